"""A root is put together without holding in memory what is in it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.spool import Spool
from kata_lab.image.tree import RootTree
from tests.kata_lab.image.fake_mirror import build_deb
from tests.kata_lab.image.test_cpio import read_newc

CONTROL = "Package: sample\nVersion: 1\nArchitecture: riscv64\nMaintainer: test\nDescription: test\n"
LARGE = 96 << 20

GROWTH = """
import sys
from pathlib import Path
from kata_lab.image.spool import Spool
from kata_lab.image.tree import RootTree

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10

with Spool() as spool:
    tree = RootTree("riscv64", spool)
    before = peak()
    tree.install(Path(sys.argv[1]), "large")
    with open(sys.argv[2], "wb") as file:
        file.writelines(tree.chunks())
    print(peak() - before)
"""


def write(directory: Path, files: dict[str, bytes | str], name: str = "sample.deb", compression: str = "xz") -> Path:
    path = directory / name
    path.write_bytes(build_deb(CONTROL, files, compression))
    return path


@pytest.fixture(autouse=True)
def own_home(home: Path) -> None:
    pass


def test_contents_come_out_as_they_went_in(tmp_path: Path) -> None:
    contents: dict[str, bytes | str] = {f"usr/{number}": bytes([number]) * (number << 16) for number in range(40)}
    with Spool() as spool:
        tree = RootTree("riscv64", spool)
        tree.install(write(tmp_path, contents), "sample")

        root = read_newc(b"".join(tree.chunks()))

    assert {path: root[path].data for path in contents} == contents


def test_large_package_takes_little_memory(tmp_path: Path) -> None:
    package = write(tmp_path, {"usr/large": bytes(LARGE)}, compression="gz")
    root = tmp_path / "root.cpio"

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GROWTH, str(package), str(root)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert root.stat().st_size > LARGE
    assert int(done.stdout) < LARGE // 4


def test_same_file_in_two_packages_is_no_conflict(tmp_path: Path) -> None:
    with Spool() as spool:
        tree = RootTree("riscv64", spool)
        tree.install(write(tmp_path, {"usr/same": b"text"}), "first")
        tree.install(write(tmp_path, {"usr/same": b"text"}, "second.deb"), "second")
        with pytest.raises(ImageError, match="the packages first and third both have /usr/same, differently"):
            tree.install(write(tmp_path, {"usr/same": b"test"}, "third.deb"), "third")


def test_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Spool() as spool:
        tree = RootTree("riscv64", spool)
        package = write(tmp_path, {"usr/file": b"text"})
        monkeypatch.setattr(os, "pwrite", refuse)
        with pytest.raises(ImageError, match="is full: make room there"):
            tree.install(package, "sample")


def test_spool_leaves_nothing_behind(home: Path) -> None:
    with Spool() as spool:
        assert spool.add([b"con", b"tent"]).read() == b"content"
        assert not [path for path in home.rglob("*") if path.is_file()]
