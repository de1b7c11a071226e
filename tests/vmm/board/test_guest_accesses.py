"""Hostile guests: whatever a guest reads and writes, the devices answer or refuse, and stay usable."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.board.riscv_virt import PLIC_BASE, RAM_BASE, UART_BASE, RiscvVirtBoard, virtio_address
from vmm.console import Console
from vmm.devices.plic import PLIC_SIZE
from vmm.errors import BusError
from vmm.memory import GuestMemory

INTERESTING_VALUES = st.one_of(st.sampled_from([0, 1, 0xFF, 0xFFFF_FFFF, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1))
ADDRESSES = st.one_of(
    st.integers(UART_BASE, UART_BASE + 8),
    st.integers(UART_BASE - 8, UART_BASE + 0x110),
    st.integers(0, 130).map(lambda source: PLIC_BASE + 4 * source),
    st.integers(0, 8).map(lambda word: PLIC_BASE + 0x1000 + 4 * word),
    st.integers(0, 100).map(lambda word: PLIC_BASE + 0x2000 + 4 * word),
    st.tuples(st.integers(0, 3), st.sampled_from([0, 4, 8])).map(
        lambda at: PLIC_BASE + 0x20_0000 + 0x1000 * at[0] + at[1]
    ),
    st.integers(PLIC_BASE - 8, PLIC_BASE + PLIC_SIZE + 8),
    st.integers(virtio_address(0) - 8, virtio_address(8) + 8),
    st.integers(0, (1 << 56) - 1),
)
ACCESSES = st.tuples(
    st.sampled_from(["read", "write", "type", "wire"]), ADDRESSES, st.sampled_from([1, 2, 4, 8]), INTERESTING_VALUES
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESSES, max_size=60))
def test_arbitrary_accesses_are_answered_or_refused(accesses: list[tuple[str, int, int, int]]) -> None:
    raised = [False, False]

    def hear(context: int, level: bool) -> None:
        assert raised[context] != level
        raised[context] = level

    with GuestMemory(RAM_BASE, 4096) as memory:
        console = Console(limit=4096)
        board = RiscvVirtBoard(memory, console, [lambda level: hear(0, level), lambda level: hear(1, level)])
        for kind, address, width, value in accesses:
            with suppress(BusError):
                if kind == "read":
                    assert 0 <= board.bus.read(address, width) < 1 << 8 * width
                elif kind == "write":
                    board.bus.write(address, width, value)
                elif kind == "type":
                    board.uart.receive(value.to_bytes(8, "little"))
                else:
                    board.irq_line(1 + value % 96).set(bool(address & 1))

        # Whatever state the guest left behind, a driver that starts over finds a working port.
        board.bus.write(UART_BASE + 3, 1, 0x03)
        board.bus.write(UART_BASE + 4, 1, 0x03)
        board.bus.write(UART_BASE, 1, ord("!"))
        assert console.output.endswith(b"!")
