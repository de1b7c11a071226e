"""What every disk can do, whatever it keeps its bytes in.

::

    VmmError
    └── DiskError            a disk that cannot be opened, locked or made
    OSError
    └── FileEndedError       a file that became shorter than the disk (errno EIO)

Offsets and lengths are in bytes and inside the disk: who calls has checked them. Buffers are views of memory, filled or
written in order, so that nothing is copied on the way. What the host refuses comes as :class:`OSError`, from any
method; the disk remains usable. Any method may be called from any thread.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vmm.errors import VmmError


class DiskError(VmmError):
    """A disk that cannot be opened, locked or made."""


class FileEndedError(OSError):
    """The file is shorter than the disk that it holds: somebody cut it off."""

    def __init__(self, path: Path, offset: int) -> None:
        text = f"the file ends before byte {offset} of the disk, it must be as long as it was"
        super().__init__(errno.EIO, text, str(path))


class Disk(ABC):
    """Bytes that outlive the machine. A context manager.

    Attributes:
        path: the file or block device.
        read_only: nothing may be written.
        size: in bytes; :meth:`refresh` looks again.
    """

    path: Path
    read_only: bool
    size: int

    @abstractmethod
    def read(self, buffers: Sequence[memoryview], length: int, offset: int) -> None:
        """Fill ``buffers``, which have ``length`` bytes together, from ``offset``."""

    @abstractmethod
    def try_read(self, buffers: Sequence[memoryview], length: int, offset: int) -> bool:
        """:meth:`read` if the host has the bytes in memory; False, with the buffers in any state, if it would wait."""

    @abstractmethod
    def write(self, buffers: Sequence[memoryview], length: int, offset: int, *, stable: bool = False) -> None:
        """Write ``buffers``, which have ``length`` bytes together, to ``offset``.

        Args:
            stable: return only when the bytes would survive a loss of power.
        """

    @abstractmethod
    def flush(self) -> None:
        """Make everything that was written stable."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed any more: give their room back, where that is possible."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """The bytes read as zeroes from now on.

        Args:
            unmap: their room may be given back.
        """

    @abstractmethod
    def refresh(self) -> int:
        """Look at the file again, which may have grown; returns and keeps the size."""

    @abstractmethod
    def close(self) -> None:
        """Give the file and its lock back; a second time, this does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
