"""Names in a share: what the guest makes, finds and removes is what the host has."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.devices.virtio.fs.client import Client, mounted, refused
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.host import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from vmm.devices.virtio.fs.protocol import Opcode

IS_ROOT = os.geteuid() == 0


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with mounted(tmp_path) as client:
        yield client


def test_lookup_tells_what_the_host_has(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    os.utime(tmp_path / "file", ns=(1_500_000_000_123_456_789, -5_000_000_001))

    found = client.lookup(b"file").attributes

    status = os.stat(tmp_path / "file")
    assert (found["ino"], found["size"], found["mode"]) == (status.st_ino, 3, status.st_mode)
    assert (found["atime"], found["atimensec"]) == (1_500_000_000, 123_456_789)
    assert (found["mtime"], found["mtimensec"]) == (-6, 999_999_999)


def test_a_name_that_is_not_there_is_enoent(client: Client) -> None:
    with refused(errno.ENOENT):
        client.lookup(b"nothing")


def test_the_same_file_has_one_node_under_all_its_names(client: Client, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x")
    os.link(tmp_path / "one", tmp_path / "two")

    first, second = client.lookup(b"one"), client.lookup(b"two")
    os.rename(tmp_path / "one", tmp_path / "three")
    third = client.lookup(b"three")

    assert first.node == second.node == third.node
    assert client.getattr(first.node)["nlink"] == 2


def test_a_file_keeps_its_node_when_the_guest_renames_it(client: Client, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "old").write_bytes(b"x")
    node, below = client.lookup(b"old").node, client.lookup(b"below").node

    client.rename(b"old", b"new", target=below)

    assert client.lookup(b"new", below).node == node
    assert os.listdir(tmp_path / "below") == ["new"]


def test_mkdir_and_rmdir(client: Client, tmp_path: Path) -> None:
    made = client.mkdir(b"directory", 0o1777)
    assert stat.filemode((tmp_path / "directory").stat().st_mode) == "drwxrwxrwt"

    client.mkdir(b"inner", parent=made.node)
    with refused(errno.ENOTEMPTY):
        client.rmdir(b"directory")
    client.rmdir(b"inner", made.node)
    client.rmdir(b"directory")
    assert os.listdir(tmp_path) == []


def test_the_mode_is_the_guests_whatever_the_umask_of_the_process(client: Client, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        client.mkdir(b"directory", 0o775)
        client.create(b"file", mode=0o4755)
        client.mknod(b"fifo", stat.S_IFIFO | 0o666)
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0o775
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o4755
    assert stat.S_IMODE((tmp_path / "fifo").stat().st_mode) == 0o666


def test_special_files_are_made_but_never_opened(client: Client, tmp_path: Path) -> None:
    fifo = client.mknod(b"fifo", stat.S_IFIFO | 0o600)
    socket = client.mknod(b"socket", stat.S_IFSOCK | 0o600)

    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)
    for node in (fifo.node, socket.node):
        with refused(errno.ENXIO):
            client.open(node, os.O_RDWR)
    with refused(errno.ENXIO):
        client.create(b"fifo")


def test_a_device_number_goes_both_ways(client: Client, tmp_path: Path) -> None:
    encoded = 0x34 | 0xABC << 8 | 0x12 << 20  # major 0xabc, minor 0x1234

    if not IS_ROOT:
        with refused(errno.EPERM):
            client.mknod(b"device", stat.S_IFCHR | 0o600, encoded)
        return
    made = client.mknod(b"device", stat.S_IFCHR | 0o600, encoded)

    device = (tmp_path / "device").stat().st_rdev
    assert (os.major(device), os.minor(device)) == (0xABC, 0x1234)
    assert made.attributes["rdev"] == encoded
    with refused(errno.ENXIO):
        client.open(made.node)


@pytest.mark.parametrize("mode", [stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, 0o170000])
def test_mknod_of_a_kind_that_has_its_own_request_is_refused(client: Client, mode: int) -> None:
    with refused(errno.EINVAL):
        client.mknod(b"node", mode)


def test_symbolic_links_are_read_and_not_followed(client: Client, tmp_path: Path) -> None:
    made = client.symlink(b"link", b"/etc/../anything at all")

    assert os.readlink(tmp_path / "link") == "/etc/../anything at all"
    assert client.readlink(made.node) == b"/etc/../anything at all"
    assert stat.S_ISLNK(made.attributes["mode"])
    with refused(errno.ELOOP):
        client.open(made.node)
    with refused(errno.ENOTDIR):
        client.lookup(b"passwd", made.node)


def test_readlink_of_a_file_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(errno.EINVAL):
        client.readlink(client.lookup(b"file").node)


def test_hard_links(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.symlink("nowhere", tmp_path / "link")
    file, link = client.lookup(b"file"), client.lookup(b"link")

    linked = client.link(file.node, b"again")
    client.link(link.node, b"link again")

    assert linked.node == file.node
    assert linked.attributes["nlink"] == 2
    assert os.readlink(tmp_path / "link again") == "nowhere"
    with refused(errno.EEXIST):
        client.link(file.node, b"again")
    with refused(errno.EPERM):
        client.link(fuse.ROOT, b"directory")


def test_rename_flags(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    node = client.lookup(b"a").node

    with refused(errno.EEXIST):
        client.rename(b"a", b"b", RENAME_NOREPLACE)
    client.rename(b"a", b"b", RENAME_EXCHANGE)
    assert (tmp_path / "a").read_bytes() == b"b"
    assert client.lookup(b"b").node == node
    client.rename(b"a", b"b")
    assert os.listdir(tmp_path) == ["b"]
    with refused(errno.EINVAL):
        client.rename(b"b", b"c", 1 << 10)


def test_the_old_rename_request(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    client.call(Opcode.RENAME, fuse.ROOT, fuse.RENAME_IN.pack(fuse.ROOT), b"a\0b\0")
    assert os.listdir(tmp_path) == ["b"]


def test_rename_leaves_a_whiteout(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    client.rename(b"a", b"b", RENAME_WHITEOUT)
    status = (tmp_path / "a").stat()
    assert stat.S_ISCHR(status.st_mode)
    assert status.st_rdev == 0


def test_create_makes_opens_and_tells(client: Client, tmp_path: Path) -> None:
    entry, handle = client.create(b"file", mode=0o640)
    client.write(handle, 0, b"hello")

    assert (tmp_path / "file").read_bytes() == b"hello"
    assert entry.attributes["ino"] == (tmp_path / "file").stat().st_ino
    assert client.lookup(b"file").node == entry.node


def test_create_of_what_is_there(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    node = client.lookup(b"file").node

    with refused(errno.EEXIST):
        client.create(b"file", os.O_RDWR | os.O_EXCL)
    entry, handle = client.create(b"file")
    assert entry.node == node
    assert client.read(handle, 0, 100) == b"hello"
    entry, handle = client.create(b"file", os.O_RDWR | os.O_TRUNC)
    assert entry.attributes["size"] == 0


def test_a_file_without_a_name_gets_one_by_link(client: Client, tmp_path: Path) -> None:
    arguments = fuse.CREATE_IN.pack(os.O_RDWR, 0o600, 0, 0)
    data = client.call(Opcode.TMPFILE, fuse.ROOT, arguments, b"/\0")
    entry, handle = client.entry(data), fuse.OPEN_OUT.decode(data, fuse.ENTRY_OUT.size)["fh"]
    assert os.listdir(tmp_path) == []

    client.write(handle, 0, b"content")
    assert client.getattr(entry.node)["nlink"] == 0
    client.link(entry.node, b"named")

    assert (tmp_path / "named").read_bytes() == b"content"


@pytest.mark.parametrize("make", ["create", "mkdir", "mknod", "symlink"])
def test_what_the_guest_makes_belongs_to_its_user_where_the_vmm_can(client: Client, tmp_path: Path, make: str) -> None:
    tmp_path.chmod(0o700)
    client.uid, client.gid = 1234, 5678
    match make:
        case "create":
            client.create(b"name", mode=0o600)
        case "mkdir":
            client.mkdir(b"name", 0o700)
        case "mknod":
            client.mknod(b"name", stat.S_IFREG | 0o600)
        case "symlink":
            client.symlink(b"name", b"target")
    client.uid = client.gid = 0
    client.create(b"another")

    owner = (1234, 5678) if IS_ROOT else (os.getuid(), os.getgid())
    status = os.lstat(tmp_path / "name")
    assert (status.st_uid, status.st_gid) == owner
    assert os.lstat(tmp_path / "another").st_uid == os.getuid()


def test_the_user_that_is_none_is_refused(client: Client, tmp_path: Path) -> None:
    client.uid = client.gid = 0xFFFF_FFFF
    if IS_ROOT:
        with refused(errno.EINVAL):
            client.create(b"file")
        client.uid = client.gid = 0
        client.create(b"other")
        assert (tmp_path / "other").stat().st_uid == 0


def test_unlinked_but_open_files_go_on_working(client: Client, tmp_path: Path) -> None:
    entry, handle = client.create(b"file")
    client.write(handle, 0, b"before")
    client.unlink(b"file")

    client.write(handle, 6, b" after")

    assert client.read(handle, 0, 100) == b"before after"
    assert client.getattr(entry.node, handle)["size"] == 12
    assert client.getattr(entry.node)["nlink"] == 0
    client.setattr(entry.node, fuse.SetAttr.SIZE, size=3)
    assert client.getattr(entry.node)["size"] == 3


def test_forgotten_nodes_are_stale_and_looked_up_again_new(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first = client.lookup(b"file")
    client.lookup(b"file")

    client.forget(first.node)
    client.getattr(first.node)
    client.forget(first.node, 1 << 40)
    with refused(errno.ESTALE):
        client.getattr(first.node)

    assert client.lookup(b"file").node != first.node


def test_many_nodes_are_forgotten_at_once(client: Client, tmp_path: Path) -> None:
    nodes = []
    for number in range(50):
        (tmp_path / str(number)).touch()
        nodes.append(client.lookup(str(number).encode()).node)

    body = b"".join(fuse.FORGET_ONE.pack(node, 1) for node in nodes)
    client.tell(Opcode.BATCH_FORGET, 0, fuse.BATCH_FORGET_IN.pack(len(nodes)), body)

    for node in nodes:
        with refused(errno.ESTALE):
            client.getattr(node)


def test_the_root_is_never_forgotten(client: Client) -> None:
    client.forget(fuse.ROOT, (1 << 64) - 1)
    assert stat.S_ISDIR(client.getattr(fuse.ROOT)["mode"])


def test_a_directory_lists_all_its_names_with_inode_numbers_and_kinds(client: Client, tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"file {number}").touch()
    (tmp_path / "directory").mkdir()
    os.symlink("x", tmp_path / "link")

    assert sorted(client.names(size=700)) == sorted([b".", b"..", *map(os.fsencode, os.listdir(tmp_path))])

    handle = client.opendir(fuse.ROOT)
    kinds = {name: (fields["ino"], fields["type"]) for fields, name in client.readdir(handle, 0, 1 << 16)}
    assert kinds[b"directory"] == ((tmp_path / "directory").stat().st_ino, 4)
    assert kinds[b"link"] == (os.lstat(tmp_path / "link").st_ino, 10)


def test_a_listing_goes_on_where_the_guest_says(client: Client, tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / str(number)).touch()
    handle = client.opendir(fuse.ROOT)
    whole = client.readdir(handle, 0, 1 << 16)

    middle = whole[49][0]["off"]
    assert client.readdir(handle, middle, 1 << 16) == whole[50:]
    assert client.readdir(handle, 0, 200)[0] == whole[0]
    assert client.readdir(handle, middle, 1 << 16) == whole[50:]


def test_readdirplus_looks_every_entry_up_and_counts_it(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    handle = client.opendir(fuse.ROOT)

    listed = {name: entry for entry, _, name in client.readdirplus(handle)}

    assert listed[b"."].node == listed[b".."].node == 0
    assert listed[b"file"].attributes["size"] == 5
    client.getattr(listed[b"file"].node)
    client.forget(listed[b"file"].node)
    with refused(errno.ESTALE):
        client.getattr(listed[b"file"].node)


def test_an_entry_for_which_there_is_no_room_is_refused_and_not_lost(client: Client, tmp_path: Path) -> None:
    (tmp_path / ("x" * 200)).touch()
    handle = client.opendir(fuse.ROOT)
    offset = 0
    with refused(errno.EINVAL):
        while found := client.readdir(handle, offset, 64):
            offset = found[-1][0]["off"]

    assert b"x" * 200 in [name for _, name in client.readdir(handle, offset)] + client.names()


def test_a_directory_handle_is_not_a_files(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    directory, file = client.opendir(fuse.ROOT), client.open(client.lookup(b"file").node)
    with refused(errno.EBADF):
        client.read(directory, 0, 10)
    with refused(errno.EBADF):
        client.readdir(file)
    with refused(errno.ENOTDIR):
        client.opendir(client.lookup(b"file").node)
    with refused(errno.EISDIR):
        client.open(fuse.ROOT)
    client.call(Opcode.FSYNCDIR, fuse.ROOT, fuse.FSYNC_IN.pack(directory, 0))
    client.release(directory, directory=True)
    with refused(errno.EBADF):
        client.readdir(directory)
