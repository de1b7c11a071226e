"""The block device, asked by a driver in Python; the disk is a file of the host."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vmm.devices.virtio.driver import Driver, driven
from vmm.config import BlockConfig
from vmm.devices.virtio import blk
from vmm.devices.virtio.blk import IOERR, OK, UNSUPP, BlockDevice
from vmm.storage import DiskError, create_overlay

SIZE = 1 << 20
SECTORS = SIZE // 512
CONTENTS = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENTS)
    return path


@contextlib.contextmanager
def disk(path: Path, features: int | None = None, **settings) -> Iterator[Driver]:
    with driven(BlockDevice(BlockConfig(path=path, **settings)), features) as driver:
        yield driver


def header(kind: int, sector: int = 0) -> bytes:
    return blk.HEADER.pack(kind, 0, sector)


def read(driver: Driver, sector: int, *parts: int, queue: int = 0) -> tuple[int, bytes]:
    """Status and data."""
    answer = driver.request(queue, [header(blk.T_IN, sector)], [*parts, 1])
    return answer[-1], answer[:-1]


def write(driver: Driver, sector: int, *parts: bytes, queue: int = 0) -> int:
    return driver.request(queue, [header(blk.T_OUT, sector), *parts], [1])[0]


def flush(driver: Driver) -> int:
    return driver.request(0, [header(blk.T_FLUSH)], [1])[0]


def deallocate(driver: Driver, kind: int, *ranges: tuple[int, int, int]) -> int:
    data = b"".join(blk.SEGMENT.pack(*each) for each in ranges)
    return driver.request(0, [header(kind), data], [1])[0]


class Broken:
    """Makes a method of a device's disk fail until it is mended."""

    def __init__(self, device: BlockDevice, name: str) -> None:
        self.mended = False
        original: Callable[..., object] = getattr(device.disk, name)

        def method(*arguments, **named) -> object:
            if not self.mended:
                raise OSError(errno.EIO, "broken")
            return original(*arguments, **named)

        setattr(device.disk, name, method)


# What the driver is told.


def test_configuration_space_tells_capacity_and_limits(image: Path) -> None:
    with disk(image, queues=3) as driver:
        assert driver.config(0, 4) | driver.config(4, 4) << 32 == SECTORS
        assert driver.config(12, 4) == blk.MAX_SEGMENTS
        assert driver.config(20, 4) == 512
        assert driver.config(24, 1) == 3  # physical blocks of 4 KiB
        assert driver.config(32, 1) == 1  # writes wait in a cache
        assert driver.config(34, 2) == 3
        assert driver.config(36, 4) == blk.MAX_DISCARD_SECTORS
        assert driver.config(48, 4) == blk.MAX_WRITE_ZEROES_SECTORS
        assert driver.config(56, 1) == 1


def test_features_follow_the_configuration(image: Path) -> None:
    with disk(image, read_only=True) as driver:
        assert driver.offered & blk.RO
        assert not driver.offered & (blk.DISCARD | blk.WRITE_ZEROES | blk.MQ)
    with disk(image, queues=2) as driver:
        assert not driver.offered & blk.RO
        assert driver.offered & blk.DISCARD
        assert driver.offered & blk.MQ


def test_serial_number_is_padded_with_zeroes(image: Path) -> None:
    with disk(image, serial="lab-disk-1") as driver:
        answer = driver.request(0, [header(blk.T_GET_ID)], [20, 1])

    assert answer == b"lab-disk-1".ljust(20, b"\0") + bytes([OK])


def test_serial_number_into_too_small_a_buffer_is_an_error(image: Path) -> None:
    with disk(image, serial="lab-disk-1") as driver:
        assert driver.request(0, [header(blk.T_GET_ID)], [10, 1])[-1] == IOERR


# Reading and writing.


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("parts", [[512], [4096], [512, 1024, 512], [3, 500, 9], [512] * 40, [300 << 10]])
def test_what_is_written_is_read(image: Path, indirect: bool, parts: list[int]) -> None:
    pieces = [os.urandom(size) for size in parts]
    with disk(image) as driver:
        status = driver.request(0, [header(blk.T_OUT, 7), *pieces], [1], indirect=indirect)
        answer = driver.request(0, [header(blk.T_IN, 7)], [*parts, 1], indirect=indirect)

        assert status == bytes([OK])
        assert answer == b"".join(pieces) + bytes([OK])
    expected = bytearray(CONTENTS)
    expected[7 * 512 : 7 * 512 + sum(parts)] = b"".join(pieces)
    assert image.read_bytes() == expected


def test_any_framing_of_a_request_is_understood(image: Path) -> None:
    data = os.urandom(1024)
    whole = header(blk.T_OUT, 2) + data
    with disk(image) as driver:
        assert driver.request(0, [whole], [1]) == bytes([OK])
        assert driver.request(0, [whole[:5], whole[5:13], whole[13:700], whole[700:]], [1]) == bytes([OK])
        head = header(blk.T_IN, 2)
        assert driver.request(0, [head], [1025]) == data + bytes([OK])
        assert driver.request(0, [head[:8], head[8:]], [100, 925]) == data + bytes([OK])


def test_the_last_sector_is_inside_and_the_next_is_not(image: Path) -> None:
    with disk(image) as driver:
        assert read(driver, SECTORS - 1, 512) == (OK, CONTENTS[-512:])
        assert read(driver, SECTORS - 1, 1024)[0] == IOERR
        assert read(driver, SECTORS, 512)[0] == IOERR
        assert write(driver, SECTORS, bytes(512)) == IOERR
    assert image.stat().st_size == SIZE


@pytest.mark.parametrize("sector", [2**64 - 1, 2**63, 2**55, SECTORS + 1])
@pytest.mark.parametrize("kind", [blk.T_IN, blk.T_OUT])
def test_sectors_beyond_the_end_are_refused(image: Path, kind: int, sector: int) -> None:
    readable, writable = ([], [512, 1]) if kind == blk.T_IN else ([bytes(512)], [1])
    with disk(image) as driver:
        assert driver.request(0, [header(kind, sector), *readable], writable)[-1] == IOERR


def test_lengths_that_are_no_whole_sectors_are_refused(image: Path) -> None:
    with disk(image) as driver:
        assert read(driver, 0, 511)[0] == IOERR
        assert write(driver, 0, bytes(513)) == IOERR


def test_requests_without_data_do_nothing(image: Path) -> None:
    with disk(image) as driver:
        assert read(driver, 0) == (OK, b"")
        assert write(driver, 0) == OK


def test_unknown_types_are_unsupported(image: Path) -> None:
    with disk(image) as driver:
        for kind in (2, 3, 10, 14, 0xFFFF_FFFF):
            assert driver.request(0, [header(kind)], [1]) == bytes([UNSUPP])


def test_a_read_only_disk_refuses_every_kind_of_write(image: Path) -> None:
    image.chmod(0o444)
    with disk(image, read_only=True) as driver:
        assert write(driver, 0, bytes(512)) == IOERR
        assert deallocate(driver, blk.T_DISCARD, (0, 8, 0)) == IOERR
        assert deallocate(driver, blk.T_WRITE_ZEROES, (0, 8, 0)) == IOERR
        assert read(driver, 0, 512) == (OK, CONTENTS[:512])
        assert flush(driver) == OK
    assert image.read_bytes() == CONTENTS


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([header(blk.T_IN)], []), ([header(blk.T_IN)[:15]], [1]), ([], [512, 1]), ([b"x"], [])],
    ids=["no status", "short header", "no header", "neither"],
)
def test_requests_without_header_or_status_ask_for_a_reset(
    image: Path, readable: list[bytes], writable: list[int]
) -> None:
    with disk(image) as driver:
        driver.add(0, readable, writable)
        driver.notify(0)

        assert driver.needs_reset
        driver.start()
        assert read(driver, 0, 512) == (OK, CONTENTS[:512])


def test_several_queues_serve_the_same_disk(image: Path) -> None:
    with disk(image, queues=4) as driver:
        for queue in range(4):
            assert write(driver, queue, bytes([queue]) * 512, queue=queue) == OK
        for queue in range(4):
            assert read(driver, queue, 512, queue=3 - queue) == (OK, bytes([queue]) * 512)


def test_many_requests_before_one_notification_are_all_served(image: Path) -> None:
    with disk(image) as driver:
        buffers = [driver.add(0, [header(blk.T_IN, n)], [512, 1]) for n in range(20)]
        driver.notify(0)
        driver.wait(0, 20)

        for n, buffer in enumerate(buffers):
            assert driver.contents(buffer) == CONTENTS[n * 512 : n * 512 + 512] + bytes([OK])


PARTS = st.lists(st.sampled_from([1, 4, 16, 20, 511, 512, 1024, 4096]), max_size=5)
KINDS = st.sampled_from([*blk.TYPE_NAMES, 2, 14, 0xFFFF_FFFF])
PLACES = st.one_of(st.integers(0, SECTORS + 8), st.integers(0, 2**64 - 1))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(KINDS, PLACES, st.integers(0, 17), PARTS, PARTS), max_size=12))
def test_whatever_the_driver_asks_it_gets_a_status_or_has_to_reset(
    image: Path, requests: list[tuple[int, int, int, list[int], list[int]]]
) -> None:
    with disk(image, queues=2) as driver:
        for kind, sector, length, to_read, to_write in requests:
            first = header(kind, sector)[:length]
            readable = [part for part in (first, *map(bytes, to_read)) if part]
            if not readable and not to_write:
                continue
            driver.add(1, readable, to_write)
            driver.notify(1)
            if len(b"".join(readable)) < 16 or not to_write:
                assert driver.needs_reset
                driver.start()
                continue
            (buffer,) = driver.wait(1)
            assert buffer.written == sum(to_write)
            assert driver.contents(buffer)[-1] in (OK, IOERR, UNSUPP)
    assert image.stat().st_size == SIZE


# Discard and zeroes.


def test_discard_gives_the_room_back(image: Path) -> None:
    before = image.stat().st_blocks
    with disk(image) as driver:
        assert deallocate(driver, blk.T_DISCARD, (0, 512, 0), (1024, 512, 0)) == OK
    assert image.stat().st_blocks <= before - 2 * 512
    assert image.stat().st_size == SIZE


@pytest.mark.parametrize("unmap", [0, blk.UNMAP])
def test_zeroes_are_read_where_zeroes_were_written(image: Path, unmap: int) -> None:
    before = image.stat().st_blocks
    with disk(image) as driver:
        assert deallocate(driver, blk.T_WRITE_ZEROES, (3, 300, unmap)) == OK
        assert read(driver, 2, 302 * 512) == (OK, CONTENTS[:512] + bytes(300 * 512) + CONTENTS[:512])
    if unmap:
        assert image.stat().st_blocks < before
    else:
        assert image.stat().st_blocks >= before


@pytest.mark.parametrize(
    ("kind", "segment", "status"),
    [
        (blk.T_DISCARD, (0, 8, 1), UNSUPP),
        (blk.T_DISCARD, (0, 8, 2), UNSUPP),
        (blk.T_WRITE_ZEROES, (0, 8, 2), UNSUPP),
        (blk.T_DISCARD, (SECTORS - 1, 2, 0), IOERR),
        (blk.T_DISCARD, (2**64 - 1, 8, 0), IOERR),
        (blk.T_DISCARD, (0, 0xFFFF_FFFF, 0), IOERR),
        (blk.T_WRITE_ZEROES, (0, 0xFFFF_FFFF, 0), IOERR),
        (blk.T_WRITE_ZEROES, (0, blk.MAX_WRITE_ZEROES_SECTORS + 1, 0), IOERR),
    ],
)
def test_bad_ranges_are_refused_and_change_nothing(image: Path, kind: int, segment: tuple, status: int) -> None:
    with disk(image) as driver:
        assert deallocate(driver, kind, (0, 8, 0), segment) == status
    assert image.read_bytes() == CONTENTS


@pytest.mark.parametrize("length", [0, 15, 17, 16 * (blk.MAX_DISCARD_RANGES + 1)])
def test_bad_numbers_of_ranges_are_refused(image: Path, length: int) -> None:
    with disk(image) as driver:
        data = [bytes(length)] if length else []
        assert driver.request(0, [header(blk.T_DISCARD), *data], [1]) == bytes([IOERR])


def test_discard_that_was_not_negotiated_is_unsupported(image: Path) -> None:
    with disk(image, features=blk.FLUSH) as driver:
        assert deallocate(driver, blk.T_DISCARD, (0, 8, 0)) == UNSUPP
    assert image.read_bytes() == CONTENTS


# Caching.


def test_flush_is_answered(image: Path) -> None:
    with disk(image) as driver:
        assert write(driver, 0, bytes(512)) == OK
        assert flush(driver) == OK
        assert driver.device.counters.flushes == 1


def test_the_driver_can_turn_the_write_cache_off(image: Path) -> None:
    with disk(image) as driver:
        driver.slot.write(0x100 + 32, 1, 0)
        assert driver.config(32, 1) == 0
        assert write(driver, 0, bytes(512)) == OK
        assert driver.device.counters.on_worker == 1  # synchronous, hence not on the vCPU's thread


def test_a_cache_that_cannot_be_emptied_stays_on(image: Path) -> None:
    with disk(image) as driver:
        broken = Broken(driver.device, "flush")
        driver.slot.write(0x100 + 32, 1, 0)
        assert driver.config(32, 1) == 1
        broken.mended = True
        driver.slot.write(0x100 + 32, 1, 0)
        assert driver.config(32, 1) == 0


@pytest.mark.parametrize("kind", [blk.T_FLUSH, blk.T_IN, blk.T_OUT, blk.T_DISCARD, blk.T_WRITE_ZEROES])
def test_an_error_of_the_host_is_an_error_of_the_request_alone(image: Path, kind: int) -> None:
    method = {blk.T_IN: "try_read", blk.T_OUT: "write", blk.T_WRITE_ZEROES: "write_zeroes"}
    readable = {blk.T_OUT: [bytes(512)], blk.T_WRITE_ZEROES: [blk.SEGMENT.pack(0, 8, 0)]}
    readable[blk.T_DISCARD] = readable[blk.T_WRITE_ZEROES]
    writable = [512, 1] if kind == blk.T_IN else [1]
    with disk(image) as driver:
        broken = Broken(driver.device, method.get(kind, blk.TYPE_NAMES[kind]))
        assert driver.request(0, [header(kind), *readable.get(kind, [])], writable)[-1] == IOERR
        broken.mended = True
        assert driver.request(0, [header(kind), *readable.get(kind, [])], writable)[-1] == OK


def test_a_disk_that_cannot_be_made_stable_cannot_be_saved(image: Path) -> None:
    with disk(image) as driver:
        Broken(driver.device, "flush")
        with pytest.raises(DiskError, match=r"cannot be made stable: broken; the state of blk needs that"):
            driver.slot.save()


def test_the_write_cache_setting_needs_its_feature(image: Path) -> None:
    with disk(image, features=blk.FLUSH) as driver:
        driver.slot.write(0x100 + 32, 1, 0)
        assert driver.config(32, 1) == 1


def test_a_driver_that_cannot_flush_gets_stable_writes(image: Path) -> None:
    with disk(image, features=0) as driver:
        assert driver.config(32, 1) == 0
        assert write(driver, 0, bytes(512)) == OK
        assert driver.device.counters.on_worker == 1


def test_other_bytes_of_the_configuration_space_cannot_be_written(image: Path) -> None:
    with disk(image) as driver:
        before = driver.device.config_space
        for offset in (*range(32), *range(33, 60)):
            driver.slot.write(0x100 + offset, 1, 0xFF)
        assert driver.device.config_space == before


# The host's troubles.


def test_a_file_that_was_cut_off_gives_errors_and_its_rest_can_be_read(image: Path) -> None:
    with disk(image) as driver:
        os.truncate(image, 4096)

        assert read(driver, 8, 512)[0] == IOERR
        assert read(driver, 7, 1024)[0] == IOERR
        assert read(driver, 0, 512 << 10)[0] == IOERR
        assert write(driver, 8, bytes(512)) == IOERR
        assert deallocate(driver, blk.T_WRITE_ZEROES, (8, 8, 0)) == IOERR
        assert read(driver, 7, 512) == (OK, CONTENTS[7 * 512 : 8 * 512])
        assert write(driver, 7, bytes(512)) == OK
    assert image.stat().st_size == 4096


def test_a_limit_of_the_host_gives_an_error_and_the_device_lives(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with disk(path) as driver:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
        try:
            assert write(driver, 0, b"x" * 4096) == OK
            assert write(driver, 512, b"x" * 4096) == IOERR
            assert write(driver, 120, b"x" * 8192) == IOERR  # half of it is below the limit
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert write(driver, 512, b"x" * 4096) == OK


class Held:
    """Holds up a method of a device's disk until it is told to go on."""

    def __init__(self, device: BlockDevice, name: str) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        original: Callable[..., object] = getattr(device.disk, name)

        def method(*arguments, **named) -> object:
            self.entered.set()
            assert self.go_on.wait(10)
            return original(*arguments, **named)

        setattr(device.disk, name, method)


def test_large_requests_are_moved_by_the_worker(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk, "LARGE", 65536)
    data = os.urandom(65536)
    with disk(image) as driver:
        assert write(driver, 100, data) == OK
        assert read(driver, 100, 1000, 64536) == (OK, data)
        assert driver.device.counters.on_worker == 2


def test_what_the_host_must_fetch_is_fetched_by_the_worker(image: Path) -> None:
    with disk(image) as driver:
        driver.device.disk.try_read = lambda *_: False
        assert read(driver, 8, 4096) == (OK, CONTENTS[:4096])
        assert driver.device.counters.on_worker == 1


def test_requests_go_on_while_a_flush_waits(image: Path) -> None:
    with disk(image) as driver:
        held = Held(driver.device, "flush")
        waiting = driver.add(0, [header(blk.T_FLUSH)], [1])
        driver.notify(0)
        assert held.entered.wait(10)

        assert read(driver, 0, 512) == (OK, CONTENTS[:512])

        assert waiting.written is None
        held.go_on.set()
        assert driver.wait(0) == [waiting]
        assert driver.contents(waiting) == bytes([OK])


def test_a_reset_waits_for_the_worker_and_gives_nothing_back(image: Path) -> None:
    with disk(image) as driver:
        held = Held(driver.device, "read")
        driver.device.disk.try_read = lambda *_: False
        buffer = driver.add(0, [header(blk.T_IN)], [65536, 1])
        driver.notify(0)
        assert held.entered.wait(10)
        reset = threading.Thread(target=driver.set, args=(0x70, 0))
        reset.start()
        reset.join(0.05)
        assert reset.is_alive()

        held.go_on.set()
        reset.join(10)

        assert not reset.is_alive()
        driver.start()
        assert driver.collect(0) == []
        assert read(driver, 0, 512) == (OK, CONTENTS[:512])
        status_address, _ = buffer.parts[1]
        assert driver.memory.read(status_address, 1) == b"\0"


def test_a_pause_waits_for_the_worker_and_gives_everything_back(image: Path) -> None:
    with disk(image) as driver:
        held = Held(driver.device, "flush")
        for _ in range(3):
            driver.add(0, [header(blk.T_FLUSH)], [1])
        driver.notify(0)
        assert held.entered.wait(10)
        threading.Timer(0.05, held.go_on.set).start()

        with driver.device.lock:
            driver.device.pause()
            finished = driver.collect(0)

        assert [driver.contents(each) for each in finished] == [bytes([OK])] * 3


def test_a_device_that_asks_for_a_reset_can_leave_while_it_works(image: Path) -> None:
    with disk(image) as driver:
        held = Held(driver.device, "read")
        driver.device.disk.try_read = lambda *_: False
        driver.add(0, [header(blk.T_IN)], [65536, 1])
        driver.notify(0)
        assert held.entered.wait(10)
        driver.add(0, [b"?"], [1])
        driver.notify(0)
        assert driver.needs_reset
        threading.Timer(0.05, held.go_on.set).start()


def test_an_unexpected_exception_of_the_worker_is_reported_to_the_machine(image: Path) -> None:
    with disk(image) as driver:

        def broken() -> None:
            raise ZeroDivisionError

        driver.device.disk.flush = broken
        driver.add(0, [header(blk.T_FLUSH)], [1])
        driver.notify(0)
        deadline = time.monotonic() + 10
        while not driver.crashes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [type(each) for each in driver.crashes] == [ZeroDivisionError]
        driver.crashes.clear()


# Locks, growth and snapshots.


def test_what_an_overlay_loses_when_it_is_closed_is_told(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "overlay"
    create_overlay(path, image)
    with disk(path, format="overlay") as driver:
        assert write(driver, 0, bytes(512)) == OK
        assert isinstance(driver.device, BlockDevice)
        Broken(driver.device, "flush")

    (told,) = caplog.messages
    assert told.startswith(f"the disk {path} could not be closed whole: broken; what the guest wrote since it last")
    with disk(path, format="overlay") as driver:
        assert read(driver, 0, 512) == (OK, CONTENTS[:512])


def test_a_disk_has_one_writer(image: Path) -> None:
    with disk(image), pytest.raises(DiskError, match=r"in use by somebody else; a disk has one writer"):
        BlockDevice(BlockConfig(path=image))


def test_readers_share_a_disk_and_keep_writers_away(image: Path) -> None:
    with disk(image, read_only=True), disk(image, read_only=True) as second:
        assert read(second, 0, 512)[0] == OK
        with pytest.raises(DiskError, match="in use"):
            BlockDevice(BlockConfig(path=image))
    BlockDevice(BlockConfig(path=image)).close()


def test_a_grown_file_is_announced(image: Path) -> None:
    with disk(image) as driver:
        os.truncate(image, 2 * SIZE)
        assert read(driver, SECTORS, 512)[0] == IOERR
        generation = driver.get(0xFC)

        assert driver.device.update() == 2 * SIZE

        assert driver.get(0xFC) == generation + 1
        assert driver.acknowledge() & 2
        assert driver.config(0, 4) == 2 * SECTORS
        assert read(driver, SECTORS, 512) == (OK, bytes(512))


def test_a_saved_device_goes_on_where_it_was(image: Path) -> None:
    with disk(image) as driver:
        driver.slot.write(0x100 + 32, 1, 0)
        assert write(driver, 5, b"s" * 512) == OK
        with driver.device.lock:
            driver.device.pause()
        state = driver.slot.save()

        driver.slot.reset()
        driver.slot.restore(state)

        assert driver.config(32, 1) == 0
        assert read(driver, 5, 512) == (OK, b"s" * 512)


def test_an_overlay_takes_the_writes_and_leaves_the_backing_file_alone(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "vm.overlay"
    create_overlay(overlay, image)
    with disk(overlay, format="overlay", queues=2) as driver:
        assert write(driver, 3, b"o" * 512) == OK
        assert write(driver, 1000, b"p" * 512) == OK
        assert flush(driver) == OK
        assert deallocate(driver, blk.T_WRITE_ZEROES, (500, 10, blk.UNMAP)) == OK
        assert read(driver, 2, 1536) == (OK, CONTENTS[:512] + b"o" * 512 + CONTENTS[:512])
    with disk(overlay, format="overlay", read_only=True) as driver:
        assert read(driver, 1000, 512) == (OK, b"p" * 512)
        assert read(driver, 499, 12 * 512) == (OK, CONTENTS[:512] + bytes(5120) + CONTENTS[:512])
    assert image.read_bytes() == CONTENTS


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"cannot be opened: No such file"):
        BlockDevice(BlockConfig(path=tmp_path / "missing.img"))


def test_a_raw_file_is_no_overlay(image: Path) -> None:
    with pytest.raises(DiskError, match=r"an overlay must start with"):
        BlockDevice(BlockConfig(path=image, format="overlay"))


def test_the_trace_says_what_was_asked(image: Path) -> None:
    with disk(image) as driver:
        driver.device.queues[0].tracing = True
        read(driver, 4, 1024)
        assert driver.device.queues[0].recent[-1].detail == "read 2 sectors at 4"
