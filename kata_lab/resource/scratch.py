"""The disk for what the containers of a sandbox write: an empty ext4 file system, the same for all, and what differs
from it in an overlay file of each sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from kata_lab.errors import KataLabError
from kata_lab.image.store import exclusive
from kata_lab.paths import cache_directory

SIZE: Final = 8 << 30  #: bytes; none of them is used on the host before the guest writes
SERIAL: Final = "kata-scratch"
_UUID: Final = "00000000-0000-4000-8000-00006b617461"  # the same bytes each time
_OPTIONS: Final = (
    *("-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-U", _UUID),
    *("-E", f"lazy_itable_init=1,nodiscard,hash_seed={_UUID}"),
)


def make_scratch(path: Path) -> None:
    """Make the overlay file ``path`` of a new disk.

    Raises:
        KataLabError: mke2fs is missing or fails.
        VmmError: the file cannot be made.
    """
    from vmm.storage.overlay import create_overlay

    create_overlay(path, _template(), durable=False)


def _template() -> Path:
    place = cache_directory() / "disks" / f"scratch-{SIZE >> 20}.ext4"
    if not place.exists():
        with exclusive(place.parent):
            if not place.exists():
                partial = place.with_suffix(".partial")
                make_ext4(partial, SIZE)
                partial.rename(place)
    return place


def make_ext4(path: Path, size: int, *options: str) -> None:
    """Make a read-only file with an ext4 file system.

    Args:
        path: the file; one that is there is replaced.
        size: bytes; none of them is used on the host before something is written.
        options: more of mke2fs(8).

    Raises:
        KataLabError: mke2fs is missing or fails; the file is not there then.
    """
    path.unlink(missing_ok=True)
    try:
        with path.open("wb") as file:
            file.truncate(size)
        run_tool("mke2fs", *_OPTIONS, *options, os.fspath(path))
        path.chmod(0o400)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def run_tool(name: str, *arguments: str) -> None:
    """Run a program of e2fsprogs.

    Raises:
        KataLabError: it is missing or fails.
    """
    program = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise KataLabError(f"this machine has no {name} to make a disk with: install the package e2fsprogs")
    made = subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if made.returncode:
        raise KataLabError(f"{name} failed with status {made.returncode}: {made.stderr.strip()[-300:]}")
