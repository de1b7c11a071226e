"""How files enter the cache: whole or not at all, and by one writer at a time.

A file is written under a temporary name in a ``partial`` directory, synced and renamed; so what has its final name is
complete. Whoever writes holds a lock (flock(2)), which the programs that it starts inherit: a killed build's leftover
download keeps the next build waiting until it has ended, and only then are the leftovers removed. The lock file says
which process took it, for whoever waits to read. What the system refuses meanwhile (a full disk, a directory that
somebody removed) becomes an ImageError.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kata_lab.errors import ImageError
from kata_lab.paths import HOME_VARIABLE
from kata_lab.progress import Progress, ProgressMode

LOCK = "lock"
PARTIAL = "partial"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOOK_AGAIN = 0.1
"""Seconds between two looks at a lock that another process holds."""


@contextmanager
def exclusive(directory: Path, progress: ProgressMode = "auto") -> Iterator[int]:
    """Be the only writer in `directory`, which is created; leftovers of a killed writer are removed.

    Args:
        directory: of the cache.
        progress: how to show that another process must be waited for.

    Yields:
        the descriptor that holds the lock, to be passed to child processes that write here.

    Raises:
        ImageError: the directory cannot be written to, the disk is full, or files vanish while they are used.
    """
    descriptor = _locked(directory, progress)
    try:
        import shutil  # not at the top: a built guest is found without it

        shutil.rmtree(directory / PARTIAL, ignore_errors=True)
        yield descriptor
    except BrokenPipeError:
        raise  # whoever read our output is gone, and the cache is well
    except OSError as error:
        raise refused_by_system(directory, error) from error
    finally:
        os.close(descriptor)


def refused_by_system(directory: Path, error: OSError) -> ImageError:
    """What the system refused to do in a directory of the cache, as one sentence."""
    if error.errno in _FULL:
        return disk_is_full(directory)
    if isinstance(error, FileNotFoundError):
        return ImageError(
            f"{error.filename or directory} is gone: somebody removed it from the cache while it was in use, "
            "so try again"
        )
    return ImageError(
        f"the cache directory {directory} cannot be used ({error}): make it readable and writable, "
        f"or set {HOME_VARIABLE} to another directory"
    )


def disk_is_full(directory: Path) -> ImageError:
    """The error that says so."""
    return ImageError(
        f"the disk with the cache directory {directory} is full: make room there, "
        f"or set {HOME_VARIABLE} to a directory on another disk"
    )


def _locked(directory: Path, progress: ProgressMode) -> int:
    """A descriptor with the lock, once it is there for the taking."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise refused_by_system(directory, error) from error
        try:
            _wait(descriptor, progress)
            if _is_still(directory / LOCK, descriptor):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # somebody removed the directory meanwhile, so this lock excludes nobody


def _wait(descriptor: int, progress: ProgressMode) -> None:
    if _is_taken(descriptor):
        with Progress(f"Waiting for {_holder(descriptor)}", announced=True, mode=progress) as shown:
            while _is_taken(descriptor):
                time.sleep(_LOOK_AGAIN)
                shown.tick()


def _is_taken(descriptor: int) -> bool:
    """Whether somebody else has the lock; if not, we have it now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _holder(descriptor: int) -> str:
    """Who has the lock, as far as the lock file says it."""
    pid = os.pread(descriptor, 20, 0).strip()
    if not pid.isdigit():
        return "another process, which writes to the cache"
    if not Path(f"/proc/{int(pid)}").exists():
        return f"what process {int(pid)} left running, which writes to the cache"
    return f"process {int(pid)}, which writes to the cache"


def _sign(descriptor: int) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError:
        pass  # on a full disk: whoever waits is told less


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory for half-written files beneath `directory`, on the same file system; removed at the end."""
    import shutil
    import tempfile

    partial = directory / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=partial))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_synced(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, its content as a whole or in chunks, and wait until the disk has it.

    Raises:
        ImageError: the file cannot be written, for instance because the disk is full.
    """
    try:
        with path.open("wb") as file:
            file.writelines((data,) if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "make room on its disk" if error.errno in _FULL else "make its directory writable"
        raise ImageError(f"{path} cannot be written ({error.strerror}): {remedy}") from error


def publish(finished: Path, place: Path) -> None:
    """Give a finished file or directory its final name in one step, in place of what had it; survives a crash."""
    if place.is_dir() and finished.is_dir():
        with scratch(place.parent) as old:
            place.rename(old / place.name)
            finished.rename(place)
    else:
        synced(finished)
        finished.replace(place)
    synced(place.parent)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def synced(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
