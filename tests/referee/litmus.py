"""Programs for several harts, and the threads that run them on our engine.

Every program runs with satp = 0 and works on the doublewords of one table, `LOCATIONS`, spaced a page apart where
they must not share anything. Shapes and names of the tests: The RISC-V Instruction Set Manual, volume I (20191213),
chapter 14 and appendix A (RVWMO). Rounds are started by a barrier that gives up after a while, so that a hart whose
host thread is not running delays the others but cannot stop them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tests.referee import assembly as asm
from tests.referee.assembly import A0, A7, T0, T1, ZERO, Assembler
from tests.referee.case import RefereeError
from tests.referee.image import SRST
from vmm.engine.base import ExitReason
from vmm.engine.rv64.hart import Hart, Rv64Engine
from vmm.memory import GuestMemory

MEMORY_BASE = 0x8000_0000
MEMORY_SIZE = 32 << 20
CODE = MEMORY_BASE
LOCATIONS = MEMORY_BASE + (1 << 20)
RESULTS = MEMORY_BASE + (16 << 20)
SPACING = 4096
_LIMIT_SECONDS = 30
_SLICE_INSTRUCTIONS = 20_000_000

#: Answers an environment call: hart number and a0..a7 to (error, value).
Firmware = Callable[[Rv64Engine, int, tuple[int, ...]], tuple[int, int]]


def location(index: int) -> int:
    """Address of shared location ``index``."""
    return LOCATIONS + index * SPACING


def _refuse(engine: Rv64Engine, hart: int, args: tuple[int, ...]) -> tuple[int, int]:
    raise RefereeError(f"hart {hart} made the unexpected environment call {args[7]:#x}")


class Program:
    """Machine code in the making: one entry for all harts, which part by a0, the hart's number."""

    def __init__(self) -> None:
        self.code = Assembler(CODE)
        self.harts = 0

    @contextmanager
    def hart(self) -> Iterator[Assembler]:
        """What the next hart executes; it ends with SRST."""
        code, number = self.code, self.harts
        self.harts += 1
        code.emit(asm.addi(T0, ZERO, number))
        code.bne(A0, T0, f"not hart {number}")
        yield code
        code.load(A7, SRST)
        code.emit(asm.ECALL)
        code.label(f"not hart {number}")


class Litmus:
    """A program loaded into a machine of its own; released by `close` or as a context manager."""

    def __init__(self, program: Program, firmware: Firmware, contents: Mapping[int, bytes]) -> None:
        self.memory = GuestMemory(MEMORY_BASE, MEMORY_SIZE)
        self._firmware = firmware
        self._failures: list[BaseException] = []
        try:
            for address, content in {**contents, CODE: program.code.assemble()}.items():
                self.memory.write(address, content)
            self._engine = Rv64Engine(self.memory, program.harts, "real")
        except BaseException:
            self.memory.close()
            raise

    def run(self) -> None:
        """Run every hart in a thread of its own until all have ended.

        Raises:
            RefereeError: a hart came back for an unexpected reason, or did not end.
        """
        # Before any of them runs: a reset forgets interrupts.
        for hart in self._engine.harts:
            hart.reset(CODE, hart.id, 0)
        deadline = time.monotonic() + _LIMIT_SECONDS
        threads = [
            threading.Thread(target=self._live, args=(hart, deadline), name=f"litmus-hart-{hart.id}")
            for hart in self._engine.harts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _live(self, hart: Hart, deadline: float) -> None:
        try:
            self._serve(hart, deadline)
        except BaseException as error:
            self._failures.append(error)

    def _serve(self, hart: Hart, deadline: float) -> None:
        while not self._failures:
            left = hart.run(_SLICE_INSTRUCTIONS)
            if left.reason is ExitReason.SBI_CALL:
                if left.args[7] == SRST:
                    return
                hart.complete_sbi(*self._firmware(self._engine, hart.id, left.args))
            elif left.reason is ExitReason.HALTED:
                hart.wait(timeout=1.0)
            elif left.reason is not ExitReason.BUDGET:
                raise RefereeError(f"hart {hart.id} came back with {left} at {hart.pc:#x}; it must only call SBI")
            if time.monotonic() > deadline:
                raise RefereeError(f"hart {hart.id} is still at {hart.pc:#x} after {_LIMIT_SECONDS} s")

    def close(self) -> None:
        """Release engine and memory."""
        self._engine.close()
        self.memory.close()

    def __enter__(self) -> Litmus:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def run_program(
    program: Program, firmware: Firmware = _refuse, contents: Mapping[int, bytes] | None = None
) -> Callable[[int, int], list[int]]:
    """Run ``program`` to its end in memory that holds ``contents``; the result reads doublewords of what it left."""
    with Litmus(program, firmware, contents or {}) as litmus:
        litmus.run()
        content = litmus.memory.read(MEMORY_BASE, MEMORY_SIZE)

    def words(address: int, count: int) -> list[int]:
        start = address - MEMORY_BASE
        return [int.from_bytes(content[at : at + 8], "little") for at in range(start, start + 8 * count, 8)]

    return words


def repeat(code: Assembler, name: str, counter: int, rounds: int, body: Callable[[], None]) -> None:
    """Execute ``body`` ``rounds`` times; register ``counter`` counts down to 1 in the last round."""
    code.load(counter, rounds)
    code.label(name)
    body()
    code.emit(asm.addi(counter, counter, -1))
    code.bne(counter, ZERO, name)


def meet(code: Assembler, name: str, arrivals: int, goal: int, patience: int) -> None:
    """A barrier: count up at register ``arrivals``, then wait until ``goal`` have come, or ``patience`` looks."""
    code.emit(asm.addi(T0, ZERO, 1), asm.amo(0, 8, ZERO, arrivals, T0, acquire=True, release=True))
    code.load(T1, patience)
    code.label(name)
    code.emit(asm.ld(T0, arrivals, 0))
    code.branch(7, T0, goal, f"{name} met")
    code.emit(asm.addi(T1, T1, -1))
    code.bne(T1, ZERO, name)
    code.label(f"{name} met")
