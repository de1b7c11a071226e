"""The bus: lookups, refusals, and changes under way."""

from __future__ import annotations

import threading

import pytest

from vmm.bus import Bus
from vmm.errors import BusError, ConfigError


class Recorder:
    """A device that answers with its offset and remembers what was written."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, width: int) -> int:
        return offset

    def write(self, offset: int, width: int, value: int) -> None:
        self.written.append((offset, width, value))


def test_device_sees_offsets_and_not_addresses() -> None:
    bus, device = Bus(), Recorder()
    bus.attach(device, 0x1000_0000, 0x100, "recorder")

    bus.write(0x1000_0004, 4, 0xABCD)

    assert bus.read(0x1000_00FF, 1) == 0xFF
    assert device.written == [(4, 4, 0xABCD)]


def test_each_address_reaches_its_own_device() -> None:
    bus = Bus()
    devices = [Recorder() for _ in range(20)]
    for number in (7, 3, 19, 0, *(n for n in range(20) if n not in (0, 3, 7, 19))):
        bus.attach(devices[number], 0x1000 * number, 0x1000, f"device {number}")

    for number in range(20):
        bus.write(0x1000 * number + 0xFFF, 1, number)

    assert [device.written for device in devices] == [[(0xFFF, 1, number)] for number in range(20)]
    assert [each.name for each in bus.attachments] == [f"device {number}" for number in range(20)]


@pytest.mark.parametrize("address", [0, 0xFFF, 0x1100, 0x2000, 1 << 55])
def test_access_where_no_device_is_is_refused(address: int) -> None:
    bus = Bus()
    bus.attach(Recorder(), 0x1000, 0x100, "recorder")

    with pytest.raises(BusError, match=rf"read of 1 bytes at {address:#x}.*recorder at 0x1000\.\.0x1100"):
        bus.read(address, 1)
    with pytest.raises(BusError, match="write of 1 bytes"):
        bus.write(address, 1, 0)


def test_access_that_leaves_its_device_is_refused() -> None:
    bus, device = Bus(), Recorder()
    bus.attach(device, 0x1000, 0x100, "first")
    bus.attach(device, 0x1100, 0x100, "second")

    with pytest.raises(BusError, match="0x10fe"):
        bus.write(0x10FE, 4, 1)

    assert device.written == []


def test_empty_bus_says_so() -> None:
    with pytest.raises(BusError, match="nothing is attached"):
        Bus().read(0, 4)


@pytest.mark.parametrize(("base", "size"), [(0x1000, 0x100), (0xFFF, 2), (0x10FF, 1), (0, 0x10000), (0x1010, 1)])
def test_overlap_is_refused(base: int, size: int) -> None:
    bus = Bus()
    bus.attach(Recorder(), 0x1000, 0x100, "first")

    with pytest.raises(ConfigError, match=r"second at .* overlaps first at 0x1000"):
        bus.attach(Recorder(), base, size, "second")

    assert [each.name for each in bus.attachments] == ["first"]


@pytest.mark.parametrize(("base", "size"), [(-1, 4), (0, 0), (0, -4)])
def test_impossible_range_is_refused(base: int, size: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte"):
        Bus().attach(Recorder(), base, size, "recorder")


def test_detached_device_answers_no_more_and_its_range_is_free() -> None:
    bus, device = Bus(), Recorder()
    bus.attach(device, 0x1000, 0x100, "recorder")

    assert bus.detach(0x1000).device is device

    with pytest.raises(BusError):
        bus.read(0x1000, 1)
    bus.attach(Recorder(), 0x1000, 0x100, "another")
    with pytest.raises(BusError, match="no device starts at 0x1001"):
        bus.detach(0x1001)


def test_lookups_go_on_while_devices_come_and_go() -> None:
    bus = Bus()
    bus.attach(Recorder(), 0x8000, 0x100, "constant")
    wrong: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            if (offset := bus.read(0x8010, 4)) != 0x10:
                wrong.append(offset)

    reader = threading.Thread(target=look, name="reader")
    reader.start()
    for _ in range(300):
        bus.attach(Recorder(), 0x1000, 0x100, "guest")
        bus.detach(0x1000)
    stop.set()
    reader.join()

    assert wrong == []
