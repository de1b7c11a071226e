"""A bare program on a small machine: one hart, RAM and a serial port, and somebody who types.

The machine is the library's own parts (memory, engine, bus, UART at 0x1000_0000) with the shortest loop that can serve
them: the first notebook writes the same loop by hand. Of SBI it knows only system reset (SRST, SBI specification 2.0,
chapter 10); other calls are answered "not supported". There is no interrupt controller. Until the program sets stvec,
that points at an instruction which ends the run, so that the first trap is the one that is told of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

RAM_BASE: Final = 0x8000_0000
RAM_BYTES: Final = 1 << 20
UART_BASE: Final = 0x1000_0000
SBI_SRST: Final = 0x5352_5354
_SBI_NOT_SUPPORTED: Final = -2
_LINE_STATUS: Final = 5
_TRAP_VECTOR: Final = RAM_BASE + RAM_BYTES - 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a bare program went.

    Attributes:
        ended: ``shut down``; ``trapped``, and it had set no handler; ``budget``: it did not end; ``halted``: it waits
            for an interrupt that nobody sends; or ``stuck``: its own handler cannot be fetched.
        printed: what it sent through the UART.
        instructions: how many it retired.
        exits: how often it left guest code.
        pc: where it stood.
        trap: what it trapped for, "" if it did not end so.
        trapped_at: the address of the instruction that trapped.
        status_reads: how often it looked at the UART's line status register.
        unread: typed bytes that it never read.
    """

    ended: str
    printed: bytes
    instructions: int
    exits: int
    pc: int
    trap: str = ""
    trapped_at: int = 0
    status_reads: int = 0
    unread: int = 0


class _SlowTypist:
    """A UART behind which somebody types one byte at a time, each after the program has found no data twice."""

    def __init__(self, typed: bytes, output: Callable[[bytes], None]) -> None:
        from vmm.devices.uart16550 import Uart16550
        from vmm.irq import IrqLine

        self._uart = Uart16550(output, IrqLine(lambda level: None))
        self._rest = bytearray(typed)
        self._patience = 2
        self.status_reads = 0

    @property
    def unread(self) -> int:
        return len(self._rest) + self._uart.queued

    def read(self, offset: int, width: int) -> int:
        if offset == _LINE_STATUS:
            self.status_reads += 1
            if not self._uart.queued and self._rest:
                self._patience -= 1
                if self._patience < 0:
                    self._patience = 2
                    self._uart.receive(bytes([self._rest.pop(0)]))
        return self._uart.read(offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        self._uart.write(offset, width, value)


def run_bare(program: bytes, typed: bytes = b"", budget: int = 2_000_000) -> Outcome:
    """Run ``program`` from 0x8000_0000 until it ends, or has retired ``budget`` instructions.

    Raises:
        GuestAddressError: the program is larger than the machine's memory.
    """
    from vmm.bus import Bus
    from vmm.devices.uart16550 import UART_SIZE
    from vmm.engine.base import ExitReason
    from vmm.engine.rv64.assembler import assemble
    from vmm.engine.rv64.hart import Rv64Engine
    from vmm.engine.rv64.registers import EXCEPTIONS
    from vmm.errors import BusError
    from vmm.memory import GuestMemory

    printed, bus, exits, ended = bytearray(), Bus(), 0, ""
    uart = _SlowTypist(typed, printed.extend)
    bus.attach(uart, UART_BASE, UART_SIZE, "uart")
    with GuestMemory(RAM_BASE, RAM_BYTES) as memory, Rv64Engine(memory, clock="deterministic") as engine:
        hart = engine.harts[0]
        memory.write(RAM_BASE, program)
        memory.write(_TRAP_VECTOR, assemble("ecall"))
        hart.reset(RAM_BASE)
        hart.csr["stvec"] = _TRAP_VECTOR
        while not ended:
            left = hart.run(max(budget - hart.instructions, 0))
            exits += 1
            try:
                match left.reason:
                    case ExitReason.MMIO_READ:
                        hart.complete_read(bus.read(left.address, left.width))
                    case ExitReason.MMIO_WRITE:
                        bus.write(left.address, left.width, left.value)
                    case ExitReason.SBI_CALL if hart.pc == _TRAP_VECTOR:
                        ended = "trapped"
                    case ExitReason.SBI_CALL if left.args[7] == SBI_SRST:
                        ended = "shut down"
                    case ExitReason.SBI_CALL:
                        hart.complete_sbi(_SBI_NOT_SUPPORTED, 0)
                    case _:
                        ended = left.reason.name.lower()
            except BusError:
                hart.bus_fault()
        return Outcome(
            ended=ended,
            printed=bytes(printed),
            instructions=hart.instructions,
            exits=exits,
            pc=hart.pc,
            trap=EXCEPTIONS.get(hart.csr["scause"], "interrupt") if ended == "trapped" else "",
            trapped_at=hart.csr["sepc"],
            status_reads=uart.status_reads,
            unread=uart.unread,
        )
