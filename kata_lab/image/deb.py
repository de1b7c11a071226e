"""A reader of Debian binary packages: what is inside, without root and without running a maintainer script.

Follows deb(5), format version 2.0: an ``ar`` archive whose members are ``debian-binary``, ``control.tar`` and
``data.tar``, the latter two plain or compressed with gzip or xz. Leaves out zstd (which Debian does not use) and bzip2
and lzma (which dpkg no longer writes), the conffile and trigger machinery, and unpacking to a directory: what a guest
gets goes from here into an image and never touches the host's file system.
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal

from kata_lab.errors import ImageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60

_BUFFER = 1 << 16
_CHUNK = 1 << 20
_COMPRESSIONS = ("", ".gz", ".xz")


@dataclass(frozen=True)
class PackagedFile:
    """One object that a package would install.

    Args:
        path: where it goes, relative to the root, such as ``usr/bin/busybox``; empty for the root itself.
        kind: what it is.
        permissions: permission bits.
        size: bytes of a regular file.
        target: what a symbolic link says, or the path of the file that a hard link shares.
        device: major and minor number of a device node.
    """

    path: str
    kind: Literal["directory", "file", "symlink", "hardlink", "character", "block", "fifo"]
    permissions: int
    uid: int
    gid: int
    size: int = 0
    target: str = ""
    device: tuple[int, int] = (0, 0)


class DebPackage:
    """An open ``.deb`` file, as a context manager.

    ::

        with DebPackage(path) as package:
            busybox = package.read("usr/bin/busybox")

    Raises:
        ImageError: from every method, for a file that is no package, is cut short, uses zstd, or holds an absolute
            path or one with "..".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise ImageError(f"the package {path} cannot be read: {error.strerror}") from error
        try:
            self._members = _read_ar(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> DebPackage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        self._file.close()

    def control(self) -> dict[str, str]:
        """The fields of the control file, such as ``{"Package": "busybox-static", …}``."""
        for entry, content in self._walk("control.tar", lambda file: file.path == "control"):
            if entry.path == "control":
                return parse_fields(b"".join(content).decode("utf-8", "replace"))
        raise ImageError(f"the package {self.path} has no control file")

    def files(self) -> Iterator[PackagedFile]:
        """Everything that the package installs, in the order of the archive."""
        for entry, _ in self._walk("data.tar", lambda file: False):
            yield entry

    def contents(self, wanted: Callable[[PackagedFile], bool]) -> Iterator[tuple[PackagedFile, bytes]]:
        """The regular files for which `wanted` is true, with their content; stops unpacking when the caller stops."""
        for entry, content in self._walk("data.tar", wanted):
            if entry.kind == "file" and wanted(entry):
                yield entry, b"".join(content)

    def entries(self, wanted: Callable[[PackagedFile], bool]) -> Iterator[tuple[PackagedFile, Iterator[bytes]]]:
        """Everything that the package installs, regular files with their content where `wanted` is true.

        A content comes in chunks, and must be taken before the next entry is asked for.
        """
        return self._walk("data.tar", wanted)

    def read(self, path: str) -> bytes:
        """The content of the regular file `path` (relative to the root).

        Raises:
            ImageError: the package has no such file.
        """
        for _, content in self.contents(lambda file: file.path == path):
            return content
        raise ImageError(f"the package {self.path.name} has no file {path!r}")

    def _walk(
        self, member: str, wanted: Callable[[PackagedFile], bool]
    ) -> Iterator[tuple[PackagedFile, Iterator[bytes]]]:
        with (
            self._unpacking(member),
            self._tar(member) as stream,
            tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER) as archive,
        ):
            for info in archive:
                entry = _packaged(info, self.path)
                content: Iterator[bytes] = iter(())
                if entry.kind == "file" and wanted(entry):
                    content = self._content(archive, info, member)
                yield entry, content

    def _content(self, archive: tarfile.TarFile, info: tarfile.TarInfo, member: str) -> Iterator[bytes]:
        left = info.size
        with self._unpacking(member):
            source = archive.extractfile(info)
            while left and source is not None and (chunk := source.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield chunk
        if left:
            raise ImageError(f"the package {self.path} is cut short within {info.name!r}")

    @contextmanager
    def _unpacking(self, member: str) -> Iterator[None]:
        try:
            yield
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            raise ImageError(
                f"the package {self.path} is damaged: its {member} cannot be unpacked ({error})"
            ) from error

    def _tar(self, member: str) -> io.BufferedIOBase:
        for name, (start, size) in self._members.items():
            if not name.startswith(member):
                continue
            suffix = name.removeprefix(member)
            if suffix not in _COMPRESSIONS:
                raise ImageError(
                    f"the package {self.path} holds {name!r}, whose compression is not supported: "
                    "Debian's own packages use xz or gzip"
                )
            return _unpacked(io.BufferedReader(_Window(self._file, start, size), _BUFFER), suffix)
        raise ImageError(f"the package {self.path} has no {member}: it is not a Debian binary package")


def _unpacked(packed: io.BufferedReader, suffix: str) -> io.BufferedIOBase:
    """Unpacks no more than is read, however much a few bytes stand for; tarfile's own modes would unpack it at once."""
    match suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=packed)
        case ".xz":
            return lzma.LZMAFile(packed)
    return packed


class _Window(io.RawIOBase):
    """A part of a file, read in sequence; keeps its own position so that several can share the file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file = file
        self._position = start
        self._end = start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer).cast("B")
        self._file.seek(self._position)
        data = self._file.read(min(len(room), self._end - self._position))
        room[: len(data)] = data
        self._position += len(data)
        return len(data)


def parse_fields(text: str) -> dict[str, str]:
    """The fields of one control paragraph (deb822(5)); lines that continue a field are joined with newlines."""
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t"):
            if name:
                fields[name] += "\n" + line.strip()
        elif ":" in line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def _read_ar(file: BinaryIO, path: Path) -> dict[str, tuple[int, int]]:
    """Name → (offset, size) of each member of an ``ar`` archive."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise ImageError(f"{path} is not a Debian package: it does not begin with {AR_MAGIC!r}")
    end = path.stat().st_size
    position = len(AR_MAGIC)
    members: dict[str, tuple[int, int]] = {}
    while position < end:
        file.seek(position)
        header = file.read(AR_HEADER)
        digits = header[48:58].strip()
        if len(header) < AR_HEADER or header[58:60] != b"`\n" or not digits.isdigit():
            raise ImageError(f"the package {path} is damaged: no member header at offset {position}")
        size = int(digits)
        start = position + AR_HEADER
        if start + size > end:
            raise ImageError(f"the package {path} is cut short: it ends at {end} and its members at {start + size}")
        members[header[:16].decode("ascii", "replace").strip().rstrip("/")] = (start, size)
        position = start + size + size % 2
    if "debian-binary" not in members:
        raise ImageError(f"{path} is not a Debian package: it has no debian-binary member")
    return members


def _packaged(info: tarfile.TarInfo, package: Path) -> PackagedFile:
    path = _relative(info.name, package)
    if info.isdir():
        kind: Literal["directory", "file", "symlink", "hardlink", "character", "block", "fifo"] = "directory"
    elif info.isreg():
        kind = "file"
    elif info.issym():
        kind = "symlink"
    elif info.islnk():
        kind = "hardlink"
    elif info.ischr():
        kind = "character"
    elif info.isblk():
        kind = "block"
    elif info.isfifo():
        kind = "fifo"
    else:
        raise ImageError(f"the package {package} holds {info.name!r} of the unknown type {info.type!r}")
    target = _relative(info.linkname, package) if kind == "hardlink" else info.linkname
    return PackagedFile(
        path=path,
        kind=kind,
        permissions=info.mode & 0o7777,
        uid=info.uid,
        gid=info.gid,
        size=info.size,
        target=target,
        device=(info.devmajor, info.devminor) if kind in ("character", "block") else (0, 0),
    )


def _relative(name: str, package: Path) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise ImageError(f"the package {package} is refused: its member {name!r} would lie outside the root")
    return "/".join(parts)
