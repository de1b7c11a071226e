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
_OPTIONS: Final = (
    *("-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", "-O", "^has_journal"),
    *("-U", "00000000-0000-4000-8000-00006b617461", "-E", "hash_seed=00000000-0000-4000-8000-00006b617461"),
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
    if place.exists():
        return place
    program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise KataLabError("this machine has no mke2fs to make a disk with: install the package e2fsprogs")
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(place.parent):
        if not place.exists():
            partial = place.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            with partial.open("wb") as file:
                file.truncate(SIZE)
            made = subprocess.run([program, *_OPTIONS, os.fspath(partial)], capture_output=True, text=True, check=False)
            if made.returncode:
                partial.unlink()
                raise KataLabError(f"mke2fs failed with status {made.returncode}: {made.stderr.strip()[-300:]}")
            partial.chmod(0o400)
            partial.rename(place)
    return place
