"""A raw disk: a sparse file, or a block device where there is one to make."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.storage import DiskError, FileEndedError, RawDisk, open_disk

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def views(*parts: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in parts]


def test_more_buffers_than_one_system_call_takes_are_read_and_written(path: Path) -> None:
    contents = path.read_bytes()
    parts = views(*[100] * 5000)
    with RawDisk(path) as disk:
        disk.read(parts, 500_000, 512)
        assert b"".join(parts) == contents[512 : 512 + 500_000]
        disk.write(parts, 500_000, 1024)
    assert path.read_bytes()[1024 : 1024 + 500_000] == contents[512 : 512 + 500_000]


def test_short_reads_and_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = path.read_bytes()
    preadv, pwritev = os.preadv, os.pwritev

    def little(function):
        def move(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            return function(fd, [buffers[0][:7]], offset, flags)

        return move

    monkeypatch.setattr(os, "preadv", little(preadv))
    monkeypatch.setattr(os, "pwritev", little(pwritev))
    parts = views(10, 500, 2)
    with RawDisk(path) as disk:
        disk.read(parts, 512, 1000)
        disk.write(parts, 512, 3000)
    assert b"".join(parts) == contents[1000:1512]
    assert path.read_bytes() == contents[:3000] + contents[1000:1512] + contents[3512:]


def test_a_file_that_ended_says_where(path: Path) -> None:
    with RawDisk(path) as disk:
        os.truncate(path, 1000)
        with pytest.raises(FileEndedError, match=r"ends before byte 1001 of the disk") as caught:
            disk.read(views(512, 512), 1024, 512)
        assert caught.value.errno == errno.EIO


def test_a_read_that_would_wait_is_left_to_the_caller(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def cold(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        return preadv(fd, buffers, offset, flags)

    with RawDisk(path) as disk:
        (part,) = views(512)
        assert disk.try_read([part], 512, 0)
        monkeypatch.setattr(os, "preadv", cold)
        assert not disk.try_read([part], 512, 512)
        disk.read([part], 512, 512)
    assert part == path.read_bytes()[512:1024]


def test_a_file_system_that_cannot_say_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def plain(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", plain)
    with RawDisk(path) as disk:
        assert not disk.try_read(views(512), 512, 0)
        assert disk.try_read(views(512), 512, 0)


def test_zeroes_are_written_where_the_host_has_no_other_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = path.read_bytes()
    with RawDisk(path) as disk:
        monkeypatch.setattr(disk, "_allocate", lambda *_: False)
        disk.write_zeroes(512, 1024, unmap=True)
        disk.write_zeroes(4096, SIZE - 8192, unmap=False)
        disk.discard(2048, 512)
    expected = bytearray(contents)
    expected[512 : 512 + 1024] = bytes(1024)
    expected[4096 : SIZE - 4096] = bytes(SIZE - 8192)
    assert path.read_bytes() == expected


def test_a_full_file_system_gives_an_error_and_the_disk_lives(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev

    def full(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset >= 8192:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwritev(fd, [buffers[0][: 8192 - offset]], offset, flags)

    with RawDisk(path) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            with pytest.raises(OSError, match="No space left"):
                disk.write([memoryview(b"x" * 8192)], 8192, 4096)
        disk.write([memoryview(b"y" * 512)], 512, 8192)
    assert path.read_bytes()[4096:8704] == b"x" * 4096 + b"y" * 512


def test_a_lock_is_seen_by_other_processes_and_goes_with_its_disk(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vmm.storage import RawDisk, DiskError\n"
        "try: RawDisk(Path(sys.argv[1]), read_only=sys.argv[2] == 'r')\n"
        "except DiskError as error: print(error)\n"
        "else: print('opened')"
    )

    def other(mode: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, str(path), mode], capture_output=True, text=True, check=True)
        return done.stdout

    with RawDisk(path):
        assert "is in use by somebody else; a disk has one writer, or readers alone" in other("w")
        assert "is in use by somebody who writes it" in other("r")
    with RawDisk(path, read_only=True):
        assert other("r") == "opened\n"
    assert other("w") == "opened\n"


@pytest.mark.parametrize("size", [0, 511, 1000])
def test_a_file_of_no_whole_sectors_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    with pytest.raises(DiskError, match=rf"has {size} bytes, a disk must have sectors of 512 bytes"):
        RawDisk(path)


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(DiskError, match="neither a file nor a block device"):
            RawDisk(path)
    with pytest.raises(DiskError, match=r"cannot be opened: Is a directory"):
        RawDisk(tmp_path)


def test_a_format_that_is_not_known_is_refused(path: Path) -> None:
    with pytest.raises(DiskError, match=r"format of .* is 'qcow2', it must be one of 'raw', 'overlay'"):
        open_disk(path, "qcow2")


def test_a_refused_disk_leaves_no_descriptor_open(path: Path, tmp_path: Path) -> None:
    with RawDisk(path):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(DiskError):
                RawDisk(path)
        assert len(os.listdir("/proc/self/fd")) == before
