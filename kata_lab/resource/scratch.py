"""The disk for what the containers of a sandbox write: an empty ext4 file system, the same for all, and what differs
from it in an overlay file of each sandbox. One that outlives its sandbox has a journal, so that it can be mounted again
after a sandbox that was killed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Final

from kata_lab.errors import KataLabError
from kata_lab.image.store import exclusive
from kata_lab.paths import cache_directory
from kata_lab.programs import run_apart

SIZE: Final = 8 << 30  #: bytes; none of them is used on the host before the guest writes
JOURNAL_MIB: Final = 8
SERIAL: Final = "kata-scratch"
_UUID: Final = "00000000-0000-4000-8000-00006b617461"  # the same bytes each time
_OPTIONS: Final = (
    *("-q", "-F", "-t", "ext4", "-m", "0", "-U", _UUID),
    *("-E", f"lazy_itable_init=1,nodiscard,hash_seed={_UUID}"),
)


def make_scratch(path: Path, lasting: bool = False) -> None:
    """Make the overlay file ``path`` of a new disk.

    Args:
        path: the file.
        lasting: the disk outlives its sandbox; one that is there already is used again.

    Raises:
        KataLabError: mke2fs is missing or fails.
        VmmError: the file cannot be made.
    """
    from vmm.storage.overlay import create_overlay

    # Also for a disk that is there: it lies over the template, and a cache may be emptied at any time.
    template = _template(lasting)
    if not (lasting and path.exists()):
        create_overlay(path, template, durable=False)


def make_raw_scratch(path: Path, lasting: bool = False) -> None:
    """Make the raw file ``path`` of a new disk, for a VMM that knows no overlays: a sparse copy of the template.

    Args:
        path: the file.
        lasting: the disk outlives its sandbox; one that is there already is used again.

    Raises:
        KataLabError: mke2fs is missing or fails, the file cannot be made, or it is an overlay.
    """
    from vmm.storage.overlay import MAGIC

    template = _template(lasting)
    if lasting and path.exists():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                raise KataLabError(f"the disk {path} is an overlay, made in another arrangement; name another file")
        return
    try:
        with template.open("rb") as source, path.open("wb") as target:
            _copy_data(source.fileno(), target.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise KataLabError(f"the disk {path} cannot be made: {error.strerror}") from error


def _copy_data(source: int, target: int) -> None:
    """Copy a file, but not its holes (lseek(2), SEEK_DATA)."""
    size, end = os.fstat(source).st_size, 0
    os.ftruncate(target, size)
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only holes follow
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        os.lseek(target, start, os.SEEK_SET)
        os.lseek(source, start, os.SEEK_SET)
        while start < end:
            start += os.sendfile(target, source, None, end - start)


def _template(journal: bool) -> Path:
    place = cache_directory() / "disks" / f"scratch-{SIZE >> 20}-{'journal' if journal else 'passing'}.ext4"
    if not place.exists():
        with exclusive(place.parent):
            if not place.exists():
                partial = place.with_suffix(".partial")
                make_ext4(partial, SIZE, *(("-J", f"size={JOURNAL_MIB}") if journal else ()), journal=journal)
                partial.rename(place)
    return place


def make_ext4(path: Path, size: int, *options: str, journal: bool = False) -> None:
    """Make a read-only file with an ext4 file system.

    Args:
        path: the file; one that is there is replaced.
        size: bytes; none of them is used on the host before something is written.
        options: more of mke2fs(8).
        journal: it has one.

    Raises:
        KataLabError: mke2fs is missing or fails; the file is not there then.
    """
    path.unlink(missing_ok=True)
    try:
        with path.open("wb") as file:
            file.truncate(size)
        # What has no journal is not meant to outlive a crash; checksums of all its metadata would be work for nothing.
        # Those of the groups are what allows to leave inode tables unwritten.
        features = "has_journal" if journal else "^has_journal,^metadata_csum,uninit_bg"
        run_tool("mke2fs", *_OPTIONS, "-O", features, *options, os.fspath(path))
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
    made = run_apart([program, *arguments])
    if made.returncode:
        raise KataLabError(f"{name} failed with status {made.returncode}: {made.stderr.strip()[-300:]}")
