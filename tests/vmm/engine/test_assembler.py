"""The assembler, against the disassembler for every row, and what it says about mistakes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmm.engine.rv64.assembler import PSEUDO_INSTRUCTIONS, AssemblyError, assemble
from vmm.engine.rv64.disassembler import disassemble
from vmm.engine.rv64.instructions import INSTRUCTIONS, Instruction, decode, instruction_length

BASE = 0x8000_0000

#: Fields that a word has and its assembly does not show: the manual has them zero.
PAUSE = 0x0100000F
SILENT = {"fence": ("fm", "rs1", "rd"), "fence.i": ("imm", "rs1", "rd")}


def listing(program: bytes, base: int = BASE) -> list[str]:
    lines, at = [], 0
    while at < len(program):
        word = int.from_bytes(program[at : at + 4], "little")
        lines.append(disassemble(word, base + at))
        at += instruction_length(word)
    return lines


def canonical(row: Instruction, word: int) -> int:
    fields = row.fields(word)
    implied = dict(row.bits.implied)
    shown = {
        name: value for name, value in fields.items() if name not in SILENT.get(row.name, ()) and name not in implied
    }
    return row.encode(**shown)


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=lambda row: row.name)
@settings(max_examples=12, deadline=None)
@given(free=st.integers(0, (1 << 32) - 1))
@example(free=PAUSE | 1 << 7)
def test_every_row_survives_disassembly_and_assembly(row: Instruction, free: int) -> None:
    word = (free & ~row.mask | row.match) & (1 << 8 * row.length) - 1
    found = decode(word)
    if found is None or found[0] is not row:
        return
    text = disassemble(word, BASE)

    # A fence after writes that orders nothing is another instruction where it names no registers.
    if row.name == "fence" and canonical(row, word) == PAUSE:
        with pytest.raises(AssemblyError, match="would be read as pause"):
            assemble(text, BASE)
        return
    program = assemble(text, BASE)

    assert program == canonical(row, word).to_bytes(row.length, "little")
    assert listing(program) == [text]


@given(st.integers(-(1 << 63), (1 << 64) - 1))
def test_li_builds_any_constant(value: int) -> None:
    result = 0
    for line in listing(assemble(f"li t0, {value}")):
        name, *operands = line.replace(",", "").split()
        number = int(operands[-1], 0)
        match name:
            case "addi":
                result = (0 if operands[1] == "zero" else result) + number
            case "lui":
                result = (number ^ 0x80000) - 0x80000 << 12
            case "addiw":
                result = (result + number + (1 << 31)) % (1 << 32) - (1 << 31)
            case "slli":
                result <<= number
            case _:
                raise AssertionError(f"li used {line}")

    assert (result - value) % (1 << 64) == 0


def test_labels_reach_backwards_and_forwards() -> None:
    program = assemble("start: beqz a0, done\n addi a0, a0, -1\n j start\ndone: ret")

    assert listing(program) == [
        "beq a0, zero, 0x8000000c",
        "addi a0, a0, -1",
        "jal zero, 0x80000000",
        "jalr zero, 0(ra)",
    ]


def test_la_points_at_data_behind_the_program() -> None:
    program = assemble('la a0, text\nla a1, start\nebreak\nstart: nop\ntext: .asciz "a\\n#"')

    auipc, addi, back, back_low = (int.from_bytes(program[at : at + 4], "little") for at in (0, 4, 8, 12))
    assert disassemble(auipc, BASE) == "auipc a0, 0x0"
    assert disassemble(addi, BASE + 4) == "addi a0, a0, 24"
    assert disassemble(back, BASE + 8) == "auipc a1, 0x0"
    assert disassemble(back_low, BASE + 12) == "addi a1, a1, 12"
    assert program[24:] == b"a\n#\0"


def test_numeric_registers_names_sums_and_comments() -> None:
    text = "  .equ UART, 0x10000000 // a device\n.equ LSR, UART + 5\nli x5, LSR - UART # 5\nlb x6, 'A'-60(x5)\n"

    assert listing(assemble(text)) == ["addi t0, zero, 5", "lb t1, 5(t0)"]


def test_data_directives() -> None:
    program = assemble(".byte 1, 'b', -1\n.align 2\nhere: .word here, 0xffffffff\n.dword -2\n.half 0x1234")

    assert program == b"\x01b\xff\0" + b"\x04\0\0\x80" + b"\xff" * 4 + b"\xfe" + b"\xff" * 7 + b"\x34\x12"


def test_memory_order_and_rounding_mode_are_written_as_they_are_shown() -> None:
    text = "amoadd.w.aqrl a0, a1, (a2)\nlr.d.aq a0, (a1)\nfadd.d fa0, fa1, fa2\nfadd.s fa0, fa1, fa2, rtz\nfence rw, w"

    assert listing(assemble(text)) == [
        "amoadd.w.aqrl a0, a1, (a2)",
        "lr.d.aq a0, (a1)",
        "fadd.d fa0, fa1, fa2, dyn",
        "fadd.s fa0, fa1, fa2, rtz",
        "fence rw, w",
    ]


def test_pause_is_a_hint_among_the_fences() -> None:
    program = assemble("pause\nfence w, w")

    assert program[:4] == PAUSE.to_bytes(4, "little")
    assert listing(program) == ["pause", "fence w, w"]


@pytest.mark.parametrize("name", PSEUDO_INSTRUCTIONS)
def test_every_pseudo_instruction_stands_for_one_instruction(name: str) -> None:
    samples = {"rd": "a0", "rs": "a1", "rt": "a2", "csr": "sepc", "target": str(BASE)}
    operands, meaning = PSEUDO_INSTRUCTIONS[name]
    written = ", ".join(samples[each] for each in operands.split(", ") if each)

    assert listing(assemble(f"{name} {written}"))[0].split()[0] == meaning.split()[0]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("nop\naddii a0, a0, 1", 2, "there is no instruction 'addii'; did you mean addi?"),
        ("addi a0, a0, 5000", 1, "the immediate 5000 of addi must be from -2048 to 2047"),
        ("addi a0, a9, 1", 1, "'a9' is no register here; it must be x0 to x31"),
        ("addi a0, a0", 1, "addi is written `addi rd, rs1, imm`"),
        ("ld a0, a1", 1, "ld is written `ld rd, imm(rs1)`"),
        ("beq a0, a1, lop\nloop: nop", 1, "'lop' is not known: did you mean loop?"),
        ("j far\n.equ far, 0", 1, "the branch distance -2147483648 of jal must be from -1048576 to 1048574"),
        ("beq a0, a1, here + 1\nhere: nop", 1, "and a multiple of 2"),
        ("a: nop\na: nop", 2, "the name a is defined twice"),
        ("t0: nop", 1, "t0 is a register"),
        ("li a0, there\nthere: nop", 1, "li takes a number; use la for a label"),
        ("li a0, 1 << 70", 1, "is no number"),
        ("c.sub t0, s0", 1, "c.sub reaches only s0, s1, a0, a1, a2, a3, a4, a5, not t0"),
        ("c.addi4spn a0, t0, 4", 1, "c.addi4spn always uses sp there, not t0"),
        ("c.lui a0, 0", 1, "c.lui cannot have imm = 0"),
        ("slli a0, a0, 64", 1, "must be from 0 to 63"),
        ("csrr a0, sstaus", 1, "there is no CSR 'sstaus'; did you mean sstatus?"),
        ("csrrwi a0, sie, 32", 1, "must be from 0 to 31, not 32"),
        ("fence q, w", 1, "written with letters of iorw"),
        ("fadd.s fa0, fa1, fa2, up", 1, "the rounding mode 'up' is unknown"),
        (".byte 300", 1, "the value of .byte must be from -128 to 255, not 300"),
        (".wrod 1", 1, "there is no directive '.wrod'; did you mean .word?"),
        (".byte 1\nnop", 2, "cannot start at the odd address 0x80000001"),
        ("add.aq a0, a0, a0", 1, "there is no instruction 'add.aq'"),
        (".asciz hello", 1, "wants a text in double quotes"),
        ("mv a0", 1, "mv is written `mv rd, rs`"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, line: int, message: str) -> None:
    with pytest.raises(AssemblyError) as caught:
        assemble(text)

    assert caught.value.line == line
    assert str(caught.value).startswith(f"line {line}, `")
    assert message in str(caught.value)
