"""A disk in a raw file or a block device: byte n of the disk is byte n of the file.

The file may be sparse: a discard punches a hole, and zeroes are written as a hole or an unwritten range where the file
system can do that (fallocate(2)), else as zeroes.

A disk that can be written is locked for its one user, a read-only one is shared: with open file description locks
(fcntl(2), F_OFD_SETLK) over the whole file, the kind that QEMU takes as well.

Left out: direct I/O (the host's page cache is the disk's cache) and asynchronous I/O.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vmm.storage.disk import Disk, DiskError, FileEndedError

SECTOR: Final = 512

_BATCH: Final = os.sysconf("SC_IOV_MAX")  # buffers in one system call
_ZEROES: Final = memoryview(bytes(1 << 20))

# fallocate(2).
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16

# What the host says of an operation that the file system, the device, or the alignment does not allow.
_CANNOT: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)

_FLOCK: Final = struct.Struct("@hhqqi4x")  #: struct flock: type, whence, start, length, pid


class RawDisk(Disk):
    """A file or a block device as a disk.

    Raises:
        DiskError: it cannot be opened, is of another kind, is locked by another user, or does not end with a sector.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.size = 0
        self._no_wait = os.RWF_NOWAIT
        with contextlib.ExitStack() as opened:
            self._fd = _open(path, read_only)
            opened.callback(self.close)
            _lock(self._fd, path, read_only)
            self.refresh()
            if not self.size or self.size % SECTOR:
                raise DiskError(
                    f"{path} has {self.size} bytes, a disk must have sectors of {SECTOR} bytes, at least one"
                )
            opened.pop_all()

    def read(self, buffers: Sequence[memoryview], length: int, offset: int) -> None:
        if len(buffers) > _BATCH or os.preadv(self._fd, buffers, offset) != length:
            self._in_batches(os.preadv, buffers, offset)

    def try_read(self, buffers: Sequence[memoryview], length: int, offset: int) -> bool:
        if len(buffers) > _BATCH:
            return False
        try:
            return os.preadv(self._fd, buffers, offset, self._no_wait) == length
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._no_wait or error.errno not in _CANNOT:
                raise
            self._no_wait = 0  # a file system that cannot say; its reads are waited for
            return False

    def write(self, buffers: Sequence[memoryview], length: int, offset: int, *, stable: bool = False) -> None:
        # A write beyond the end would make the file long again, with a hole in place of what was cut off.
        if os.lseek(self._fd, 0, os.SEEK_END) < offset + length:
            raise FileEndedError(self.path, offset + length)
        flags = os.RWF_DSYNC if stable else 0
        if len(buffers) > _BATCH or os.pwritev(self._fd, buffers, offset, flags) != length:
            self._in_batches(functools.partial(_written, flags), buffers, offset)

    def _in_batches(
        self, move: Callable[[int, Sequence[memoryview], int], int], buffers: Sequence[memoryview], offset: int
    ) -> None:
        """Call ``move`` until all is done, however little it does at a time."""
        left = list(buffers)
        while left:
            moved = move(self._fd, left[:_BATCH], offset)
            if not moved:
                raise FileEndedError(self.path, offset + 1)
            offset += moved
            whole = 0
            while whole < len(left) and moved >= len(left[whole]):
                moved -= len(left[whole])
                whole += 1
            del left[:whole]
            if moved:
                left[0] = left[0][moved:]

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        if not self._allocate((_PUNCH_HOLE if unmap else _ZERO_RANGE) | _KEEP_SIZE, offset, length):
            end = offset + length
            while offset < end:
                part = min(len(_ZEROES), end - offset)
                self.write([_ZEROES[:part]], part, offset)
                offset += part

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(2); False where this file or this range does not have that."""
        if os.lseek(self._fd, 0, os.SEEK_END) < offset + length:
            raise FileEndedError(self.path, offset + length)
        while _libc().fallocate(self._fd, mode, offset, length):
            number = ctypes.get_errno()
            if number in _CANNOT:
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), str(self.path))
        return True

    def refresh(self) -> int:
        # Of a block device this is what BLKGETSIZE64 says.
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        return self.size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _written(flags: int, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    return os.pwritev(fd, buffers, offset, flags)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


def _open(path: Path, read_only: bool) -> int:
    try:
        # Without waiting, so that a pipe of that name is refused and not waited for.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        wanted = "read" if read_only else "read and written; a read-only disk needs less"
        raise DiskError(f"{path} cannot be opened: {error.strerror}; it must be a file that can be {wanted}") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        raise DiskError(f"{path} is neither a file nor a block device, a disk must be one of them")
    os.set_blocking(fd, True)
    return fd


def _lock(fd: int, path: Path, read_only: bool) -> None:
    try:
        fcntl.fcntl(
            fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK if read_only else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        )
    except (BlockingIOError, PermissionError) as error:
        users = "somebody who writes it" if read_only else "somebody else"
        raise DiskError(f"{path} is in use by {users}; a disk has one writer, or readers alone") from error
    except OSError as error:
        raise DiskError(f"{path} cannot be locked: {error.strerror}; its file system must know file locks") from error
