"""A small assembler: from assembly text to the bytes of a program, by the rows of the instruction table.

It is the disassembler's inverse, and writes the programs of notebooks and tests. The syntax is that of the RISC-V
Assembly Programmer's Manual (riscv-non-isa, 1.0), one statement a line::

    loop:   addi  t0, t0, -1        # labels end in a colon; comments start with # or //
            bnez  t0, loop          # a branch goes to a label or to an absolute address
            .equ  UART, 0x10000000  # names a number; it may be used from the next line on

Registers go by their ABI names or as x0..x31 and f0..f31; CSRs by name or number. Numbers are decimal, 0x…, 0b… or 'c',
and may be sums of numbers and names. Directives: ``.equ .align .byte .half .2byte .word .4byte .dword .ascii .asciz``
(``.align 3`` means a multiple of 2³ bytes).

Pseudo-instructions, beside ``li rd, number`` (1 to 8 instructions) and ``la rd, label`` (auipc and addi), are those of
:data:`PSEUDO_INSTRUCTIONS`. Every one of them stands for full-length instructions: compressed ones are written as such
(``c.li``), so that a program has the length it shows. ``call`` and ``j`` reach ±1 MiB. Left out: sections, relocations,
numeric local labels, ``%hi`` and ``%lo``, macros.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

from vmm.engine.rv64.disassembler import ROUNDING_MODES
from vmm.engine.rv64.instructions import BY_NAME, Instruction, decode
from vmm.engine.rv64.registers import CSR_NUMBERS, F_NAMES, X_NAMES
from vmm.errors import VmmError

DEFAULT_BASE: Final = 0x8000_0000

#: name → (operands, the instruction it stands for), as the Assembly Programmer's Manual lists them.
PSEUDO_INSTRUCTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "nop": ("", "addi zero, zero, 0"),
    "mv": ("rd, rs", "addi rd, rs, 0"),
    "not": ("rd, rs", "xori rd, rs, -1"),
    "neg": ("rd, rs", "sub rd, zero, rs"),
    "seqz": ("rd, rs", "sltiu rd, rs, 1"),
    "snez": ("rd, rs", "sltu rd, zero, rs"),
    "j": ("target", "jal zero, target"),
    "call": ("target", "jal ra, target"),
    "jr": ("rs", "jalr zero, 0(rs)"),
    "ret": ("", "jalr zero, 0(ra)"),
    "beqz": ("rs, target", "beq rs, zero, target"),
    "bnez": ("rs, target", "bne rs, zero, target"),
    "bltz": ("rs, target", "blt rs, zero, target"),
    "bgez": ("rs, target", "bge rs, zero, target"),
    "bgt": ("rs, rt, target", "blt rt, rs, target"),
    "ble": ("rs, rt, target", "bge rt, rs, target"),
    "bgtu": ("rs, rt, target", "bltu rt, rs, target"),
    "bleu": ("rs, rt, target", "bgeu rt, rs, target"),
    "csrr": ("rd, csr", "csrrs rd, csr, zero"),
    "csrw": ("csr, rs", "csrrw zero, csr, rs"),
    "rdtime": ("rd", "csrrs rd, time, zero"),
    "rdinstret": ("rd", "csrrs rd, instret, zero"),
}

_X_NUMBERS: Final = {name: number for number, name in enumerate(X_NAMES)} | {f"x{n}": n for n in range(32)} | {"fp": 8}
_F_NUMBERS: Final = {name: number for number, name in enumerate(F_NAMES)} | {f"f{n}": n for n in range(32)}
_DATA_BYTES: Final = {".byte": 1, ".half": 2, ".2byte": 2, ".word": 4, ".4byte": 4, ".dword": 8}
_OTHER_DIRECTIVES: Final = (".equ", ".align", ".ascii", ".asciz")
_ORDERING: Final = re.compile(r"\.(aqrl|aq|rl)$")
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}
_STRING: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')
_LABEL: Final = re.compile(r"\s*([A-Za-z_.$][\w.$]*)\s*:")
_SYMBOL: Final = re.compile(r"[A-Za-z_.$][\w.$]*$")
_TERM: Final = re.compile(r"\s*([+-]?)\s*('(?:[^'\\]|\\.)'|[\w.$]+)\s*")
_COMMENT: Final = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)')|(?:#|//).*""")


class AssemblyError(VmmError):
    """A statement that cannot be assembled; ``line`` counts from 1."""

    def __init__(self, line: int, statement: str, problem: str) -> None:
        super().__init__(f"line {line}, `{statement}`: {problem}")
        self.line = line
        self.statement = statement


class _Problem(Exception):
    """What is wrong with a statement, before it is known which one that is."""


@dataclass(frozen=True, slots=True)
class _Statement:
    """One machine instruction or run of data, placed: ``size`` bytes at ``address``."""

    line: int
    source: str
    address: int
    size: int
    encode: Callable[[Mapping[str, int], int], bytes]


def assemble(text: str, base: int = DEFAULT_BASE) -> bytes:
    """The bytes of a program whose first one will lie at address ``base``.

    Raises:
        AssemblyError: a statement that means nothing or does not fit; it names line, statement and what would be right.
    """
    symbols: dict[str, int] = {}
    statements: list[_Statement] = []
    address = base
    for number, source, rest in _split_lines(text):
        try:
            while found := _LABEL.match(rest):
                _define(symbols, found[1], address)
                rest = rest[found.end() :]
            if rest := rest.strip():
                for size, encode in _place(rest, symbols, address):
                    statements.append(_Statement(number, source, address, size, encode))
                    address += size
        except _Problem as problem:
            raise AssemblyError(number, source, str(problem)) from None
    program = bytearray()
    for statement in statements:
        try:
            program += statement.encode(symbols, statement.address)
        except _Problem as problem:
            raise AssemblyError(statement.line, statement.source, str(problem)) from None
    return bytes(program)


def _split_lines(text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        code = _COMMENT.sub(lambda found: found[1] or "", line)
        if code.strip():
            yield number, line.strip(), code


def _define(symbols: dict[str, int], name: str, value: int) -> None:
    if name in symbols:
        raise _Problem(f"the name {name} is defined twice; give one of them another name")
    if name in _X_NUMBERS or name in _F_NUMBERS:
        raise _Problem(f"{name} is a register; give the label another name")
    symbols[name] = value


_Placed = tuple[int, Callable[[Mapping[str, int], int], bytes]]


def _place(text: str, symbols: dict[str, int], address: int) -> Iterator[_Placed]:
    """The parts of one statement with their sizes; values are looked up when all labels are known."""
    name, _, operands = text.partition(" ") if " " in text else text.partition("\t")
    name, operands = name.strip().lower(), operands.strip()
    if name.startswith("."):
        yield from _place_directive(name, operands, symbols, address)
        return
    if address % 2:
        raise _Problem(f"an instruction cannot start at the odd address {address:#x}; put .align 1 before it")
    for instruction in _expand(name, operands, symbols):
        row, fields = _match(*instruction)
        yield row.length, partial(_encode, row, fields)


def _place_directive(name: str, operands: str, symbols: dict[str, int], address: int) -> Iterator[_Placed]:
    if width := _DATA_BYTES.get(name):
        for value in _listed(operands):
            yield width, partial(_data, value, width, name)
    elif name == ".equ":
        symbol, _, value = operands.partition(",")
        if not _SYMBOL.match(symbol.strip()):
            raise _Problem(f".equ wants a name and a number, such as .equ UART, 0x10000000, not {operands!r}")
        _define(symbols, symbol.strip(), _value(value, symbols))
    elif name == ".align":
        power = _value(operands, symbols)
        if not 0 <= power <= 12:
            raise _Problem(f".align {power} must be 0 to 12, for multiples of 1 to 4096 bytes")
        gap = -address % (1 << power)
        yield gap, lambda known, _: bytes(gap)
    elif name in (".ascii", ".asciz"):
        found = _STRING.fullmatch(operands)
        if found is None:
            raise _Problem(f"{name} wants a text in double quotes, not {operands!r}")
        data = _unescape(found[1]).encode() + (b"\0" if name == ".asciz" else b"")
        yield len(data), lambda known, _: data
    else:
        raise _Problem(_unknown("directive", name, (*_DATA_BYTES, *_OTHER_DIRECTIVES)))


def _expand(name: str, operands: str, symbols: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The instructions that ``name`` stands for, as (name, operands)."""
    if name == "li":
        rd, value = _exactly(name, operands, "rd, number")
        yield from _load_immediate(rd, _value(value, symbols, "li takes a number; use la for a label"))
    elif name == "la":
        rd, target = _exactly(name, operands, "rd, label")
        yield "la.high", f"{rd}, {target}"
        yield "la.low", f"{rd}, {target}"
    elif name in PSEUDO_INSTRUCTIONS:
        template, meaning = PSEUDO_INSTRUCTIONS[name]
        given = dict(zip(_listed(template), _exactly(name, operands, template), strict=True))
        real, _, rest = meaning.partition(" ")
        yield real, re.sub(r"[a-z]+", lambda found: given.get(found[0], found[0]), rest)
    else:
        yield name, operands


def _load_immediate(rd: str, value: int) -> Iterator[tuple[str, str]]:
    if not -(1 << 63) <= value < 1 << 64:
        raise _Problem(f"{value} does not fit a register; it must be from -2**63 to 2**64 - 1")
    value = _signed(value, 64)
    if -2048 <= value < 2048:
        yield "addi", f"{rd}, zero, {value}"
        return
    low = _signed(value, 12)
    if -(1 << 31) <= value < 1 << 31:
        yield "lui", f"{rd}, {value - low >> 12 & 0xFFFFF}"
        if low:
            yield "addiw", f"{rd}, {rd}, {low}"
        return
    high = value - low >> 12
    shift = 12 + (high & -high).bit_length() - 1
    yield from _load_immediate(rd, _signed(value - low >> shift, 64 - shift))
    yield "slli", f"{rd}, {rd}, {shift}"
    if low:
        yield "addi", f"{rd}, {rd}, {low}"


def _match(name: str, operands: str) -> tuple[Instruction, dict[str, str]]:
    """The row of ``name`` and its operands as text."""
    if name in ("la.high", "la.low"):
        rd, target = _listed(operands)
        if name == "la.high":
            return BY_NAME["auipc"], {"rd": rd, "high part": target}
        return BY_NAME["addi"], {"rd": rd, "rs1": rd, "low part": target}
    ordering = _ORDERING.search(name)
    row = BY_NAME.get(name)
    if row is None and ordering is not None:
        row = BY_NAME.get(name[: ordering.start()])
        if row is not None and "aq" not in row.operands:
            row = None
    if row is None:
        raise _Problem(_unknown("instruction", name, (*BY_NAME, *PSEUDO_INSTRUCTIONS, "li", "la")))
    found = _pattern(row).fullmatch(operands)
    if found is None:
        wanted = row.assembly.replace("order", "pred, succ").replace(", rm", "[, rm]")
        raise _Problem(
            f"{row.name} is written `{f'{row.name} {wanted}'.strip()}`, not with the operands `{operands}`"
            if operands
            else f"{row.name} is written `{row.name} {wanted}`, and here its operands are missing"
        )
    fields = {key: text.strip() for key, text in found.groupdict().items() if text is not None}
    if ordering is not None and "aq" in row.operands:
        fields |= {"aq": str(int("aq" in ordering[1])), "rl": str(int("rl" in ordering[1]))}
    return row, fields


@cache
def _pattern(row: Instruction) -> re.Pattern[str]:
    """A regular expression made of the row's assembly: ``rd, imm(rs1)`` matches ``a0, 8(sp)``."""
    template = row.assembly.replace("order", "pred, succ")
    parts = []
    for token in re.findall(r", rm|[a-z]+\d?|[^a-z]", template):
        if token == ", rm":
            parts.append(r"(?:\s*,\s*(?P<rm>[^,()]+))?")
        elif token[0].isalpha():
            parts.append(rf"(?P<{token}>{_operand_pattern(token)})")
        elif token != " ":
            parts.append(rf"\s*{re.escape(token)}\s*")
    return re.compile("".join(parts))


def _operand_pattern(name: str) -> str:
    return r"(?:'.*?'|[^,()])*?" if name == "imm" else r"[^,()]+?"


def _encode(row: Instruction, texts: Mapping[str, str], symbols: Mapping[str, int], pc: int) -> bytes:
    implied = dict(row.bits.implied)
    values: dict[str, int] = {}
    for name, text in texts.items():
        operand, value = _operand(row, name, text, symbols, pc)
        if operand in implied:
            if implied[operand] != value:
                raise _Problem(f"{row.name} always uses {X_NAMES[implied[operand]]} there, not {text}")
        else:
            values[operand] = value
    if "rm" in row.operands:
        values.setdefault("rm", ROUNDING_MODES.index("dyn"))
    by_position = {field.low: values[field.name] for field in row.bits.fields if field.name in values}
    for field in row.bits.fields:
        # One field that is both destination and source is written once.
        if field.low in by_position:
            values.setdefault(field.name, by_position[field.low])
        if field.compressed and not 8 <= values[field.name] < 16:
            names = F_NAMES if field.name.startswith("f") else X_NAMES
            raise _Problem(f"{row.name} reaches only {', '.join(names[8:16])}, not {names[values[field.name]]}")
    for name, excluded in row.reserved:
        if values.get(name) == excluded:
            shown = X_NAMES[excluded] if name != "imm" else excluded
            raise _Problem(f"{row.name} cannot have {name} = {shown}, which stands for another instruction or none")
    word = row.encode(**values)
    found = decode(word)
    if found is None or found[0] is not row:
        other = found[0].name if found else "no instruction"
        raise _Problem(f"these operands of {row.name} would be read as {other}; write it in another way")
    return word.to_bytes(row.length, "little")


def _operand(row: Instruction, name: str, text: str, symbols: Mapping[str, int], pc: int) -> tuple[str, int]:
    """Which field an operand goes to, and its value there."""
    match name:
        case "rd" | "rs1" | "rs2" | "rs3":
            return name, _register(text, _X_NUMBERS, "x0 to x31 or an ABI name such as a0, t1, sp")
        case "fd" | "fs1" | "fs2" | "fs3":
            return name, _register(text, _F_NUMBERS, "f0 to f31 or an ABI name such as fa0, ft1")
        case "csr":
            return name, CSR_NUMBERS[text] if text in CSR_NUMBERS else _within(_csr(text), 0, 4095, "CSR number")
        case "rm":
            if text not in ROUNDING_MODES:
                raise _Problem(f"the rounding mode {text!r} is unknown; it is one of rne, rtz, rdn, rup, rmm, dyn")
            return name, ROUNDING_MODES.index(text)
        case "pred" | "succ":
            if text != "0" and (not set(text) <= set("iorw") or len(set(text)) != len(text)):
                raise _Problem(f"{text!r} is no set of accesses; it is written with letters of iorw, or 0")
            return name, sum(bit for letter, bit in zip("iorw", (8, 4, 2, 1), strict=True) if letter in text)
        case "zimm":
            return name, _within(_value(text, symbols), 0, 31, f"the operand of {row.name}")
        case "aq" | "rl":
            return name, int(text)
        case "upper":
            return "imm", _immediate(
                row, _signed(_within(_value(text, symbols), 0, 0xFFFFF, "an upper part"), 20) << 12
            )
        case "target":
            return "imm", _immediate(row, _signed(_value(text, symbols) - pc, 64), "the branch distance")
        case "high part":
            return "imm", _immediate(row, _signed(_value(text, symbols) - pc + 0x800, 64) >> 12 << 12)
        case "low part":
            # The addi of la follows its auipc, to whose address the distance is counted.
            return "imm", _signed(_value(text, symbols) - (pc - 4), 12)
        case _:
            return "imm", _immediate(row, _value(text, symbols) if text else 0)


def _immediate(row: Instruction, value: int, what: str = "the immediate") -> int:
    bits, step = row.bits.immediate_bits, 1 << min(move.target for move in row.bits.moves)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if row.bits.signed else (0, 1 << bits)
    if not low <= value < high or value % step:
        multiple = f" and a multiple of {step}" if step > 1 else ""
        raise _Problem(f"{what} {value} of {row.name} must be from {low} to {high - step}{multiple}")
    return value


def _register(text: str, numbers: Mapping[str, int], known: str) -> int:
    if text not in numbers:
        raise _Problem(f"{text!r} is no register here; it must be {known}")
    return numbers[text]


def _csr(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise _Problem(_unknown("CSR", text, tuple(CSR_NUMBERS))) from None


def _value(text: str, symbols: Mapping[str, int], hint: str = "define it as a label or with .equ") -> int:
    """A sum of numbers and names."""
    total, position = 0, 0
    while found := _TERM.match(text, position):
        if position and not found[1]:
            break
        total += (-1 if found[1] == "-" else 1) * _term(found[2], symbols, hint)
        position = found.end()
    if position == 0 or position != len(text):
        raise _Problem(f"{text.strip()!r} is no number; write one such as 10, 0x1f or 'A', or a name")
    return total


def _term(text: str, symbols: Mapping[str, int], hint: str) -> int:
    if text.startswith("'"):
        return ord(_unescape(text[1:-1]))
    if text in symbols:
        return symbols[text]
    try:
        return int(text, 0)
    except ValueError:
        near = difflib.get_close_matches(text, symbols, n=1)
        raise _Problem(f"{text!r} is not known: {f'did you mean {near[0]}?' if near else hint}") from None


def _data(text: str, width: int, name: str, symbols: Mapping[str, int], pc: int) -> bytes:
    bits, value = 8 * width, _value(text, symbols)
    _within(value, -(1 << bits - 1), (1 << bits) - 1, f"the value of {name}")
    return (value & (1 << bits) - 1).to_bytes(width, "little")


def _within(value: int, low: int, high: int, what: str) -> int:
    if not low <= value <= high:
        raise _Problem(f"{what} must be from {low} to {high}, not {value}")
    return value


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def _listed(operands: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?=(?:[^']*'[^']*')*[^']*$)", operands)] if operands else []


def _exactly(name: str, operands: str, template: str) -> list[str]:
    given = _listed(operands)
    if len(given) != len(_listed(template)) or not all(given):
        raise _Problem(f"{name} is written `{f'{name} {template}'.strip()}`, not with the operands `{operands}`")
    return given


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), text)


def _unknown(kind: str, name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no {kind} {name!r}" + (f"; did you mean {near[0]}?" if near else "")
