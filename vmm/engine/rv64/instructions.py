"""The instructions of the hart, one row each: encoding, assembly and meaning.

Decoder, disassembler, assembler and executor all come from these rows. After: The RISC-V Instruction Set Manual,
volume I (20240411): RV64I 2.1, M 2.0, A 2.1, F 2.2, D 2.2, C 2.0, Zicsr 2.0, Zifencei 2.0, Zihintpause 2.0;
volume II: supervisor 1.12.

How a meaning is written:

- ``rd``, ``rs1``, ``fd``, ``fs1`` … are 64-bit register patterns, ``imm`` the immediate, ``pc`` and ``link`` this
  and the next instruction's address; arithmetic wraps at 64 bits and ``>>`` is arithmetic.
- ``i32[address]`` is guest memory: signed i8..i64, unsigned u8..u32.
- ``goto address`` jumps.
- ``rm`` is the rounding mode in force, ``flags`` where accrued floating-point exceptions go.
- Everything else is a function of ``native.py``, ``floating.py`` or ``system.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from vmm.engine.rv64.encoding import Encoding, parse
from vmm.engine.rv64.layout import FIRST_OPERATION


@dataclass(frozen=True)
class Instruction:
    """One row. ``operation`` is its number in decoded records; ``reserved`` lists operand values that it may not
    have."""

    operation: int
    name: str
    encoding: str
    assembly: str
    semantics: str
    reserved: tuple[tuple[str, int], ...] = ()

    @cached_property
    def bits(self) -> Encoding:
        """The parsed encoding."""
        return parse(self.encoding)

    @property
    def mask(self) -> int:
        """Bits that are the same in every word of this instruction."""
        return self.bits.mask

    @property
    def match(self) -> int:
        """What those bits are."""
        return self.bits.match

    @property
    def length(self) -> int:
        """Bytes: 2 or 4."""
        return self.bits.length

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands that a word carries."""
        names = dict.fromkeys(field.name for field in self.bits.fields)
        if self.bits.moves:
            names["imm"] = None
        return tuple(names)

    def matches(self, word: int) -> bool:
        """Whether ``word`` (its low 16 bits for a compressed row) is this instruction."""
        if self.length == 2:
            word &= 0xFFFF
        if word & self.mask != self.match:
            return False
        fields = self.fields(word)
        return all(fields.get(name) != value for name, value in self.reserved)

    def fields(self, word: int) -> dict[str, int]:
        """The operands in ``word``, implied ones included; the immediate is ``imm``."""
        values = dict(self.bits.implied)
        for field in self.bits.fields:
            value = word >> field.low & (1 << field.width) - 1
            values[field.name] = value + 8 if field.compressed else value
        if self.bits.moves:
            values["imm"] = self.bits.immediate(word)
        return values

    def encode(self, **operands: int) -> int:
        """The word for these operands; those not named are 0 (8 in a compressed register field).

        Raises:
            ValueError: an unknown operand, or a value that the field cannot hold.
        """
        for name in operands:
            if name not in self.operands:
                raise ValueError(f"{self.name} has no operand {name!r}; it has {', '.join(self.operands) or 'none'}")
        word = self.match
        for field in self.bits.fields:
            value = operands.get(field.name, 8 if field.compressed else 0) - (8 if field.compressed else 0)
            if not 0 <= value < 1 << field.width:
                raise ValueError(f"{self.name}: {field.name}={operands[field.name]} does not fit {field.width} bits")
            word = word & ~((1 << field.width) - 1 << field.low) | value << field.low
        if self.bits.moves:
            word |= self._place_immediate(operands.get("imm", 0))
        return word

    def _place_immediate(self, value: int) -> int:
        word = 0
        rest = value & (1 << self.bits.immediate_bits) - 1
        for move in self.bits.moves:
            word |= (rest >> move.target & (1 << move.width) - 1) << move.source
        if self.bits.immediate(word) != value:
            raise ValueError(f"{self.name}: the immediate {value} cannot be encoded in {self.encoding!r}")
        return word


def _rows() -> Iterator[tuple[str, str, str, str, str]]:
    """Rows as (name, encoding, assembly, semantics, reserved operand values)."""
    yield "lui", "imm[31:12] rd 0110111", "rd, upper", "rd = imm", ""
    yield "auipc", "imm[31:12] rd 0010111", "rd, upper", "rd = pc + imm", ""
    yield "jal", "imm[20|10:1|11|19:12] rd 1101111", "rd, target", "rd = link; goto pc + imm", ""
    yield "jalr", "imm[11:0] rs1 000 rd 1100111", "rd, imm(rs1)", "rd = link; goto (rs1 + imm) & -2", ""

    for name, code, condition in (
        ("beq", "000", "rs1 == rs2"),
        ("bne", "001", "rs1 != rs2"),
        ("blt", "100", "rs1 < rs2"),
        ("bge", "101", "rs1 >= rs2"),
        ("bltu", "110", "less_unsigned(rs1, rs2)"),
        ("bgeu", "111", "not less_unsigned(rs1, rs2)"),
    ):
        encoding = f"imm[12|10:5] rs2 rs1 {code} imm[4:1|11] 1100011"
        yield name, encoding, "rs1, rs2, target", f"if {condition}: goto pc + imm", ""

    for name, code, kind in (
        ("lb", "000", "i8"),
        ("lh", "001", "i16"),
        ("lw", "010", "i32"),
        ("ld", "011", "i64"),
        ("lbu", "100", "u8"),
        ("lhu", "101", "u16"),
        ("lwu", "110", "u32"),
    ):
        yield name, f"imm[11:0] rs1 {code} rd 0000011", "rd, imm(rs1)", f"rd = {kind}[rs1 + imm]", ""
    for name, code, kind in (("sb", "000", "i8"), ("sh", "001", "i16"), ("sw", "010", "i32"), ("sd", "011", "i64")):
        yield name, f"imm[11:5] rs2 rs1 {code} imm[4:0] 0100011", "rs2, imm(rs1)", f"{kind}[rs1 + imm] = rs2", ""

    for name, code, meaning in (
        ("addi", "000", "rs1 + imm"),
        ("slti", "010", "int(rs1 < imm)"),
        ("sltiu", "011", "less_unsigned(rs1, imm)"),
        ("xori", "100", "rs1 ^ imm"),
        ("ori", "110", "rs1 | imm"),
        ("andi", "111", "rs1 & imm"),
    ):
        yield name, f"imm[11:0] rs1 {code} rd 0010011", "rd, rs1, imm", f"rd = {meaning}", ""
    yield "slli", "000000 uimm[5:0] rs1 001 rd 0010011", "rd, rs1, imm", "rd = rs1 << imm", ""
    yield "srli", "000000 uimm[5:0] rs1 101 rd 0010011", "rd, rs1, imm", "rd = shift_right_logical(rs1, imm)", ""
    yield "srai", "010000 uimm[5:0] rs1 101 rd 0010011", "rd, rs1, imm", "rd = rs1 >> imm", ""
    yield "addiw", "imm[11:0] rs1 000 rd 0011011", "rd, rs1, imm", "rd = sign_extend_32(rs1 + imm)", ""
    yield "slliw", "0000000 uimm[4:0] rs1 001 rd 0011011", "rd, rs1, imm", "rd = sign_extend_32(rs1 << imm)", ""
    meaning = "rd = sign_extend_32(zero_extend_32(rs1) >> imm)"
    yield "srliw", "0000000 uimm[4:0] rs1 101 rd 0011011", "rd, rs1, imm", meaning, ""
    yield "sraiw", "0100000 uimm[4:0] rs1 101 rd 0011011", "rd, rs1, imm", "rd = sign_extend_32(rs1) >> imm", ""

    for name, high, code, meaning in (
        ("add", "0000000", "000", "rs1 + rs2"),
        ("sub", "0100000", "000", "rs1 - rs2"),
        ("sll", "0000000", "001", "rs1 << (rs2 & 63)"),
        ("slt", "0000000", "010", "int(rs1 < rs2)"),
        ("sltu", "0000000", "011", "less_unsigned(rs1, rs2)"),
        ("xor", "0000000", "100", "rs1 ^ rs2"),
        ("srl", "0000000", "101", "shift_right_logical(rs1, rs2 & 63)"),
        ("sra", "0100000", "101", "rs1 >> (rs2 & 63)"),
        ("or", "0000000", "110", "rs1 | rs2"),
        ("and", "0000000", "111", "rs1 & rs2"),
        ("mul", "0000001", "000", "rs1 * rs2"),
        ("mulh", "0000001", "001", "multiply_high_signed(rs1, rs2)"),
        ("mulhsu", "0000001", "010", "multiply_high_signed_unsigned(rs1, rs2)"),
        ("mulhu", "0000001", "011", "multiply_high_unsigned(rs1, rs2)"),
        ("div", "0000001", "100", "quotient(rs1, rs2)"),
        ("divu", "0000001", "101", "quotient_unsigned(rs1, rs2)"),
        ("rem", "0000001", "110", "remainder(rs1, rs2)"),
        ("remu", "0000001", "111", "remainder_of_unsigned(rs1, rs2)"),
    ):
        yield name, f"{high} rs2 rs1 {code} rd 0110011", "rd, rs1, rs2", f"rd = {meaning}", ""
    for name, high, code, meaning in (
        ("addw", "0000000", "000", "rs1 + rs2"),
        ("subw", "0100000", "000", "rs1 - rs2"),
        ("sllw", "0000000", "001", "rs1 << (rs2 & 31)"),
        ("srlw", "0000000", "101", "zero_extend_32(rs1) >> (rs2 & 31)"),
        ("sraw", "0100000", "101", "sign_extend_32(rs1) >> (rs2 & 31)"),
        ("mulw", "0000001", "000", "rs1 * rs2"),
        ("divw", "0000001", "100", "quotient(sign_extend_32(rs1), sign_extend_32(rs2))"),
        ("divuw", "0000001", "101", "quotient_unsigned(zero_extend_32(rs1), zero_extend_32(rs2))"),
        ("remw", "0000001", "110", "remainder(sign_extend_32(rs1), sign_extend_32(rs2))"),
        ("remuw", "0000001", "111", "remainder_of_unsigned(zero_extend_32(rs1), zero_extend_32(rs2))"),
    ):
        yield name, f"{high} rs2 rs1 {code} rd 0111011", "rd, rs1, rs2", f"rd = sign_extend_32({meaning})", ""

    # A reserved fm is treated as fm=0 and the rs1 and rd fields are ignored, as the manual asks of base
    # implementations.
    # In a loop that waits for another hart, which may need the host's processor to get there.
    yield "pause", "000000010000 00000 000 00000 0001111", "", "pause()", ""
    yield "fence", "fm pred succ rs1 000 rd 0001111", "order", "memory_fence()", ""
    yield "fence.i", "imm[11:0] rs1 001 rd 0001111", "", "fence_i()", ""
    yield "ecall", "000000000000 00000 000 00000 1110011", "", "ecall()", ""
    yield "ebreak", "000000000001 00000 000 00000 1110011", "", "ebreak()", ""
    yield "sret", "000100000010 00000 000 00000 1110011", "", "sret()", ""
    yield "wfi", "000100000101 00000 000 00000 1110011", "", "wfi()", ""
    yield "sfence.vma", "0001001 rs2 rs1 000 00000 1110011", "rs1, rs2", "sfence_vma(rs1, rs2)", ""
    for name, code, meaning in (
        ("csrrw", "001", "csr_write(csr, rs1)"),
        ("csrrs", "010", "csr_set(csr, rs1)"),
        ("csrrc", "011", "csr_clear(csr, rs1)"),
    ):
        yield name, f"csr rs1 {code} rd 1110011", "rd, csr, rs1", f"rd = {meaning}", ""
        immediate = f"1{code[1:]}"
        yield (
            f"{name}i",
            f"csr zimm {immediate} rd 1110011",
            "rd, csr, zimm",
            f"rd = {meaning.replace('rs1', 'zimm')}",
            "",
        )

    for suffix, code, kind in (("w", "010", "i32"), ("d", "011", "i64")):
        yield (
            f"lr.{suffix}",
            f"00010 aq rl 00000 rs1 {code} rd 0101111",
            "rd, (rs1)",
            f"rd = load_reserved_{kind}(rs1)",
            "",
        )
        meaning = f"rd = store_conditional_{kind}(rs1, rs2)"
        yield f"sc.{suffix}", f"00011 aq rl rs2 rs1 {code} rd 0101111", "rd, rs2, (rs1)", meaning, ""
        for stem, high in (
            ("swap", "00001"),
            ("add", "00000"),
            ("xor", "00100"),
            ("and", "01100"),
            ("or", "01000"),
            ("min", "10000"),
            ("max", "10100"),
            ("minu", "11000"),
            ("maxu", "11100"),
        ):
            meaning = f"rd = atomic_{stem}_{kind}[rs1](rs2)"
            yield f"amo{stem}.{suffix}", f"{high} aq rl rs2 rs1 {code} rd 0101111", "rd, rs2, (rs1)", meaning, ""

    yield from _floating_rows()
    yield from _compressed_rows()


def _floating_rows() -> Iterator[tuple[str, str, str, str, str]]:
    yield "flw", "imm[11:0] rs1 010 fd 0000111", "fd, imm(rs1)", "fd = box(u32[rs1 + imm])", ""
    yield "fsw", "imm[11:5] fs2 rs1 010 imm[4:0] 0100111", "fs2, imm(rs1)", "i32[rs1 + imm] = fs2", ""
    yield "fld", "imm[11:0] rs1 011 fd 0000111", "fd, imm(rs1)", "fd = i64[rs1 + imm]", ""
    yield "fsd", "imm[11:5] fs2 rs1 011 imm[4:0] 0100111", "fs2, imm(rs1)", "i64[rs1 + imm] = fs2", ""
    for suffix, kind, bits in (("s", "f32", "00"), ("d", "f64", "01")):
        # Single-precision operands come out of their NaN boxes and results go into one (volume I, 21.2).
        one, two, three = ("unbox(fs1)", "unbox(fs2)", "unbox(fs3)") if kind == "f32" else ("fs1", "fs2", "fs3")
        box = "box(%s)" if kind == "f32" else "%s"
        sign = "0x80000000" if kind == "f32" else "SIGN"
        for name, low, product, addend in (
            ("fmadd", "1000011", one, three),
            ("fmsub", "1000111", one, f"{three} ^ {sign}"),
            ("fnmsub", "1001011", f"{one} ^ {sign}", three),
            ("fnmadd", "1001111", f"{one} ^ {sign}", f"{three} ^ {sign}"),
        ):
            meaning = box % f"{kind}_fma({product}, {two}, {addend}, rm, flags)"
            yield f"{name}.{suffix}", f"fs3 {bits} fs2 fs1 rm fd {low}", "fd, fs1, fs2, fs3, rm", f"fd = {meaning}", ""
        for name, high in (("add", "00000"), ("sub", "00001"), ("mul", "00010"), ("div", "00011")):
            meaning = box % f"{kind}_{name}({one}, {two}, rm, flags)"
            yield f"f{name}.{suffix}", f"{high}{bits} fs2 fs1 rm fd 1010011", "fd, fs1, fs2, rm", f"fd = {meaning}", ""
        meaning = box % f"{kind}_sqrt({one}, rm, flags)"
        yield f"fsqrt.{suffix}", f"01011{bits} 00000 fs1 rm fd 1010011", "fd, fs1, rm", f"fd = {meaning}", ""
        for name, code, from_second in (
            ("fsgnj", "000", f"{two} & {sign}"),
            ("fsgnjn", "001", f"~{two} & {sign}"),
            ("fsgnjx", "010", f"({one} ^ {two}) & {sign}"),
        ):
            meaning = box % f"{one} & ~{sign} | {from_second}"
            yield f"{name}.{suffix}", f"00100{bits} fs2 fs1 {code} fd 1010011", "fd, fs1, fs2", f"fd = {meaning}", ""
        for name, code in (("min", "000"), ("max", "001")):
            meaning = box % f"{kind}_{name}({one}, {two}, flags)"
            yield f"f{name}.{suffix}", f"00101{bits} fs2 fs1 {code} fd 1010011", "fd, fs1, fs2", f"fd = {meaning}", ""
        for name, code in (("le", "000"), ("lt", "001"), ("eq", "010")):
            meaning = f"rd = {kind}_{name}({one}, {two}, flags)"
            yield f"f{name}.{suffix}", f"10100{bits} fs2 fs1 {code} rd 1010011", "rd, fs1, fs2", meaning, ""
        yield f"fclass.{suffix}", f"11100{bits} 00000 fs1 001 rd 1010011", "rd, fs1", f"rd = {kind}_class({one})", ""
        for number, short, integer in (
            ("00000", "w", "i32"),
            ("00001", "wu", "u32"),
            ("00010", "l", "i64"),
            ("00011", "lu", "u64"),
        ):
            encoding = f"11000{bits} {number} fs1 rm rd 1010011"
            yield f"fcvt.{short}.{suffix}", encoding, "rd, fs1, rm", f"rd = {kind}_to_{integer}({one}, rm, flags)", ""
            encoding = f"11010{bits} {number} rs1 rm fd 1010011"
            meaning = box % f"{integer}_to_{kind}(rs1, rm, flags)"
            yield f"fcvt.{suffix}.{short}", encoding, "fd, rs1, rm", f"fd = {meaning}", ""
    yield "fcvt.s.d", "0100000 00001 fs1 rm fd 1010011", "fd, fs1, rm", "fd = box(f64_to_f32(fs1, rm, flags))", ""
    # Widening is exact, so the rounding mode only has to be a valid one (volume I, 22.5).
    yield (
        "fcvt.d.s",
        "0100001 00000 fs1 rm fd 1010011",
        "fd, fs1, rm",
        "fd = exact(f32_to_f64(unbox(fs1), flags), rm)",
        "",
    )
    yield "fmv.x.w", "1110000 00000 fs1 000 rd 1010011", "rd, fs1", "rd = sign_extend_32(fs1)", ""
    yield "fmv.w.x", "1111000 00000 rs1 000 fd 1010011", "fd, rs1", "fd = box(rs1)", ""
    yield "fmv.x.d", "1110001 00000 fs1 000 rd 1010011", "rd, fs1", "rd = fs1", ""
    yield "fmv.d.x", "1111001 00000 rs1 000 fd 1010011", "fd, rs1", "fd = rs1", ""


def _compressed_rows() -> Iterator[tuple[str, str, str, str, str]]:
    """RVC, quadrants 0 to 2. Operands that are hints (rd=0) execute as what they look like, without effect."""
    yield "c.addi4spn", "000 uimm[5:4|9:6|2|3] rd' 00; rs1=2", "rd, rs1, imm", "rd = rs1 + imm", "imm=0"
    for name, code, ranges, register, meaning in (
        ("fld", "001", "uimm[5:3] rs1' uimm[7:6]", "f", "i64"),
        ("lw", "010", "uimm[5:3] rs1' uimm[2|6]", "r", "i32"),
        ("ld", "011", "uimm[5:3] rs1' uimm[7:6]", "r", "i64"),
    ):
        load = f"{register}d = {meaning}[rs1 + imm]"
        yield f"c.{name}", f"{code} {ranges} {register}d' 00", f"{register}d, imm(rs1)", load, ""
        source = f"{register}s2"
        store = f"{meaning}[rs1 + imm] = {source}"
        yield f"c.{name.replace('l', 's')}", f"1{code[1:]} {ranges} {source}' 00", f"{source}, imm(rs1)", store, ""

    yield "c.addi", "000 imm[5] rd/rs1 imm[4:0] 01", "rd, imm", "rd = rs1 + imm", ""
    yield "c.addiw", "001 imm[5] rd/rs1 imm[4:0] 01", "rd, imm", "rd = sign_extend_32(rs1 + imm)", "rd=0"
    yield "c.li", "010 imm[5] rd imm[4:0] 01", "rd, imm", "rd = imm", ""
    yield "c.addi16sp", "011 imm[9] 00010 imm[4|6|8:7|5] 01; rd=2 rs1=2", "rd, imm", "rd = rs1 + imm", "imm=0"
    yield "c.lui", "011 imm[17] rd imm[16:12] 01", "rd, upper", "rd = imm", "imm=0 rd=2"
    yield "c.srli", "100 uimm[5] 00 rd'/rs1' uimm[4:0] 01", "rd, imm", "rd = shift_right_logical(rs1, imm)", ""
    yield "c.srai", "100 uimm[5] 01 rd'/rs1' uimm[4:0] 01", "rd, imm", "rd = rs1 >> imm", ""
    yield "c.andi", "100 imm[5] 10 rd'/rs1' imm[4:0] 01", "rd, imm", "rd = rs1 & imm", ""
    for name, high, low, meaning in (
        ("sub", "0", "00", "rs1 - rs2"),
        ("xor", "0", "01", "rs1 ^ rs2"),
        ("or", "0", "10", "rs1 | rs2"),
        ("and", "0", "11", "rs1 & rs2"),
        ("subw", "1", "00", "sign_extend_32(rs1 - rs2)"),
        ("addw", "1", "01", "sign_extend_32(rs1 + rs2)"),
    ):
        yield f"c.{name}", f"100 {high} 11 rd'/rs1' {low} rs2' 01", "rd, rs2", f"rd = {meaning}", ""
    yield "c.j", "101 imm[11|4|9:8|10|6|7|3:1|5] 01", "target", "goto pc + imm", ""
    for name, code, condition in (("beqz", "110", "rs1 == 0"), ("bnez", "111", "rs1 != 0")):
        encoding = f"{code} imm[8|4:3] rs1' imm[7:6|2:1|5] 01"
        yield f"c.{name}", encoding, "rs1, target", f"if {condition}: goto pc + imm", ""

    yield "c.slli", "000 uimm[5] rd/rs1 uimm[4:0] 10", "rd, imm", "rd = rs1 << imm", ""
    yield "c.fldsp", "001 uimm[5] fd uimm[4:3|8:6] 10; rs1=2", "fd, imm(rs1)", "fd = i64[rs1 + imm]", ""
    yield "c.lwsp", "010 uimm[5] rd uimm[4:2|7:6] 10; rs1=2", "rd, imm(rs1)", "rd = i32[rs1 + imm]", "rd=0"
    yield "c.ldsp", "011 uimm[5] rd uimm[4:3|8:6] 10; rs1=2", "rd, imm(rs1)", "rd = i64[rs1 + imm]", "rd=0"
    yield "c.jr", "100 0 rs1 00000 10", "rs1", "goto rs1 & -2", "rs1=0"
    yield "c.mv", "100 0 rd rs2 10", "rd, rs2", "rd = rs2", "rs2=0"
    yield "c.ebreak", "100 1 00000 00000 10", "", "ebreak()", ""
    yield "c.jalr", "100 1 rs1 00000 10; rd=1", "rs1", "rd = link; goto rs1 & -2", "rs1=0"
    yield "c.add", "100 1 rd/rs1 rs2 10", "rd, rs2", "rd = rs1 + rs2", "rs2=0"
    yield "c.fsdsp", "101 uimm[5:3|8:6] fs2 10; rs1=2", "fs2, imm(rs1)", "i64[rs1 + imm] = fs2", ""
    yield "c.swsp", "110 uimm[5:2|7:6] rs2 10; rs1=2", "rs2, imm(rs1)", "i32[rs1 + imm] = rs2", ""
    yield "c.sdsp", "111 uimm[5:3|8:6] rs2 10; rs1=2", "rs2, imm(rs1)", "i64[rs1 + imm] = rs2", ""


def _reserved(text: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, _, value in (part.partition("=") for part in text.split()))


INSTRUCTIONS: tuple[Instruction, ...] = tuple(
    Instruction(FIRST_OPERATION + index, name, encoding, assembly, semantics, _reserved(reserved))
    for index, (name, encoding, assembly, semantics, reserved) in enumerate(_rows())
)

BY_NAME: dict[str, Instruction] = {instruction.name: instruction for instruction in INSTRUCTIONS}


def instruction_length(low: int) -> int:
    """Bytes of the instruction whose low 16 bits are ``low``: 4 if the lowest two bits are 11, else 2."""
    return 4 if low & 3 == 3 else 2


def decode(word: int) -> tuple[Instruction, dict[str, int]] | None:
    """The row and operands of an instruction word, or None where no row matches (illegal).

    A word longer than the instruction is fine: only the first 2 or 4 bytes count.
    """
    length = instruction_length(word)
    best: Instruction | None = None
    for row in INSTRUCTIONS:
        more_specific = best is None or row.mask.bit_count() > best.mask.bit_count()
        if row.length == length and more_specific and row.matches(word):
            best = row
    return (best, best.fields(word)) if best else None
