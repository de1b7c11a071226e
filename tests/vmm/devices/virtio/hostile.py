"""A driver that means harm: random registers, rings, descriptors and notifications, from a seed.

Everything that it names lies in the playground, the last part of guest memory, or outside memory; what is below the
playground was named by nobody and must stay as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.vmm.devices.virtio.driver import BASE, Driver
from vmm.devices.virtio.device import VERSION_1, VirtioDevice
from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, MAX_QUEUE_SIZE, NEXT, WRITE

MEMORY = 4 << 20
PLAYGROUND = BASE + (3 << 20)
END = BASE + MEMORY
GUARD = bytes(range(1, 256)) * (3 * 4096 + 48 + 1)

QUEUE_REGISTERS = (0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4)
REGISTERS = (0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, *QUEUE_REGISTERS)
WORDS = (0, 1, 2, 3, 4, 7, 8, 11, 15, 64, 128, 255, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)

#: Makes the beginning of a request that a device of some kind may take for a good one.
Request = Callable[[random.Random], bytes]


class HostileDriver:
    """One stream of misdeeds against a device.

    Args:
        device: what is attacked; it belongs to the driver that is made of it.
        seed: decides what happens.
        requests: beginnings of requests.
        shapes: of each queue's buffers, ``r`` with parts to read, ``w`` with parts to write, or both; the last one is
            that of all further queues.
        guard: fills the memory that nobody names; zeros for a device that may be told to forget any page.
        host: called now and then, with the stream's random numbers: what the device's other side does.
    """

    def __init__(
        self,
        device: VirtioDevice,
        seed: int,
        requests: Sequence[Request] = (),
        shapes: Sequence[str] = ("rw",),
        guard: bool = True,
        host: Callable[[random.Random], None] | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.driver = Driver(device, MEMORY)
        self.requests = requests
        self.shapes = shapes
        #: How often it does anything but to send requests.
        self.malice = self.random.choice((0.02, 0.2, 0.7))
        self.host = host
        self.guard = GUARD[: PLAYGROUND - BASE] if guard else bytes(PLAYGROUND - BASE)
        self.driver.memory.write(BASE, self.guard)
        self.callbacks: list[str] = []
        self.driver.loop.loop.set_exception_handler(lambda _, context: self.callbacks.append(str(context)))
        self.rings: list[tuple[int, int, int, int]] = []  # size, table, available, used of each queue
        self.indices: list[int] = []

    def run(self, steps: int) -> None:
        """Do harm, and look at what must hold."""
        self.set_up()
        often = [self.describe, self.offer, self.notify, self.scribble, self.configuration]
        seldom = [self.write_register, self.read_registers, self.jump, self.set_up, self.pause]
        for step in range(steps):
            act = self.random.choice(2 * often + seldom) if self.random.random() < self.malice else self.request
            act()
            if self.driver.needs_reset:
                self.set_up()
            if self.host is not None and step % 32 == 31:
                self.host(self.random)
            if step % 64 == 63:
                self.check()
        self.check()

    def repent(self) -> Driver:
        """The same device's driver, from now on one that means well."""
        self.driver.memory.write(BASE, bytes(PLAYGROUND - BASE))
        self.driver.start()
        return self.driver

    def check(self) -> None:
        """What holds whatever a driver does."""
        driver = self.driver
        assert not driver.crashes, driver.crashes
        assert not self.callbacks, self.callbacks
        with driver.device.lock:
            for queue in driver.device.queues:
                if driver.device.active and queue.ready:
                    view = queue.view()
                    taken = view["next_available"] - view["next_used"] & 0xFFFF
                    assert taken == len(view["held"]) <= queue.size, "the used ring is ahead of what was taken"
                    assert not queue.lost
        left_alone = driver.memory.read(BASE, PLAYGROUND - BASE) == self.guard
        assert left_alone, "memory that no descriptor names was written"

    # Numbers.

    def address(self) -> int:
        choose = self.random.random()
        if choose < 0.85:
            return self.random.randrange(PLAYGROUND, END)
        return self.random.choice(
            (0, 1, BASE - 1, END - 1, END, END + 4096, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096, 0x1000_1000)
        )

    def length(self) -> int:
        choose = self.random.random()
        if choose < 0.7:
            return self.random.choice((1, 2, 4, 8, 12, 16, 24, 40, 44, 56, 64, 80, 104, 512, 4096))
        if choose < 0.9:
            return self.random.randrange(0, 9000)
        return self.random.choice((0, 65536, 1 << 20, 0x7FFF_FFFF, 0xFFFF_FFFF))

    # Acts.

    def set_up(self) -> None:
        """Reset and initialise, more or less as 3.1.1 says."""
        driver, rand = self.driver, self.random
        accepted = driver.offered
        if rand.random() < 0.5:
            accepted &= rand.getrandbits(64)
        if rand.random() < 0.05:
            accepted |= rand.getrandbits(64)
        driver.negotiate(accepted | VERSION_1)
        self.rings, self.indices = [], []
        for number in range(len(driver.device.queues)):
            size = 1 << rand.randrange(0, 8) if rand.random() < 0.95 else rand.choice(WORDS)
            driver.set(0x30, number)
            size = min(size, driver.get(0x34)) if rand.random() < 0.95 else size
            places = [rand.randrange(PLAYGROUND, END - 20_000) & ~15 for _ in range(3)]
            if rand.random() < 0.03:
                places[rand.randrange(3)] = self.address()
            driver.set(0x38, size)
            for register, place in zip((0x80, 0x90, 0xA0), places, strict=True):
                driver.set(register, place & 0xFFFF_FFFF)
                driver.set(register + 4, place >> 32)
            if driver.get(0x44) == 0:
                for place in places:
                    self.poke(place, bytes(8))
                self.poke(places[1], bytes(4))
            driver.set(0x44, 1)
            self.rings.append((min(size, MAX_QUEUE_SIZE), *places))
            self.indices.append(0)
        driver.set(0x70, 15)

    def poke(self, address: int, data: bytes) -> None:
        """Write, as a hart of the guest would, to the playground only."""
        if PLAYGROUND <= address <= END - len(data):
            self.driver.memory.write(address, data)

    def queue(self) -> int:
        return self.random.randrange(len(self.rings))

    def describe(self, flags: int | None = None) -> None:
        size, table, _, _ = self.rings[self.queue()]
        rand = self.random
        flags = rand.choice((0, NEXT, WRITE, NEXT | WRITE, INDIRECT, rand.getrandbits(16)))
        entry = DESCRIPTOR.pack(self.address(), self.length(), flags, rand.randrange(0, size + 2) & 0xFFFF)
        self.poke(table + 16 * rand.randrange(0, max(size, 1)), entry)

    def offer(self) -> None:
        number, rand = self.queue(), self.random
        size, _, available, _ = self.rings[number]
        if not size:
            return
        for _ in range(rand.choice((1, 1, 1, 2, 3, size, size + 1))):
            head = rand.randrange(size) if rand.random() < 0.98 else rand.getrandbits(16)
            self.poke(available + 4 + 2 * (self.indices[number] % size), head.to_bytes(2, "little"))
            self.indices[number] = self.indices[number] + 1 & 0xFFFF
        self.poke(available + 2, self.indices[number].to_bytes(2, "little"))
        self.driver.notify(number)

    def request(self) -> None:
        """A chain that is well-formed as a chain: some parts to read, some to write."""
        rand, number = self.random, self.queue()
        size, table, available, _ = self.rings[number]
        if not size:
            return
        shape = self.shapes[min(number, len(self.shapes) - 1)] if rand.random() > self.malice / 4 else "rw"
        parts: list[tuple[int, int, int]] = []
        if "r" in shape and self.requests and rand.random() < 0.95:
            start = bytearray(rand.choice(self.requests)(rand))
            if rand.random() < self.malice:
                start[rand.randrange(len(start))] = rand.getrandbits(8)
            place = rand.randrange(PLAYGROUND, END - 8192)
            self.poke(place, bytes(start))
            parts.append((place, len(start), 0))
        if "r" in shape:
            parts += self.parts(rand.choice((0, 0, 0, 1, 2)), 0)
        if "w" in shape:
            parts += self.parts(1, WRITE, least=16 if rand.random() > self.malice / 2 else 1)
            parts += self.parts(rand.choice((0, 0, 1, 2)), WRITE)
        parts = parts or self.parts(1, 0)
        if indirect := len(parts) > size or rand.random() < 0.3:
            place = rand.randrange(PLAYGROUND, END - 4096)
            self.poke(place, self.chain(parts, 0))
            parts = [(place, DESCRIPTOR.size * len(parts), INDIRECT)]
        first = rand.randrange(size - len(parts) + 1)
        self.poke(table + DESCRIPTOR.size * first, self.chain(parts, 0 if indirect else first))
        self.poke(available + 4 + 2 * (self.indices[number] % size), first.to_bytes(2, "little"))
        self.indices[number] = self.indices[number] + 1 & 0xFFFF
        self.poke(available + 2, self.indices[number].to_bytes(2, "little"))
        self.driver.notify(number)

    @staticmethod
    def chain(parts: Sequence[tuple[int, int, int]], first: int) -> bytes:
        """Descriptors that follow each other from number ``first`` on."""
        return b"".join(
            DESCRIPTOR.pack(
                address, length, flags | (NEXT if n < len(parts) else 0), first + n if n < len(parts) else 0
            )
            for n, (address, length, flags) in enumerate(parts, 1)
        )

    def parts(self, count: int, flags: int, least: int = 1) -> list[tuple[int, int, int]]:
        return [
            (self.random.randrange(PLAYGROUND, END - 70_000), max(self.length() & 0xFFFF, least), flags)
            for _ in range(count)
        ]

    def jump(self) -> None:
        """An available index from nowhere."""
        number = self.queue()
        self.indices[number] = self.random.choice(
            (self.indices[number] - 1 & 0xFFFF, self.indices[number] + 2 & 0xFFFF, self.random.getrandbits(16))
        )
        self.poke(self.rings[number][2] + 2, self.indices[number].to_bytes(2, "little"))

    def pause(self) -> None:
        """The VM is paused, its device saved and perhaps put back, as a snapshot would do."""
        self.driver.loop.run(self._pause, self.random.random() < 0.5)

    def _pause(self, restore: bool) -> None:
        slot, device = self.driver.slot, self.driver.device
        with device.lock:
            device.pause()
        state = slot.save()
        if restore:
            slot.restore(state)
            again = slot.save()
            assert (again.status, again.device.queues) == (state.status, state.device.queues)
        with device.lock:
            device.resume()

    def notify(self) -> None:
        choices = (self.queue(), self.queue(), self.queue(), len(self.rings), self.random.getrandbits(32))
        self.driver.notify(self.random.choice(choices))

    def scribble(self) -> None:
        """Random bytes somewhere, often over rings."""
        number = self.queue()
        place = self.random.choice((*self.rings[number][1:], self.random.randrange(PLAYGROUND, END)))
        self.poke(place + self.random.randrange(0, 64), self.random.randbytes(self.random.randrange(1, 16)))

    def write_register(self) -> None:
        rand = self.random
        value = rand.choice((*WORDS, rand.getrandbits(32), PLAYGROUND & 0xFFFF_FFFF))
        width = rand.choice((4, 4, 4, 4, 1, 2, 8))
        offset = rand.choice(REGISTERS) if rand.random() < 0.9 else rand.randrange(0, 0x100)
        # A ring that reaches out of the playground would be named by the driver, too.
        if offset not in QUEUE_REGISTERS:
            self.driver.slot.write(offset, width, value)

    def read_registers(self) -> None:
        for offset in (0x10, 0x34, 0x44, 0x60, 0x70, 0xFC, self.random.randrange(0, 0x1000)):
            self.driver.slot.read(offset, self.random.choice((1, 2, 4, 8)))
        self.driver.acknowledge()

    def configuration(self) -> None:
        rand = self.random
        width = rand.choice((1, 2, 4, 8))
        offset = rand.choice((rand.randrange(0, 128), rand.randrange(0, 0xF00 - 8)))
        self.driver.config(offset, width)
        self.driver.slot.write(
            0x100 + offset, width, rand.choice((*WORDS, rand.getrandbits(64))) & (1 << 8 * width) - 1
        )
