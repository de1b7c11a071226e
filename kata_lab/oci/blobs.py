"""Where an image's blobs come from: a layout's directory, or a tar archive; and reading them so that they are verified.

Follows the OCI image specification 1.1, image-layout.md (version 1.0.0): ``oci-layout``, ``index.json`` and
``blobs/<algorithm>/<digits>``. An archive is a tar of the same, or what ``docker save`` writes; it may be compressed
with gzip, and is then unpacked into a file without a name first. Nothing of an archive is written under its own names.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol, Self

from kata_lab.oci.descriptor import LARGEST_DOCUMENT, Descriptor, OciError, blob_path
from kata_lab.paths import cache_directory

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LAYOUT_FILE: Final = "oci-layout"
INDEX_FILE: Final = "index.json"
DOCKER_FILE: Final = "manifest.json"

MOST_MEMBERS: Final = 100_000
"""Of an archive of images; an image has a handful of blobs."""

LARGEST_ARCHIVE: Final = 64 << 30
"""Bytes of an archive that was compressed as a whole."""

LARGEST_HEADER: Final = 1 << 20
"""Bytes of what an archive says of one member: long names and extended attributes."""

_CHUNK = 1 << 20
_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_GZIP_MAGIC = b"\x1f\x8b"
_MOST_LINKS = 8


class BlobSource(Protocol):
    """Something with files in it, of which some are blobs."""

    origin: str

    def file(self, name: str) -> BinaryIO | None:
        """An open file by its name, or None when there is none."""

    def close(self) -> None:
        """Release what is open."""


class DirectorySource:
    """The files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.origin = str(directory)
        self._directory = directory

    def file(self, name: str) -> BinaryIO | None:
        try:
            descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OciError(f"{self._directory / name} cannot be read ({error.strerror})") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OciError(f"{self._directory / name} is no regular file: a layout has nothing else")
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        pass


class BoundedTarInfo(tarfile.TarInfo):
    """A member of an archive; a header before it that would fill the memory is refused."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _LONG_HEADERS and found.size > LARGEST_HEADER:
            raise OciError(f"an archive has a header of {found.size} bytes: it must have at most {LARGEST_HEADER}")
        return found


class ArchiveSource:
    """The files in a tar archive, found by their names without being unpacked.

    Raises:
        OciError: it cannot be read, is no tar archive, or has too many members.
    """

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._file = _plain_archive(path)
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        try:
            self._read_members()
        except BaseException:
            self._file.close()
            raise

    def _read_members(self) -> None:
        try:
            with tarfile.open(fileobj=self._file, mode="r:", tarinfo=BoundedTarInfo) as archive:
                for count, info in enumerate(archive):
                    if count >= MOST_MEMBERS:
                        raise OciError(f"the archive {self.origin} has more than {MOST_MEMBERS} members")
                    name = os.path.normpath(info.name)
                    if info.isreg() and not info.issparse():
                        self._members[name] = (info.offset_data, info.size)
                    elif info.issym():
                        self._links[name] = os.path.normpath(os.path.join(os.path.dirname(name), info.linkname))
                    elif info.islnk():
                        self._links[name] = os.path.normpath(info.linkname)
                    vars(archive)["members"].clear()  # what was seen is not kept twice
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise OciError(f"{self.origin} is no tar archive that can be read ({error})") from error

    def file(self, name: str) -> BinaryIO | None:
        name = os.path.normpath(name)
        for _ in range(_MOST_LINKS):
            if name in self._members:
                start, size = self._members[name]
                return io.BufferedReader(_Window(self._file.fileno(), start, size), _CHUNK)
            if name not in self._links:
                break
            name = self._links[name]
        return None

    def close(self) -> None:
        self._file.close()


class _Window(io.RawIOBase):
    """A part of a file, with a position of its own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor = descriptor
        self._position = start
        self._end = start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer).cast("B")[: self._end - self._position]
        got = os.preadv(self._descriptor, [room], self._position) if room else 0
        self._position += got
        return got


def _plain_archive(path: Path) -> BinaryIO:
    """The archive as an open file that can be read at any place."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise OciError(f"the archive {path} cannot be read ({error.strerror})") from error
    with ExitStack() as release:
        release.callback(file.close)
        try:
            is_packed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            if not is_packed:
                release.pop_all()
                return file
            return _unpacked(file)
        except (OSError, EOFError, zlib.error) as error:
            raise OciError(f"the archive {path} cannot be unpacked ({error})") from error


def _unpacked(file: BinaryIO) -> BinaryIO:
    """What gzip packed, in a file without a name."""
    with ExitStack() as release:
        plain: BinaryIO = release.enter_context(tempfile.TemporaryFile(dir=cache_directory()))
        with gzip.GzipFile(fileobj=file) as unpacked:
            size = 0
            while chunk := unpacked.read(_CHUNK):
                size += len(chunk)
                if size > LARGEST_ARCHIVE:
                    raise OciError(f"the archive {file.name} unpacks to more than {LARGEST_ARCHIVE} bytes")
                plain.write(chunk)
        plain.seek(0)
        release.pop_all()
        return plain


class VerifiedReader(io.RawIOBase):
    """Passes on a blob while it hashes it; check() says whether it was the right one.

    Args:
        file: where the blob comes from; closed with the reader.
        descriptor: what it must be.
        origin: what to call its source in messages.
    """

    def __init__(self, file: BinaryIO, descriptor: Descriptor, origin: str) -> None:
        self._file = file
        self._descriptor = descriptor
        self._origin = origin
        self._hash = hashlib.new(descriptor.digest.partition(":")[0])
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer).cast("B")
        try:
            data = self._file.read(len(room))
        except OSError as error:
            raise self._wrong(f"cannot be read ({error.strerror})") from error
        self._size += len(data)
        if self._size > self._descriptor.size:
            raise self._wrong(f"has more than the {self._descriptor.size} bytes that it must have")
        self._hash.update(data)
        room[: len(data)] = data
        return len(data)

    def check(self) -> None:
        """Read what is left, and compare.

        Raises:
            OciError: another size or digest than the descriptor says.
        """
        while self.read(_CHUNK):
            pass
        if self._size != self._descriptor.size:
            raise self._wrong(f"has {self._size} bytes and must have {self._descriptor.size}")
        found = self._hash.hexdigest()
        if found != self._descriptor.digest.partition(":")[2]:
            raise self._wrong(f"has the digest {self._hash.name}:{found}, so it was changed or damaged")

    def _wrong(self, what: str) -> OciError:
        return OciError(f"the blob {self._descriptor.digest} in {self._origin} {what}")

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def opened_blob(source: BlobSource, descriptor: Descriptor) -> Iterator[VerifiedReader]:
    """A blob to be read; it is verified when the ``with`` block ends well.

    Raises:
        OciError: there is no such blob, or it is not what the descriptor says.
    """
    file = source.file(str(blob_path(descriptor.digest)))
    if file is None:
        raise OciError(f"{source.origin} has no blob {descriptor.digest}: the image is incomplete")
    reader = VerifiedReader(file, descriptor, source.origin)
    try:
        yield reader
        reader.check()
    finally:
        reader.close()


def read_document(source: BlobSource, descriptor: Descriptor) -> bytes:
    """A blob as a whole, verified: an index, a manifest or a configuration.

    Raises:
        OciError: as opened_blob(), or larger than such a document is.
    """
    if descriptor.size > LARGEST_DOCUMENT:
        raise OciError(
            f"the blob {descriptor.digest} in {source.origin} would have {descriptor.size} bytes: "
            f"a {descriptor.media_type} has at most {LARGEST_DOCUMENT}"
        )
    with opened_blob(source, descriptor) as reader:
        data = reader.read(descriptor.size + 1)
    return data or b""


def read_named(source: BlobSource, name: str) -> bytes | None:
    """A file of a source as a whole, such as its index; None when there is none.

    Raises:
        OciError: larger than such a document is.
    """
    file = source.file(name)
    if file is None:
        return None
    with file:
        data = file.read(LARGEST_DOCUMENT + 1)
    if len(data) > LARGEST_DOCUMENT:
        raise OciError(f"{name} in {source.origin} has more than {LARGEST_DOCUMENT} bytes")
    return data
