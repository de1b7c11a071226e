"""Bare-metal loops for the benchmarks, put together from the instruction table.

A program is raw code for the beginning of RAM (0x8000_0000) that runs on our hart in S-mode and on QEMU's in M-mode
alike: it uses no CSR and no call. Each hart comes in with its number in a0, runs the loop on a page of its own, counts
itself in memory and waits for ever; the last one writes "finished" to SiFive's test device (QEMU's ``virt`` machine,
hw/misc/sifive_test: 0x5555 ends it with status 0), where our machine has none and exits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.engine.rv64.instructions import BY_NAME
from vmm.engine.rv64.registers import X_NAMES

BASE = 0x8000_0000
TEST_DEVICE = 0x10_0000
FINISHED = 0x5555
DATA_OFFSET = 0x1_0000
HARTS_OFFSET = 0xF000

_LONGEST = (1 << 31) - 2048  # what lui and addi load into a register without a sign


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop's body: instructions as (name, operands); the count-down and the branch follow it."""

    name: str
    body: tuple[tuple[str, dict[str, int | str]], ...]

    @property
    def instructions(self) -> int:
        """Of one round."""
        return len(self.body) + 2


INTEGER = Loop(
    "integer",
    (
        # xorshift64: every instruction waits for the one before it, as in a hash.
        ("slli", {"rd": "t1", "rs1": "a1", "imm": 13}),
        ("xor", {"rd": "a1", "rs1": "a1", "rs2": "t1"}),
        ("srli", {"rd": "t1", "rs1": "a1", "imm": 7}),
        ("xor", {"rd": "a1", "rs1": "a1", "rs2": "t1"}),
        ("slli", {"rd": "t1", "rs1": "a1", "imm": 17}),
        ("xor", {"rd": "a1", "rs1": "a1", "rs2": "t1"}),
        ("add", {"rd": "a2", "rs1": "a2", "rs2": "a1"}),
        ("addi", {"rd": "a3", "rs1": "a3", "imm": 1}),
    ),
)

LOAD_STORE = Loop(
    "load/store",
    (
        ("ld", {"rd": "t1", "rs1": "s0", "imm": 0}),
        ("addi", {"rd": "t1", "rs1": "t1", "imm": 1}),
        ("sd", {"rs2": "t1", "rs1": "s0", "imm": 0}),
        ("ld", {"rd": "t2", "rs1": "s0", "imm": 1024}),
        ("add", {"rd": "t2", "rs1": "t2", "rs2": "t1"}),
        ("sd", {"rs2": "t2", "rs1": "s0", "imm": 1032}),
        ("lw", {"rd": "t3", "rs1": "s0", "imm": 512}),
        ("sw", {"rs2": "t3", "rs1": "s0", "imm": 516}),
    ),
)


def _encode(name: str, operands: dict[str, int | str]) -> int:
    numbers = {key: X_NAMES.index(value) if isinstance(value, str) else value for key, value in operands.items()}
    return BY_NAME[name].encode(**numbers)


def _constant(register: str, value: int) -> list[int]:
    """``lui`` and ``addi`` for 0 <= value < 2^31 - 2048."""
    low = (value & 0xFFF ^ 0x800) - 0x800
    return [
        _encode("lui", {"rd": register, "imm": value - low}),
        _encode("addi", {"rd": register, "rs1": register, "imm": low}),
    ]


def _address(register: str, offset: int, at: int) -> list[int]:
    """``auipc`` and ``addi`` for an offset from the program's beginning; ``at`` is where the first of them stands."""
    distance = offset - at
    low = (distance & 0xFFF ^ 0x800) - 0x800
    return [
        _encode("auipc", {"rd": register, "imm": distance - low}),
        _encode("addi", {"rd": register, "rs1": register, "imm": low}),
    ]


def assemble(loop: Loop, rounds: int, harts: int = 1) -> bytes:
    """The program: ``rounds`` rounds on each of ``harts`` harts.

    Raises:
        ValueError: more rounds than the counter takes.
    """
    if not 1 <= rounds < _LONGEST:
        raise ValueError(f"{rounds} rounds cannot be counted; the number must be from 1 to {_LONGEST - 1}")
    words: list[int] = []

    def here() -> int:
        return 4 * len(words)

    def put(name: str, **operands: int | str) -> None:
        words.append(_encode(name, operands))

    words += _address("s0", DATA_OFFSET, here())
    put("slli", rd="t1", rs1="a0", imm=12)
    put("add", rd="s0", rs1="s0", rs2="t1")
    put("addi", rd="a1", rs1="a0", imm=1)
    words += _constant("t0", rounds)
    start = here()
    words += [_encode(name, operands) for name, operands in loop.body]
    put("addi", rd="t0", rs1="t0", imm=-1)
    put("bne", rs1="t0", rs2="zero", imm=start - here())

    words += _address("s1", HARTS_OFFSET, here())
    put("addi", rd="t1", rs1="zero", imm=1)
    put("amoadd.w", rd="t2", rs1="s1", rs2="t1", aq=1, rl=1)
    put("addi", rd="t3", rs1="zero", imm=harts - 1)
    waiting = here() + 4 * (1 + len(_constant("t0", 0)) * 2 + 1)
    put("bne", rs1="t2", rs2="t3", imm=waiting - here())
    words += _constant("t0", TEST_DEVICE)
    words += _constant("t1", FINISHED)
    put("sw", rs1="t0", rs2="t1", imm=0)
    assert here() == waiting
    put("wfi")
    put("jal", rd="zero", imm=-4)
    return struct.pack(f"<{len(words)}I", *words)
