"""The instruction table: every row is found again by the decoder, and no two rows claim the same word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.engine.rv64.disassembler import disassemble
from vmm.engine.rv64.encoding import parse
from vmm.engine.rv64.instructions import BY_NAME, INSTRUCTIONS, Instruction, decode, instruction_length


@given(st.sampled_from(INSTRUCTIONS), st.integers(0, 0xFFFFFFFF))
def test_a_word_with_a_rows_fixed_bits_decodes_to_that_row_or_a_more_specific_one(row: Instruction, bits: int) -> None:
    word = row.match | bits & ~row.mask & ((1 << 8 * row.length) - 1)

    found = decode(word)

    if row.matches(word):
        assert found is not None
        assert found[0] is row or found[0].mask.bit_count() > row.mask.bit_count()
    elif found is not None:
        assert found[0] is not row


@given(st.sampled_from(INSTRUCTIONS), st.integers(0, 0xFFFFFFFF))
def test_encoding_the_decoded_operands_gives_the_word_back(row: Instruction, bits: int) -> None:
    word = row.match | bits & ~row.mask & ((1 << 8 * row.length) - 1)
    operands = {name: value for name, value in row.fields(word).items() if name in row.operands}

    assert row.encode(**operands) == word


def test_every_compressed_word_has_at_most_one_most_specific_row() -> None:
    rows = [row for row in INSTRUCTIONS if row.length == 2]

    for word in range(1 << 16):
        claims = [row.mask.bit_count() for row in rows if instruction_length(word) == 2 and row.matches(word)]
        assert len(claims) < 2 or sorted(claims)[-1] > sorted(claims)[-2], f"{word:#06x}"


@pytest.mark.parametrize(
    "word", [0x0000, 0x2001, 0x6001, 0x6101, 0x4002, 0x8002, 0x9C41, 0xFFFF, 0xFFFFFFFF, 0x00000057]
)
def test_reserved_words_are_no_instruction(word: int) -> None:
    assert decode(word) is None


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (0x00A28293, "addi t0, t0, 10"),
        (0xFE5FF06F, "jal zero, 0x7fffffe4"),
        (0x8082, "c.jr ra"),
        (0x0FF0000F, "fence iorw, iorw"),
        (0x18079073, "csrrw zero, satp, a5"),
        (0x1604B02F, "lr.d.aqrl zero, (s1)"),
        (0x02B7F553, "fadd.d fa0, fa5, fa1, dyn"),
        (0x0000, ".2byte 0x0000"),
        (0xFFFFFFFF, ".4byte 0xffffffff"),
    ],
)
def test_disassembly_follows_the_manuals_syntax(word: int, text: str) -> None:
    assert disassemble(word, 0x80000000) == text


def test_an_immediate_that_does_not_fit_is_refused_by_value() -> None:
    with pytest.raises(ValueError, match=r"addi: the immediate 2048 cannot be encoded"):
        BY_NAME["addi"].encode(rd=1, rs1=1, imm=2048)


def test_an_unknown_operand_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"addi has no operand 'rs2'; it has rs1, rd, imm"):
        BY_NAME["addi"].encode(rs2=1)


def test_a_register_beyond_31_is_refused() -> None:
    with pytest.raises(ValueError, match=r"add: rd=32 does not fit 5 bits"):
        BY_NAME["add"].encode(rd=32)


def test_an_encoding_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="describes 31 bits, not 32"):
        parse("imm[10:0] rs1 000 rd 0010011")
