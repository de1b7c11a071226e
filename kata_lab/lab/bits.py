"""One instruction word, bit by bit, drawn from its row of the instruction table.

The boxes stand as the RISC-V ISA manual (volume I, 2.2) draws them: the most significant bit on the left.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kata_lab.lab.picture import ORANGE, SKY, Picture, drawing

if TYPE_CHECKING:
    from vmm.engine.rv64.instructions import Instruction

_MARGIN: Final = 10
_BIT: Final = {4: 24, 2: 44}
_FIXED, _NAMED, _NUMBER = "says which instruction it is", "register or option", "part of the immediate"
_FILLS: Final = {_FIXED: "white", _NAMED: SKY, _NUMBER: ORANGE}


@dataclass(frozen=True, slots=True)
class Run:
    """A run of bits of a word from ``high`` down to ``low``: its name, kind and value."""

    high: int
    low: int
    name: str
    kind: str
    value: int

    @property
    def width(self) -> int:
        """Bits."""
        return self.high - self.low + 1


def draw_instruction(word: int, pc: int = 0) -> Picture:
    """The bits of the instruction at the low end of ``word``, with what each run of them means."""
    from vmm.engine.rv64.disassembler import disassemble
    from vmm.engine.rv64.instructions import decode

    found = decode(word)
    if found is None:
        text = f"The word {word & 0xFFFFFFFF:#010x} is no instruction of this hart: to execute it is an exception."
        return drawing(f"<text x='{_MARGIN}' y='24'>{html.escape(text)}</text>", 700, 40, text)
    row, fields = found
    word &= (1 << 8 * row.length) - 1
    runs = runs_of(row, word)
    title = f"{disassemble(word, pc)}   =   {word:#0{2 + 2 * row.length}x}"
    details = [f"{name} = {_meaning(name, value)}" for name, value in fields.items()]
    words = "; ".join(f"bits {run.high} to {run.low}: {run.value:0{run.width}b}, {run.name}" for run in runs)
    alternative = f"{title.replace('   ', ' ')}. {words}. So {', '.join(details)}. Meaning: {row.semantics}."
    body = [_text(_MARGIN, 22, title, "font-weight='bold' font-family='monospace' font-size='14'")]
    body += [_box(run, row.length) for run in runs]
    body.append(_text(_MARGIN, 142, "   ".join(details), "font-family='monospace'"))
    body.append(_text(_MARGIN, 162, f"meaning: {row.semantics}", "font-family='monospace'"))
    body += [_legend(number, kind) for number, kind in enumerate(_FILLS)]
    return drawing("".join(body), 2 * _MARGIN + 8 * row.length * _BIT[row.length], 200, alternative)


def runs_of(row: Instruction, word: int) -> list[Run]:
    """The runs of bits of a word of ``row``, most significant first."""
    runs = [(field.low, field.width, field.name, _NAMED) for field in row.bits.fields]
    runs += [
        (move.source, move.width, f"imm[{_range(move.target + move.width - 1, move.target)}]", _NUMBER)
        for move in row.bits.moves
    ]
    merged: dict[tuple[int, int], tuple[str, str]] = {}
    for low, width, name, kind in runs:
        before = merged.get((low, width))
        merged[low, width] = (f"{before[0]}/{name}" if before else name, kind)
    at = 8 * row.length
    found: list[Run] = []
    for (low, width), (name, kind) in sorted(merged.items(), reverse=True):
        if low + width < at:
            found.append(_run(word, at - 1, low + width, "fixed", _FIXED))
        found.append(_run(word, low + width - 1, low, name, kind))
        at = low
    if at:
        found.append(_run(word, at - 1, 0, "opcode" if at == 7 else "fixed", _FIXED))
    return found


def _run(word: int, high: int, low: int, name: str, kind: str) -> Run:
    return Run(high, low, name, kind, word >> low & (1 << high - low + 1) - 1)


def _range(high: int, low: int) -> str:
    return f"{high}" if high == low else f"{high}:{low}"


def _meaning(name: str, value: int) -> str:
    from vmm.engine.rv64.registers import CSR_NAMES, F_NAMES, X_NAMES

    if name in ("rd", "rs1", "rs2", "rs3"):
        return X_NAMES[value]
    if name in ("fd", "fs1", "fs2", "fs3"):
        return F_NAMES[value]
    if name == "csr":
        return CSR_NAMES.get(value, f"{value:#x}")
    return f"{value} ({value:#x})" if abs(value) > 9 else str(value)


def _box(run: Run, length: int) -> str:
    bit = _BIT[length]
    x, width = _MARGIN + (8 * length - 1 - run.high) * bit, run.width * bit
    middle = x + width / 2
    edges = _text(x + 3, 44, str(run.high), "font-size='9'")
    if run.width > 1:
        edges += _text(x + width - 3, 44, str(run.low), "font-size='9' text-anchor='end'")
    centred = "text-anchor='middle'"
    # A name that is wider than its box is written upright.
    upright = len(run.name) * 7 > width
    name = (
        f"<text transform='translate({middle + 4},83) rotate(-90)' text-anchor='end' font-size='10'>"
        f"{html.escape(run.name)}</text>"
        if upright
        else _text(middle, 96, run.name, centred)
    )
    return (
        f"<rect x='{x}' y='50' width='{width}' height='28' fill='{_FILLS[run.kind]}' stroke='black'/>"
        + edges
        + _text(middle, 69, f"{run.value:0{run.width}b}", f"{centred} font-family='monospace' font-size='13'")
        + name
    )


def _legend(number: int, kind: str) -> str:
    x = _MARGIN + 210 * number
    return f"<rect x='{x}' y='176' width='12' height='12' fill='{_FILLS[kind]}' stroke='black'/>" + _text(
        x + 18, 187, kind, "font-size='11'"
    )


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f"<text x='{x}' y='{y}' xml:space='preserve' {attributes}>{html.escape(text)}</text>"
