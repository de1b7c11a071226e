"""The disk for what containers write, as a raw file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kata_lab.errors import KataLabError
from kata_lab.resource.scratch import SIZE, make_raw_scratch, make_scratch


def test_raw_disk_is_a_sparse_file_system(tmp_path: Path) -> None:
    make_raw_scratch(tmp_path / "disk")

    found = (tmp_path / "disk").stat()
    assert found.st_size == SIZE
    assert found.st_blocks * 512 < 64 << 20
    checked = subprocess.run(
        ["/sbin/e2fsck", "-fn", str(tmp_path / "disk")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_raw_disk_that_lasts_is_used_again(tmp_path: Path) -> None:
    make_raw_scratch(tmp_path / "disk", lasting=True)
    with (tmp_path / "disk").open("r+b") as file:
        file.write(b"written")

    make_raw_scratch(tmp_path / "disk", lasting=True)

    with (tmp_path / "disk").open("rb") as file:
        assert file.read(7) == b"written"


def test_overlay_is_not_taken_for_a_raw_disk(tmp_path: Path) -> None:
    make_scratch(tmp_path / "disk", lasting=True)

    with pytest.raises(KataLabError, match="is an overlay, made in another arrangement; name another file"):
        make_raw_scratch(tmp_path / "disk", lasting=True)
