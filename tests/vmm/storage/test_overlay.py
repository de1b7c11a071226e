"""The copy-on-write overlay: what it reads, what it leaves alone, and what is left of it after a crash."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.storage import DiskError, OverlayDisk, RawDisk, create_overlay, open_disk
from vmm.storage.overlay import HEADER

SIZE = 256 << 10


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def path(backing: Path, tmp_path: Path) -> Path:
    path = tmp_path / "vm.overlay"
    create_overlay(path, backing)
    return path


@pytest.fixture
def disk(path: Path) -> Iterator[OverlayDisk]:
    with OverlayDisk(path) as disk:
        yield disk


def read(disk, offset: int, length: int) -> bytes:
    part = memoryview(bytearray(length))
    disk.read([part], length, offset)
    return bytes(part)


def write(disk, offset: int, data: bytes) -> None:
    disk.write([memoryview(data)], len(data), offset)


def test_a_new_overlay_reads_as_its_backing_disk_and_takes_next_to_no_room(path: Path, backing: Path) -> None:
    with OverlayDisk(path) as disk:
        assert disk.size == SIZE
        assert read(disk, 0, SIZE) == backing.read_bytes()
        assert disk.clusters_here == 0
    assert path.stat().st_blocks * 512 <= 16 << 10


def test_a_written_sector_brings_the_rest_of_its_cluster(disk: OverlayDisk, backing: Path) -> None:
    expected = bytearray(backing.read_bytes())
    expected[10_240:10_752] = b"s" * 512

    write(disk, 10_240, b"s" * 512)

    assert disk.clusters_here == 1
    assert read(disk, 0, SIZE) == expected


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zeroes", "unmap", "flush", "reopen"]),
        st.integers(0, SIZE // 512 - 1),
        st.integers(1, 60),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, cluster=st.sampled_from([4096, 16384]), extra=st.sampled_from([0, 512, 40_960]))
def test_any_operations_leave_what_a_plain_disk_would_hold(
    backing: Path, tmp_path: Path, operations: list[tuple[str, int, int]], cluster: int, extra: int
) -> None:
    beneath = backing.read_bytes()
    model = bytearray(beneath + bytes(extra))
    path = tmp_path / "model.overlay"
    path.unlink(missing_ok=True)
    create_overlay(path, backing, size=SIZE + extra, cluster=cluster)
    disk = OverlayDisk(path)
    try:
        for number, (operation, sector, count) in enumerate(operations):
            offset = sector * 512
            length = min(count * 512, len(model) - offset)
            if operation == "write":
                data = bytes([number + 1]) * length
                disk.write([memoryview(data)[: length // 3], memoryview(data)[length // 3 :]], length, offset)
                model[offset : offset + length] = data
            elif operation in ("zeroes", "unmap"):
                disk.write_zeroes(offset, length, unmap=operation == "unmap")
                model[offset : offset + length] = bytes(length)
            elif operation == "flush":
                disk.flush()
            else:
                disk.close()
                disk = OverlayDisk(path)
        assert read(disk, 0, len(model)) == model
        part = memoryview(bytearray(1536))
        if disk.try_read([part[:100], part[100:]], 1536, SIZE - 1536):
            assert part == model[SIZE - 1536 : SIZE]
    finally:
        disk.close()
    assert backing.read_bytes() == beneath


def test_what_was_flushed_survives_a_crash_and_the_rest_is_old_or_new(
    path: Path, backing: Path, tmp_path: Path
) -> None:
    old = backing.read_bytes()
    crashed = tmp_path / "crashed.overlay"
    with OverlayDisk(path) as disk:
        write(disk, 0, b"a" * 8192)
        disk.flush()
        write(disk, 65_536, b"b" * 8192)
        crashed.write_bytes(path.read_bytes())

    with OverlayDisk(crashed) as disk:
        assert read(disk, 0, 8192) == b"a" * 8192
        assert read(disk, 65_536, 8192) == old[65_536 : 65_536 + 8192]
        write(disk, 65_536, b"c" * 512)
        assert read(disk, 65_536, 8192) == b"c" * 512 + old[65_536 + 512 : 65_536 + 8192]


def test_data_is_stable_before_the_bits_that_say_so(disk: OverlayDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fdatasync, pwritev = os.fdatasync, os.pwritev
    monkeypatch.setattr(os, "fdatasync", lambda fd: (order.append("sync"), fdatasync(fd))[1])

    def recorded(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        order.append("bits" if offset < 8192 else "data")
        return pwritev(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", recorded)
    write(disk, 0, b"x" * 4096)
    disk.flush()
    disk.flush()

    assert order == ["data", "sync", "bits", "sync", "sync"]


def test_a_stable_write_needs_no_flush(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.overlay"
    with OverlayDisk(path) as disk:
        disk.write([memoryview(b"x" * 512)], 512, 0, stable=True)
        copy.write_bytes(path.read_bytes())
    with OverlayDisk(copy) as disk:
        assert read(disk, 0, 512) == b"x" * 512


def test_bits_that_could_not_be_written_are_written_by_the_next_flush(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    with OverlayDisk(path) as disk:
        write(disk, 4096, b"x" * 4096)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", broken)
            with pytest.raises(OSError, match="broken"):
                disk.flush()
        disk.flush()
    with OverlayDisk(path, read_only=True) as disk:
        assert read(disk, 4096, 4096) == b"x" * 4096


def test_writers_of_one_cluster_lose_nothing(disk: OverlayDisk) -> None:
    def writer(sector: int) -> None:
        for cluster in range(SIZE // 4096):
            write(disk, cluster * 4096 + sector * 512, bytes([sector + 1]) * 512)

    threads = [threading.Thread(target=writer, args=(sector,)) for sector in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert read(disk, 0, SIZE) == b"".join(bytes([n + 1]) * 512 for n in range(8)) * (SIZE // 4096)


def test_discard_gives_room_back_and_leaves_the_backing_disk_alone(path: Path, backing: Path) -> None:
    old = backing.read_bytes()
    with OverlayDisk(path) as disk:
        write(disk, 0, b"x" * 131_072)
        disk.flush()
        before = path.stat().st_blocks
        disk.discard(0, SIZE)
        assert path.stat().st_blocks <= before - 256
        assert read(disk, 0, SIZE) == bytes(131_072) + old[131_072:]
    assert backing.read_bytes() == old


def test_overlays_lie_over_overlays(path: Path, backing: Path, tmp_path: Path) -> None:
    old = backing.read_bytes()
    with OverlayDisk(path) as disk:
        write(disk, 0, b"1" * 4096)
    upper = tmp_path / "upper.overlay"
    create_overlay(upper, path, backing_format="overlay", size=2 * SIZE)
    with open_disk(upper, "overlay") as disk:
        write(disk, 8192, b"2" * 4096)
        assert read(disk, 0, 16_384) == b"1" * 4096 + old[4096:8192] + b"2" * 4096 + old[12_288:16_384]
        assert read(disk, SIZE - 512, 1024) == old[-512:] + bytes(512)


def test_a_directory_with_overlay_and_backing_disk_can_be_moved(path: Path, backing: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    old = backing.read_bytes()
    backing.rename(moved / backing.name)
    path.rename(moved / path.name)
    with OverlayDisk(moved / path.name) as disk:
        assert read(disk, 0, SIZE) == old


def test_the_backing_disk_is_locked_against_writers_and_shared_by_overlays(
    disk: OverlayDisk, backing: Path, tmp_path: Path
) -> None:
    create_overlay(tmp_path / "second.overlay", backing)
    with OverlayDisk(tmp_path / "second.overlay") as second:
        assert read(second, 0, 512) == backing.read_bytes()[:512]
        with pytest.raises(DiskError, match="in use"):
            RawDisk(backing)


def test_an_existing_file_is_not_overwritten(path: Path, backing: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(DiskError, match=r"exists already"):
        create_overlay(path, backing)
    assert path.read_bytes() == before
    assert sorted(each.name for each in path.parent.iterdir()) == ["base.img", "vm.overlay"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cluster": 2048}, "cluster size 2048 must be a power of two from 4096 to 1048576"),
        ({"cluster": 5000}, "cluster size 5000 must be a power of two"),
        ({"size": 4096}, f"size 4096 of an overlay must be at least {SIZE}"),
        ({"size": SIZE + 1}, "must be a multiple of 512"),
        ({"backing_format": "qcow2"}, "format of .* is 'qcow2'"),
        ({"backing_format": "overlay"}, "is it a raw disk"),
    ],
)
def test_what_cannot_be_an_overlay_is_refused(backing: Path, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(DiskError, match=message):
        create_overlay(tmp_path / "new.overlay", backing, **arguments)
    assert not (tmp_path / "new.overlay").exists()


def test_a_missing_backing_disk_is_refused(path: Path, backing: Path) -> None:
    backing.unlink()
    with pytest.raises(DiskError, match=r"base.img cannot be opened"):
        OverlayDisk(path)


def test_a_backing_disk_that_shrank_is_refused(path: Path, backing: Path) -> None:
    os.truncate(backing, SIZE // 2)
    with pytest.raises(DiskError, match=r"a backing disk must not change"):
        OverlayDisk(path)


def test_a_cut_off_overlay_is_refused(path: Path) -> None:
    os.truncate(path, 8192)
    with pytest.raises(DiskError, match=r"has 8192 bytes, its header says"):
        OverlayDisk(path)


@given(position=st.integers(0, HEADER.size + 7), value=st.integers(1, 255))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_refused(path: Path, position: int, value: int) -> None:
    original = path.read_bytes()[: HEADER.size + 8]
    damaged = bytearray(original)
    damaged[position] ^= value
    with path.open("r+b") as file:
        file.write(damaged)
    try:
        with pytest.raises(DiskError):
            OverlayDisk(path)
    finally:
        with path.open("r+b") as file:
            file.write(original)


def test_an_overlay_over_itself_is_refused(tmp_path: Path, backing: Path) -> None:
    path = tmp_path / "loop.overlay"
    create_overlay(tmp_path / "first.overlay", backing)
    create_overlay(path, tmp_path / "first.overlay", backing_format="overlay")
    (tmp_path / "first.overlay").unlink()
    path.rename(tmp_path / "first.overlay")
    with pytest.raises(DiskError, match="in use"):
        OverlayDisk(tmp_path / "first.overlay")
    with pytest.raises(DiskError, match="lies under 8 overlays, there must be less than 8"):
        OverlayDisk(tmp_path / "first.overlay", read_only=True)
