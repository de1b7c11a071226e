"""A share of exports, which come and go: what the guest may do depends on where it found a file, and ends with it."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from pathlib import Path

import pytest

from tests.vmm.devices.virtio.fs.client import REQUESTS, Client, mounted, refused
from tests.vmm.devices.virtio.fs.exported import client, exported, places, statx
from vmm.devices.virtio.fs import protocol as fuse
from vmm.devices.virtio.fs.protocol import Opcode, SetAttr
from vmm.errors import ConfigError

__all__ = ["client", "places"]

ROOT = fuse.ROOT
TMPFILE = Opcode.TMPFILE


def view(path: Path) -> list[tuple[object, ...]]:
    """Everything about a tree that a write would change."""
    found: list[tuple[object, ...]] = []
    for each in [path, *sorted(path.rglob("*"))]:
        status = each.lstat()
        content = each.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        told = os.listxattr(each, follow_symlinks=False)
        found.append((each, status.st_mode, status.st_uid, status.st_nlink, status.st_ctime_ns, content, told))
    return found


def open_descriptors() -> list[str]:
    found = []
    for each in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{each}"))
        except OSError:
            continue  # that of the listing
    return found


# What is there.


def test_exports_are_entries_of_the_top_directory(client: Client) -> None:
    assert sorted(client.names()) == [b".", b"..", b"free", b"kept"]
    node = client.lookup(b"kept").node

    assert client.read(client.open(client.lookup(b"file", node).node), 0, 8) == b"keptkept"
    assert client.readlink(client.lookup(b"link", node).node) == b"file"


def test_a_file_can_be_exported(client: Client, places: dict[str, Path]) -> None:
    client.device.add("resolv.conf", places["free"] / "file", read_only=True)

    entry = client.lookup(b"resolv.conf")
    assert stat.S_ISREG(entry.attributes["mode"])
    assert client.read(client.open(entry.node), 0, 4) == b"free"
    with refused(errno.EROFS):
        client.open(entry.node, os.O_RDWR)
    with refused(errno.ENOTDIR):
        client.lookup(b"file", entry.node)


def test_a_symbolic_link_is_followed_when_it_is_added(client: Client, places: dict[str, Path]) -> None:
    link = places["free"].parent / "to"
    link.symlink_to(places["kept"])
    client.device.add("linked", link)
    link.unlink()
    link.symlink_to("/")

    assert client.read(client.open(client.walk("linked/file")), 0, 4) == b"kept"


def test_the_top_directory_listed_with_attributes_counts_as_looked_up(client: Client) -> None:
    found = {name: (entry, fields) for entry, fields, name in client.readdirplus(client.opendir(ROOT))}

    assert found[b"."][0].node == found[b".."][0].node == 0
    kept, fields = found[b"kept"]
    assert kept.node == client.lookup(b"kept").node
    assert kept.attributes["ino"] == fields["ino"]
    assert fields["type"] == stat.S_IFDIR >> 12


def test_the_top_directory_is_a_directory_that_everybody_may_pass(client: Client) -> None:
    attributes = client.getattr(ROOT)

    assert attributes["mode"] == stat.S_IFDIR | 0o755
    assert attributes["nlink"] == 4
    assert statx(client, ROOT)[:2] == (attributes["mode"], attributes["ino"])
    assert fuse.STATFS_OUT.decode(client.call(Opcode.STATFS, ROOT))["namelen"] == 255
    client.uid = client.gid = 1000
    client.call(Opcode.ACCESS, ROOT, fuse.ACCESS_IN.pack(os.R_OK | os.X_OK))
    with refused(errno.EROFS):
        client.call(Opcode.ACCESS, ROOT, fuse.ACCESS_IN.pack(os.W_OK))


def test_files_of_two_exports_have_different_numbers(client: Client, places: dict[str, Path]) -> None:
    client.device.add("again", places["free"])

    one, other = (client.lookup(b"file", client.lookup(name).node) for name in (b"free", b"again"))
    assert one.node != other.node
    assert one.attributes["ino"] != other.attributes["ino"]
    assert statx(client, other.node)[1] == other.attributes["ino"]


# What is read-only stays as it is.


def test_nothing_is_written_into_a_read_only_export(client: Client, places: dict[str, Path]) -> None:
    before = view(places["kept"])
    top = client.lookup(b"kept").node
    file, inner = client.lookup(b"file", top).node, client.lookup(b"inner", top).node
    reading = client.open(file)
    made = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0)
    attempts: list[tuple[int, int, tuple[bytes, ...]]] = [
        *((Opcode.OPEN, file, (fuse.OPEN_IN.pack(flags, 0),)) for flags in (1, 2, 3, os.O_TRUNC)),
        (Opcode.WRITE, file, (fuse.WRITE_IN.pack(reading, 0, 1, 0, 0, 0), b"x")),
        (Opcode.FALLOCATE, file, (fuse.FALLOCATE_IN.pack(reading, 0, 100000, 0),)),
        (Opcode.COPY_FILE_RANGE, file, (fuse.COPY_FILE_RANGE_IN.pack(reading, 0, file, reading, 50, 10, 0),)),
        (Opcode.CREATE, top, (made, b"new\0")),
        (Opcode.CREATE, top, (made, b"file\0")),
        (TMPFILE, top, (made, b"\0")),
        (Opcode.MKDIR, inner, (fuse.MKDIR_IN.pack(0o755, 0), b"new\0")),
        (Opcode.MKNOD, inner, (fuse.MKNOD_IN.pack(stat.S_IFREG | 0o644, 0, 0), b"new\0")),
        (Opcode.SYMLINK, top, (b"new\0target\0",)),
        (Opcode.LINK, top, (fuse.LINK_IN.pack(file), b"new\0")),
        (Opcode.UNLINK, top, (b"file\0",)),
        (Opcode.RMDIR, top, (b"inner\0",)),
        (Opcode.RENAME2, top, (fuse.RENAME2_IN.pack(inner, 0), b"file\0new\0")),
        (Opcode.RENAME, top, (fuse.RENAME_IN.pack(top), b"file\0new\0")),
        (Opcode.SETXATTR, file, (fuse.SETXATTR_IN_EXT.pack(1, 0, 0), b"user.new\0x")),
        (Opcode.REMOVEXATTR, file, (b"user.new\0",)),
        *(
            (Opcode.SETATTR, node, (fuse.SETATTR_IN.pack(*({**arguments, "valid": int(each)}).values()),))
            for each in (SetAttr.MODE, SetAttr.UID, SetAttr.SIZE, SetAttr.MTIME, SetAttr.MTIME | SetAttr.FH)
            for node, arguments in [(file, dict.fromkeys(fuse.SETATTR_IN.fields, 0) | {"fh": reading})]
        ),
    ]

    for opcode, node, parts in attempts:
        with refused(errno.EROFS):
            client.call(opcode, node, *parts)

    assert view(places["kept"]) == before


def test_a_node_that_may_be_written_does_not_lend_its_right_to_a_handle(
    client: Client, places: dict[str, Path]
) -> None:
    before = view(places["kept"])
    reading = client.open(client.walk("kept/file"))
    free = client.walk("free/file")
    writing = client.open(free, os.O_RDWR)

    with refused(errno.EROFS):
        client.setattr(free, SetAttr.SIZE | SetAttr.FH, fh=reading)
    with refused(errno.EROFS):
        client.setattr(free, SetAttr.MODE | SetAttr.FH, fh=reading, mode=0o777)
    with refused(errno.EROFS):
        arguments = fuse.COPY_FILE_RANGE_IN.pack(writing, 0, free, reading, 0, 10, 0)
        client.call(Opcode.COPY_FILE_RANGE, free, arguments)

    assert view(places["kept"]) == before


def test_nothing_gets_from_one_export_into_another_but_bytes(client: Client, places: dict[str, Path]) -> None:
    before = view(places["kept"])
    kept, free = client.lookup(b"kept").node, client.lookup(b"free").node
    file = client.lookup(b"file", kept).node

    with refused(errno.EXDEV):
        client.link(file, b"stolen", free)
    for flags in (0, 1, 2):
        with refused(errno.EXDEV):
            client.rename(b"file", b"file", flags, parent=free, target=kept)
        with refused(errno.EROFS):
            client.rename(b"file", b"file", flags, parent=kept, target=free)
        with refused(errno.EXDEV):
            client.rename(b"file", b"name", flags, parent=free, target=ROOT)
    writing = client.open(client.lookup(b"file", free).node, os.O_WRONLY)
    client.call(Opcode.COPY_FILE_RANGE, 0, fuse.COPY_FILE_RANGE_IN.pack(client.open(file), 0, 0, writing, 0, 8, 0))

    assert (places["free"] / "file").read_bytes().startswith(b"keptkeptfree")
    assert view(places["kept"]) == before


def test_two_exports_that_both_may_be_written_are_two_file_systems(client: Client, places: dict[str, Path]) -> None:
    client.device.add("inner", places["free"] / "inner")
    free, inner = client.lookup(b"free").node, client.lookup(b"inner").node

    with refused(errno.EXDEV):
        client.rename(b"file", b"file", parent=free, target=inner)
    with refused(errno.EXDEV):
        client.link(client.lookup(b"deep", inner).node, b"deep", free)


@pytest.mark.parametrize("outer_first", [True, False])
def test_what_may_be_done_depends_on_the_way_to_a_file(places: dict[str, Path], outer_first: bool) -> None:
    exports = [("outer", places["kept"], True), ("inner", places["kept"] / "inner", False)]
    with exported() as client:
        for name, path, read_only in exports if outer_first else reversed(exports):
            client.device.add(name, path, read_only=read_only)
        through_outer, through_inner = client.walk("outer/inner/deep"), client.walk("inner/deep")

        with refused(errno.EROFS):
            client.open(through_outer, os.O_WRONLY)
        with refused(errno.EROFS):
            client.unlink(b"deep", client.walk("outer/inner"))
        assert client.write(client.open(through_inner, os.O_WRONLY), 0, b"DEEP") == 4
        assert client.read(client.open(through_outer), 0, 4) == b"DEEP"
        client.unlink(b"deep", client.lookup(b"inner").node)
        with refused(errno.ENOENT):
            client.walk("outer/inner/deep")


def test_a_directory_exported_twice_keeps_both_rights(client: Client, places: dict[str, Path]) -> None:
    client.device.add("kept for writing", places["kept"])

    with refused(errno.EROFS):
        client.create(b"new", parent=client.lookup(b"kept").node)
    client.create(b"new", parent=client.lookup(b"kept for writing").node)
    node = client.walk("kept/new")
    with refused(errno.EROFS):
        client.open(node, os.O_RDWR)
    with refused(errno.EROFS):
        client.setattr(node, SetAttr.MODE, mode=0o777)


def test_a_read_only_share_makes_every_export_read_only(places: dict[str, Path]) -> None:
    with exported(read_only=True) as client:
        client.device.add("free", places["free"], read_only=False)

        with refused(errno.EROFS):
            client.create(b"new", parent=client.lookup(b"free").node)


def test_locking_in_a_read_only_export_opens_nothing_for_writing(client: Client, places: dict[str, Path]) -> None:
    handle = client.open(client.walk("kept/file"))

    client.lock(Opcode.SETLK, handle, 7, fcntl.F_RDLCK)
    with refused(errno.EBADF):
        client.lock(Opcode.SETLK, handle, 8, fcntl.F_WRLCK)

    for each in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{each}") == os.fspath(places["kept"] / "file"):
            flags = int(Path(f"/proc/self/fdinfo/{each}").read_text().split("flags:")[1].split()[0], 8)
            assert flags & os.O_ACCMODE == os.O_RDONLY


# What the top directory refuses.


def test_nothing_is_made_or_changed_in_the_top_directory(client: Client) -> None:
    made = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0)
    kept = client.walk("kept/file")
    attempts: list[tuple[int, *tuple[bytes, ...]]] = [
        (Opcode.CREATE, made, b"new\0"),
        (TMPFILE, made, b"\0"),
        (Opcode.MKDIR, fuse.MKDIR_IN.pack(0o755, 0), b"new\0"),
        (Opcode.MKNOD, fuse.MKNOD_IN.pack(stat.S_IFCHR | 0o666, 0x103, 0), b"new\0"),
        (Opcode.SYMLINK, b"new\0/etc\0"),
        (Opcode.LINK, fuse.LINK_IN.pack(kept), b"new\0"),
        (Opcode.RMDIR, b"free\0"),
        (Opcode.UNLINK, b"free\0"),
        (Opcode.RENAME, fuse.RENAME_IN.pack(ROOT), b"free\0kept\0"),
        (Opcode.RENAME2, fuse.RENAME2_IN.pack(ROOT, 2), b"free\0kept\0"),
        (Opcode.RENAME2, fuse.RENAME2_IN.pack(client.lookup(b"free").node, 0), b"kept\0moved\0"),
        (Opcode.SETXATTR, fuse.SETXATTR_IN_EXT.pack(1, 0, 0), b"user.new\0x"),
    ]

    for opcode, *parts in attempts:
        with refused(errno.EROFS):
            client.call(opcode, ROOT, *parts)
    for valid in (SetAttr.MODE, SetAttr.UID, SetAttr.MTIME):
        with refused(errno.EROFS):
            client.setattr(ROOT, valid)
    assert sorted(client.names()) == [b".", b"..", b"free", b"kept"]


@pytest.mark.parametrize("name", [b"..", b".", b"../kept", b"free/inner", b""])
def test_no_name_leads_out_of_an_export(client: Client, name: bytes) -> None:
    for node in (ROOT, client.lookup(b"free").node, client.walk("free/inner")):
        with refused(errno.EINVAL):
            client.lookup(name, node)


def test_a_listing_of_an_export_gives_no_node_for_what_is_above_it(client: Client) -> None:
    found = {name: entry for entry, _, name in client.readdirplus(client.opendir(client.lookup(b"free").node))}

    assert found[b".."].node == found[b"."].node == 0
    assert found[b"inner"].node


def test_places_in_the_top_directory_that_are_none_are_its_end(client: Client) -> None:
    handle = client.opendir(ROOT)

    for place in (4, 5, 1 << 31, (1 << 63) + 1, (1 << 64) - 1):
        assert client.readdir(handle, place) == []
    assert len(client.readdir(handle, 0)) == 4


def test_an_export_is_not_forgotten_however_often_a_guest_says_so(client: Client) -> None:
    node = client.lookup(b"free").node

    for _ in range(3):
        client.forget(node, (1 << 64) - 1)
    client.forget(ROOT, (1 << 64) - 1)
    client.tell(Opcode.BATCH_FORGET, 0, fuse.BATCH_FORGET_IN.pack(2), fuse.FORGET_ONE.pack(node, 1 << 63) * 2)

    assert client.lookup(b"free").node == node
    assert client.walk("free/file")


# Coming and going.


def test_an_export_that_is_removed_is_stale_and_closed(client: Client, places: dict[str, Path]) -> None:
    free = client.lookup(b"free").node
    file = client.lookup(b"file", free).node
    reading, writing, listing = client.open(file), client.open(file, os.O_RDWR), client.opendir(free)
    client.lock(Opcode.SETLK, writing, 1, fcntl.F_WRLCK)
    client.walk("free/inner/deep")

    client.device.remove("free")

    with refused(errno.ENOENT):
        client.lookup(b"free")
    for node in (free, file):
        with refused(errno.ESTALE):
            client.getattr(node)
    with refused(errno.ESTALE):
        client.lookup(b"file", free)
    with refused(errno.EBADF):
        client.read(reading, 0, 4)
    with refused(errno.EBADF):
        client.write(writing, 0, b"late")
    with refused(errno.EBADF):
        client.readdir(listing)
    with refused(errno.EBADF):
        client.release(reading)
    client.forget(file, 5)
    assert sorted(client.names()) == [b".", b"..", b"kept"]
    assert (places["free"] / "file").read_bytes() == b"free" * 100
    assert not [each for each in open_descriptors() if each.startswith(os.fspath(places["free"]))]


def test_a_name_that_comes_back_is_another_file(client: Client, places: dict[str, Path]) -> None:
    before = client.lookup(b"free")
    file = client.lookup(b"file", before.node).node

    client.device.remove("free")
    client.device.add("free", places["kept"], read_only=True)

    after = client.lookup(b"free")
    assert after.node not in (before.node, file)
    assert after.attributes["ino"] != before.attributes["ino"]
    with refused(errno.ESTALE):
        client.open(file)
    with refused(errno.EROFS):
        client.create(b"new", parent=after.node)


@pytest.mark.parametrize("cache", ["none", "auto", "always"])
def test_the_guest_never_trusts_names_in_the_top_directory(places: dict[str, Path], cache: str) -> None:
    with exported(cache=cache) as client:
        with refused(errno.ENOENT):
            client.lookup(b"late")
        listing = client.opendir(ROOT)
        assert len(client.readdir(listing)) == 2

        client.device.add("late", places["free"])

        assert client.lookup(b"late").entry_valid == 0
        assert len(client.readdir(listing)) == 3
        answer = client.call(Opcode.OPENDIR, ROOT, fuse.OPEN_IN.pack(0, 0))
        assert fuse.OPEN_OUT.decode(answer)["open_flags"] == 0


def test_a_process_that_waits_for_a_lock_in_a_removed_export_is_told(client: Client) -> None:
    handle = client.open(client.walk("free/file"), os.O_RDWR)
    client.lock(Opcode.SETLK, handle, 1, fcntl.F_WRLCK)
    waiting = client.post(Opcode.SETLKW, 0, fuse.LK_IN.pack(handle, 2, 0, 10, fcntl.F_WRLCK, 0, 0))

    client.device.remove("free")

    with refused(errno.EBADF):
        client.receive(waiting, REQUESTS)


def test_a_second_mount_finds_the_exports(client: Client) -> None:
    node = client.walk("free/inner")
    client.open(client.walk("free/file"))
    client.call(Opcode.DESTROY, 0)
    client.init()

    with refused(errno.ESTALE):
        client.getattr(node)
    assert sorted(client.names()) == [b".", b"..", b"free", b"kept"]
    client.init()
    assert client.walk("free/inner/deep")
    assert len(client.device.share.opened) == 0


def test_exports_survive_when_descriptors_are_few(tmp_path: Path) -> None:
    with exported(descriptors=16) as client:
        for number in range(40):
            place = tmp_path / str(number)
            (place / "sub").mkdir(parents=True)
            for each in range(5):
                (place / "sub" / str(each)).write_text(f"{number} {each}")
            client.device.add(f"export {number}", place)
        nodes = {
            (number, each): client.walk(f"export {number}/sub/{each}") for number in range(40) for each in range(5)
        }

        for (number, each), node in nodes.items():
            handle = client.open(node)
            assert client.read(handle, 0, 16) == f"{number} {each}".encode()
            client.release(handle)

        inodes = client.device.share.inodes
        assert inodes.evicted
        assert inodes.reopened
        for number in range(40):
            client.device.remove(f"export {number}")
        assert inodes.descriptors == 0
        assert not [each for each in open_descriptors() if each.startswith(os.fspath(tmp_path))]


def test_an_export_that_cannot_be_opened_leaves_nothing(client: Client, places: dict[str, Path]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(ConfigError, match="Too many open files"):
            client.device.add("more", places["free"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    client.device.add("more", places["free"])
    assert client.walk("more/file")


def test_adding_and_removing_leaves_no_descriptor_and_no_memory(client: Client, places: dict[str, Path]) -> None:
    inodes = client.device.share.inodes
    before, known = len(open_descriptors()), len(inodes)

    for _ in range(50):
        client.device.add("more", places["free"])
        client.open(client.walk("more/inner/deep"))
        client.device.remove("more")

    assert (len(open_descriptors()), len(inodes)) == (before, known)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "x" * 256, "a\0b"])
def test_a_name_that_is_no_component_of_a_path_is_refused(client: Client, places: dict[str, Path], name: str) -> None:
    with pytest.raises(ConfigError):
        client.device.add(name, places["free"])


def test_what_cannot_be_added_or_removed_is_said(tmp_path: Path, client: Client, places: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be shared as 'free': File exists"):
        client.device.add("free", places["kept"])
    with pytest.raises(ConfigError, match="No such file"):
        client.device.add("new", tmp_path / "missing")
    with pytest.raises(ConfigError, match="shares nothing as 'new'"):
        client.device.remove("new")
    with mounted(tmp_path) as other, pytest.raises(ConfigError, match="leave its path out"):
        other.device.add("new", places["free"])
    client.device.close()
    with pytest.raises(ConfigError):
        client.device.add("late", places["free"])
    assert not [each for each in open_descriptors() if each.startswith(os.fspath(tmp_path))]


def test_everything_that_can_be_written_is_synchronized_from_the_top(client: Client, places: dict[str, Path]) -> None:
    client.device.add("a file", places["free"] / "file")

    assert client.call(Opcode.SYNCFS, ROOT, bytes(8)) == b""
    assert client.call(Opcode.SYNCFS, client.lookup(b"free").node, bytes(8)) == b""


# Saved and restored.


def test_exports_go_on_after_a_restore_whatever_their_order(client: Client, places: dict[str, Path]) -> None:
    for _ in range(3):  # numbers that a fresh device would use for something else
        client.device.add("short", places["free"])
        client.walk("short/inner/deep")
        client.device.remove("short")
    names = ("kept", "free", "kept/file", "free/file", "free/inner/deep")
    nodes = {name: client.walk(name) for name in names}
    numbers = {name: client.getattr(node)["ino"] for name, node in nodes.items()}
    handle = client.open(nodes["free/file"], os.O_RDWR)
    listing = client.opendir(ROOT)
    saved = client.device.save_own()

    with exported() as other:
        other.device.add("later", places["free"])
        other.device.add("free", places["free"])
        other.device.add("kept", places["kept"], read_only=True)
        other.device.restore_own(saved)

        assert {name: other.getattr(node)["ino"] for name, node in nodes.items()} == numbers
        for name in names:
            assert other.walk(name) == nodes[name]
        assert other.walk("later/file") not in nodes.values()
        assert other.write(handle, 0, b"FREE") == 4
        with refused(errno.EROFS):
            other.open(nodes["kept/file"], os.O_RDWR)
        assert len(other.readdir(listing)) == 5
        other.forget(nodes["free"], 1 << 60)
        assert other.lookup(b"free").node == nodes["free"]


def test_an_export_that_is_missing_after_a_restore_is_stale_for_ever(client: Client, places: dict[str, Path]) -> None:
    gone = [client.walk(path) for path in ("free", "free/file", "free/inner/deep")]
    handle = client.open(gone[1], os.O_RDWR)
    saved = client.device.save_own()

    with exported() as other:
        other.device.add("kept", places["kept"], read_only=True)
        other.device.restore_own(saved)
        other.device.add("free", places["free"])

        for node in gone:
            with refused(errno.ESTALE):
                other.getattr(node)
        with refused(errno.EBADF):
            other.write(handle, 0, b"late")
        fresh = [other.walk(path) for path in ("free", "free/file", "free/inner/deep")]
        assert not set(fresh) & set(gone)


def test_another_directory_in_an_exports_place_is_not_what_was_saved(client: Client, places: dict[str, Path]) -> None:
    gone = [client.walk(path) for path in ("free", "free/file")]
    saved = client.device.save_own()

    with exported() as other:
        other.device.add("free", places["kept"])
        other.device.restore_own(saved)

        for node in gone:
            with refused(errno.ESTALE):
                other.getattr(node)
        assert other.read(other.open(other.walk("free/file")), 0, 4) == b"kept"
