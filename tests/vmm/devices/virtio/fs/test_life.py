"""A share's session: what is agreed on, how long the guest may trust, few descriptors, pause, save, a changing host."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.devices.virtio.driver import BASE, Driver, driven
from tests.vmm.devices.virtio.fs.client import REQUESTS, Client, mounted, refused
from vmm.config import FsConfig
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.device import FsDevice
from vmm.devices.virtio.fs.protocol import Feature, Opcode, SetAttr
from vmm.errors import ConfigError

TO_END = (1 << 63) - 1
DAY = 86_400


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    (path / "directory").mkdir(parents=True)
    (path / "file").write_bytes(b"content")
    return path


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# What the guest is told first.


def test_the_configuration_space_has_tag_and_queues(share: Path) -> None:
    device = FsDevice(FsConfig(path=share, tag="shåre", queues=3))
    with driven(device) as driver:
        space = b"".join(driver.config(4 * n, 4).to_bytes(4, "little") for n in range(10))
        assert space[:36].rstrip(b"\0").decode() == "shåre"
        assert int.from_bytes(space[36:], "little") == 3
        assert [queue.max_size for queue in device.queues] == [128, 512, 512, 512]
        client = Client(driver)
        for queue in (1, 2, 3):
            assert client.call(Opcode.STATFS, fuse.ROOT, queue=queue)


def test_a_path_that_is_no_directory_is_refused(share: Path) -> None:
    before = open_descriptors()
    with pytest.raises(ConfigError, match=r"fs path '.*missing' cannot be shared: No such file"):
        FsDevice(FsConfig(path=share / "missing", tag="x"))
    with pytest.raises(ConfigError, match="it must be a directory"):
        FsDevice(FsConfig(path=share / "file", tag="x"))
    assert open_descriptors() == before


def test_a_device_that_is_closed_twice_leaves_nothing(share: Path) -> None:
    before = open_descriptors()
    device = FsDevice(FsConfig(path=share, tag="x"))
    device.close()
    device.close()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("cache", "wanted", "unwanted"),
    [
        ("none", Feature.DIRECT_IO_ALLOW_MMAP, Feature.WRITEBACK_CACHE | Feature.AUTO_INVAL_DATA),
        ("auto", Feature.AUTO_INVAL_DATA, Feature.WRITEBACK_CACHE | Feature.CACHE_SYMLINKS),
        ("always", Feature.WRITEBACK_CACHE | Feature.CACHE_SYMLINKS, Feature.AUTO_INVAL_DATA),
    ],
)
def test_init_agrees_on_what_the_policy_needs(share: Path, cache: str, wanted: Feature, unwanted: Feature) -> None:
    with mounted(share, cache=cache) as client:
        answer = client.init()
    common = Feature.ATOMIC_O_TRUNC | Feature.POSIX_LOCKS | Feature.FLOCK_LOCKS | Feature.MAX_PAGES | Feature.INIT_EXT
    assert (answer["major"], answer["max_write"], answer["max_pages"]) == (7, 1 << 20, 256)
    assert answer["features"] & (common | wanted) == common | wanted
    assert not answer["features"] & unwanted


def test_init_agrees_on_nothing_that_was_not_offered(share: Path) -> None:
    with mounted(share, cache="always", init=False) as client:
        assert client.init(int(Feature.BIG_WRITES))["features"] == Feature.BIG_WRITES


def test_a_read_only_share_has_no_writeback_cache(share: Path) -> None:
    with mounted(share, cache="always", read_only=True) as client:
        assert not client.init()["features"] & Feature.WRITEBACK_CACHE


def test_versions(share: Path) -> None:
    with mounted(share, init=False) as client:
        with refused(errno.EPROTO):
            client.init(minor=30)
        assert client.init(major=8)["major"] == 7
        with refused(errno.EIO):
            client.getattr(fuse.ROOT)
        client.init(minor=31)
        client.getattr(fuse.ROOT)


@pytest.mark.parametrize(
    ("cache", "seconds", "first", "second", "changed"),
    [
        ("none", 0, fuse.FOPEN_DIRECT_IO, fuse.FOPEN_DIRECT_IO, fuse.FOPEN_DIRECT_IO),
        ("auto", 1, 0, fuse.FOPEN_KEEP_CACHE, 0),
        ("always", DAY, fuse.FOPEN_KEEP_CACHE, fuse.FOPEN_KEEP_CACHE, fuse.FOPEN_KEEP_CACHE),
    ],
)
def test_the_policy_decides_what_is_kept(
    share: Path, cache: str, seconds: int, first: int, second: int, changed: int
) -> None:
    with mounted(share, cache=cache) as client:
        found = client.lookup(b"file")
        assert (found.entry_valid, found.attr_valid) == (seconds, seconds)
        assert client.getattr(found.node)["attr_valid"] == seconds
        assert client.open_out(found.node)["open_flags"] == first
        assert client.open_out(found.node)["open_flags"] == second
        (share / "file").write_bytes(b"new content")
        assert client.open_out(found.node)["open_flags"] == changed


def test_missing_names_are_kept_only_where_nobody_else_makes_them(share: Path) -> None:
    with mounted(share, cache="always") as client:
        missing = client.lookup(b"missing")
        assert (missing.node, missing.entry_valid) == (0, DAY)


def test_with_writeback_the_guest_may_read_what_it_opened_for_writing(share: Path) -> None:
    with mounted(share, cache="always") as client:
        handle = client.open(client.lookup(b"file").node, os.O_WRONLY)
        assert client.read(handle, 0, 100) == b"content"
        _, handle = client.create(b"new", os.O_WRONLY)
        assert client.read(handle, 0, 100) == b""


def test_a_read_only_share_cannot_be_changed(share: Path) -> None:
    with mounted(share, read_only=True) as client:
        node, directory = client.lookup(b"file").node, client.lookup(b"directory").node
        handle = client.open(node)
        for attempt in (
            lambda: client.create(b"new"),
            lambda: client.mkdir(b"new"),
            lambda: client.mknod(b"new", 0o100644),
            lambda: client.symlink(b"new", b"x"),
            lambda: client.link(node, b"new"),
            lambda: client.unlink(b"file"),
            lambda: client.rmdir(b"directory"),
            lambda: client.rename(b"file", b"new"),
            lambda: client.call(Opcode.RENAME, directory, fuse.RENAME_IN.pack(fuse.ROOT), b"a\0b\0"),
            lambda: client.call(Opcode.TMPFILE, fuse.ROOT, fuse.CREATE_IN.pack(os.O_RDWR, 0o600, 0, 0), b"/\0"),
            lambda: client.open(node, os.O_WRONLY),
            lambda: client.open(node, os.O_RDWR),
            lambda: client.open(node, os.O_TRUNC),
            lambda: client.write(handle, 0, b"x"),
            lambda: client.setattr(node, SetAttr.MODE, mode=0),
            lambda: client.setxattr(node, b"user.x", b"x"),
            lambda: client.call(Opcode.REMOVEXATTR, node, b"user.x\0"),
            lambda: client.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(handle, 0, 100, 0)),
            lambda: client.call(
                Opcode.COPY_FILE_RANGE, 0, fuse.COPY_FILE_RANGE_IN.pack(handle, 0, node, handle, 100, 5, 0)
            ),
            lambda: client.call(Opcode.ACCESS, node, fuse.ACCESS_IN.pack(os.W_OK)),
        ):
            with refused(errno.EROFS):
                attempt()
        assert client.read(handle, 0, 100) == b"content"
        client.lock(Opcode.SETLK, handle, 1, fcntl.F_RDLCK)
    assert sorted(os.listdir(share)) == ["directory", "file"]
    assert (share / "file").read_bytes() == b"content"


def test_files_of_other_mounts_in_a_share_have_numbers_of_their_own() -> None:
    assert os.stat("/proc").st_dev != os.stat("/").st_dev
    with mounted(Path("/"), read_only=True) as client:
        proc = client.lookup(b"proc")
        root = client.getattr(fuse.ROOT)
        handle = client.opendir(proc.node)
        version = {name: fields["ino"] for fields, name in client.readdir(handle, 0, 1 << 16)}[b"version"]
        assert root["ino"] == os.stat("/").st_ino
        assert proc.attributes["ino"] == os.stat("/proc").st_ino | 1 << 48
        assert version == client.lookup(b"version", proc.node).attributes["ino"]


# Few descriptors, many files.


@pytest.fixture(params=["by handle", "by name"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How closed nodes are opened again; a VMM that is not root can do so by name only."""

    def not_permitted(*_: object) -> int:
        raise PermissionError(errno.EPERM, "not permitted")

    if request.param == "by name":
        monkeypatch.setattr("vmm.devices.virtio.fs.host.open_by_handle", not_permitted)
    return str(request.param)


@pytest.fixture
def crowd(share: Path) -> Iterator[tuple[Path, list[tuple[str, int]], Client]]:
    """5,000 files in 50 directories, all known to a guest whose device may have few descriptors."""
    with mounted(share, descriptors=128) as client:
        known = []
        for number in range(50):
            (share / f"d{number}").mkdir()
            directory = client.lookup(b"d%d" % number).node
            for file in range(100):
                path = f"d{number}/f{file}"
                (share / path).write_bytes(path.encode())
                known.append((path, client.lookup(b"f%d" % file, directory).node))
        yield share, known, client


def test_five_thousand_files_need_few_descriptors(way: str, crowd: tuple[Path, list[tuple[str, int]], Client]) -> None:
    share, known, client = crowd
    link, fifo = client.symlink(b"link", b"target").node, client.mknod(b"fifo", 0o10600).node
    assert open_descriptors() < 200
    for path, node in known:
        assert client.getattr(node)["ino"] == os.stat(share / path).st_ino
    assert client.readlink(link) == b"target"
    assert client.setattr(fifo, SetAttr.MODE, mode=0o640)["mode"] == 0o10640
    path, node = known[17]
    assert client.read(client.open(node), 0, 100) == path.encode()
    assert open_descriptors() < 200


def test_a_closed_node_is_found_where_the_guest_moved_it(
    way: str, crowd: tuple[Path, list[tuple[str, int]], Client]
) -> None:
    _, known, client = crowd
    first, last = dict(known)["d0/f0"], dict(known)["d49/f99"]
    source, target = client.lookup(b"d0").node, client.lookup(b"d49").node
    client.rename(b"f0", b"moved", parent=source, target=target)
    for _, node in known:
        client.getattr(node)
    assert client.read(client.open(first), 0, 100) == b"d0/f0"
    assert client.getattr(last)["size"] == 7


def test_another_file_with_the_name_of_a_closed_node_is_not_it(
    way: str, crowd: tuple[Path, list[tuple[str, int]], Client]
) -> None:
    share, known, client = crowd
    node = dict(known)["d0/f0"]
    (share / "d0/f0").unlink()
    (share / "d0/f0").write_bytes(b"another")

    with refused(errno.ESTALE):
        client.getattr(node)
    found = client.lookup(b"f0", client.lookup(b"d0").node)
    assert found.node != node
    assert client.read(client.open(found.node), 0, 100) == b"another"


def test_open_files_stay_although_their_names_are_gone(
    way: str, crowd: tuple[Path, list[tuple[str, int]], Client]
) -> None:
    share, known, client = crowd
    node = dict(known)["d0/f0"]
    handle = client.open(node, os.O_RDWR)
    (share / "d0/f0").unlink()
    for _, each in known[1:]:
        client.getattr(each)
    assert client.getattr(node)["nlink"] == 0
    assert client.read(handle, 0, 100) == b"d0/f0"


def test_running_out_of_descriptors_closes_old_ones(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (share / str(number)).touch()
    failures = iter([errno.EMFILE, errno.ENFILE])
    real = os.open

    def scarce(path: bytes, flags: int, *arguments: int, **names: int) -> int:
        if path == b"19":
            for code in failures:
                raise OSError(code, os.strerror(code))
        return real(path, flags, *arguments, **names)

    with mounted(share) as client:
        for number in range(19):
            client.lookup(b"%d" % number)
        monkeypatch.setattr(os, "open", scarce)
        with refused(errno.ENFILE):
            client.lookup(b"19")
        assert client.lookup(b"19").node
        assert client.device.share.inodes.evicted >= 10


# The device's life.


def test_a_reset_closes_everything(share: Path) -> None:
    with mounted(share) as client:
        before = open_descriptors()
        handle = client.open(client.lookup(b"file").node, os.O_RDWR)
        client.opendir(client.lookup(b"directory").node)
        client.lock(Opcode.SETLK, handle, 1, fcntl.F_WRLCK)
        assert open_descriptors() == before + 5
        client.driver.start(size=512)
        assert open_descriptors() == before
        client.init()
        with refused(errno.EBADF):
            client.read(handle, 0, 1)
        client.call(Opcode.DESTROY, 0)


def test_a_pause_ends_waiting_and_finishes_what_is_slow(share: Path) -> None:
    with mounted(share) as client:
        node = client.lookup(b"file").node
        one, other = client.open(node, os.O_RDWR), client.open(node, os.O_RDWR)
        client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK)
        waiting = client.post(Opcode.SETLKW, 0, fuse.LK_IN.pack(other, 2, 0, TO_END, fcntl.F_WRLCK, 0, 0))
        syncing = client.post(Opcode.FSYNC, 0, fuse.FSYNC_IN.pack(one, 0))
        with client.device.lock:
            client.device.pause()
        done = client.driver.collect(REQUESTS)
        assert {id(each) for each in done} == {id(waiting), id(syncing)}
        with refused(errno.EINTR):
            client.results(waiting)
        assert client.results(syncing) == b""
        assert not any(queue.held for queue in client.device.queues)
        with client.device.lock:
            client.device.resume()
        client.getattr(node)


def test_a_queue_that_the_driver_takes_away_keeps_its_buffers(share: Path) -> None:
    with mounted(share, queues=2) as client:
        node = client.lookup(b"file").node
        one, other = client.open(node, os.O_RDWR), client.open(node, os.O_RDWR)
        client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK)
        waiting = client.post(Opcode.SETLKW, 0, fuse.LK_IN.pack(other, 2, 0, TO_END, fcntl.F_WRLCK, 0, 0))
        client.driver.memory.write(waiting.parts[0][0], bytes(16))
        client.driver.set(0x30, REQUESTS)
        client.driver.set(0x44, 0)  # QueueReady
        client.call(Opcode.FLUSH, 0, fuse.FLUSH_IN.pack(one, 1), queue=2)
        assert client.driver.memory.read(*waiting.parts[0]) == bytes(16)


@pytest.mark.parametrize("cache", ["auto", "always"])
def test_a_saved_session_goes_on_in_another_device(way: str, share: Path, cache: str) -> None:
    config = FsConfig(path=share, tag="share", cache=cache)
    with mounted(share, cache=cache) as client:
        directory = client.lookup(b"directory").node
        entry, handle = client.create(b"inner", parent=directory)
        client.write(handle, 0, b"written")
        file = client.lookup(b"file").node
        gone, _ = client.create(b"gone")
        listing = client.opendir(fuse.ROOT)
        with client.device.lock:
            client.device.pause()
        state = client.device.save()
        memory = client.driver.memory.read(BASE, client.driver.memory.size)
        queues, mark = client.driver.queues, client._mark
    (share / "gone").unlink()

    with Driver(FsDevice(config)) as driver:
        driver.memory.write(BASE, memory)
        driver.negotiate()
        for queue, saved in zip(driver.device.queues, state.queues, strict=True):
            queue.size = saved.size
        driver.device.restore(state)
        driver.queues, driver._next = queues, mark
        again = Client(driver, init=False)
        assert again.read(handle, 0, 100) == b"written"
        assert again.getattr(file)["size"] == 7
        assert again.lookup(b"inner", directory).node == entry.node
        assert {name for _, name in again.readdir(listing)} == {b".", b"..", b"file", b"directory"}
        with refused(errno.ESTALE):
            again.getattr(gone.node)
        again.forget(file)
        with refused(errno.ESTALE):
            again.getattr(file)


# A host that changes.


def test_a_file_that_the_host_truncates_ends_there(share: Path) -> None:
    with mounted(share) as client:
        node = client.lookup(b"file").node
        handle = client.open(node)
        os.truncate(share / "file", 3)
        assert client.read(handle, 0, 100) == b"con"
        assert client.getattr(node)["size"] == 3


def test_a_directory_that_the_host_removes_is_gone(share: Path) -> None:
    with mounted(share) as client:
        node = client.lookup(b"directory").node
        handle = client.opendir(node)
        (share / "directory").rmdir()
        for attempt in (
            lambda: client.lookup(b"directory"),
            lambda: client.create(b"new", parent=node),
            lambda: client.mkdir(b"new", parent=node),
            lambda: client.lookup(b"x", node),
            lambda: client.readdir(handle),
        ):
            with refused(errno.ENOENT):
                attempt()
        assert client.getattr(node)["nlink"] == 0


def test_a_share_that_the_host_removes_gives_errors(share: Path) -> None:
    with mounted(share) as client:
        shutil.rmtree(share)
        for attempt in (lambda: client.lookup(b"file"), lambda: client.create(b"new")):
            with refused(errno.ENOENT):
                attempt()
        client.getattr(fuse.ROOT)
        client.call(Opcode.STATFS, fuse.ROOT)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_the_hosts_errors_are_the_guests(share: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with mounted(share) as client:
        handle = client.open(client.lookup(b"file").node, os.O_RDWR)
        for function in ("pwritev", "preadv", "fsync"):
            monkeypatch.setattr(os, function, fail)
        with refused(code):
            client.write(handle, 0, b"x")
        with refused(code):
            client.read(handle, 0, 1)
        with refused(code):
            client.call(Opcode.FSYNC, 0, fuse.FSYNC_IN.pack(handle, 0))
        monkeypatch.undo()
        assert client.read(handle, 0, 100) == b"content"
