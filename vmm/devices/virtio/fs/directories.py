"""Operations on open directories.

Places in a directory are the host's own cookies, so that a directory of any size is read through one small buffer and a
guest can go back to any place. READDIRPLUS looks every entry up and counts it as LOOKUP does, but for ``.`` and ``..``.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from vmm.devices.virtio.fs.inodes import Inode, failure
from vmm.devices.virtio.fs.protocol import (
    ARGUMENTS,
    DIRENT,
    ENTRY_OUT,
    FOPEN_CACHE_DIR,
    FOPEN_KEEP_CACHE,
    FSYNC_FDATASYNC,
    FSYNC_IN,
    OPEN_OUT,
    READ_IN,
    RELEASE_IN,
    Opcode,
)
from vmm.devices.virtio.fs.share import Operation, Request, Share, Slow

MAX_LISTING: Final = 1 << 20
_NO_ENTRY: Final = bytes(ENTRY_OUT.size)


class Directories:
    """The operations, on one share."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._opened = share.opened
        self.operations: dict[int, Operation] = {
            Opcode.OPENDIR: self.opendir,
            Opcode.READDIR: self.readdir,
            Opcode.READDIRPLUS: self.readdirplus,
            Opcode.RELEASEDIR: self.releasedir,
            Opcode.FSYNCDIR: self.fsyncdir,
        }

    def opendir(self, request: Request) -> bytes:
        inodes = self._share.inodes
        inode = inodes.get(request.node)
        handle = self._opened.add_directory(inode)
        changes = inode is inodes.root and inodes.virtual
        caching = FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE if self._share.cache == "always" and not changes else 0
        return OPEN_OUT.pack(handle, caching)

    def readdir(self, request: Request) -> bytes:
        return self._list(request, plus=False)

    def readdirplus(self, request: Request) -> bytes:
        return self._list(request, plus=True)

    def _list(self, request: Request, plus: bool) -> bytes:
        handle, offset, size, _, _, _ = READ_IN.unpack(request.data, ARGUMENTS)
        directory = self._opened.directory(handle)
        share, inode = self._share, directory.inode
        upper = share.inodes.upper_bits(inode)
        size = min(size, request.capacity, MAX_LISTING)
        directory.seek(offset)
        parts: list[bytes] = []
        filled = 0
        while (found := directory.peek(share.reader)) is not None:
            name = found.name
            length = DIRENT.size + len(name)
            padding = -length % 8
            length += padding + (ENTRY_OUT.size if plus else 0)
            if filled + length > size:
                if not filled:
                    raise failure(errno.EINVAL)
                break
            if plus:
                parts.append(_NO_ENTRY if name in (b".", b"..") else self._entry(inode, name))
            parts.append(DIRENT.pack(found.number ^ upper, found.cookie & (1 << 64) - 1, len(name), found.kind))
            parts.append(name + bytes(padding))
            filled += length
            directory.take()
        return b"".join(parts)

    def _entry(self, directory: Inode, name: bytes) -> bytes:
        try:
            return self._share.entry(directory, name)
        except OSError:
            # Gone meanwhile, or not to be seen: the guest looks for itself when it wants to know.
            return _NO_ENTRY

    def releasedir(self, request: Request) -> bytes:
        handle = RELEASE_IN.unpack(request.data, ARGUMENTS)[0]
        self._opened.release(self._opened.directory(handle), handle)
        return b""

    def fsyncdir(self, request: Request) -> Slow:
        handle, flags = FSYNC_IN.unpack(request.data, ARGUMENTS)
        descriptor = os.dup(self._opened.directory(handle).descriptor)

        def work() -> bytes:
            (os.fdatasync if flags & FSYNC_FDATASYNC else os.fsync)(descriptor)
            return b""

        return Slow(work, lambda: os.close(descriptor))
