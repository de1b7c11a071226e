"""A queue with the driver's half of it, which writes whatever a test wants into rings and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, MAX_QUEUE_SIZE, NEXT, Chain, Queue
from vmm.memory import GuestMemory

BASE = 0x8000_0000
SIZE = 4 << 20
END = BASE + SIZE
TABLE, AVAILABLE, USED, INDIRECT_TABLE, DATA = BASE, BASE + 0x8000, BASE + 0x10000, BASE + 0x20000, BASE + 0x100000

Part = tuple[int, int, int]  # address, length, flags


class Rings:
    """A queue, and the driver's half of it."""

    def __init__(self, memory: GuestMemory, size: int, event_index: bool, indirect: bool, start: int) -> None:
        self.memory = memory
        self.size = size
        self.interrupts = 0
        self.index = start
        memory.write(BASE, bytes(0x20000))
        memory.write_int(AVAILABLE + 2, 2, start)
        memory.write_int(USED + 2, 2, start)
        self.queue = Queue(memory, MAX_QUEUE_SIZE, self._interrupt)
        self.queue.size = size
        self.queue.descriptors, self.queue.available, self.queue.used = TABLE, AVAILABLE, USED
        self.queue.enable(event_index, indirect)
        if start:
            state = dataclasses.replace(
                self.queue.save(), next_available=start, next_used=start, signalled=start, ready=True
            )
            self.queue.restore(state, event_index, indirect)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def describe(self, index: int, address: int, length: int, flags: int, follower: int = 0) -> None:
        self.memory.write(TABLE + 16 * index, DESCRIPTOR.pack(address, length, flags, follower))

    def chain(self, parts: list[Part], first: int = 0, table: int | None = None) -> None:
        """Write descriptors that follow each other, into the queue's table or an indirect one."""
        packed = b"".join(
            DESCRIPTOR.pack(address, length, flags | (NEXT if number + 1 < len(parts) else 0), first + number + 1)
            for number, (address, length, flags) in enumerate(parts)
        )
        self.memory.write((TABLE if table is None else table) + 16 * first, packed)

    def indirect(self, parts: list[Part], index: int = 0, flags: int = INDIRECT) -> None:
        self.chain(parts, table=INDIRECT_TABLE)
        self.describe(index, INDIRECT_TABLE, 16 * len(parts), flags)

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.memory.write_int(AVAILABLE + 4 + 2 * (self.index % self.size), 2, head)
            self.index = self.index + 1 & 0xFFFF
        self.memory.write_int(AVAILABLE + 2, 2, self.index)

    def take(self) -> Chain:
        """The buffer at descriptor 0."""
        self.offer(0)
        chain = self.queue.pop()
        assert chain is not None
        return chain

    @property
    def used_index(self) -> int:
        return self.memory.read_int(USED + 2, 2)

    def used(self, number: int) -> tuple[int, int]:
        element = USED + 4 + 8 * (number % self.size)
        return self.memory.read_int(element, 4), self.memory.read_int(element + 4, 4)

    @property
    def avail_event(self) -> int:
        return self.memory.read_int(USED + 4 + 8 * self.size, 2)

    def want(self, used_event: int) -> None:
        self.memory.write_int(AVAILABLE + 4 + 2 * self.size, 2, used_event)


@contextmanager
def rings(size: int = 8, event_index: bool = False, indirect: bool = True, start: int = 0) -> Iterator[Rings]:
    with GuestMemory(BASE, SIZE) as memory:
        made = Rings(memory, size, event_index, indirect, start)
        try:
            yield made
        finally:
            made.queue.release()
