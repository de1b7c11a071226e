"""A two-pass assembler for the few instructions that the referees' driver and prelude need.

It is written apart from `vmm.engine.rv64.instructions` on purpose: the driver must not inherit a mistake of the table
that it helps to examine. Encodings: The RISC-V Instruction Set Manual, volume I (20191213), chapter 24, and volume II
(20211203), chapter 10. Left out: everything that the driver does not use, pseudo-instructions other than
:meth:`Assembler.load`, relaxation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

ZERO, RA, SP, GP, TP, T0, T1, T2, S0, S1, A0, A1 = range(12)
A6, A7, S2, S3, S4, S5, S6 = 16, 17, 18, 19, 20, 21, 22
T3, T4, T5, T6 = 28, 29, 30, 31

FENCE_I = 0x0000_100F
ECALL = 0x0000_0073
EBREAK = 0x0010_0073
SRET = 0x1020_0073
MRET = 0x3020_0073
WFI = 0x1050_0073
SFENCE_VMA_ALL = 0x1200_0073
FENCE_RW_RW = 0x0330_000F
C_EBREAK = 0x9002
C_NOP = 0x0001


class AssemblyError(Exception):
    """A label that does not exist or lies too far away, or an immediate that does not fit."""


def _signed(value: int, bits: int, what: str) -> int:
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise AssemblyError(f"{what} {value} does not fit in {bits} signed bits")
    return value & ((1 << bits) - 1)


def r_type(opcode: int, funct3: int, funct7: int, rd: int, rs1: int, rs2: int) -> int:
    """funct7 | rs2 | rs1 | funct3 | rd | opcode."""
    return funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode


def i_type(opcode: int, funct3: int, rd: int, rs1: int, immediate: int) -> int:
    """imm[11:0] | rs1 | funct3 | rd | opcode."""
    return _signed(immediate, 12, "immediate") << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode


def s_type(opcode: int, funct3: int, rs1: int, rs2: int, immediate: int) -> int:
    """imm[11:5] | rs2 | rs1 | funct3 | imm[4:0] | opcode."""
    bits = _signed(immediate, 12, "immediate")
    return (bits >> 5) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (bits & 31) << 7 | opcode


def b_type(funct3: int, rs1: int, rs2: int, offset: int) -> int:
    """A branch: imm[12|10:5] | rs2 | rs1 | funct3 | imm[4:1|11] | 1100011."""
    bits = _signed(offset, 13, "branch offset")
    high = (bits >> 12 & 1) << 6 | bits >> 5 & 0x3F
    low = (bits >> 1 & 0xF) << 1 | bits >> 11 & 1
    return high << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | low << 7 | 0x63


def u_type(opcode: int, rd: int, page: int) -> int:
    """imm[31:12] | rd | opcode."""
    return (page & 0xFFFFF) << 12 | rd << 7 | opcode


def jal(rd: int, offset: int) -> int:
    """imm[20|10:1|11|19:12] | rd | 1101111."""
    bits = _signed(offset, 21, "jump offset")
    packed = (bits >> 20 & 1) << 19 | (bits >> 1 & 0x3FF) << 9 | (bits >> 11 & 1) << 8 | bits >> 12 & 0xFF
    return packed << 12 | rd << 7 | 0x6F


def addi(rd: int, rs1: int, immediate: int) -> int:
    return i_type(0x13, 0, rd, rs1, immediate)


def ld(rd: int, rs1: int, offset: int) -> int:
    return i_type(0x03, 3, rd, rs1, offset)


def lw(rd: int, rs1: int, offset: int) -> int:
    return i_type(0x03, 2, rd, rs1, offset)


def sd(rs2: int, rs1: int, offset: int) -> int:
    return s_type(0x23, 3, rs1, rs2, offset)


def sw(rs2: int, rs1: int, offset: int) -> int:
    return s_type(0x23, 2, rs1, rs2, offset)


def fld(rd: int, rs1: int, offset: int) -> int:
    return i_type(0x07, 3, rd, rs1, offset)


def fsd(rs2: int, rs1: int, offset: int) -> int:
    return s_type(0x27, 3, rs1, rs2, offset)


def jalr(rd: int, rs1: int, offset: int = 0) -> int:
    return i_type(0x67, 0, rd, rs1, offset)


def add(rd: int, rs1: int, rs2: int) -> int:
    return r_type(0x33, 0, 0, rd, rs1, rs2)


def csrrw(rd: int, csr: int, rs1: int) -> int:
    return csr << 20 | rs1 << 15 | 1 << 12 | rd << 7 | 0x73


def csrrs(rd: int, csr: int, rs1: int) -> int:
    return csr << 20 | rs1 << 15 | 2 << 12 | rd << 7 | 0x73


def csrrc(rd: int, csr: int, rs1: int) -> int:
    return csr << 20 | rs1 << 15 | 3 << 12 | rd << 7 | 0x73


def csrrwi(rd: int, csr: int, immediate: int) -> int:
    return csr << 20 | immediate << 15 | 5 << 12 | rd << 7 | 0x73


def amo(funct5: int, width: int, rd: int, rs1: int, rs2: int, *, acquire: bool = False, release: bool = False) -> int:
    """An instruction of the A extension; ``width`` is 4 or 8 bytes. LR is funct5 2, SC 3, AMOSWAP 1, AMOADD 0."""
    funct3 = 2 if width == 4 else 3
    return r_type(0x2F, funct3, funct5 << 2 | acquire << 1 | release, rd, rs1, rs2)


@dataclass(slots=True)
class Assembler:
    """Words, labels and data laid one after the other from address ``base``."""

    base: int = 0
    _chunks: list[bytes | Callable[[], bytes]] = field(default_factory=list)
    _labels: dict[str, int] = field(default_factory=dict)
    _size: int = 0

    @property
    def here(self) -> int:
        """Address of whatever comes next."""
        return self.base + self._size

    def address(self, label: str) -> int:
        """Where a label lies."""
        if label not in self._labels:
            raise AssemblyError(f"label {label!r} is not defined; there are {sorted(self._labels)}")
        return self._labels[label]

    def label(self, name: str) -> None:
        """Give ``name`` to the address of whatever comes next."""
        if name in self._labels:
            raise AssemblyError(f"label {name!r} is defined twice")
        self._labels[name] = self.here

    def _append(self, chunk: bytes | Callable[[], bytes], size: int) -> None:
        self._chunks.append(chunk)
        self._size += size

    def emit(self, *words: int) -> None:
        """Append 32-bit instructions."""
        for word in words:
            self._append(word.to_bytes(4, "little"), 4)

    def emit_short(self, *parcels: int) -> None:
        """Append 16-bit instructions."""
        for parcel in parcels:
            self._append(parcel.to_bytes(2, "little"), 2)

    def data(self, content: bytes) -> None:
        """Append bytes as they are."""
        self._append(content, len(content))

    def align(self, boundary: int) -> None:
        """Fill with zero bytes up to a multiple of ``boundary``."""
        self.data(bytes(-self.here % boundary))

    def branch(self, funct3: int, rs1: int, rs2: int, label: str) -> None:
        """A conditional branch to a label: funct3 0 BEQ, 1 BNE, 4 BLT, 5 BGE, 6 BLTU, 7 BGEU."""
        at = self.here
        self._append(lambda: b_type(funct3, rs1, rs2, self.address(label) - at).to_bytes(4, "little"), 4)

    def beq(self, rs1: int, rs2: int, label: str) -> None:
        self.branch(0, rs1, rs2, label)

    def bne(self, rs1: int, rs2: int, label: str) -> None:
        self.branch(1, rs1, rs2, label)

    def jump(self, label: str, link: int = ZERO) -> None:
        """JAL to a label."""
        at = self.here
        self._append(lambda: jal(link, self.address(label) - at).to_bytes(4, "little"), 4)

    def load_address(self, rd: int, label: str) -> None:
        """rd = address of a label, relative to pc (AUIPC, ADDI)."""
        at = self.here

        def words() -> bytes:
            offset = self.address(label) - at
            page = offset + 0x800 >> 12
            return (u_type(0x17, rd, page) | addi(rd, rd, offset - (page << 12)) << 32).to_bytes(8, "little")

        self._append(words, 8)

    def load(self, rd: int, value: int) -> None:
        """rd = any 64-bit constant, from a literal beside the code (AUIPC, LD, JAL over it)."""
        self.emit(u_type(0x17, rd, 0), ld(rd, rd, 12), jal(ZERO, 12))
        self.data((value & (1 << 64) - 1).to_bytes(8, "little"))

    def assemble(self) -> bytes:
        """All of it, with every label resolved.

        Raises:
            AssemblyError: a missing label, or one out of a branch's reach.
        """
        return b"".join(chunk if isinstance(chunk, bytes) else chunk() for chunk in self._chunks)
