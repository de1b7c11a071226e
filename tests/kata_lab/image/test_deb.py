"""Packages are read whole and with suspicion; the referee is dpkg-deb."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.deb import DebPackage
from tests.kata_lab.image.fake_mirror import build_ar, build_deb

CONTROL = "Package: sample\nVersion: 1\nArchitecture: riscv64\nMaintainer: test\nDescription: one\n two\n"


def write(directory: Path, content: bytes) -> Path:
    path = directory / "sample.deb"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compression", ["xz", "gz", ""])
def test_files_and_control_are_read(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path, build_deb(CONTROL, {"usr/bin/one": b"first", "usr/bin/two": b"second"}, compression))

    with DebPackage(path) as package:
        assert package.control()["Description"] == "one\ntwo"
        assert [(file.path, file.kind, file.permissions, file.size) for file in package.files()] == [
            ("usr/bin/one", "file", 0o755, 5),
            ("usr/bin/two", "file", 0o755, 6),
        ]
        assert package.read("usr/bin/two") == b"second"


def test_package_built_by_dpkg_is_read(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(CONTROL)
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/tool").write_bytes(b"tool" * 10000)
    (tree / "usr/bin/link").symlink_to("/usr/bin/tool")
    path = tmp_path / "sample.deb"
    subprocess.run(["dpkg-deb", "-Zxz", "--root-owner-group", "-b", tree, path], check=True, capture_output=True)

    with DebPackage(path) as package:
        kinds = {file.path: (file.kind, file.target, file.uid) for file in package.files()}
        assert package.control()["Package"] == "sample"
        assert package.read("usr/bin/tool") == b"tool" * 10000
    assert kinds["usr/bin/link"] == ("symlink", "/usr/bin/tool", 0)
    assert kinds["usr/bin"] == ("directory", "", 0)


@pytest.mark.parametrize("name", ["../etc/passwd", "usr/../../x", "/etc/passwd"])
def test_member_outside_the_root_is_refused(tmp_path: Path, name: str) -> None:
    content = _with_member(name)
    with DebPackage(write(tmp_path, content)) as package, pytest.raises(ImageError, match="would lie outside the root"):
        list(package.files())


def _with_member(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return build_ar({"debian-binary": b"2.0\n", "control.tar": b"", "data.tar": buffer.getvalue()})


def test_zstd_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, build_deb(CONTROL, {"x": b""}, data_name="data.tar.zst"))
    with DebPackage(path) as package, pytest.raises(ImageError, match=r"'data.tar.zst', whose compression is not supp"):
        list(package.files())


def test_truncated_package_is_refused(tmp_path: Path) -> None:
    content = build_deb(CONTROL, {"x": b"y" * 1000})
    with pytest.raises(ImageError, match=f"is cut short: it ends at {len(content) - 50}"):
        DebPackage(write(tmp_path, content[:-50]))


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    content = bytearray(build_deb(CONTROL, {"x": bytes(range(256)) * 100}))
    content[-80] ^= 0xFF
    with DebPackage(write(tmp_path, bytes(content))) as package, pytest.raises(ImageError, match="is damaged"):
        package.read("x")


def test_other_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not a Debian package"):
        DebPackage(write(tmp_path, b"PK\3\4 a zip file"))
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        DebPackage(tmp_path / "absent.deb")


def test_absent_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, build_deb(CONTROL, {"x": b""}))
    with DebPackage(path) as package, pytest.raises(ImageError, match="has no file 'y'"):
        package.read("y")
