"""A FUSE session over one share: INIT, DESTROY, and which operation answers which request.

What is agreed on in INIT (7.31 at least; what the client does not know is left out): reads of 1 MiB in several requests
at once, parallel lookups, READDIRPLUS where it pays, locks of both kinds, opening with truncation, set-user-id bits
cleared by the server. By the share's cache policy:

========  =====================  =====================  ==================================================
policy    names and attributes   pages                  besides
========  =====================  =====================  ==================================================
none      asked for every time   none (direct I/O)      shared mappings of files are possible all the same
auto      trusted for a second   kept until a file is   pages go when size or mtime is seen to have changed
                                 opened that changed
always    trusted for a day      kept                   names known to be missing; directories; symbolic links;
                                                        writes stay in the guest until it writes them back
========  =====================  =====================  ==================================================

Not agreed on: DONT_MASK (the guest's kernel applies umask), POSIX_ACL, SUBMOUNTS, EXPORT_SUPPORT, splicing, DAX.
"""

from __future__ import annotations

import errno
from typing import Final

from vmm.devices.virtio.fs.attributes import Attributes
from vmm.devices.virtio.fs.directories import Directories
from vmm.devices.virtio.fs.files import MAX_TRANSFER, Files
from vmm.devices.virtio.fs.inodes import failure
from vmm.devices.virtio.fs.names import Names
from vmm.devices.virtio.fs.protocol import (
    ARGUMENTS,
    INIT_IN,
    INIT_IN_EXT,
    INIT_OUT,
    MAJOR,
    MINOR,
    OLDEST_MINOR,
    Feature,
    Opcode,
)
from vmm.devices.virtio.fs.share import Answer, Operation, Request, Share

_PAGE: Final = 4096
_MAX_READAHEAD: Final = MAX_TRANSFER
_MAX_BACKGROUND: Final = 128
_CONGESTED: Final = 96

_ALWAYS_WANTED: Final = (
    Feature.ASYNC_READ
    | Feature.POSIX_LOCKS
    | Feature.ATOMIC_O_TRUNC
    | Feature.BIG_WRITES
    | Feature.FLOCK_LOCKS
    | Feature.DO_READDIRPLUS
    | Feature.READDIRPLUS_AUTO
    | Feature.ASYNC_DIO
    | Feature.PARALLEL_DIROPS
    | Feature.MAX_PAGES
    | Feature.HANDLE_KILLPRIV_V2
    | Feature.SETXATTR_EXT
    | Feature.INIT_EXT
)
_WANTED_BY_CACHE: Final = {
    "none": Feature.DIRECT_IO_ALLOW_MMAP,
    "auto": Feature.AUTO_INVAL_DATA,
    "always": Feature.CACHE_SYMLINKS,
}


class FileServer:
    """Answers FUSE requests.

    Args:
        share: the directory that is served; it belongs to the server's owner.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        #: Whether INIT was answered.
        self.begun = False
        self._operations: dict[int, Operation] = {}
        for group in (Names(share), Attributes(share), Files(share), Directories(share)):
            self._operations |= group.operations
        self._operations[Opcode.DESTROY] = self._destroy

    def answer(self, opcode: int, request: Request) -> Answer:
        """Carry out a request.

        Raises:
            OSError: with what the guest shall see.
            ValueError, OverflowError, struct.error: the arguments make no sense.
        """
        if not self.begun:
            if opcode != Opcode.INIT:
                raise failure(errno.EIO)
            return self._init(request)
        operation = self._operations.get(opcode)
        if operation is None:
            if opcode == Opcode.INIT:
                return self._init(request)
            raise failure(errno.ENOSYS)
        return operation(request)

    def _init(self, request: Request) -> bytes:
        major, minor, readahead, flags = INIT_IN.unpack(request.data, ARGUMENTS)
        if major < MAJOR or (major == MAJOR and minor < OLDEST_MINOR):
            raise failure(errno.EPROTO)
        if major > MAJOR:
            # The client asks again with the version that it is told.
            return INIT_OUT.pack(MAJOR, MINOR, *(0,) * (len(INIT_OUT.fields) - 2))
        offered = flags
        if flags & Feature.INIT_EXT:
            (upper,) = INIT_IN_EXT.unpack(request.data, ARGUMENTS + INIT_IN.size)
            offered |= upper << 32
        wanted = _ALWAYS_WANTED | _WANTED_BY_CACHE[self._share.cache]
        if self._share.cache == "always" and not self._share.read_only:
            wanted |= Feature.WRITEBACK_CACHE
        accepted = wanted & Feature(offered & int(wanted))
        self._share.agree(accepted)
        self.begun = True
        return INIT_OUT.pack(
            MAJOR,
            MINOR,
            min(readahead, _MAX_READAHEAD),
            int(accepted) & 0xFFFF_FFFF,
            _MAX_BACKGROUND,
            _CONGESTED,
            MAX_TRANSFER,
            1,
            MAX_TRANSFER // _PAGE,
            0,
            int(accepted) >> 32,
        )

    def _destroy(self, request: Request) -> bytes:
        self.end()
        return b""

    def end(self) -> None:
        """The session is over; the client begins the next one with INIT."""
        self.begun = False
        self._share.forget()

    def resume(self, features: int) -> None:
        """Go on with a session that began elsewhere; the tables are filled by the caller afterwards."""
        self._share.agree(Feature(features))
        self.begun = True
