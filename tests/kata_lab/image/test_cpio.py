"""The initramfs writer against two referees: GNU cpio, and a reader written here from the format's description."""

from __future__ import annotations

import gzip
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_lab.errors import ImageError
from kata_lab.image.cpio import Initramfs, Node

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..", "TRAILER!!!")
)
trees = st.dictionaries(
    st.lists(names, min_size=1, max_size=3).map("/".join),
    st.one_of(
        st.builds(lambda data, mode: Node(stat.S_IFREG | mode, data), st.binary(max_size=40), st.integers(0, 0o7777)),
        st.builds(lambda name: Node(stat.S_IFLNK | 0o777, name.encode()), names),
        st.builds(
            lambda major, minor: Node(stat.S_IFCHR | 0o600, device=(major, minor)),
            st.integers(0, 4095),
            st.integers(0, 2**20 - 1),
        ),
        st.builds(lambda uid, gid: Node(stat.S_IFDIR | 0o700, uid=uid, gid=gid), *[st.integers(0, 2**32 - 1)] * 2),
    ),
    max_size=8,
).filter(lambda tree: not any(other.startswith(f"{path}/") for path in tree for other in tree))


def read_newc(archive: bytes) -> dict[str, Node]:
    """Every member of a newc archive up to its trailer, without the directories' link counts and inode numbers."""
    found: dict[str, Node] = {}
    position = 0
    while True:
        assert position % 4 == 0
        assert archive[position : position + 6] == b"070701"
        digits = archive[position + 6 : position + 110]
        fields = [int(digits[start : start + 8], 16) for start in range(0, 104, 8)]
        _, mode, uid, gid, _, mtime, size, _, _, major, minor, length, check = fields
        assert (mtime, check) == (0, 0)
        name = archive[position + 110 : position + 110 + length]
        assert name.endswith(b"\0")
        position = (position + 110 + length + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert not any(archive[position:])
            return found
        found[name[:-1].decode()] = Node(mode, archive[position : position + size], uid, gid, (major, minor))
        position = (position + size + 3) // 4 * 4


@given(trees)
def test_every_node_is_read_back_by_another_reader(tree: dict[str, Node]) -> None:
    root = Initramfs()
    for path, node in tree.items():
        root.add(path, node)

    found = read_newc(root.pack())

    assert {path: found[path] for path in tree} == tree
    assert all(stat.S_ISDIR(found[path].mode) for path in found.keys() - tree.keys())


@given(trees)
def test_order_of_adding_does_not_change_the_archive(tree: dict[str, Node]) -> None:
    forwards, backwards = Initramfs(), Initramfs()
    for path in tree:
        forwards.add(path, tree[path])
    for path in reversed(tree):
        backwards.add(path, tree[path])

    assert forwards.pack() == backwards.pack()


def sample() -> Initramfs:
    root = Initramfs()
    root.file("bin/busybox", b"program", 0o755)
    root.symlink("bin/sh", "busybox")
    root.directory("tmp", 0o1777)
    root.device("dev/console", "c", 5, 1)
    root.device("dev/vda", "b", 254, 0, 0o660)
    return root


def test_gnu_cpio_lists_the_same_tree() -> None:
    listing = subprocess.run(
        ["cpio", "--list", "--verbose", "--numeric-uid-gid"], input=sample().pack(), capture_output=True, check=True
    )

    rows = {line.split()[-1]: line.split() for line in listing.stdout.decode().splitlines()}
    assert rows["bin/busybox"][0] == "-rwxr-xr-x"
    assert rows["tmp"][0] == "drwxrwxrwt"
    assert rows["busybox"][0] == "lrwxrwxrwx"
    assert rows["dev/console"][:1] + rows["dev/console"][4:6] == ["crw-------", "5,", "1"]
    assert rows["dev/vda"][:1] + rows["dev/vda"][4:6] == ["brw-rw----", "254,", "0"]


def test_gnu_cpio_unpacks_the_same_files(tmp_path: Path) -> None:
    root = Initramfs()
    root.file("a/b/data", bytes(range(256)), 0o640)
    root.symlink("a/link", "b/data")

    subprocess.run(["cpio", "-i", "--quiet"], input=root.pack(), cwd=tmp_path, capture_output=True, check=True)

    assert (tmp_path / "a/link").read_bytes() == bytes(range(256))
    assert stat.S_IMODE((tmp_path / "a/b/data").stat().st_mode) == 0o640


def test_gzip_holds_the_plain_archive() -> None:
    packed = sample().pack("gzip")

    assert gzip.decompress(packed) == sample().pack("none")
    assert packed == sample().pack("gzip")


@pytest.mark.parametrize("path", ["", "/bin/sh", "a/../b", "./a", "a//b", "a/", "TRAILER!!!", "a\0b", "x" * 5000])
def test_path_outside_the_root_is_refused(path: str) -> None:
    with pytest.raises(ImageError, match=r"in an initramfs|too long for an initramfs"):
        Initramfs().file(path, b"")


def test_path_added_twice_is_refused() -> None:
    root = sample()
    with pytest.raises(ImageError, match="'bin/sh' is in the initramfs already"):
        root.symlink("bin/sh", "dash")


def test_file_below_a_file_is_refused() -> None:
    root = sample()
    with pytest.raises(ImageError, match="'bin/busybox' is not a directory"):
        root.file("bin/busybox/child", b"")


def test_directory_keeps_the_permissions_it_was_given_after_its_children() -> None:
    root = Initramfs()
    root.file("root/.profile", b"")
    root.directory("root", 0o700)

    assert read_newc(root.pack())["root"].mode == stat.S_IFDIR | 0o700


def test_number_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ImageError, match="'dev/x' has a number"):
        Initramfs().device("dev/x", "c", 1 << 32, 0)
    with pytest.raises(ImageError, match="permissions 0o17777"):
        Initramfs().file("x", b"", 0o17777)
