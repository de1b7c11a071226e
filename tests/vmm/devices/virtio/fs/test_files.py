"""Bytes, attributes and locks of a share's files: the guest's view is the host's."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.devices.virtio.fs.client import PRIORITY, REQUESTS, Client, mounted, refused
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.protocol import Opcode, SetAttr

IS_ROOT = os.geteuid() == 0
TO_END = (1 << 63) - 1


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with mounted(tmp_path) as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_reads_are_the_files_bytes(client: Client, file: Path) -> None:
    handle = client.open(client.lookup(b"file").node)
    content = file.read_bytes()

    assert client.read(handle, 0, 4096) == content[:4096]
    assert client.read(handle, 10_000, 4096) == content[10_000:]
    assert client.read(handle, 1 << 40, 4096) == b""
    assert client.read(handle, 0, 1 << 20) == content


def test_writes_arrive_on_the_host(client: Client, file: Path) -> None:
    handle = client.open(client.lookup(b"file").node, os.O_RDWR)

    assert client.write(handle, 100, b"hello") == 5
    assert client.write(handle, 20_000, b"end") == 3

    content = file.read_bytes()
    assert content[100:105] == b"hello"
    assert content[-3:] == b"end"
    assert len(content) == 20_003


def test_a_write_needs_a_handle_for_writing(client: Client, file: Path) -> None:
    handle = client.open(client.lookup(b"file").node)
    with refused(errno.EBADF):
        client.write(handle, 0, b"x")
    assert file.stat().st_size == 10_240


def test_appending_writes_go_to_the_end_but_pages_to_their_place(client: Client, file: Path) -> None:
    flags = os.O_RDWR | os.O_APPEND
    handle = client.open(client.lookup(b"file").node, flags)

    client.write(handle, 0, b"appended", flags=flags)
    client.write(handle, 0, b"page", how=fuse.WRITE_CACHE, flags=flags)

    content = file.read_bytes()
    assert content.endswith(b"appended")
    assert content.startswith(b"page")
    assert len(content) == 10_248


def test_opening_truncates(client: Client, file: Path) -> None:
    client.open(client.lookup(b"file").node, os.O_WRONLY | os.O_TRUNC)
    assert file.read_bytes() == b""


@pytest.mark.parametrize("way", ["write", "truncate", "open"])
def test_set_user_id_bits_are_cleared_when_asked(client: Client, file: Path, way: str) -> None:
    node = client.lookup(b"file").node
    handle = client.open(node, os.O_RDWR)
    file.chmod(0o6775)

    match way:
        case "write":
            client.write(handle, 0, b"x", how=fuse.WRITE_KILL_SUIDGID)
        case "truncate":
            client.setattr(node, SetAttr.SIZE | SetAttr.KILL_SUIDGID, size=1)
        case "open":
            client.open(node, os.O_RDWR | os.O_TRUNC, fuse.OPEN_KILL_SUIDGID)

    assert stat.S_IMODE(file.stat().st_mode) == 0o775


def test_fsync_flush_and_syncfs(client: Client, file: Path) -> None:
    handle = client.open(client.lookup(b"file").node, os.O_RDWR)
    client.write(handle, 0, b"x")
    client.call(Opcode.FSYNC, 0, fuse.FSYNC_IN.pack(handle, 0))
    client.call(Opcode.FSYNC, 0, fuse.FSYNC_IN.pack(handle, fuse.FSYNC_FDATASYNC))
    client.call(Opcode.SYNCFS, fuse.ROOT, bytes(8))
    client.flush(handle)
    client.release(handle)
    with refused(errno.EBADF):
        client.flush(handle)


def test_a_file_may_be_closed_while_it_is_synced(client: Client, file: Path) -> None:
    handle = client.open(client.lookup(b"file").node, os.O_RDWR)
    syncing = client.post(Opcode.FSYNC, 0, fuse.FSYNC_IN.pack(handle, 0))
    arguments = fuse.RELEASE_IN.pack(handle, 0, 0, 0)
    closing = client.post(Opcode.RELEASE, 0, arguments)
    done = client.driver.wait(REQUESTS, 2)
    assert {id(syncing), id(closing)} == {id(each) for each in done}
    assert [client.results(each) for each in done] == [b"", b""]


def test_fallocate_reserves_and_punches_holes(client: Client, file: Path) -> None:
    handle = client.open(client.lookup(b"file").node, os.O_RDWR)
    keep_size, punch_hole = 1, 2

    client.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(handle, 0, 1 << 20, 0))
    assert file.stat().st_size == 1 << 20
    client.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(handle, 0, 4096, keep_size | punch_hole))
    assert file.read_bytes()[:4097] == bytes(4096) + b"\0"
    with refused(errno.EINVAL):
        client.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(handle, 0, 0, 0))
    with refused(errno.EFBIG):
        client.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(handle, 1 << 63, 1, 0))


def test_holes_are_found(client: Client, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 20)
        sparse.seek(1 << 19)
        sparse.write(b"data")
    handle = client.open(client.lookup(b"sparse").node)

    def seek(offset: int, whence: int) -> int:
        answer = client.call(Opcode.LSEEK, 0, fuse.LSEEK_IN.pack(handle, offset, whence))
        return fuse.LSEEK_OUT.unpack(answer)[0]

    assert seek(0, os.SEEK_DATA) == 1 << 19
    assert seek(1 << 19, os.SEEK_HOLE) == (1 << 19) + 4096
    with refused(errno.ENXIO):
        seek(1 << 20, os.SEEK_DATA)
    with refused(errno.EINVAL):
        seek(0, os.SEEK_SET)


@pytest.mark.parametrize("size", [10_000, 6 << 20])
def test_copy_file_range(client: Client, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "from").write_bytes(content)
    source = client.open(client.lookup(b"from").node)
    _, target = client.create(b"to")

    done = 0
    while done < size:
        arguments = fuse.COPY_FILE_RANGE_IN.pack(source, done, 0, target, done, size - done, 0)
        (copied,) = fuse.WRITE_OUT.unpack(client.call(Opcode.COPY_FILE_RANGE, 0, arguments))
        assert copied
        done += copied

    assert (tmp_path / "to").read_bytes() == content


def test_attributes_are_set(client: Client, file: Path) -> None:
    node = client.lookup(b"file").node

    client.setattr(node, SetAttr.MODE, mode=0o1640)
    client.setattr(node, SetAttr.SIZE, size=123)
    client.setattr(node, SetAttr.ATIME | SetAttr.MTIME, atime=1000, atimensec=5, mtime=-7, mtimensec=6)

    status = file.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o1640, 123)
    assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_000_005, -7_000_000_000 + 6)

    client.setattr(node, SetAttr.MTIME | SetAttr.MTIME_NOW)
    status = file.stat()
    assert status.st_atime_ns == 1_000_000_000_005
    assert abs(status.st_mtime - time.time()) < 60
    with refused(errno.EINVAL):
        client.setattr(node, SetAttr.MTIME, mtimensec=1_000_000_000)


def test_owners_are_set_where_the_vmm_can(client: Client, file: Path) -> None:
    node = client.lookup(b"file").node
    if IS_ROOT:
        client.setattr(node, SetAttr.UID, uid=1000)
        answer = client.setattr(node, SetAttr.GID, gid=2000)
        assert (file.stat().st_uid, file.stat().st_gid) == (1000, 2000)
        assert (answer["uid"], answer["gid"]) == (1000, 2000)
    else:
        with refused(errno.EPERM):
            client.setattr(node, SetAttr.UID, uid=os.getuid() + 1)
        assert client.setattr(node, SetAttr.UID, uid=0)["uid"] == 0


def test_a_vmm_that_is_not_root_is_the_guests_root(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = file.stat()
    if IS_ROOT:
        # Nothing can be called as another user, but the numbers are translated alike.
        os.chown(file, 1000, 1001)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(os, "getegid", lambda: 1001)
        status = file.stat()
    with mounted(tmp_path) as client:
        found = client.lookup(b"file")
        again = client.setattr(found.node, SetAttr.UID | SetAttr.GID, uid=0, gid=0)

    assert (found.attributes["uid"], found.attributes["gid"]) == (0, 0)
    assert (again["uid"], again["gid"]) == (0, 0)
    assert (file.stat().st_uid, file.stat().st_gid) == (status.st_uid, status.st_gid)


def test_attributes_of_a_symbolic_link_are_its_own(client: Client, tmp_path: Path, file: Path) -> None:
    os.symlink("file", tmp_path / "link")
    node = client.lookup(b"link").node

    client.setattr(node, SetAttr.MTIME, mtime=77)
    with refused(errno.EOPNOTSUPP):
        client.setattr(node, SetAttr.MODE, mode=0o600)
    with refused(errno.EINVAL):
        client.setattr(node, SetAttr.SIZE, size=0)

    assert os.lstat(tmp_path / "link").st_mtime == 77
    assert file.stat().st_mtime != 77
    assert file.stat().st_size == 10_240


def test_statx_tells_the_time_of_birth(client: Client, file: Path) -> None:
    node = client.lookup(b"file").node
    data = client.call(Opcode.STATX, node, fuse.STATX_IN.pack(0, 0, 0, 0xFFF))
    body = data[fuse.STATX_OUT.size :]
    assert len(body) == 256
    assert int.from_bytes(body[32:40], "little") == file.stat().st_ino
    assert int.from_bytes(body[40:48], "little") == 10_240


def test_statfs_is_the_hosts(client: Client, tmp_path: Path) -> None:
    found = fuse.STATFS_OUT.decode(client.call(Opcode.STATFS, fuse.ROOT))
    status = os.statvfs(tmp_path)
    assert (found["blocks"], found["bsize"], found["namelen"]) == (status.f_blocks, status.f_bsize, 255)


def test_extended_attributes(client: Client, file: Path) -> None:
    node = client.lookup(b"file").node

    client.setxattr(node, b"user.one", b"value")
    client.setxattr(node, b"user.empty", b"")

    assert os.getxattr(file, "user.one") == b"value"
    assert client.getxattr(node, b"user.one") == fuse.GETXATTR_OUT.pack(5)
    assert client.getxattr(node, b"user.one", 5) == b"value"
    assert set(client.listxattr(node, 100).split(b"\0")) == {b"user.one", b"user.empty", b""}
    assert client.listxattr(node) == fuse.GETXATTR_OUT.pack(20)
    with refused(errno.ERANGE):
        client.getxattr(node, b"user.one", 4)
    with refused(errno.EEXIST):
        client.setxattr(node, b"user.one", b"x", os.XATTR_CREATE)
    client.call(Opcode.REMOVEXATTR, node, b"user.one\0")
    with refused(errno.ENODATA):
        client.getxattr(node, b"user.one", 5)


def test_access_control_lists_are_not_there(client: Client, file: Path) -> None:
    node = client.lookup(b"file").node
    with refused(errno.EOPNOTSUPP):
        client.getxattr(node, b"system.posix_acl_access", 100)
    with refused(errno.EOPNOTSUPP):
        client.setxattr(node, b"system.posix_acl_access", bytes(28))


def test_access_is_what_the_mode_allows(client: Client, file: Path) -> None:
    file.chmod(0o640)
    node = client.lookup(b"file").node

    def access(mask: int) -> None:
        client.call(Opcode.ACCESS, node, fuse.ACCESS_IN.pack(mask))

    access(os.R_OK | os.W_OK)
    with refused(errno.EACCES):
        access(os.X_OK)
    client.uid = client.gid = 4242
    with refused(errno.EACCES):
        access(os.R_OK)
    access(os.F_OK)


# Locks.


def two_handles(client: Client) -> tuple[int, int]:
    node = client.lookup(b"file").node
    return client.open(node, os.O_RDWR), client.open(node, os.O_RDWR)


def test_locks_of_two_owners_exclude_each_other_where_they_overlap(client: Client, file: Path) -> None:
    one, other = two_handles(client)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK, 0, 99)

    client.lock(Opcode.SETLK, other, 2, fcntl.F_WRLCK, 100, 199)
    with refused(errno.EAGAIN):
        client.lock(Opcode.SETLK, other, 2, fcntl.F_RDLCK, 99, 99)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_RDLCK, 0, 99)
    client.lock(Opcode.SETLK, other, 2, fcntl.F_RDLCK, 99, 99)

    found = fuse.LK_OUT.decode(client.lock(Opcode.GETLK, one, 1, fcntl.F_WRLCK, 0, TO_END))
    assert (found["start"], found["end"], found["type"]) == (99, 99, fcntl.F_RDLCK)
    found = fuse.LK_OUT.decode(client.lock(Opcode.GETLK, one, 1, fcntl.F_WRLCK, 0, 50))
    assert found["type"] == fcntl.F_UNLCK


def test_the_host_sees_the_guests_locks(client: Client, file: Path) -> None:
    one, _ = two_handles(client)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK)
    with file.open("r+b") as on_host:
        with pytest.raises(BlockingIOError):
            fcntl.lockf(on_host, fcntl.LOCK_EX | fcntl.LOCK_NB)
        client.flush(one, 1)
        fcntl.lockf(on_host, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with refused(errno.EAGAIN):
            client.lock(Opcode.SETLK, one, 1, fcntl.F_RDLCK)


def test_flock_belongs_to_the_open_file(client: Client, file: Path) -> None:
    one, other = two_handles(client)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK, flags=fuse.LK_FLOCK)
    with refused(errno.EAGAIN):
        client.lock(Opcode.SETLK, other, 2, fcntl.F_RDLCK, flags=fuse.LK_FLOCK)
    client.release(one)
    client.lock(Opcode.SETLK, other, 2, fcntl.F_WRLCK, flags=fuse.LK_FLOCK)


@pytest.mark.parametrize("flags", [0, fuse.LK_FLOCK])
def test_a_waiting_lock_is_granted_when_the_guest_unlocks(client: Client, file: Path, flags: int) -> None:
    one, other = two_handles(client)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK, flags=flags)

    waiting = client.post(Opcode.SETLKW, 0, fuse.LK_IN.pack(other, 2, 0, TO_END, fcntl.F_WRLCK, 0, flags))
    assert client.driver.collect(REQUESTS) == []
    unlocking = client.post(Opcode.SETLK, 0, fuse.LK_IN.pack(one, 1, 0, TO_END, fcntl.F_UNLCK, 0, flags))

    done = client.driver.wait(REQUESTS, 2)
    assert {id(each) for each in done} == {id(waiting), id(unlocking)}
    assert [client.results(each) for each in done] == [b"", b""]


def test_a_waiting_lock_is_granted_when_the_host_unlocks(client: Client, file: Path) -> None:
    one, _ = two_handles(client)
    with file.open("r+b") as on_host:
        fcntl.lockf(on_host, fcntl.LOCK_EX)
        waiting = client.post(Opcode.SETLKW, 0, fuse.LK_IN.pack(one, 1, 0, TO_END, fcntl.F_WRLCK, 0, 0))
        assert client.driver.collect(REQUESTS) == []
        fcntl.lockf(on_host, fcntl.LOCK_UN)
    assert client.receive(waiting) == b""


def test_an_interrupt_ends_waiting_for_a_lock(client: Client, file: Path) -> None:
    one, other = two_handles(client)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK)
    arguments = fuse.LK_IN.pack(other, 2, 0, TO_END, fcntl.F_WRLCK, 0, 0)
    unique = 4444
    body = client.header(Opcode.SETLKW, 0, fuse.ARGUMENTS + len(arguments), unique) + arguments
    waiting = client.driver.add(REQUESTS, [body], [16])
    client._mark = client.driver._next
    client.driver.notify(REQUESTS)

    client.tell(Opcode.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(unique + 2))
    assert client.driver.collect(REQUESTS) == []
    client.tell(Opcode.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(unique))

    with refused(errno.EINTR):
        client.results(client.driver.wait(REQUESTS)[0])
    assert waiting.written == fuse.RESULTS


def test_too_many_waiters_are_refused_so_that_unlocking_stays_possible(client: Client, file: Path) -> None:
    one, other = two_handles(client)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK, flags=fuse.LK_FLOCK)
    arguments = fuse.LK_IN.pack(other, 2, 0, TO_END, fcntl.F_WRLCK, 0, fuse.LK_FLOCK)
    for _ in range(64):
        client.post(Opcode.SETLKW, 0, arguments)
    with refused(errno.ENOLCK):
        client.receive(client.post(Opcode.SETLKW, 0, arguments))
    client.post(Opcode.SETLK, 0, fuse.LK_IN.pack(one, 1, 0, TO_END, fcntl.F_UNLCK, 0, fuse.LK_FLOCK))
    assert all(client.results(each) == b"" for each in client.driver.wait(REQUESTS, 65))


@pytest.mark.parametrize(
    ("start", "end", "kind"), [(5, 4, fcntl.F_WRLCK), (0, 1 << 63, fcntl.F_WRLCK), (0, 0, 7), (1 << 63, 1 << 63, 0)]
)
def test_a_lock_that_makes_no_sense_is_refused(client: Client, file: Path, start: int, end: int, kind: int) -> None:
    one, _ = two_handles(client)
    with refused(errno.EINVAL):
        client.lock(Opcode.SETLK, one, 1, kind, start, end)


def test_a_lock_is_gone_when_the_file_is_forgotten(client: Client, file: Path) -> None:
    one, _ = two_handles(client)
    client.lock(Opcode.SETLK, one, 1, fcntl.F_WRLCK)
    node = client.lookup(b"file").node
    client.tell(Opcode.FORGET, node, fuse.FORGET_IN.pack(100), queue=PRIORITY)
    with file.open("r+b") as on_host:
        fcntl.lockf(on_host, fcntl.LOCK_EX | fcntl.LOCK_NB)
