"""The checks of notebook 3: what is unsolved is "not yet", what is wrong is named, what is right passes.

The solutions are the instructor's answers, and nowhere in the notebook.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import pytest

from kata_lab.lab.device_exercise import Capture, check_counting, check_reading
from kata_lab.lab.hand_driver import HandDriver
from kata_lab.lab.machines import LabError
from tests.kata_lab.lab.answers import answered
from vmm.devices.virtio.blk import HEADER, T_IN, T_OUT
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, NEXT, WRITE, Queue

NOTEBOOK = Path(__file__).parents[3] / "notebooks" / "03-inside-a-device.ipynb"
TABLE, HEADER_AT, DATA_AT, STATUS_AT = 0x8100_0000, 0x8200_0040, 0x8300_0000, 0x8200_0050


LAYOUTS: dict[str, Any] = {"DESCRIPTOR": DESCRIPTOR, "HEADER": HEADER, "INDIRECT": INDIRECT, "NEXT": NEXT}
ANSWER = answered("03-counting", VirtioDevice=VirtioDevice)["CountingEntropy"]


class Template(VirtioDevice):
    DEVICE_ID = 4
    KIND = "counting"

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (8,)

    def notify(self, queue: Queue, index: int) -> None:
        raise NotImplementedError


class Counting(Template):
    """A solution; what is wrong below is one step away from it."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    def content(self, length: int) -> bytes:
        return bytes((self.given + place) % 256 for place in range(length))

    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            data = self.content(chain.writable_bytes)
            chain.write(data)
            self.given += len(data)
            queue.push(chain, len(data))
        queue.signal()


class StartsOver(Counting):
    def content(self, length: int) -> bytes:
        return bytes(place % 256 for place in range(length))


class CountsInTheClass(Template):
    count: ClassVar[int] = 0

    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            chain.write(bytes((self.count + place) % 256 for place in range(chain.writable_bytes)))
            type(self).count += chain.writable_bytes
            queue.push(chain, chain.writable_bytes)
        queue.signal()


class BeginsWithOne(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.given = 1


class NeverSignals(Template):
    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            chain.write(bytes((self.given + place) % 256 for place in range(chain.writable_bytes)))
            self.given += chain.writable_bytes
            queue.push(chain, chain.writable_bytes)


class SaysNothingWasWritten(Counting):
    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            chain.write(self.content(chain.writable_bytes))
            queue.push(chain, 0)
        queue.signal()


class FillsTheFirstPart(Counting):
    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            view = chain.writable_views()[0]
            view[:] = self.content(len(view))
            self.given += chain.writable_bytes
            queue.push(chain, chain.writable_bytes)
        queue.signal()


class TakesOne(Counting):
    def notify(self, queue: Queue, index: int) -> None:
        chain = queue.pop()
        if chain is not None:
            data = self.content(chain.writable_bytes)
            chain.write(data)
            self.given += len(data)
            queue.push(chain, len(data))
        queue.signal()


class PushesTwice(Counting):
    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            queue.push(chain, chain.write(self.content(chain.writable_bytes)))
            queue.push(chain, 0)


class Forgets(Counting):
    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            chain.write(self.content(chain.writable_bytes))


class CountsTooFar(Counting):
    def content(self, length: int) -> bytes:
        return bytes(range(self.given, self.given + length))


class GivesRandomBytes(Counting):
    def content(self, length: int) -> bytes:
        return b"\1" + os.urandom(length - 1)


class IsADisk(Counting):
    DEVICE_ID = 2


class HasNoKind(VirtioDevice):
    DEVICE_ID = 4


class HasNoQueue(Counting):
    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return ()


class HasAShortQueue(Counting):
    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (2,)


class ForgetsItsParent(Template):
    def __init__(self) -> None:
        self.given = 0


class FailsForLinux(Counting):
    def content(self, length: int) -> bytes:
        return bytes(length) if length == 64 else super().content(length)


def test_the_unsolved_device_is_not_yet() -> None:
    assert check_counting(Template).verdict == "not yet"


def test_the_right_device_passes_with_the_driver_of_one_page() -> None:
    assert check_counting(ANSWER, boot=False).passed
    assert check_counting(Counting, boot=False).passed


def test_the_right_device_passes_with_the_driver_of_linux() -> None:
    feedback = check_counting(ANSWER)

    assert feedback.passed, feedback
    assert "Linux's own driver read 512 bytes" in feedback.text


def test_what_only_linux_sees_is_told() -> None:
    feedback = check_counting(FailsForLinux)

    assert feedback.verdict == "not right"
    assert "do not follow the byte before them" in feedback.text


@pytest.mark.parametrize(
    ("device", "hint"),
    [
        (StartsOver, "With the second buffer, of 20 bytes, the device counts from 0 again"),
        (CountsInTheClass, "also of a second device of this class"),
        (BeginsWithOne, "The very first byte is 1"),
        (NeverSignals, "the driver was not told"),
        (SaysNothingWasWritten, "0 of 10 bytes were said to be written"),
        (FillsTheFirstPart, "With a buffer in two parts, of 5 and 300 bytes, the bytes from number 5 on"),
        (TakesOne, "With three buffers in one notification, a buffer did not come back"),
        (PushesTwice, "give it back once"),
        (Forgets, "were taken and never given back"),
        (CountsTooFar, "raised ValueError"),
        (GivesRandomBytes, "The very first byte is 1"),
        (IsADisk, "which number is an entropy source's"),
        (HasNoKind, "the class has no KIND"),
        (HasNoQueue, "the device has no queue 0"),
        (HasAShortQueue, "The queue has 2 entries"),
        (ForgetsItsParent, "cannot be plugged in. AttributeError"),
        (Counting(), "hand over the class itself"),
        (dict, "no class made from VirtioDevice"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_wrong_device_is_told_where_to_look(device: Any, hint: str) -> None:
    feedback = check_counting(device)

    assert feedback.verdict == "not right"
    assert hint in feedback.text


def test_the_driver_of_one_page_leaves_a_device_that_was_reset_usable() -> None:
    with HandDriver(Counting()) as driver:
        driver.start()
        assert driver.ask([3]) == [b"\0\1\2"]
        driver.start()
        assert driver.ask([2, 2]) == [b"\3\4\5\6"]


# Exercise 1.


def captured(kind: int = T_IN, sector: int = 2056, sizes: tuple[int, ...] = (8192,), indirect: bool = True) -> Capture:
    """A request as Linux makes it, with head 3 in entry 1 of the ring."""
    way = WRITE if kind == T_IN else 0
    parts = [(HEADER_AT, HEADER.size, 0)]
    address = DATA_AT
    for size in sizes:
        parts.append((address, size, way))
        address += 2 * size
    parts.append((STATUS_AT, 1, WRITE))
    order = range(len(parts)) if indirect else [3, *(n for n in range(len(parts)) if n != 3)][: len(parts)]
    entries = {}
    for number, (place, (at, size, flags)) in enumerate(zip(order, parts, strict=True)):
        last = number + 1 == len(parts)
        following = 0 if last else order[number + 1]
        entries[place] = DESCRIPTOR.pack(at, size, flags | (0 if last else NEXT), following)
    table = b"".join(entries.get(place, bytes(16)) for place in range(8))
    pieces = [(at, HEADER.pack(kind, 0, sector) if at == HEADER_AT else bytes(size)) for at, size, _ in parts]
    if indirect:
        inner = b"".join(entries[place] for place in order)
        pieces.append((TABLE, inner))
        table = bytes(48) + DESCRIPTOR.pack(TABLE, len(inner), INDIRECT, 0) + bytes(64)
    ring = b"\0\0\2\0" + b"\7\0\3\0" + bytes(14)
    return Capture(8, table, ring, bytes(70), tuple(pieces))


def test_a_capture_that_nobody_read_is_not_yet() -> None:
    assert check_reading(captured(), None, None, None, None).verdict == "not yet"
    assert check_reading(captured(), "read", 2056, 8192, None).verdict == "not yet"


@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize(("kind", "name"), [(T_IN, "read"), (T_OUT, "write")])
def test_a_capture_that_was_read_rightly_passes(kind: int, name: str, indirect: bool) -> None:
    capture = captured(kind, 1480, (4096, 8192), indirect)

    read = answered("03-read-a-request", captured=capture, **LAYOUTS)

    assert check_reading(capture, name, 1480, 12288, DATA_AT).passed
    assert check_reading(capture, read["kind"], read["sector"], read["data_bytes"], read["data_address"]).passed


@pytest.mark.parametrize(
    ("answers", "hint"),
    [
        (("write", 2056, 8192, DATA_AT), "is the other one"),
        (("copy", 2056, 8192, DATA_AT), "it is 'read' or 'write'"),
        (("read", 2056 * 512, 8192, DATA_AT), "an offset in bytes"),
        (("read", int.from_bytes((2056).to_bytes(8, "little"), "big"), 8192, DATA_AT), "their order is not"),
        (("read", 7, 8192, DATA_AT), "the last 8 bytes of the header"),
        (("read", 2056, 8193, DATA_AT), "header and status do not count"),
        (("read", 2056, 48, DATA_AT), "the length of the indirect table"),
        (("read", 2056, 4096, DATA_AT), "which descriptors are data"),
        (("read", 2056, 8192, TABLE), "behind that of the header"),
    ],
)
def test_a_capture_that_was_read_wrongly_is_told_where_to_look(answers: tuple[str, int, int, int], hint: str) -> None:
    feedback = check_reading(captured(), *answers)

    assert feedback.verdict == "not right"
    assert hint in feedback.text
    assert str(2056) not in feedback.text or answers[1] == 2056 * 512


def test_a_capture_keeps_only_what_the_request_names() -> None:
    assert HEADER.unpack(captured().memory(HEADER_AT, HEADER.size)) == (T_IN, 0, 2056)
    with pytest.raises(LabError, match="was not captured"):
        captured().memory(0x8000_0000, 16)


def test_the_third_notebook_holds_the_exercises_and_not_their_solutions() -> None:
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells]

    assert any("raise NotImplementedError  # your code here" in cell for cell in cells)
    assert any("data_address = None" in cell for cell in cells)
    assert not any("% 256" in cell or "self.given" in cell for cell in cells)
