"""Contents of files on their way from packages into an image, kept on disk rather than in memory.

One temporary file without a name (O_TMPFILE of open(2), where the file system has it) holds them one after another; it
is gone when its owner closes it or ends, however it ends. Each content is hashed while it comes in, so that two can be
compared without being read again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType

from kata_lab.image.store import refused_by_system
from kata_lab.paths import cache_directory

CHUNK = 1 << 20
"""The most bytes of a content that are in memory at once."""


class Spool:
    """The file with the contents, as a context manager.

    Raises:
        ImageError: from adding and reading, too: the disk is full, or cannot be written to.
    """

    def __init__(self) -> None:
        self._directory = cache_directory()
        self._end = 0
        self._file = _nameless_file(self._directory)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the space back; what was added cannot be read any more."""
        self._file.close()

    def add(self, chunks: Iterable[bytes]) -> Spooled:
        """Take in one content."""
        start = self._end
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
            self._write(chunk)
        return Spooled(self._end - start, digest.hexdigest(), self, start)

    def _write(self, chunk: bytes) -> None:
        left = memoryview(chunk)
        while left:
            try:
                written = os.pwrite(self._file.fileno(), left, self._end)
            except OSError as error:
                raise refused_by_system(self._directory, error) from error
            self._end += written
            left = left[written:]

    def read(self, start: int, size: int) -> Iterator[bytes]:
        """Bytes of the file, in chunks."""
        try:
            while size and (chunk := os.pread(self._file.fileno(), min(CHUNK, size), start)):
                yield chunk
                start += len(chunk)
                size -= len(chunk)
        except OSError as error:
            raise refused_by_system(self._directory, error) from error


def _nameless_file(directory: Path) -> FileIO:
    import tempfile

    try:
        return tempfile.TemporaryFile(dir=directory, buffering=0)
    except OSError as error:
        raise refused_by_system(directory, error) from error


@dataclass(frozen=True)
class Spooled:
    """A content in a spool: `size` in bytes, and SHA-256 in hexadecimal, by which two are equal or not."""

    size: int
    sha256: str
    spool: Spool = field(repr=False, compare=False)
    start: int = field(repr=False, compare=False)

    def __len__(self) -> int:
        return self.size

    def chunks(self) -> Iterator[bytes]:
        """The content, a part at a time."""
        return self.spool.read(self.start, self.size)

    def read(self) -> bytes:
        """The content as a whole."""
        return b"".join(self.chunks())


Content = bytes | Spooled
"""What is in a file: in memory, or in a spool."""


def chunks_of(content: Content) -> Iterable[bytes]:
    """A content, a part at a time."""
    return (content,) if isinstance(content, bytes) else content.chunks()
