"""Owners, modes and kinds of files that are kept in an extended attribute, as containers without root need them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.devices.virtio.fs.client import Client, refused
from tests.vmm.devices.virtio.fs.exported import client, exported, places, statx
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.override import OVERRIDE
from vmm.devices.virtio.fs.protocol import Opcode, SetAttr

__all__ = ["client", "places"]

ROOT = fuse.ROOT
TMPFILE = Opcode.TMPFILE


GOOD = {
    b"1000:1001:640": (stat.S_IFREG | 0o640, 1000, 1001, (0, 0)),
    b"0:0:4755:file": (stat.S_IFREG | 0o4755, 0, 0, (0, 0)),
    b"5:6:620:char-5-1": (stat.S_IFCHR | 0o620, 5, 6, (5, 1)),
    b"0:6:660:block-259-70000": (stat.S_IFBLK | 0o660, 0, 6, (259, 70000)),
    b"1:2:644:pipe": (stat.S_IFIFO | 0o644, 1, 2, (0, 0)),
    b"1:2:600:socket": (stat.S_IFSOCK | 0o600, 1, 2, (0, 0)),
    b"0:0:777777:dir": (stat.S_IFREG | 0o7777, 0, 0, (0, 0)),
}
NONSENSE = (b"", b"0:0", b"0:0:999", b"-1:0:644", b"0:0:644:door", b"0:0:644 ", b"a" * 4000, b"0:0:644:char-5", b"\xff")


@pytest.mark.parametrize(("text", "expected"), GOOD.items())
def test_owner_and_kind_are_read_from_an_attribute(places: dict[str, Path], text: bytes, expected: Any) -> None:
    os.setxattr(places["kept"] / "file", OVERRIDE, text)
    with exported() as client:
        client.device.add("root", places["kept"], read_only=True, override_stat=True)
        node = client.walk("root/file")

        found = client.getattr(node)
        device = os.makedev(*expected[3])
        assert (found["mode"], found["uid"], found["gid"]) == expected[:3]
        major, minor = found["rdev"] >> 8 & 0xFFF, found["rdev"] & 0xFF | found["rdev"] >> 12 & 0xFFF00
        assert os.makedev(major, minor) == device
        mode, number, *device_parts = statx(client, node)
        assert (mode, number) == (found["mode"], found["ino"])
        assert tuple(device_parts) == expected[3]


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_in_the_attribute_is_no_attribute(places: dict[str, Path], text: bytes) -> None:
    os.chmod(places["kept"] / "file", 0o600)
    os.setxattr(places["kept"] / "file", OVERRIDE, text)
    with exported() as client:
        client.device.add("root", places["kept"], override_stat=True)

        assert client.getattr(client.walk("root/file"))["mode"] == stat.S_IFREG | 0o600


def test_the_guest_neither_sees_nor_sets_the_attribute_by_its_name(places: dict[str, Path]) -> None:
    path = places["free"] / "file"
    os.setxattr(path, OVERRIDE, b"7:7:4711")
    with exported() as client:
        client.device.add("root", places["free"], override_stat=True)
        client.device.add("plain", places["free"])
        for node in (client.walk("root/file"), client.walk("plain/file")):
            client.setxattr(node, b"user.other", b"1")
            assert client.listxattr(node, 4096) == b"user.other\0"
            for attempt in (
                lambda node=node: client.getxattr(node, OVERRIDE, 100),
                lambda node=node: client.setxattr(node, OVERRIDE, b"0:0:4777"),
                lambda node=node: client.call(Opcode.REMOVEXATTR, node, OVERRIDE + b"\0"),
            ):
                with refused(errno.EOPNOTSUPP):
                    attempt()
        assert client.setattr(client.walk("root/file"), SetAttr.SIZE, size=3)["size"] == 3

    assert os.getxattr(path, OVERRIDE) == b"7:7:4711"


def test_access_goes_by_the_attribute(places: dict[str, Path]) -> None:
    os.setxattr(places["kept"] / "file", OVERRIDE, b"1000:1000:600")
    with exported() as client:
        client.device.add("root", places["kept"], override_stat=True)
        node = client.walk("root/file")

        client.uid = client.gid = 1000
        client.call(Opcode.ACCESS, node, fuse.ACCESS_IN.pack(os.R_OK))
        client.uid = client.gid = 1001
        with refused(errno.EACCES):
            client.call(Opcode.ACCESS, node, fuse.ACCESS_IN.pack(os.R_OK))


@pytest.fixture
def owned(places: dict[str, Path]) -> Iterator[Client]:
    """``root`` is the directory ``free`` with owners in the attribute; the caller is user 1000 of group 1001."""
    with exported() as client:
        client.device.add("root", places["free"], override_stat=True)
        client.uid, client.gid = 1000, 1001
        yield client


def told(path: Path) -> str:
    return os.getxattr(path, OVERRIDE).decode()


def seen(attributes: dict[str, Any]) -> tuple[int, int, int]:
    return attributes["mode"], attributes["uid"], attributes["gid"]


def test_what_is_made_belongs_to_the_caller_by_the_attribute(owned: Client, places: dict[str, Path]) -> None:
    root, free = owned.walk("root"), places["free"]

    made = {
        "made": owned.create(b"made", mode=0o4750, parent=root)[0],
        "empty": owned.create(b"empty", mode=0, parent=root)[0],
        "place": owned.mkdir(b"place", 0o1770, root),
        "plain": owned.mknod(b"plain", 0o640, parent=root),
        "pipe": owned.mknod(b"pipe", stat.S_IFIFO | 0o600, parent=root),
        "null": owned.mknod(b"null", stat.S_IFCHR | 0o666, 0x103, root),
    }

    assert {name: told(free / name) for name in made} == {
        "made": "1000:1001:4750:file",
        "empty": "1000:1001:0000:file",
        "place": "1000:1001:1770:dir",
        "plain": "1000:1001:0640:file",
        "pipe": "1000:1001:0600:pipe",
        "null": "1000:1001:0666:char-1-3",
    }
    assert seen(made["made"].attributes) == (stat.S_IFREG | 0o4750, 1000, 1001)
    assert seen(made["null"].attributes) == (stat.S_IFCHR | 0o666, 1000, 1001)
    for name, entry in made.items():
        status = (free / name).lstat()
        assert owned.lookup(name.encode(), root).attributes == entry.attributes
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        assert stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR)
        assert status.st_mode & 0o6600 == 0o600


def test_a_file_without_a_name_keeps_its_owner_when_it_gets_one(owned: Client, places: dict[str, Path]) -> None:
    root = owned.walk("root")
    data = owned.call(TMPFILE, root, fuse.CREATE_IN.pack(os.O_RDWR, 0o640, 0, 0), b"x\0")

    owned.link(owned.entry(data).node, b"named", root)

    assert told(places["free"] / "named") == "1000:1001:0640:file"
    assert seen(owned.lookup(b"named", root).attributes) == (stat.S_IFREG | 0o640, 1000, 1001)


def test_a_symbolic_link_is_made_without_the_attribute(owned: Client, places: dict[str, Path]) -> None:
    entry = owned.symlink(b"way", b"file", owned.walk("root"))

    assert os.readlink(places["free"] / "way") == "file"
    assert stat.S_ISLNK(entry.attributes["mode"])


def test_a_directory_with_set_group_id_gives_its_group(owned: Client, places: dict[str, Path]) -> None:
    os.setxattr(places["free"] / "inner", OVERRIDE, b"0:50:2775")
    inner = owned.walk("root/inner")

    owned.create(b"made", mode=0o2770, parent=inner)
    owned.mkdir(b"place", 0o755, inner)

    assert told(places["free"] / "inner" / "made") == "1000:50:0770:file"
    assert told(places["free"] / "inner" / "place") == "1000:50:2755:dir"


def test_owner_and_mode_are_changed_in_the_attribute(owned: Client, places: dict[str, Path]) -> None:
    path = places["free"] / "file"
    before = path.stat()
    node = owned.walk("root/file")
    uid, gid = owned.getattr(node)["uid"], owned.getattr(node)["gid"]

    assert owned.setattr(node, SetAttr.MODE, mode=0o100604)["mode"] == stat.S_IFREG | 0o604
    assert told(path) == f"{uid}:{gid}:0604:file"
    assert seen(owned.setattr(node, SetAttr.UID, uid=7)) == (stat.S_IFREG | 0o604, 7, gid)
    assert seen(owned.setattr(node, SetAttr.GID, gid=8)) == (stat.S_IFREG | 0o604, 7, 8)
    owned.setattr(node, SetAttr.MODE | SetAttr.UID | SetAttr.GID, mode=0o4755, uid=9, gid=10)
    assert told(path) == "9:10:4755:file"
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def _write(client: Client, node: int, killing: bool) -> None:
    client.write(client.open(node, os.O_RDWR), 0, b"x", how=fuse.WRITE_KILL_SUIDGID if killing else 0)


def _truncate(client: Client, node: int, killing: bool) -> None:
    client.setattr(node, SetAttr.SIZE | (SetAttr.KILL_SUIDGID if killing else SetAttr(0)), size=1)


def _open(client: Client, node: int, killing: bool) -> None:
    client.open(node, os.O_RDWR | os.O_TRUNC, fuse.OPEN_KILL_SUIDGID if killing else 0)


def _allocate(client: Client, node: int, killing: bool) -> None:
    client.uid = 1000 if killing else 0
    client.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.pack(client.open(node, os.O_RDWR), 0, 4096, 0))


@pytest.mark.parametrize("act", [_write, _truncate, _open, _allocate])
def test_set_id_bits_of_the_attribute_are_cleared_by(act: Any, owned: Client, places: dict[str, Path]) -> None:
    path, node = places["free"] / "file", owned.walk("root/file")

    for before, after in (("6755", "0755"), ("6745", "2745"), ("0644", "0644")):
        os.setxattr(path, OVERRIDE, f"5:6:{before}:file".encode())
        act(owned, node, False)
        assert told(path) == f"5:6:{before}:file"
        act(owned, node, True)
        assert told(path) == f"5:6:{after}:file"


def test_set_id_bits_of_the_attribute_are_cleared_with_a_new_owner(owned: Client, places: dict[str, Path]) -> None:
    path, node = places["free"] / "file", owned.walk("root/file")
    os.setxattr(path, OVERRIDE, b"5:6:6755")

    assert owned.setattr(node, SetAttr.UID, uid=5)["mode"] == stat.S_IFREG | 0o755

    os.setxattr(places["free"] / "inner", OVERRIDE, b"5:6:6755")
    assert owned.setattr(owned.walk("root/inner"), SetAttr.GID, gid=7)["mode"] == stat.S_IFDIR | 0o6755


def test_what_cannot_have_the_attribute_is_not_made(
    owned: Client, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root, names = owned.walk("root"), sorted(os.listdir(places["free"]))
    monkeypatch.setattr(os, "setxattr", full)
    for attempt in (
        lambda: owned.create(b"made", parent=root),
        lambda: owned.mkdir(b"made", parent=root),
        lambda: owned.mknod(b"made", stat.S_IFIFO | 0o600, parent=root),
    ):
        with refused(errno.ENOSPC):
            attempt()

    assert sorted(os.listdir(places["free"])) == names
