"""How files enter the cache: whole or not at all, and by one writer at a time.

A file is written under a temporary name in a ``partial`` directory, synced and renamed; so what has its final name is
complete. Whoever writes holds a lock (flock(2)), which the programs that it starts inherit: a killed build's leftover
download keeps the next build waiting until it has ended, and only then are the leftovers removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kata_lab.errors import ImageError

PARTIAL = "partial"


@contextmanager
def exclusive(directory: Path) -> Iterator[int]:
    """Be the only writer in `directory`, which is created; leftovers of a killed writer are removed.

    Yields:
        the descriptor that holds the lock, to be passed to child processes that write here.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ImageError(f"the cache directory {directory} cannot be written to ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        import shutil  # not at the top: a built guest is found without it

        shutil.rmtree(directory / PARTIAL, ignore_errors=True)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory for half-written files beneath `directory`, on the same file system; removed at the end."""
    import shutil
    import tempfile

    partial = directory / PARTIAL
    partial.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=partial))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it.

    Raises:
        ImageError: the file cannot be written, for instance because the disk is full.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ImageError(f"{path} cannot be written ({error.strerror}): {len(data)} bytes are needed there") from error


def publish(finished: Path, place: Path) -> None:
    """Give a finished file or directory its final name in one step, in place of what had it; survives a crash."""
    if place.is_dir() and finished.is_dir():
        with scratch(place.parent) as old:
            place.rename(old / place.name)
            finished.rename(place)
    else:
        _sync(finished)
        finished.replace(place)
    _sync(place.parent)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
