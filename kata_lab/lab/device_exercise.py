"""Exercises of notebook 3, "Inside a device": a captured request to read by hand, and a device to write.

The device is tried twice: with a driver of one page (:mod:`kata_lab.lab.hand_driver`), which says quickly and exactly
what is wrong, and then with Linux's own virtio-rng in a guest that boots for it.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved
from kata_lab.lab.hand_driver import HandDriver
from kata_lab.lab.machines import LabError
from kata_lab.lab.slot_probe import SlotProbe
from kata_lab.lab.virtqueue_view import Frame, Walk
from vmm.devices.virtio.blk import HEADER, SECTOR, T_IN, T_OUT
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import DESCRIPTOR, DeviceError
from vmm.errors import VmmError

if TYPE_CHECKING:
    from kata_lab.shell import GuestShell
    from vmm.devices.virtio.mmio import VirtioMmio

BLOCK: Final = 4096
KINDS: Final = {T_IN: "read", T_OUT: "write"}
_GUEST_BYTES: Final = 512
#: Bytes that the kernel may have taken for itself between two of ours.
_MOST_GAPS: Final = 4


@dataclass(frozen=True, slots=True)
class Capture:
    """A request to a disk as it lay in guest memory when the driver notified: bytes, not yet understood.

    Attributes:
        size: entries of the queue.
        descriptor_table: all of it.
        available_ring: all of it.
        used_ring: all of it.
        pieces: what the request's descriptors name: guest-physical address → bytes.
    """

    size: int
    descriptor_table: bytes
    available_ring: bytes
    used_ring: bytes
    pieces: tuple[tuple[int, bytes], ...]

    def memory(self, address: int, length: int) -> bytes:
        """Guest memory at that time.

        Raises:
            LabError: this request has nothing to do with that part of memory, so that it was not kept.
        """
        for base, data in self.pieces:
            if base <= address and address + length <= base + len(data):
                return data[address - base : address - base + length]
        raise LabError(
            f"{address:#x}+{length} was not captured: no descriptor of the request names it; is the address one of"
            " those in the table, and in little-endian order?"
        )


def capture(slot: VirtioMmio, frame: Frame, walk: Walk) -> Capture:
    """What lies in guest memory for a request that has not been served."""
    queue = slot.device.queues[frame.number]
    memory, size = queue.memory, queue.size
    return Capture(
        size,
        memory.read(queue.descriptors, 16 * size),
        memory.read(queue.available, 6 + 2 * size),
        memory.read(queue.used, 6 + 8 * size),
        tuple((part.address, memory.read(part.address, part.length)) for part in walk.parts),
    )


def capture_request(probe: SlotProbe, shell: GuestShell, seed: int | None = None) -> Capture:
    """Have the guest read or write somewhere on ``/dev/vda``, and capture the request before it is served.

    What is written is zeroes. ``seed`` makes the choice the same every time.
    """
    chosen = random.Random(seed)
    block, count = chosen.randrange(64, 512), chosen.randrange(1, 9)
    if chosen.random() < 0.5:
        place = block * BLOCK
        command = f"dd if=/dev/vda of=/dev/null bs={BLOCK * count} skip={place} count=1 iflag=direct,skip_bytes"
    else:
        command = f"dd if=/dev/zero of=/dev/vda bs={BLOCK} seek={block} count=1 oflag=direct"
    with probe.stop(lambda: shell.run(command, check=True)) as stopped:
        captured = capture(probe.slot, stopped.before, stopped.walk)
        stopped.go_on()
    return captured


@dataclass(frozen=True, slots=True)
class _Truth:
    """What a captured request is."""

    head: int
    kind: str
    sector: int
    data_address: int
    data_bytes: int


def _understand(captured: Capture) -> _Truth:
    """Reads a capture, with either form of chain; it has one new entry."""
    idx = int.from_bytes(captured.available_ring[2:4], "little")
    place = 4 + 2 * ((idx - 1) % captured.size)
    head = int.from_bytes(captured.available_ring[place : place + 2], "little")
    table, index = captured.descriptor_table, head
    parts: list[tuple[int, int, bool]] = []
    while True:
        address, length, flags, following = DESCRIPTOR.unpack_from(table, 16 * index)
        if flags & 4:
            table, index = captured.memory(address, length), 0
            continue
        parts.append((address, length, bool(flags & 2)))
        if not flags & 1:
            break
        index = following
    kind, _, sector = HEADER.unpack(captured.memory(parts[0][0], HEADER.size))
    data = parts[1:-1]
    return _Truth(head, KINDS[kind], sector, data[0][0], sum(length for _, length, _ in data))


@checks("03-read-a-request")
def check_reading(
    captured: Capture, kind: str | None, sector: int | None, data_bytes: int | None, data_address: int | None
) -> Feedback:
    """Whether a captured request was read rightly.

    Args:
        captured: by :func:`capture_request`.
        kind: ``"read"`` or ``"write"``.
        sector: the first one.
        data_bytes: of the data, without header and status.
        data_address: guest-physical, of the first byte of data.
    """
    if kind is None or sector is None or data_bytes is None or data_address is None:
        return not_yet("fill in all four answers in the cell above, run that cell, then this one again.")
    truth = _understand(captured)
    if kind not in KINDS.values():
        return not_right(f"`kind` is {kind!r}: it is 'read' or 'write'.")
    if kind != truth.kind:
        return not_right("`kind` is the other one: look at the first word of the header (virtio 1.2, 5.2.6).")
    if sector != truth.sector:
        hint = "the sector is the last 8 bytes of the header, in little-endian order."
        if sector == truth.sector * SECTOR:
            hint = "that is an offset in bytes, and a sector has 512 of them."
        elif sector == int.from_bytes(truth.sector.to_bytes(8, "little"), "big"):
            hint = "the bytes are right, their order is not."
        return not_right(f"`sector` is {sector!r}: {hint}")
    if data_bytes != truth.data_bytes:
        hint = "which descriptors are data, and which are header and status?"
        if data_bytes in (truth.data_bytes + 1, truth.data_bytes + HEADER.size, truth.data_bytes + HEADER.size + 1):
            hint = "header and status do not count."
        elif data_bytes % 16 == 0 and data_bytes < SECTOR:
            hint = "that may be the length of the indirect table: what do the descriptors in it say?"
        return not_right(f"`data_bytes` is {data_bytes!r}: {hint}")
    if data_address != truth.data_address:
        return not_right(
            f"`data_address` is {data_address!r}: it is the address in the descriptor behind that of the header."
        )
    return solved(
        f"a {truth.kind} of {truth.data_bytes} bytes at sector {truth.sector}: you can read what a driver wrote."
    )


# The device.


@checks("03-counting")
def check_counting(device: Any, image: str = "toolbox", boot: bool = True) -> Feedback:
    """Whether a class is an entropy source that counts: every byte is one more than the byte before it, modulo 256,
    beginning with 0, over all parts of all buffers.

    Args:
        device: the class.
        image: what to boot for it.
        boot: whether to try it with a guest as well.
    """
    if not isinstance(device, type) or not issubclass(device, VirtioDevice):
        return not_right(f"{device!r} is no class made from VirtioDevice: hand over the class itself, without ().")
    for name in ("DEVICE_ID", "KIND"):
        if not hasattr(device, name):
            return not_right(f"the class has no {name}: every device says which kind it is.")
    if device.DEVICE_ID != 4:
        return not_right(f"DEVICE_ID is {device.DEVICE_ID!r}: which number is an entropy source's (virtio 1.2, 5)?")
    try:
        problem = _try_by_hand(device)
    except (LabError, VmmError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
        return not_right(f"the device cannot be plugged in. {type(error).__name__}: {error}")
    if problem is not None:
        return problem
    if not boot:
        return solved("the driver of one page is content with your device.")
    return _try_in_guest(device, image)


_LEAST_ENTRIES: Final = 4
_ROUNDS: Final = (
    ("the first buffer, of 10 bytes", ((10,),)),
    ("the second buffer, of 20 bytes", ((20,),)),
    ("three buffers in one notification", ((100,), (200,), (7,))),
    ("a buffer in two parts, of 5 and 300 bytes", ((5, 300),)),
    ("a buffer of 1,000 bytes", ((1000,),)),
)


def _try_by_hand(device: type[VirtioDevice]) -> Feedback | None:
    """What is wrong, found without a guest; None if nothing."""
    for _ in range(2):  # a second one begins anew
        with HandDriver(_made(device)) as driver:
            driver.start()
            if driver.size < _LEAST_ENTRIES:
                return not_right(f"The queue has {driver.size} entries; give the driver {_LEAST_ENTRIES} or more.")
            count = 0
            for what, buffers in _ROUNDS:
                raised = driver.interrupts
                came = driver.ask(*buffers)
                if driver.crashes:
                    return _crashed(what, driver.crashes[0])
                if driver.slot.device.mistake is not None:
                    return not_right(f"With {what}, the device blamed the driver: {driver.slot.device.mistake}.")
                for sizes, data in zip(buffers, came, strict=True):
                    if (problem := _compare(what, sum(sizes), data, count)) is not None:
                        return problem
                    count += sum(sizes)
                if driver.interrupts == raised:
                    return not_right(
                        f"With {what}, everything came back, but the driver was not told: it sleeps until it is"
                        " interrupted. What does the example do after its loop?"
                    )
    return None


def _made(device: type[VirtioDevice]) -> VirtioDevice:
    return device()


def _crashed(what: str, error: BaseException) -> Feedback:
    if isinstance(error, NotImplementedError):
        return not_yet("`notify` is not written yet: replace its last line, run that cell, then this one again.")
    said = f"With {what}, the device raised {type(error).__name__}: {error}."
    if isinstance(error, DeviceError):
        return not_right(f"{said} Every buffer that is taken goes back, once, with the number of bytes written.")
    return not_right(said)


def _compare(what: str, size: int, data: bytes | None, count: int) -> Feedback | None:
    if data is None:
        return not_right(
            f"With {what}, a buffer did not come back: the driver would wait for ever. How does the example take"
            " buffers, and give them back?"
        )
    if len(data) != size:
        return not_right(
            f"With {what}, {len(data)} of {size} bytes were said to be written: fill the buffer wholly, and say so."
        )
    expected = bytes((count + place) % 256 for place in range(size))
    if data == expected:
        return None
    place = next(place for place in range(size) if data[place] != expected[place])
    if place == 0 and data[0] == 0 and count:
        return not_right(
            f"With {what}, the device counts from 0 again, although it has given {count} bytes before: where does it"
            " remember how far it was?"
        )
    if place == 0 and not count:
        return not_right(f"The very first byte is {data[0]}; it is to be 0, also of a second device of this class.")
    if not any(data[place:]):
        return not_right(f"With {what}, the bytes from number {place} on were never written, although that was said.")
    before = f"after {expected[place - 1] if place else (count - 1) % 256}"
    return not_right(f"With {what}, byte {place} is {data[place]}: {before}, another one is due.")


def _try_in_guest(device: type[VirtioDevice], image: str) -> Feedback:
    from kata_lab.shell import ShellError, boot_image

    read = (
        f"cat /sys/class/misc/hw_random/rng_current; head -c {_GUEST_BYTES} /dev/hwrng | hexdump -v -e '1/1 \"%02x\"'"
    )
    try:
        with boot_image(image, custom=[_made(device)], memory_mib=320) as (vm, shell):
            said = shell.run(read, check=True).output
            mistake = next(iter(vm.machine.devices.values())).mistake
    except ShellError as error:
        return not_right(f"The one-page driver is content, Linux is not. {error}")
    match = re.fullmatch(r"(\S+)\n([0-9a-f]+)\s*", said)
    if match is None or not match[1].startswith("virtio_rng"):
        return not_right(f"The guest has no entropy source of virtio; it says {said[:80]!r}.")
    if mistake is not None:
        return not_right(f"In the guest, the device blamed the driver: {mistake}.")
    data = bytes.fromhex(match[2])
    gaps = sum((after - before) % 256 != 1 for before, after in itertools.pairwise(data))
    if gaps > _MOST_GAPS:
        return not_right(
            f"The guest read {len(data)} bytes, of which {gaps} do not follow the byte before them; they begin with"
            f" {data[:16].hex(' ')}."
        )
    return solved(
        f"Linux's own driver read {len(data)} bytes through /dev/hwrng, and they count:"
        f" {', '.join(map(str, data[:6]))} … Your device is a device."
    )
