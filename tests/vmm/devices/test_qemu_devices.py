"""UART and PLIC against QEMU's: the same register accesses must give the same answers.

QEMU stands still under its qtest protocol, which reads and writes guest-physical addresses. Its ``virt`` machine
has an M-mode and an S-mode context per hart, so our context 0 is its context 1.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator

import pytest

from vmm.board.riscv_virt import PLIC_BASE, RAM_BASE, UART_BASE, RiscvVirtBoard
from vmm.console import Console
from vmm.memory import GuestMemory

THR, IER, FCR, LCR, MCR, LSR, MSR, SCR = range(8)
PRIORITY, PENDING, ENABLE, THRESHOLD, CLAIM = 4 * 10, 0x1000, 0x2000, 0x20_0000, 0x20_0004

OPTIONS = ("-M", "virt", "-S", "-bios", "none", "-qtest", "stdio", "-display", "none", "-nodefaults")

# (register, value to write, or None to read)
Step = tuple[int, int | None]


class Qemu:
    """The devices of QEMU's virt machine, reached through qtest."""

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen(
            (program, *OPTIONS),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _ask(self, command: str) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        assert answer[:1] == ["OK"], answer
        return answer

    def read(self, address: int, width: int) -> int:
        return int(self._ask(f"read{'b' if width == 1 else 'l'} {address:#x}")[1], 16)

    def write(self, address: int, width: int, value: int) -> None:
        self._ask(f"write{'b' if width == 1 else 'l'} {address:#x} {value:#x}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def qemu(program: Callable[[str], str]) -> Iterator[Qemu]:
    started = Qemu(program("qemu-system-riscv64"))
    yield started
    started.close()


@pytest.fixture
def board() -> Iterator[RiscvVirtBoard]:
    with GuestMemory(RAM_BASE, 4096) as memory:
        yield RiscvVirtBoard(memory, Console(), [lambda level: None])


def uart_answers(machine: Qemu | RiscvVirtBoard, steps: list[Step]) -> list[tuple[int, int]]:
    bus = machine.bus if isinstance(machine, RiscvVirtBoard) else machine
    answers = []
    # QEMU's MCR starts with OUT2 on, as firmware of a PC leaves it; the data sheet's reset value is 0 (table I).
    bus.write(UART_BASE + MCR, 1, 0)
    for register, value in steps:
        if value is None:
            answer = bus.read(UART_BASE + register, 1)
            # QEMU forgets to set the "changed" bits when loopback changes the modem signals (data sheet, 8.7 and 8.8).
            answers.append((register, answer & 0xF0 if register == MSR else answer))
        else:
            bus.write(UART_BASE + register, 1, value)
    return answers


def test_linux_start_up_of_the_port_sees_the_same_port(qemu: Qemu, board: RiscvVirtBoard) -> None:
    # The accesses of 8250_port.c: autoconfig, clearing of the FIFOs, the THRE and TXEN tests, opening of the port.
    steps: list[Step] = [
        *[(IER, None), (IER, 0), (IER, None), (IER, 0x0F), (IER, None), (IER, 0)],
        *[(MCR, 0x1A), (MSR, None), (MCR, 0)],
        *[(LCR, 0xBF), (FCR, 0), (LCR, 0), (FCR, 1), (FCR, None), (SCR, 0xA5), (SCR, None)],
        *[(FCR, 1), (FCR, 7), (FCR, 0), (LSR, None), (THR, None), (FCR, None), (MSR, None), (LCR, 3)],
        *[(MCR, 0x08), (IER, 2), (FCR, None), (IER, 0), (IER, 2), (FCR, None), (IER, 0)],
        *[(IER, 2), (LSR, None), (FCR, None), (IER, 0), (FCR, None)],
        *[(LSR, None), (THR, None), (FCR, None), (MSR, None), (IER, 5), (LCR, 0x83), (0, 0x18), (1, 0), (0, None)],
        *[(LCR, 3), (FCR, 0x81), (MCR, 0x0B), (MCR, None), (LCR, None), (IER, None), (FCR, None)],
        *[(THR, 0x41), (LSR, None), (IER, 7), (FCR, None), (FCR, None), (THR, 0x42), (FCR, None), (FCR, None)],
    ]

    assert uart_answers(board, steps) == uart_answers(qemu, steps)


@pytest.mark.parametrize("seed", range(5))
def test_arbitrary_accesses_see_the_same_port(qemu: Qemu, board: RiscvVirtBoard, seed: int) -> None:
    # Not in the draw: receiving, whose timeout QEMU lets depend on the clock, and what this UART leaves out.
    drawn = random.Random(seed)
    # FIFOs are turned on once: a FIFO reset makes QEMU report an empty transmitter anew, even when it was empty before.
    steps: list[Step] = [(FCR, 1), (IER, 2), (FCR, None), (IER, 0)]
    for _ in range(400):
        register = drawn.choice((THR, IER, IER, FCR, LCR, SCR))
        value = {
            THR: drawn.randrange(256),
            IER: drawn.randrange(16),
            FCR: drawn.choice((0x01, 0x41, 0x81, 0xC1)),
            LCR: drawn.choice((3, 3, 0x83)),
            SCR: drawn.randrange(256),
        }[register]
        steps.append((register, value))
        steps.append((drawn.choice((IER, FCR, FCR, LCR, MCR, LSR, MSR, SCR)), None))

    assert uart_answers(board, steps) == uart_answers(qemu, steps)


def test_uart_interrupt_takes_the_same_way_through_the_plic(qemu: Qemu, board: RiscvVirtBoard) -> None:
    def interrupt_and_serve(machine: Qemu | RiscvVirtBoard) -> list[int]:
        bus, context = (machine.bus, 0) if isinstance(machine, RiscvVirtBoard) else (machine, 1)
        enable, threshold, claim = ENABLE + 0x80 * context, THRESHOLD + 0x1000 * context, CLAIM + 0x1000 * context
        seen: list[int] = []

        def look(*registers: int) -> None:
            seen.extend(bus.read(PLIC_BASE + register, 4) for register in registers)

        look(PRIORITY, PENDING, enable, threshold, claim)
        bus.write(UART_BASE + IER, 1, 2)
        look(PENDING, claim)
        bus.write(PLIC_BASE + PRIORITY, 4, 0xFF)
        # Not compared: a claim below the threshold, which this QEMU refuses and the specification allows.
        bus.write(PLIC_BASE + threshold, 4, 0x3)
        bus.write(PLIC_BASE + enable, 4, 1 << 10)
        look(PRIORITY, threshold, enable, PENDING)
        look(claim, PENDING, claim)
        bus.read(UART_BASE + FCR, 1)
        bus.write(PLIC_BASE + claim, 4, 10)
        look(PENDING, claim)
        bus.write(UART_BASE + THR, 1, 0x41)
        look(PENDING, claim, PENDING)
        return seen

    assert interrupt_and_serve(board) == interrupt_and_serve(qemu)
