"""A driver that fits on one page: it brings a device up and gives it buffers, without a guest (virtio 1.2, 3.1.1).

It is for trying a device, and for breaking the rules: descriptors and rings are written as they are told. It uses what
Linux's drivers use, a slot's registers and memory. One queue, the first; no indirect tables of its own making; no event
index, so that every used buffer interrupts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kata_lab.lab.machines import LabError
from kata_lab.lab.virtqueue_view import Frame, take_frame

if TYPE_CHECKING:
    from vmm.devices.virtio.device import VirtioDevice

BASE: Final = 0x8000_0000
MEMORY_BYTES: Final = 1 << 20
SIZE: Final = 8  #: entries of the queue
TABLE: Final = BASE
AVAILABLE: Final = BASE + 0x1000
USED: Final = BASE + 0x2000
BUFFERS: Final = BASE + 0x10000  #: memory from here is for whoever uses the driver
_GAP: Final = 64  # between buffers, so that no two of them touch


class HandDriver:
    """A device in a slot, with one queue of :data:`SIZE` entries; a context manager, which closes the device.

    Attributes:
        memory: 1 MiB at 0x8000_0000.
        slot: the registers.
        interrupts: how often the line was raised.
        crashes: exceptions of the device's code.
    """

    def __init__(self, device: VirtioDevice) -> None:
        from vmm.devices.virtio.mmio import VirtioMmio
        from vmm.irq import IrqLine
        from vmm.loop_thread import LoopThread
        from vmm.memory import GuestMemory

        self.interrupts = 0
        self.crashes: list[BaseException] = []
        self._free = BUFFERS
        self._offered = self._collected = 0
        self._buffers: dict[int, list[tuple[int, int]]] = {}
        self._device = device
        with contextlib.ExitStack() as built:
            self.memory = built.enter_context(GuestMemory(BASE, MEMORY_BYTES))
            thread = LoopThread()
            built.callback(thread.stop)
            self._loop = thread.start()
            built.callback(self._close_device)
            self.slot = VirtioMmio(device, self.memory, IrqLine(self._level), self._loop, self.crashes.append)
            built.callback(self.slot.unplug)
            self._built = built.pop_all()

    def _level(self, level: bool) -> None:
        self.interrupts += level

    def read(self, offset: int) -> int:
        """A register."""
        return self.slot.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        """Write a register."""
        self.slot.write(offset, 4, value)

    @property
    def status(self) -> int:
        """The device status (2.1)."""
        return self.read(0x070)

    def start(self, refuse: int = 0) -> None:
        """Bring the device up, step by step as 3.1.1 says; also after a reset.

        Args:
            refuse: features not to accept, besides the event index.

        Raises:
            LabError: the device does not take the features, or has no queue.
        """
        from vmm.devices.virtio.device import EVENT_IDX

        self._offered = self._collected = 0
        self._buffers.clear()
        self.memory.write(TABLE, bytes(BUFFERS - TABLE))
        self.write(0x070, 0)  # 1. reset
        self.write(0x070, 1)  # 2. ACKNOWLEDGE: a device has been noticed
        self.write(0x070, 1 | 2)  # 3. DRIVER: there is one for it
        for word in (0, 1):  # 4. features: read what is offered, write what is understood
            self.write(0x014, word)
            self.write(0x024, word)
            self.write(0x020, self.read(0x010) & ~((EVENT_IDX | refuse) >> 32 * word))
        self.write(0x070, 1 | 2 | 8)  # 5. FEATURES_OK
        if not self.status & 8:  # 6. does the device agree?
            raise LabError("the device does not work with these features, it took FEATURES_OK back")
        self.write(0x030, 0)  # 7. the queue: how large, and where
        if not self.read(0x034):
            raise LabError("the device has no queue 0: what does its `queue_sizes` say?")
        self.write(0x038, min(SIZE, self.read(0x034)))
        for register, address in ((0x080, TABLE), (0x090, AVAILABLE), (0x0A0, USED)):
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        self.write(0x044, 1)
        self.write(0x070, 1 | 2 | 8 | 4)  # 8. DRIVER_OK: go

    @property
    def size(self) -> int:
        """Entries of the queue."""
        return self.slot.device.queues[0].size

    def frame(self) -> Frame:
        """The queue as it is now."""
        return take_frame(self.slot, 0)

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor, whatever it says."""
        from vmm.devices.virtio.queue import DESCRIPTOR

        self.memory.write(TABLE + 16 * index, DESCRIPTOR.pack(address, length, flags, following))

    def offer(self, head: int, ahead: int = 1) -> None:
        """Put a head into the available ring, and the ring's index ``ahead`` by so many."""
        self.memory.write_int(AVAILABLE + 4 + 2 * (self._offered % self.size), 2, head)
        self._offered = self._offered + ahead & 0xFFFF
        self.memory.write_int(AVAILABLE + 2, 2, self._offered)

    def notify(self) -> None:
        """Tell the device."""
        self.write(0x050, 0)

    def ask(self, *buffers: Sequence[int]) -> list[bytes | None]:
        """Offer buffers that the device may write, all in one notification.

        Args:
            buffers: of each, the bytes of its parts; all together at most as many parts as the queue has entries.

        Returns:
            For each, what the device says it wrote, or None if it did not come back.
        """
        from vmm.devices.virtio.queue import NEXT, WRITE

        index = 0
        heads = []
        for sizes in buffers:
            heads.append(index)
            parts = []
            for number, size in enumerate(sizes):
                address = self._room(size)
                parts.append((address, size))
                more = NEXT if number + 1 < len(sizes) else 0
                self.describe(index, address, size, WRITE | more, index + 1 if more else 0)
                index += 1
            self._buffers[heads[-1]] = parts
        for head in heads:
            self.offer(head)
        self.notify()
        came = dict(self.collect())
        return [self._content(head, came[head]) if head in came else None for head in heads]

    def _room(self, size: int) -> int:
        if self._free + size + _GAP > self.memory.end:
            self._free = BUFFERS
        address, self._free = self._free, self._free + size + _GAP
        self.memory.write(address, bytes(size))
        return address

    def _content(self, head: int, written: int) -> bytes:
        return b"".join(self.memory.read(address, size) for address, size in self._buffers[head])[:written]

    def collect(self) -> list[tuple[int, int]]:
        """What came back in the used ring since the last time: (head, bytes written). Acknowledges the interrupt."""
        self.write(0x064, self.read(0x060))
        found = []
        while self.memory.read_int(USED + 2, 2) != self._collected:
            element = USED + 4 + 8 * (self._collected % self.size)
            found.append((self.memory.read_int(element, 4), self.memory.read_int(element + 4, 4)))
            self._collected = self._collected + 1 & 0xFFFF
        return found

    def close(self) -> None:
        """Take the device out and close it; a second call does nothing."""
        self._built.close()

    def _close_device(self) -> None:
        """On the event loop's thread, as a VM does."""

        async def close() -> None:
            self._device.close()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()

    def __enter__(self) -> HandDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
