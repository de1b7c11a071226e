"""A hostile guest, and a host that changes under it: refused, alive, and nothing outside the share touched."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.vmm.devices.virtio.fs.client import PRIORITY, REQUESTS, Client, mounted, refused
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.protocol import UNANSWERED, Opcode, SetAttr

FORGED = (0, 999, 1 << 32, (1 << 64) - 1)
BAD_NAMES = {
    b"": errno.EINVAL,
    b".": errno.EINVAL,
    b"..": errno.EINVAL,
    b"/": errno.EINVAL,
    b"/etc/passwd": errno.EINVAL,
    b"../outside/canary": errno.EINVAL,
    b"file/": errno.EINVAL,
    b"x" * 256: errno.ENAMETOOLONG,
    b"x" * 4000: errno.ENAMETOOLONG,
    b"x" * 9000: errno.ENAMETOOLONG,
}


class Surroundings:
    """A share with canaries around it, to which links in the share lead."""

    def __init__(self, path: Path) -> None:
        self.share = path / "share"
        self.outside = path / "outside"
        for directory in (self.share, self.outside, self.share / "directory"):
            directory.mkdir()
        (self.outside / "canary").write_bytes(b"alive")
        (self.outside / "empty").mkdir()
        (path / "canary").write_bytes(b"alive too")
        (self.share / "file").write_bytes(b"inside")
        os.symlink("../outside/canary", self.share / "link")
        os.symlink(self.outside, self.share / "way out")
        self.path = path
        self.before = self.view()

    def view(self) -> list[tuple[object, ...]]:
        """Everything outside the share: names, owners, modes, times of change, contents."""
        found: list[tuple[object, ...]] = []
        for path in sorted([self.path / "canary", self.outside, *self.outside.rglob("*")]):
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found.append((path, status.st_mode, status.st_uid, status.st_nlink, status.st_ctime_ns, content))
        return [*found, *sorted(os.listdir(self.path))]

    def check(self) -> None:
        assert self.view() == self.before


@pytest.fixture
def around(tmp_path: Path) -> Iterator[Surroundings]:
    surroundings = Surroundings(tmp_path)
    yield surroundings
    surroundings.check()


@pytest.fixture
def client(around: Surroundings) -> Iterator[Client]:
    with mounted(around.share) as client:
        yield client


@pytest.mark.parametrize(("name", "code"), BAD_NAMES.items(), ids=range(len(BAD_NAMES)))
def test_a_name_that_is_no_component_of_a_path_is_refused_everywhere(client: Client, name: bytes, code: int) -> None:
    node = client.lookup(b"file").node
    attempts = [
        lambda: client.lookup(name),
        lambda: client.create(name),
        lambda: client.mkdir(name),
        lambda: client.mknod(name, stat.S_IFREG | 0o600),
        lambda: client.symlink(name, b"target"),
        lambda: client.link(node, name),
        lambda: client.unlink(name),
        lambda: client.rmdir(name),
    ]
    if len(name) < 1000:
        attempts += [lambda: client.rename(name, b"new"), lambda: client.rename(b"file", name)]
    for attempt in attempts:
        with refused(code):
            attempt()


def test_a_name_without_its_zero_is_refused(client: Client) -> None:
    with refused(errno.EINVAL):
        client.call(Opcode.LOOKUP, fuse.ROOT, b"file")
    with refused(errno.EINVAL):
        client.call(Opcode.RENAME2, fuse.ROOT, fuse.RENAME2_IN.pack(fuse.ROOT, 0), b"file\0new")
    with refused(errno.EINVAL):
        client.call(Opcode.SYMLINK, fuse.ROOT, b"name\0")


def test_a_link_out_of_the_share_is_only_a_link(client: Client) -> None:
    way_out, link = client.lookup(b"way out").node, client.lookup(b"link").node

    for attempt in (
        lambda: client.lookup(b"canary", way_out),
        lambda: client.create(b"new", parent=way_out),
        lambda: client.opendir(way_out),
        lambda: client.unlink(b"canary", way_out),
    ):
        with refused(errno.ENOTDIR):
            attempt()
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
        with refused(errno.ELOOP):
            client.open(link, flags)
    with refused(errno.ELOOP):
        client.create(b"link")
    with refused(errno.EINVAL):
        client.setattr(link, SetAttr.SIZE, size=0)
    client.setattr(link, SetAttr.ATIME | SetAttr.MTIME, atime=1, mtime=1)
    with pytest.raises(OSError, match=r"Errno"):
        client.setxattr(link, b"user.x", b"x")


def test_a_file_replaced_by_a_link_after_its_lookup_stays_the_file(client: Client, around: Surroundings) -> None:
    node = client.lookup(b"file").node
    os.rename(around.share / "file", around.share / "moved")
    os.symlink("../outside/canary", around.share / "file")

    handle = client.open(node, os.O_RDWR)
    client.write(handle, 0, b"INSIDE")
    client.setattr(node, SetAttr.MODE, mode=0o600)
    client.setxattr(node, b"user.x", b"x")

    assert (around.share / "moved").read_bytes() == b"INSIDE"
    with refused(errno.ELOOP):
        client.open(client.lookup(b"file").node)


def test_a_directory_replaced_by_a_link_after_its_lookup_stays_the_directory(
    client: Client, around: Surroundings
) -> None:
    node = client.lookup(b"directory").node
    os.rename(around.share / "directory", around.share / "moved")
    os.symlink(around.outside, around.share / "directory")

    client.create(b"new", parent=node)
    client.mkdir(b"deep", parent=node)

    assert sorted(os.listdir(around.share / "moved")) == ["deep", "new"]
    with refused(errno.ENOENT):
        client.lookup(b"canary", node)


def test_a_closed_node_is_not_found_again_through_a_link(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(*_: object) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr("vmm.devices.virtio.fs.host.open_by_handle", not_permitted)
    (around.share / "directory" / "canary").write_bytes(b"inside")
    for number in range(200):
        (around.share / f"many {number}").touch()
    with mounted(around.share, descriptors=64) as client:
        directory = client.lookup(b"directory").node
        canary = client.lookup(b"canary", directory).node
        for number in range(200):
            client.lookup(b"many %d" % number)
        os.rename(around.share / "directory", around.share / "moved")
        os.symlink(around.outside, around.share / "directory")

        with refused(errno.ESTALE):
            client.open(canary, os.O_RDWR)
        with refused(errno.ESTALE):
            client.create(b"new", parent=directory)


@pytest.mark.parametrize("node", FORGED)
def test_forged_nodes_are_stale(client: Client, node: int) -> None:
    for attempt in (
        lambda: client.getattr(node),
        lambda: client.lookup(b"file", node),
        lambda: client.open(node),
        lambda: client.opendir(node),
        lambda: client.readlink(node),
        lambda: client.create(b"x", parent=node),
        lambda: client.rename(b"file", b"x", target=node),
        lambda: client.link(node, b"x"),
        lambda: client.setattr(node, SetAttr.MODE, mode=0),
        lambda: client.getxattr(node, b"user.x"),
        lambda: client.call(Opcode.STATFS, node),
    ):
        with refused(errno.ESTALE):
            attempt()
    client.forget(node, 5)


@pytest.mark.parametrize("handle", FORGED)
def test_forged_handles_are_refused(client: Client, handle: int) -> None:
    node = client.lookup(b"file").node
    real = client.open(node)
    for attempt in (
        lambda: client.read(handle, 0, 10),
        lambda: client.write(handle, 0, b"x"),
        lambda: client.readdir(handle),
        lambda: client.readdirplus(handle),
        lambda: client.release(handle),
        lambda: client.release(handle, directory=True),
        lambda: client.flush(handle),
        lambda: client.getattr(node, handle),
        lambda: client.setattr(node, SetAttr.FH | SetAttr.SIZE, fh=handle),
        lambda: client.lock(Opcode.SETLK, handle, 1, 1),
        lambda: client.lock(Opcode.SETLKW, handle, 1, 1),
        lambda: client.call(Opcode.FSYNC, 0, fuse.FSYNC_IN.pack(handle, 0)),
        lambda: client.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(handle, 0, 10, 0)),
        lambda: client.call(Opcode.LSEEK, 0, fuse.LSEEK_IN.pack(handle, 0, os.SEEK_DATA)),
        lambda: client.call(Opcode.COPY_FILE_RANGE, 0, fuse.COPY_FILE_RANGE_IN.pack(real, 0, 0, handle, 0, 9, 0)),
    ):
        with refused(errno.EBADF):
            attempt()


def test_a_read_never_exceeds_its_buffer(client: Client, around: Surroundings) -> None:
    (around.share / "file").write_bytes(bytes(1 << 21))
    handle = client.open(client.lookup(b"file").node)
    arguments = fuse.READ_IN.pack(handle, 0, 0xFFFF_FFFF, 0, 0, 0)

    assert len(client.call(Opcode.READ, 0, arguments, room=100)) == 100
    assert len(client.call(Opcode.READ, 0, arguments, room=2 << 20)) == 1 << 20
    with refused(errno.EINVAL):
        client.call(Opcode.READ, 0, fuse.READ_IN.pack(handle, 1 << 63, 10, 0, 0, 0), room=10)


def test_a_write_of_more_than_was_sent_is_refused(client: Client, around: Surroundings) -> None:
    handle = client.open(client.lookup(b"file").node, os.O_RDWR)
    for size in (11, 1 << 20, 0xFFFF_FFFF):
        with refused(errno.EINVAL):
            client.call(Opcode.WRITE, 0, fuse.WRITE_IN.pack(handle, 0, size, 0, 0, 0), b"0123456789")
    with refused(errno.E2BIG):
        client.call(Opcode.SETXATTR, 2, fuse.SETXATTR_IN_EXT.pack(0xFFFF_FFFF, 0, 0), b"user.x\0value")
    with refused(errno.EINVAL):
        client.call(Opcode.SETXATTR, 2, fuse.SETXATTR_IN_EXT.pack(1000, 0, 0), b"user.x\0value")
    assert (around.share / "file").read_bytes() == b"inside"


def test_an_answer_that_does_not_fit_is_an_error(client: Client) -> None:
    with refused(errno.EINVAL):
        client.call(Opcode.LOOKUP, fuse.ROOT, b"file\0", room=100)
    with refused(errno.EINVAL):
        client.call(Opcode.STATFS, fuse.ROOT, room=8)


@pytest.mark.parametrize("opcode", [each for each in Opcode if each not in UNANSWERED | {Opcode.DESTROY, Opcode.INIT}])
def test_truncated_requests_of_every_kind_are_answered(client: Client, opcode: Opcode) -> None:
    for length in (0, 1, 7, 8, 15, 16, 23, 24, 39):
        with contextlib.suppress(OSError):
            client.call(opcode, fuse.ROOT, bytes(length))
    assert not client.driver.needs_reset
    assert stat.S_ISDIR(client.getattr(fuse.ROOT)["mode"])


@pytest.mark.parametrize("claimed", [0, 39, 41, 5000, 0xFFFF_FFFF])
def test_a_header_with_a_wrong_length_is_refused(client: Client, claimed: int) -> None:
    buffer = client.driver.add(REQUESTS, [client.header(Opcode.STATFS, fuse.ROOT, claimed)], [16, 200])
    client.driver.notify(REQUESTS)
    with refused(errno.EINVAL):
        client.receive(buffer)


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([bytes(39)], [16]), ([], [16, 100]), ([fuse.IN_HEADER.pack(40, 3, 2, 1, 0, 0, 0, 0)], [15])],
)
def test_a_buffer_without_room_for_headers_asks_for_a_reset(
    around: Surroundings, readable: list[bytes], writable: list[int]
) -> None:
    with mounted(around.share) as client:
        client.driver.add(REQUESTS, readable, writable)
        client.driver.notify(REQUESTS)
        assert client.driver.needs_reset
        client.driver.start(size=512)
        client.init()
        assert client.lookup(b"file").attributes["size"] == 6


def test_unknown_operations_are_enosys(client: Client) -> None:
    for opcode in (0, 7, 39, 40, 48, 49, 4096, 0xFFFF_FFFF):
        with refused(errno.ENOSYS):
            client.call(opcode, fuse.ROOT, bytes(64))


def test_nothing_is_answered_before_init(around: Surroundings) -> None:
    with mounted(around.share, init=False) as client:
        with refused(errno.EIO):
            client.lookup(b"file")
        client.forget(fuse.ROOT)
        client.init()
        client.lookup(b"file")
        client.call(Opcode.DESTROY, 0)
        with refused(errno.EIO):
            client.lookup(b"file")


def test_forgetting_more_than_was_looked_up_is_no_credit(client: Client) -> None:
    node = client.lookup(b"file").node
    client.forget(node, (1 << 64) - 1)
    again = client.lookup(b"file").node
    client.getattr(again)
    client.forget(again)
    with refused(errno.ESTALE):
        client.getattr(again)


def test_magic_links_are_links_like_others() -> None:
    with mounted(Path("/proc/self"), read_only=True) as client:
        for name in (b"exe", b"cwd", b"root"):
            node = client.lookup(name).node
            assert client.readlink(node) == os.fsencode(os.readlink(b"/proc/self/" + name))
            with refused(errno.ELOOP):
                client.open(node)
            with refused(errno.ENOTDIR):
                client.lookup(b"etc", node)


def test_open_files_are_bounded(around: Surroundings) -> None:
    with mounted(around.share, descriptors=64) as client:
        node = client.lookup(b"file").node
        handles = []
        with refused(errno.ENFILE):
            for _ in range(1000):
                handles.append(client.open(node))
        assert len(handles) == 32
        with refused(errno.ENFILE):
            client.create(b"new")
        assert not (around.share / "new").exists()
        with refused(errno.ENFILE):
            client.opendir(fuse.ROOT)
        client.release(handles[0])
        client.create(b"new")


def test_owners_of_locks_are_bounded(around: Surroundings) -> None:
    with mounted(around.share, descriptors=64) as client:
        handle = client.open(client.lookup(b"file").node, os.O_RDWR)
        with refused(errno.ENOLCK):
            for owner in range(100):
                client.lock(Opcode.SETLK, handle, owner, 0, owner, owner)


# Whatever a guest sends.

NODES = st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 1 << 63, (1 << 64) - 1])
HANDLES = st.sampled_from([0, 1, 2, 3, 4, 5, 1 << 40])
OFFSETS = st.sampled_from([0, 0, 1, 5, 4096, 1 << 20, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
SIZES = st.sampled_from([0, 1, 5, 4096, 1 << 20])
WORDS = st.one_of(st.integers(0, 16), st.sampled_from([0o100644, 0o40755, 0o2, 0o102, 0xFFFF_FFFF, 0x8000_0000]))
NAMES = st.sampled_from(
    [
        b"file",
        b"directory",
        b"link",
        b"way out",
        b"new",
        b"other",
        b"..",
        b".",
        b"",
        b"a/b",
        b"../outside/canary",
        b"\xff" * 255,
    ]
)
ZERO = b"\0"


def structure(layout: fuse.Layout) -> st.SearchStrategy[bytes]:
    """The layout's fields, each with values that may mean something."""
    kinds = dict.fromkeys(layout.fields, WORDS)
    kinds |= dict.fromkeys(("offset", "off_in", "off_out", "start", "end", "owner", "nlookup", "unique"), OFFSETS)
    kinds |= dict.fromkeys(("atime", "mtime", "ctime"), OFFSETS.map(lambda value: value >> 1))
    kinds |= dict.fromkeys(("length", "len", "size", "count"), SIZES)
    kinds |= {"fh": HANDLES, "fh_in": HANDLES, "fh_out": HANDLES, "newdir": NODES, "oldnodeid": NODES}
    values = [kinds[name] for name in layout.fields]
    return st.tuples(*values).map(lambda fields: layout.pack(*fields))


def named(layout: fuse.Layout | None, names: int) -> st.SearchStrategy[bytes]:
    head = st.just(b"") if layout is None else structure(layout)
    tail = st.lists(NAMES, min_size=names, max_size=names).map(lambda each: b"".join(name + ZERO for name in each))
    return st.tuples(head, tail).map(b"".join)


MEANT: dict[Opcode, st.SearchStrategy[bytes]] = {
    Opcode.LOOKUP: named(None, 1),
    Opcode.FORGET: structure(fuse.FORGET_IN),
    Opcode.GETATTR: structure(fuse.GETATTR_IN),
    Opcode.SETATTR: structure(fuse.SETATTR_IN),
    Opcode.READLINK: st.just(b""),
    Opcode.SYMLINK: named(None, 2),
    Opcode.MKNOD: named(fuse.MKNOD_IN, 1),
    Opcode.MKDIR: named(fuse.MKDIR_IN, 1),
    Opcode.UNLINK: named(None, 1),
    Opcode.RMDIR: named(None, 1),
    Opcode.RENAME: named(fuse.RENAME_IN, 2),
    Opcode.RENAME2: named(fuse.RENAME2_IN, 2),
    Opcode.LINK: named(fuse.LINK_IN, 1),
    Opcode.OPEN: structure(fuse.OPEN_IN),
    Opcode.READ: structure(fuse.READ_IN),
    Opcode.WRITE: st.tuples(structure(fuse.WRITE_IN), st.binary(max_size=100)).map(b"".join),
    Opcode.STATFS: st.just(b""),
    Opcode.RELEASE: structure(fuse.RELEASE_IN),
    Opcode.SETXATTR: named(fuse.SETXATTR_IN_EXT, 2),
    Opcode.GETXATTR: named(fuse.GETXATTR_IN, 1),
    Opcode.LISTXATTR: structure(fuse.GETXATTR_IN),
    Opcode.REMOVEXATTR: named(None, 1),
    Opcode.FLUSH: structure(fuse.FLUSH_IN),
    Opcode.INIT: structure(fuse.INIT_IN),
    Opcode.OPENDIR: structure(fuse.OPEN_IN),
    Opcode.READDIR: structure(fuse.READ_IN),
    Opcode.RELEASEDIR: structure(fuse.RELEASE_IN),
    Opcode.GETLK: structure(fuse.LK_IN),
    Opcode.SETLK: structure(fuse.LK_IN),
    Opcode.SETLKW: structure(fuse.LK_IN),
    Opcode.ACCESS: structure(fuse.ACCESS_IN),
    Opcode.CREATE: named(fuse.CREATE_IN, 1),
    Opcode.INTERRUPT: structure(fuse.INTERRUPT_IN),
    Opcode.BATCH_FORGET: st.tuples(structure(fuse.BATCH_FORGET_IN), structure(fuse.FORGET_ONE)).map(b"".join),
    Opcode.FALLOCATE: structure(fuse.FALLOCATE_IN),
    Opcode.READDIRPLUS: structure(fuse.READ_IN),
    Opcode.LSEEK: structure(fuse.LSEEK_IN),
    Opcode.COPY_FILE_RANGE: structure(fuse.COPY_FILE_RANGE_IN),
    Opcode.TMPFILE: named(fuse.CREATE_IN, 1),
    Opcode.STATX: structure(fuse.STATX_IN),
}
# Without FALLOCATE and the syncing ones, which do with a valid handle what would fill, or hold up, the host's disk.
ANYTHING = st.tuples(
    st.sampled_from([*(each for each in MEANT if each is not Opcode.FALLOCATE), 0, 7, 99]),
    NODES,
    st.binary(max_size=200),
)
SENSIBLE = st.sampled_from(list(MEANT)).flatmap(lambda opcode: st.tuples(st.just(opcode), NODES, MEANT[opcode]))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(st.one_of(SENSIBLE, SENSIBLE, ANYTHING), min_size=1, max_size=30),
    cache=st.sampled_from(["none", "always"]),
)
@example(
    requests=[
        (Opcode.LOOKUP, 1, b"way out\0"),
        (Opcode.CREATE, 2, fuse.CREATE_IN.pack(0o102, 0o644, 0, 0) + b"canary\0"),
        (Opcode.OPEN, 2, fuse.OPEN_IN.pack(0o1002, 0)),
    ],
    cache="none",
)
def test_no_sequence_of_requests_harms_the_vmm_or_the_host(requests: list[tuple[int, int, bytes]], cache: str) -> None:
    with tempfile.TemporaryDirectory() as path:
        around = Surroundings(Path(path))
        with mounted(around.share, cache=cache, descriptors=64) as client:
            for name in (b"file", b"directory", b"link", b"way out"):
                client.lookup(name)
            client.open(2, os.O_RDWR)
            client.opendir(fuse.ROOT)
            for opcode, node, payload in requests:
                if len(client.driver.queues[REQUESTS].free) < 8:
                    break
                client.post(opcode, node, payload)
            assert not client.driver.needs_reset
            client.driver.start(size=512)
            client.init()
            assert stat.S_ISDIR(client.getattr(fuse.ROOT)["mode"])
        around.check()


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), room=st.integers(0, 300), queue=st.sampled_from([PRIORITY, REQUESTS]))
def test_no_bytes_in_a_buffer_harm_the_vmm(data: bytes, room: int, queue: int) -> None:
    with tempfile.TemporaryDirectory() as path, mounted(Path(path)) as client:
        readable = [data] if data else []
        writable = [room] if room else []
        if readable or writable:
            client.driver.add(queue, readable, writable)
            client.driver.notify(queue)
        client.driver.start(size=512)
        client.init()
        assert set(client.names()) == {b".", b".."}


@pytest.mark.parametrize("node", [fuse.ROOT, (1 << 64) - 1])
def test_every_word_of_a_request_may_be_all_ones(client: Client, node: int) -> None:
    for opcode in MEANT:
        if opcode in UNANSWERED:
            client.tell(opcode, node, b"\xff" * 100)
        else:
            with contextlib.suppress(OSError):
                client.call(opcode, node, b"\xff" * 100)
    assert not client.driver.needs_reset
