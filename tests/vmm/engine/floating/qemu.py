"""A referee: what QEMU's software floating point answers.

A RISC-V ELF program of some thirty instructions is assembled here, one of which is the instruction under test. It
reads records {a, b, c, fcsr} from standard input, writes records {a0, fa0, fflags} to standard output, and runs under
``qemu-riscv64-static`` (Debian package qemu-user-static), tens of thousands of cases at a time. Instructions are
encoded by hand from the unprivileged specification (20191213, chapter 24), not by the engine's own table.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

CODE, INPUT, OUTPUT, END = 0x10000, 0x0100_0000, 0x0400_0000, 0x0700_0000
ZERO, T0, T1, S1, A0, A1, A2, A7, S2, S3 = 0, 5, 6, 9, 10, 11, 12, 17, 18, 19
FA0, FA1, FA2 = 10, 11, 12
DYNAMIC = 7
FFLAGS, FCSR = 1, 3
READ, WRITE, EXIT = 63, 64, 93

#: Case: operands a, b, c (unused ones are 0) as 64-bit register contents, and the rounding mode.
Case = tuple[int, int, int, int]


def _immediate(opcode: int, funct3: int, rd: int, rs1: int, immediate: int) -> int:
    return (immediate & 0xFFF) << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode


def _store(opcode: int, funct3: int, rs2: int, rs1: int, offset: int) -> int:
    return (offset >> 5 & 0x7F) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (offset & 31) << 7 | opcode


def _branch(funct3: int, rs1: int, rs2: int, offset: int) -> int:
    high = (offset >> 12 & 1) << 6 | offset >> 5 & 0x3F
    low = (offset >> 1 & 15) << 1 | offset >> 11 & 1
    return high << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | low << 7 | 0x63


def _add_immediate(rd: int, rs1: int, immediate: int) -> int:
    return _immediate(0x13, 0, rd, rs1, immediate)


def _load_upper(rd: int, value: int) -> int:
    return value & 0xFFFFF000 | rd << 7 | 0x37


def _call(number: int) -> list[int]:
    return [_add_immediate(A7, ZERO, number), 0x73]


def operation(funct7: int, rs2: int, rm: int) -> int:
    """An OP-FP instruction on fa0 or a0, and on ``rs2``, whose result goes to fa0 or a0."""
    return funct7 << 25 | rs2 << 20 | FA0 << 15 | rm << 12 | FA0 << 7 | 0x53


def fused(double: int) -> int:
    """fmadd fa0, fa0, fa1, fa2 in either format."""
    return FA2 << 27 | double << 25 | FA1 << 20 | FA0 << 15 | DYNAMIC << 12 | FA0 << 7 | 0x43


def _program(instruction: int) -> bytes:
    loop = [
        _immediate(0x03, 3, T0, S1, 24),
        _immediate(0x73, 1, ZERO, T0, FCSR),
        _immediate(0x03, 3, A0, S1, 0),
        _immediate(0x07, 3, FA0, S1, 0),
        _immediate(0x07, 3, FA1, S1, 8),
        _immediate(0x07, 3, FA2, S1, 16),
        instruction,
        _immediate(0x73, 2, T1, ZERO, FFLAGS),
        _store(0x23, 3, A0, S3, 0),
        _store(0x27, 3, FA0, S3, 8),
        _store(0x23, 3, T1, S3, 16),
        _add_immediate(S1, S1, 32),
        _add_immediate(S3, S3, 24),
    ]
    words = [
        _load_upper(A1, INPUT),
        _load_upper(A2, OUTPUT - INPUT),
        _add_immediate(A0, ZERO, 0),
        *_call(READ),
        _load_upper(S1, INPUT),
        0 << 25 | A0 << 20 | S1 << 15 | S2 << 7 | 0x33,
        _load_upper(S3, OUTPUT),
        *loop,
        _branch(6, S1, S2, -4 * len(loop)),
        _load_upper(A1, OUTPUT),
        0x20 << 25 | A1 << 20 | S3 << 15 | A2 << 7 | 0x33,
        _add_immediate(A0, ZERO, 1),
        *_call(WRITE),
        _add_immediate(A0, ZERO, 0),
        *_call(EXIT),
    ]
    code = struct.pack(f"<{len(words)}I", *words)
    # ELF64: header, one program header that covers code and both buffers (readable, writable, executable).
    start = 64 + 56
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    double_float_abi = 4
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 243, 1, CODE + start, 64, 0, double_float_abi, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, CODE, CODE, start + len(code), END - CODE, 4096)
    return header + segment + code


def answers(instruction: int, cases: Sequence[Case]) -> list[tuple[int, int, int]]:
    """What QEMU leaves in (a0, fa0, fflags) for each case."""
    emulator = shutil.which("qemu-riscv64-static")
    assert emulator, "qemu-riscv64-static was not found; install the Debian package qemu-user-static"
    assert 0 < 32 * len(cases) <= OUTPUT - INPUT
    with tempfile.TemporaryDirectory() as directory:
        program, given, answered = (Path(directory, name) for name in ("program", "given", "answered"))
        program.write_bytes(_program(instruction))
        program.chmod(0o700)
        given.write_bytes(b"".join(struct.pack("<4Q", a, b, c, rm << 5) for a, b, c, rm in cases))
        with given.open("rb") as source, answered.open("wb") as sink:
            subprocess.run([emulator, str(program)], stdin=source, stdout=sink, check=True, timeout=60)
        records = list(struct.iter_unpack("<3Q", answered.read_bytes()))
    assert len(records) == len(cases)
    return [(a0, fa0, flags) for a0, fa0, flags in records]
