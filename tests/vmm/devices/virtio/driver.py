"""A driver in Python for tests: it does through a slot's registers and guest memory what Linux's drivers do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vmm.devices.virtio.device import EVENT_IDX, INDIRECT_DESC, VERSION_1, VirtioDevice
from vmm.devices.virtio.mmio import VirtioMmio
from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, NEXT, WRITE
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

BASE = 0x8000_0000
PAGE = 4096


class Loop:
    """An event loop on a thread, as a VM has one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop")
        self._thread.start()

    def run(self, function, *arguments):
        """Call ``function`` on the loop's thread and wait for what it returns."""

        async def call():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class Buffer:
    """What the driver gave to the device in one chain, and what came back."""

    head: int
    descriptors: list[int]
    parts: list[tuple[int, int]]  # address and length of the writable segments
    written: int | None = None


@dataclass
class DriverQueue:
    """The driver's half of a queue."""

    number: int
    size: int
    table: int
    available: int
    used: int
    free: list[int] = field(default_factory=list)
    next_available: int = 0
    next_used: int = 0
    buffers: dict[int, Buffer] = field(default_factory=dict)


class Driver:
    """A slot with ``device`` in it, and the driver that uses it. A context manager.

    Memory is handed out from the bottom and never taken back.
    """

    def __init__(self, device: VirtioDevice, memory_size: int = 16 << 20, shared: bool = False) -> None:
        self.device = device
        self.memory = GuestMemory(BASE, memory_size, shared)
        self._next = BASE
        self.interrupted = threading.Event()
        self.interrupts = 0
        self.crashes: list[BaseException] = []
        self.loop = Loop()
        self.line = IrqLine(self._level)
        try:
            self.slot = self.loop.run(VirtioMmio, device, self.memory, self.line, self.loop.loop, self.crashes.append)
        except BaseException:
            self.loop.close()
            self.memory.close()
            raise
        self.queues: list[DriverQueue] = []

    def _level(self, level: bool) -> None:
        if level:
            self.interrupts += 1
            self.interrupted.set()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.slot.unplug()
        try:
            self.loop.run(self.device.close)
        finally:
            self.loop.close()
            self.memory.close()
        assert not self.crashes, self.crashes

    # Registers.

    def get(self, offset: int) -> int:
        return self.slot.read(offset, 4)

    def set(self, offset: int, value: int) -> None:
        self.slot.write(offset, 4, value)

    def config(self, offset: int, width: int) -> int:
        return self.slot.read(0x100 + offset, width)

    @property
    def offered(self) -> int:
        self.set(0x14, 0)
        low = self.get(0x10)
        self.set(0x14, 1)
        return low | self.get(0x10) << 32

    @property
    def needs_reset(self) -> bool:
        return bool(self.get(0x70) & 64)

    def negotiate(self, features: int | None = None) -> bool:
        """Reset, and accept ``features`` (by default all that are offered); False if the device refuses them."""
        self.set(0x70, 0)
        self.queues = []
        self.set(0x70, 1)
        self.set(0x70, 3)
        accepted = self.offered if features is None else features | VERSION_1
        for word in (0, 1):
            self.set(0x24, word)
            self.set(0x20, accepted >> 32 * word & 0xFFFF_FFFF)
        self.set(0x70, 11)
        self.accepted = accepted
        return bool(self.get(0x70) & 8)

    def start(self, features: int | None = None, size: int = 64) -> None:
        """Bring the device up with all its queues, as 3.1.1 says."""
        assert self.negotiate(features)
        for number in range(len(self.device.queues)):
            self.add_queue(number, size)
        self.set(0x70, 15)

    def add_queue(self, number: int, size: int) -> DriverQueue:
        self.set(0x30, number)
        size = min(size, self.get(0x34))
        queue = DriverQueue(
            number, size, self.allocate(16 * size), self.allocate(6 + 2 * size), self.allocate(6 + 8 * size)
        )
        queue.free = list(range(size))
        self.set(0x38, size)
        for offset, address in ((0x80, queue.table), (0x90, queue.available), (0xA0, queue.used)):
            self.set(offset, address & 0xFFFF_FFFF)
            self.set(offset + 4, address >> 32)
        self.set(0x44, 1)
        assert self.get(0x44) == 1
        self.queues.append(queue)
        return queue

    # Memory and buffers.

    def allocate(self, length: int, alignment: int = 64) -> int:
        address = self._next + -self._next % alignment
        self._next = address + length
        assert self._next <= self.memory.end, "the test's guest memory is used up"
        return address

    def place(self, data: bytes) -> int:
        address = self.allocate(max(len(data), 1))
        self.memory.write(address, data)
        return address

    def add(
        self, number: int, readable: Sequence[bytes] = (), writable: Sequence[int] = (), indirect: bool = False
    ) -> Buffer:
        """Make a buffer available in queue ``number``: the parts to read and the sizes of the parts to write."""
        queue = self.queues[number]
        parts = [(self.place(data), len(data), 0) for data in readable]
        parts += [(self.allocate(length), length, WRITE) for length in writable]
        own = [(address, length) for address, length, flags in parts if flags & WRITE]
        if indirect:
            table = b"".join(
                DESCRIPTOR.pack(address, length, flags | (NEXT if n + 1 < len(parts) else 0), n + 1)
                for n, (address, length, flags) in enumerate(parts)
            )
            parts = [(self.place(table), len(table), INDIRECT)]
        taken = [queue.free.pop(0) for _ in parts]
        for n, (address, length, flags) in enumerate(parts):
            last = n + 1 == len(parts)
            self.describe(number, taken[n], address, length, flags | (0 if last else NEXT), 0 if last else taken[n + 1])
        buffer = Buffer(taken[0], taken, own)
        queue.buffers[taken[0]] = buffer
        self.offer(number, taken[0])
        return buffer

    def add_at(self, number: int, *parts: tuple[int, int]) -> Buffer:
        """Make parts of memory to write, address and length, available in queue ``number``."""
        queue = self.queues[number]
        taken = [queue.free.pop(0) for _ in parts]
        for place, (address, length) in enumerate(parts):
            more = place + 1 < len(parts)
            following = taken[place + 1] if more else 0
            self.describe(number, taken[place], address, length, WRITE | (NEXT if more else 0), following)
        buffer = queue.buffers[taken[0]] = Buffer(taken[0], taken, list(parts))
        self.offer(number, taken[0])
        return buffer

    def describe(self, number: int, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        """Write one descriptor, whatever it says."""
        packed = DESCRIPTOR.pack(address, length, flags, following)
        self.memory.write(self.queues[number].table + 16 * index, packed)

    def offer(self, number: int, head: int) -> None:
        """Put a head into the available ring."""
        queue = self.queues[number]
        self.memory.write_int(queue.available + 4 + 2 * (queue.next_available % queue.size), 2, head)
        queue.next_available = (queue.next_available + 1) & 0xFFFF
        self.memory.write_int(queue.available + 2, 2, queue.next_available)

    def notify(self, number: int) -> None:
        self.set(0x50, number)

    def acknowledge(self) -> int:
        """Read and acknowledge the interrupt status."""
        status = self.get(0x60)
        self.interrupted.clear()
        self.set(0x64, status)
        return status

    def collect(self, number: int) -> list[Buffer]:
        """The buffers that the device gave back since the last time; asks to be interrupted for the next one."""
        queue, found = self.queues[number], []
        while self.memory.read_int(queue.used + 2, 2) != queue.next_used:
            element = queue.used + 4 + 8 * (queue.next_used % queue.size)
            buffer = queue.buffers.pop(self.memory.read_int(element, 4))
            buffer.written = self.memory.read_int(element + 4, 4)
            queue.free += buffer.descriptors
            queue.next_used = (queue.next_used + 1) & 0xFFFF
            found.append(buffer)
        if self.accepted & EVENT_IDX:
            self.memory.write_int(queue.available + 4 + 2 * queue.size, 2, queue.next_used)
        return found

    def wait(self, number: int, count: int = 1, seconds: float = 10) -> list[Buffer]:
        """Wait, by interrupts, until the device gave ``count`` buffers back."""
        found: list[Buffer] = []
        while True:
            self.acknowledge()
            found += self.collect(number)
            if len(found) >= count:
                return found
            assert self.interrupted.wait(seconds), f"{len(found)} of {count} buffers came back"

    def contents(self, buffer: Buffer) -> bytes:
        """What the device wrote into a buffer."""
        data = b"".join(self.memory.read(address, length) for address, length in buffer.parts)
        return data[: buffer.written]

    def request(
        self, number: int, readable: Sequence[bytes] = (), writable: Sequence[int] = (), indirect: bool = False
    ) -> bytes:
        """One buffer through the queue and back; what the device wrote."""
        buffer = self.add(number, readable, writable, indirect and bool(self.accepted & INDIRECT_DESC))
        self.notify(number)
        (done,) = self.wait(number)
        assert done is buffer
        return self.contents(buffer)


@contextmanager
def driven(device: VirtioDevice, features: int | None = None, size: int = 64) -> Iterator[Driver]:
    """A device that is up, with its driver."""
    with Driver(device) as driver:
        driver.start(features, size)
        yield driver
