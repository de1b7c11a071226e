"""How one row of the instruction table describes bits.

An encoding is written from the most significant bit down, as the ISA manual draws it: runs of ``0`` and ``1``, and
named fields. Names and what they stand for::

    rd rs1 rs2 rs3      5-bit x register        fd fs1 fs2 fs3      5-bit f register
    rd' rs1' rs2' …     3-bit register, x8..x15 or f8..f15 (compressed instructions)
    rd/rs1              one 5-bit field that is both (rd'/rs1' with 3 bits)
    imm[11:5|4]         these bits of a sign-extended immediate
    uimm[7:6]           the same, zero-extended
    csr zimm rm aq rl fm pred succ   as in the manual

After a ``;`` come operands that the encoding implies (``rs1=2``). A row may name operand values that are reserved
(``imm=0``): such a word is not this instruction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_WIDTHS = {"rm": 3, "csr": 12, "zimm": 5, "aq": 1, "rl": 1, "fm": 4, "pred": 4, "succ": 4}
_REGISTER = re.compile(r"(rd|rs1|rs2|rs3|fd|fs1|fs2|fs3)('?)$")
_IMMEDIATE = re.compile(r"(u?imm)\[([\d:|]+)\]$")


@dataclass(frozen=True, slots=True)
class Move:
    """``width`` bits from ``source`` of the instruction word to ``target`` of the immediate."""

    source: int
    target: int
    width: int


@dataclass(frozen=True, slots=True)
class Field:
    """A named run of bits. ``compressed``: three bits that name registers 8..15."""

    name: str
    low: int
    width: int
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class Encoding:
    """A parsed encoding: ``word & mask == match`` recognises it."""

    mask: int
    match: int
    length: int
    fields: tuple[Field, ...]
    moves: tuple[Move, ...]
    signed: bool
    implied: tuple[tuple[str, int], ...]

    @property
    def immediate_bits(self) -> int:
        """Bits of the immediate, counted from bit 0."""
        return max((move.target + move.width for move in self.moves), default=0)

    def immediate(self, word: int) -> int:
        """The immediate that ``word`` holds, sign-extended where the encoding says so."""
        value = 0
        for move in self.moves:
            value |= (word >> move.source & (1 << move.width) - 1) << move.target
        bits = self.immediate_bits
        return value - (1 << bits) if self.signed and value >> bits - 1 & 1 else value


def _immediate_moves(ranges: str, end: int) -> tuple[list[Move], int]:
    """Moves for ``11:5|4`` whose most significant bit lies just below ``end``; and the bit where they stop."""
    moves = []
    for part in ranges.split("|"):
        high, _, low = part.partition(":")
        width = int(high) - int(low or high) + 1
        end -= width
        moves.append(Move(end, int(low or high), width))
    return moves, end


def parse(text: str) -> Encoding:
    """Read an encoding as the module describes it.

    Raises:
        ValueError: a token that means nothing, or bits that do not add up to 16 or 32.
    """
    pattern, _, rest = text.partition(";")
    tokens = pattern.split()
    length = 16 if tokens[-1] != "11" and len(tokens[-1]) == 2 else 32
    mask = match = 0
    end = length
    fields: list[Field] = []
    moves: list[Move] = []
    signed = False
    for token in tokens:
        if set(token) <= {"0", "1"}:
            end -= len(token)
            mask |= (1 << len(token)) - 1 << end
            match |= int(token, 2) << end
        elif found := _IMMEDIATE.match(token):
            signed = signed or found[1] == "imm"
            more, end = _immediate_moves(found[2], end)
            moves += more
        elif token in _WIDTHS:
            end -= _WIDTHS[token]
            fields.append(Field(token, end, _WIDTHS[token]))
        else:
            names = [_REGISTER.match(name) for name in token.split("/")]
            width = 3 if token.endswith("'") else 5
            end -= width
            for name in names:
                if name is None:
                    raise ValueError(f"encoding {text!r} has the unknown field {token!r}")
                fields.append(Field(name[1], end, width, bool(name[2])))
    if end:
        raise ValueError(f"encoding {text!r} describes {length - end} bits, not {length}")
    implied = tuple((name, int(value)) for name, _, value in (part.partition("=") for part in rest.split()))
    return Encoding(mask, match, length // 8, tuple(fields), tuple(moves), signed, implied)
