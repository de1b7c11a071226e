"""The compiled decoder: from instruction words to the records that the executor runs on.

The rows of the instruction table become one constant array. Words are first sorted by opcode and funct3; the few
rows left are tried from the most specific on.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from vmm.engine.rv64.instructions import INSTRUCTIONS, Instruction
from vmm.engine.rv64.layout import ILLEGAL, SINK
from vmm.engine.rv64.native import I64, define, load_i64, native

MOVES = 9
# One row: mask, match, operation, scale, sign bit + 1, three registers, two reserved values, moves
ROW_WORDS = 10 + MOVES
BUCKETS = 256 + 32

# How a register operand is found: position, width, and what to add; or a constant (width 0)
_POSITION, _WIDTH, _BASE, _SINK_FLAG = 1, 1 << 8, 1 << 16, 1 << 24


def _register(row: Instruction, names: tuple[str, ...]) -> int:
    """Packed description of the operand that goes by one of ``names``."""
    for field in row.bits.fields:
        if field.name in names:
            base = 8 if field.compressed else 0
            sink = _SINK_FLAG if field.name == "rd" else 0
            return field.low * _POSITION + field.width * _WIDTH + base * _BASE + sink
    for name, value in row.bits.implied:
        if name in names:
            return value * _BASE
    return SINK * _BASE if "rd" in names else 0


def _moves(row: Instruction) -> list[int]:
    """Source, target and width of every run of bits that goes into a record's immediate."""
    runs = [(move.source, move.target, move.width) for move in row.bits.moves]
    for field in row.bits.fields:
        if field.name in ("rm", "csr"):
            runs.append((field.low, 0, field.width))
        elif field.name in ("rs3", "fs3"):
            runs.append((field.low, 8, field.width))
    if len(runs) > MOVES:
        raise ValueError(f"{row.name} has an immediate in {len(runs)} runs; the decoder takes {MOVES}")
    packed = [source | target << 8 | width << 16 for source, target, width in runs]
    return packed + [0] * (MOVES - len(packed))


def _reserved(row: Instruction) -> list[int]:
    """Operand values that are another instruction or none: immediate 1, rd 2, rs1 3, rs2 4, then the value; 0 for
    none."""
    kinds = {"imm": 1, "rd": 2, "rs1": 3, "rs2": 4}
    packed = [kinds[name] | value << 8 for name, value in row.reserved]
    return packed + [0] * (2 - len(packed))


def _describe(row: Instruction) -> list[int]:
    sign = row.bits.immediate_bits if row.bits.signed else 0
    scale = 2 if "pc + imm" in row.semantics and "goto" in row.semantics else 0
    return [
        row.mask,
        row.match,
        row.operation,
        scale,
        sign,
        _register(row, ("rd", "fd")),
        _register(row, ("rs1", "fs1", "zimm")),
        _register(row, ("rs2", "fs2")),
        *_reserved(row),
        *_moves(row),
    ]


def _tables() -> list[int]:
    """Bucket starts (BUCKETS + 1 of them), then rows, bucket by bucket.

    A word's bucket is opcode and funct3 of long words, quadrant and funct3 of short ones.
    """
    starts: list[int] = []
    rows: list[list[int]] = []
    for bucket in range(BUCKETS):
        starts.append(len(rows))
        found = []
        for row in INSTRUCTIONS:
            if row.length == 4 and bucket < 256:
                sample = (bucket >> 3) << 2 | 3 | (bucket & 7) << 12
                care = 0x707F
            elif row.length == 2 and bucket >= 256:
                sample = (bucket - 256 >> 3) | (bucket & 7) << 13
                care = 0xE003
            else:
                continue
            if (sample ^ row.match) & row.mask & care == 0:
                found.append(row)
        found.sort(key=lambda row: -row.mask.bit_count())
        rows += [_describe(row) for row in found]
    starts.append(len(rows))
    return starts + [word for row in rows for word in row]


def _emit_tables(builder: ir.IRBuilder) -> ir.Value:
    table = builder.module.globals.get("rv64_decode_tables")
    if table is None:
        words = _tables()
        kind = ir.ArrayType(I64, len(words))
        table = ir.GlobalVariable(builder.module, kind, "rv64_decode_tables")
        table.linkage = "internal"
        table.global_constant = True
        table.initializer = ir.Constant(kind, words)
    return builder.ptrtoint(table, I64)


decode_tables = define(
    "decode_tables", _emit_tables, types.int64, (), "Host address of the decoder's tables, a constant of the module."
)


@native
def register_of(word: int, packed: int) -> int:
    """A register operand of an instruction word; rd=x0 becomes the sink."""
    width = packed >> 8 & 255
    value = ((word >> (packed & 255)) & ((1 << width) - 1)) + (packed >> 16 & 255)
    if packed >> 24 and value == 0:
        return SINK
    return value


@native
def is_reserved(packed: int, immediate: int, rd: int, rs1: int, rs2: int) -> int:
    """Whether an operand has the value that a row excludes."""
    kind = packed & 255
    value = packed >> 8
    if kind == 1:
        return 1 if immediate == value else 0
    if kind == 2:
        return 1 if rd == value or (value == 0 and rd == SINK) else 0
    if kind == 3:
        return 1 if rs1 == value else 0
    if kind == 4:
        return 1 if rs2 == value else 0
    return 0


@native
def decode_word(word: int) -> int:
    """The record of an instruction word (2 or 4 bytes, zero-extended)."""
    tables = decode_tables()
    bucket = (word >> 2 & 31) << 3 | word >> 12 & 7
    if word & 3 != 3:
        bucket = 256 + ((word & 3) << 3 | word >> 13 & 7)
    number = load_i64(tables + (bucket << 3))
    end = load_i64(tables + (bucket << 3) + 8)
    while number < end:
        row = tables + ((BUCKETS + 1 + number * ROW_WORDS) << 3)
        number += 1
        if word & load_i64(row) != load_i64(row + 8):
            continue
        immediate = 0
        for index in range(MOVES):
            move = load_i64(row + 80 + (index << 3))
            if move == 0:
                break
            width = move >> 16
            immediate |= ((word >> (move & 255)) & ((1 << width) - 1)) << (move >> 8 & 255)
        sign = load_i64(row + 32)
        if sign and immediate >> (sign - 1) & 1:
            immediate -= 1 << sign
        rd = register_of(word, load_i64(row + 40))
        rs1 = register_of(word, load_i64(row + 48))
        rs2 = register_of(word, load_i64(row + 56))
        if is_reserved(load_i64(row + 64), immediate, rd, rs1, rs2):
            continue
        if is_reserved(load_i64(row + 72), immediate, rd, rs1, rs2):
            continue
        immediate <<= load_i64(row + 24)
        return load_i64(row + 16) | rd << 8 | rs1 << 16 | rs2 << 24 | immediate << 32
    return ILLEGAL


#: Functions that are called, never made part of their callers.
CALLED = [decode_word]
