"""Operations on open files: opening, bytes, space, and locks.

Bytes go straight between the host's file and guest memory. What waits for a disk (fsync, and reserving or copying much)
is done by another thread on a duplicate of the descriptor, so that the guest may close the file meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from vmm.devices.virtio.fs import host
from vmm.devices.virtio.fs.inodes import Inode, failure
from vmm.devices.virtio.fs.opened import File
from vmm.devices.virtio.fs.protocol import (
    ARGUMENTS,
    COPY_FILE_RANGE_IN,
    FALLOCATE_IN,
    FLUSH_IN,
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FSYNC_FDATASYNC,
    FSYNC_IN,
    LK_FLOCK,
    LK_IN,
    LK_OUT,
    LSEEK_IN,
    LSEEK_OUT,
    OPEN_IN,
    OPEN_KILL_SUIDGID,
    OPEN_OUT,
    READ_IN,
    RELEASE_IN,
    WRITE_CACHE,
    WRITE_IN,
    WRITE_KILL_SUIDGID,
    WRITE_OUT,
    Opcode,
)
from vmm.devices.virtio.fs.share import Answer, Filled, Operation, Request, Share, Slow, Waiting

MAX_TRANSFER: Final = 1 << 20  #: bytes of one READ or WRITE
_INLINE_COPY: Final = 4 << 20
_MAX_COPY: Final = 1 << 30
_INLINE_ALLOCATION: Final = 64 << 20
_MODIFYING: Final = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_DATA: Final = ARGUMENTS + WRITE_IN.size


class Files:
    """The operations, on one share."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._opened = share.opened
        self._locks = share.locks
        self.operations: dict[int, Operation] = {
            Opcode.OPEN: self.open,
            Opcode.READ: self.read,
            Opcode.WRITE: self.write,
            Opcode.FLUSH: self.flush,
            Opcode.RELEASE: self.release,
            Opcode.FSYNC: self.fsync,
            Opcode.FALLOCATE: self.fallocate,
            Opcode.LSEEK: self.lseek,
            Opcode.COPY_FILE_RANGE: self.copy_file_range,
            Opcode.GETLK: self.getlk,
            Opcode.SETLK: self.setlk,
            Opcode.SETLKW: self.setlkw,
            Opcode.SYNCFS: self.syncfs,
        }

    def open(self, request: Request) -> bytes:
        flags, how = OPEN_IN.unpack(request.data, ARGUMENTS)
        share = self._share
        inode = share.inodes.get(request.node)
        if flags & _MODIFYING:
            share.require_writable(inode)
        descriptor = self._opened.open(inode, flags, share.writeback)
        if flags & os.O_TRUNC and how & OPEN_KILL_SUIDGID:
            share.kill_set_id(inode, descriptor)
        handle = self._opened.add_file(inode, descriptor, flags)
        return OPEN_OUT.pack(handle, self._caching(inode, descriptor))

    def _caching(self, inode: Inode, descriptor: int) -> int:
        if self._share.cache == "none":
            return FOPEN_DIRECT_IO
        if self._share.cache == "always":
            return FOPEN_KEEP_CACHE
        # Pages from the last time are still right if the file has not changed since.
        status = os.fstat(descriptor)
        before, inode.seen = inode.seen, (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return FOPEN_KEEP_CACHE if before == inode.seen else 0

    def read(self, request: Request) -> Answer:
        handle, offset, size, _, _, _ = READ_IN.unpack(request.data, ARGUMENTS)
        file = self._opened.file(handle)
        size = min(size, request.capacity, MAX_TRANSFER)
        if not size:
            return b""
        return Filled(os.preadv(file.descriptor, request.space(size), offset))

    def write(self, request: Request) -> bytes:
        handle, offset, size, how, _, flags = WRITE_IN.unpack(request.data, ARGUMENTS)
        file = self._opened.file(handle)
        self._share.require_writable(file.inode)
        if size > MAX_TRANSFER:
            raise failure(errno.EINVAL)
        data = request.payload(_DATA, size)
        # The host's descriptor never appends by itself: a page from the cache comes by any handle and has its place.
        appends = os.RWF_APPEND if flags & os.O_APPEND and not how & WRITE_CACHE and not self._share.writeback else 0
        written = os.pwritev(file.descriptor, data, offset, appends) if size else 0
        if how & WRITE_KILL_SUIDGID:
            self._share.kill_set_id(file.inode, file.descriptor)
        return WRITE_OUT.pack(written)

    def flush(self, request: Request) -> bytes:
        handle, owner = FLUSH_IN.unpack(request.data, ARGUMENTS)
        file = self._opened.file(handle)
        self._locks.drop(file.inode, owner)
        # Closing a descriptor tells of errors that a network file system kept to itself.
        os.close(os.dup(file.descriptor))
        return b""

    def release(self, request: Request) -> bytes:
        handle = RELEASE_IN.unpack(request.data, ARGUMENTS)[0]
        self._opened.release(self._opened.file(handle), handle)
        return b""

    @staticmethod
    def _slowly(file: File, work: Callable[[int], bytes]) -> Slow:
        descriptor = os.dup(file.descriptor)
        return Slow(lambda: work(descriptor), lambda: os.close(descriptor))

    def fsync(self, request: Request) -> Slow:
        handle, flags = FSYNC_IN.unpack(request.data, ARGUMENTS)

        def work(descriptor: int) -> bytes:
            (os.fdatasync if flags & FSYNC_FDATASYNC else os.fsync)(descriptor)
            return b""

        return self._slowly(self._opened.file(handle), work)

    def fallocate(self, request: Request) -> Answer:
        handle, offset, length, mode = FALLOCATE_IN.unpack(request.data, ARGUMENTS)
        file = self._opened.file(handle)
        self._share.require_writable(file.inode)
        if offset >= 1 << 63 or length >= 1 << 63:
            raise failure(errno.EFBIG)

        def work(descriptor: int) -> bytes:
            host.fallocate(descriptor, mode & 0x7FFF_FFFF, offset, length)
            return b""

        self._modified(request, file)
        if length > _INLINE_ALLOCATION:
            return self._slowly(file, work)
        return work(file.descriptor)

    def _modified(self, request: Request, file: File) -> None:
        """Clear set-id bits for a request that cannot say whether to: only root keeps them (CAP_FSETID)."""
        if request.uid:
            self._share.kill_set_id(file.inode, file.descriptor)

    def lseek(self, request: Request) -> bytes:
        handle, offset, whence = LSEEK_IN.unpack(request.data, ARGUMENTS)
        file = self._opened.file(handle)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            # The guest counts positions by itself; only the host knows holes.
            raise failure(errno.EINVAL)
        return LSEEK_OUT.pack(os.lseek(file.descriptor, offset, whence))

    def copy_file_range(self, request: Request) -> Answer:
        handle, offset, _, to_handle, to_offset, length, flags = COPY_FILE_RANGE_IN.unpack(request.data, ARGUMENTS)
        source, destination = self._opened.file(handle), self._opened.file(to_handle)
        self._share.require_writable(destination.inode)
        if flags:
            raise failure(errno.EINVAL)
        self._modified(request, destination)
        length = min(length, _MAX_COPY)
        if length <= _INLINE_COPY:
            done = os.copy_file_range(source.descriptor, destination.descriptor, length, offset, to_offset)
            return WRITE_OUT.pack(done)
        one, other = os.dup(source.descriptor), os.dup(destination.descriptor)

        def finish() -> None:
            os.close(one)
            os.close(other)

        return Slow(lambda: WRITE_OUT.pack(os.copy_file_range(one, other, length, offset, to_offset)), finish)

    def getlk(self, request: Request) -> bytes:
        handle, owner, start, end, kind, _, flags = LK_IN.unpack(request.data, ARGUMENTS)
        file = self._opened.file(handle)
        if flags & LK_FLOCK:
            raise failure(errno.EINVAL)
        return LK_OUT.pack(*self._locks.test(file, owner, start, end, kind), 0)

    def setlk(self, request: Request) -> bytes:
        if not self._lock(request):
            raise failure(errno.EAGAIN)
        return b""

    def setlkw(self, request: Request) -> Answer:
        if self._lock(request):
            return b""
        return Waiting(lambda: self._lock(request))

    def _lock(self, request: Request) -> bool:
        handle, owner, start, end, kind, _, flags = LK_IN.unpack(request.data, ARGUMENTS)
        file = self._opened.file(handle)
        if flags & LK_FLOCK:
            return self._locks.set_whole(file, kind)
        return self._locks.set(file, owner, start, end, kind)

    def syncfs(self, request: Request) -> Answer:
        inodes = self._share.inodes
        inode = inodes.get(request.node)
        places = [inode]
        if inode is inodes.root and inodes.virtual:
            # One on each file system of the host that the guest can write to.
            tops = [each.inode for each in inodes.exports.values() if each.inode is not None]
            places = list({each.identification[0]: each for each in tops if not each.export.read_only}.values())
        elif inode.kind != stat.S_IFDIR:
            raise failure(errno.EINVAL)
        elif inode.export.read_only:
            return b""
        descriptors: list[int] = []

        def finish() -> None:
            for descriptor in descriptors:
                os.close(descriptor)

        def work() -> bytes:
            for descriptor in descriptors:
                host.syncfs(descriptor)
            return b""

        try:
            for each in places:
                if each.kind in (stat.S_IFDIR, stat.S_IFREG):
                    path = host.proc_path(inodes.descriptor(each))
                    descriptors.append(inodes.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            finish()
            raise
        return Slow(work, finish)
