"""A writer of initramfs archives: cpio in the "newc" format, deterministic down to the last byte.

Follows the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Each member is

::

    offset  0       6     14      22      30      38       46       54          62       70
           "070701" inode mode    uid     gid     links    mtime    file size   major    minor …
    offset 78      86            94          102     110
           rdev major   rdev minor   name size   check   name NUL, padded to 4; data, padded to 4

with every number as 8 hexadecimal digits. Members are sorted, times are 0, inode numbers are counted from 1, so that
the same tree gives the same bytes. Contents may lie in a spool, and then the archive comes in chunks. Leaves out hard
links, extended attributes, checksums ("070702") and files of 4 GiB or more.
"""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kata_lab.errors import ImageError
from kata_lab.image.spool import Content, Spooled, chunks_of

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
LONGEST_PATH = 4095
BLOCK = 512
MAX_32_BIT = 0xFFFF_FFFF

Compression = Literal["none", "gzip"]


@dataclass(frozen=True)
class Node:
    """One file system object of an initramfs.

    Args:
        mode: type and permission bits, as in ``st_mode``.
        data: content of a regular file, or (always bytes) the target of a symbolic link.
        uid, gid: owner and group.
        device: major and minor number of a device node.
    """

    mode: int
    data: Content = b""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)

    @property
    def content(self) -> bytes:
        """The data as a whole."""
        return self.data.read() if isinstance(self.data, Spooled) else self.data


class Initramfs:
    """A tree of files that becomes an initramfs. Parent directories are made as they are needed.

    Paths are relative to the root (``"bin/sh"``); a path given twice is refused, as the kernel would take the last one.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, ...], Node] = {}

    def directory(self, path: str, permissions: int = 0o755) -> None:
        """Add a directory; one that exists only as somebody's parent gets these permissions."""
        self.add(path, Node(stat.S_IFDIR | _permissions(path, permissions)))

    def file(self, path: str, data: Content, permissions: int = 0o644) -> None:
        """Add a regular file."""
        self.add(path, Node(stat.S_IFREG | _permissions(path, permissions), data))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to `target`, which need not exist."""
        if not target or "\0" in target or len(target.encode("utf-8", "surrogateescape")) > LONGEST_PATH:
            raise ImageError(
                f"the link {path!r} has the target {target!r}: it must be 1 to {LONGEST_PATH} bytes, no NUL"
            )
        self.add(path, Node(stat.S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape")))

    def device(self, path: str, kind: Literal["b", "c"], major: int, minor: int, permissions: int = 0o600) -> None:
        """Add a block ("b") or character ("c") device node; needs no root, since only the archive names it."""
        type_bits = stat.S_IFBLK if kind == "b" else stat.S_IFCHR
        self.add(path, Node(type_bits | _permissions(path, permissions), device=(major, minor)))

    def add(self, path: str, node: Node) -> None:
        """Add any node.

        Raises:
            ImageError: a path that is absolute, has empty, "." or ".." parts or is too long; a path that is taken; a
                parent that is not a directory; a number that does not fit the format.
        """
        parts = _parts(path)
        _check_numbers(path, node)
        implied = Node(stat.S_IFDIR | 0o755)
        for length in range(1, len(parts)):
            parent = self._nodes.setdefault(parts[:length], implied)
            if not stat.S_ISDIR(parent.mode):
                raise ImageError(f"{path!r} cannot be added: {'/'.join(parts[:length])!r} is not a directory")
        present = self._nodes.get(parts)
        if present is not None and (present != implied or not stat.S_ISDIR(node.mode)):
            raise ImageError(f"{path!r} is in the initramfs already: each path may be added once")
        self._nodes[parts] = node

    def pack(self, compression: Compression = "none") -> bytes:
        """The archive, padded to 512 bytes; equal trees give equal bytes.

        A guest spends about 50 instructions on each byte that it must decompress: leave small archives uncompressed.
        """
        archive = b"".join(self.chunks())
        match compression:
            case "none":
                return archive
            case "gzip":
                return gzip.compress(archive, compresslevel=9, mtime=0)
            case _:
                raise ImageError(f"compression {compression!r} is unknown: it is 'none' or 'gzip'")

    def chunks(self) -> Iterator[bytes]:
        """The archive as pack() makes it without compression, a part at a time."""
        size = 0
        for inode, (parts, node) in enumerate(sorted(self._nodes.items()), start=1):
            for chunk in _member("/".join(parts), inode, node, links=2 if stat.S_ISDIR(node.mode) else 1):
                size += len(chunk)
                yield chunk
        end = b"".join(_member(TRAILER, 0, Node(0), links=1))
        yield end + bytes(-(size + len(end)) % BLOCK)


def _member(name: str, inode: int, node: Node, links: int) -> Iterator[bytes]:
    path = name.encode("utf-8", "surrogateescape") + b"\0"
    numbers = (
        inode,
        node.mode,
        node.uid,
        node.gid,
        links,
        0,  # modification time
        len(node.data),
        0,  # device on which the file lives
        0,
        *node.device,
        len(path),
        0,  # checksum, unused in this variant
    )
    header = MAGIC + b"".join(b"%08X" % number for number in numbers) + path
    yield header + bytes(-len(header) % 4)
    yield from chunks_of(node.data)
    yield bytes(-len(node.data) % 4)


def _parts(path: str) -> tuple[str, ...]:
    parts = tuple(path.split("/"))
    if any(part in ("", ".", "..") or "\0" in part for part in parts) or path == TRAILER:
        raise ImageError(f"{path!r} cannot be a path in an initramfs: it must be relative, such as 'bin/sh'")
    if len(path.encode("utf-8", "surrogateescape")) > LONGEST_PATH:
        raise ImageError(f"{path[:40]!r}… is too long for an initramfs: a path has at most {LONGEST_PATH} bytes")
    return parts


def _permissions(path: str, permissions: int) -> int:
    if not 0 <= permissions <= 0o7777:
        raise ImageError(f"{path!r} has the permissions {permissions:#o}: they must be within 0 to 0o7777")
    return permissions


def _check_numbers(path: str, node: Node) -> None:
    numbers = (node.mode, node.uid, node.gid, *node.device, len(node.data))
    if any(not 0 <= number <= MAX_32_BIT for number in numbers):
        raise ImageError(f"{path!r} has a number (of {numbers}) that does not fit: newc holds 0 to {MAX_32_BIT}")
    if node.data and not (stat.S_ISREG(node.mode) or stat.S_ISLNK(node.mode)):
        raise ImageError(f"{path!r} carries {len(node.data)} bytes of data: only files and symbolic links may")
