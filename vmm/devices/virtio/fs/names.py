"""Operations on names: finding, making, linking, renaming, removing, and forgetting.

What is made belongs to the guest's caller (:class:`vmm.devices.virtio.fs.host.Identity`) and has the mode that the
guest asked for. FUSE_DONT_MASK is not agreed on, so the guest's kernel has applied the caller's umask already, and the
umask of the VMM's process is undone. Where an attribute tells owners (:mod:`vmm.devices.virtio.fs.override`), it is the
VMM's own on the host, which may read and write it, and the attribute says whose it is; special files are regular ones
then, and symbolic links, which cannot have the attribute, are made as everywhere.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from vmm.devices.virtio.fs import host
from vmm.devices.virtio.fs.inodes import Inode, failure
from vmm.devices.virtio.fs.override import Told
from vmm.devices.virtio.fs.protocol import (
    ARGUMENTS,
    BATCH_FORGET_IN,
    CREATE_IN,
    ENTRY_OUT,
    FOPEN_DIRECT_IO,
    FORGET_IN,
    FORGET_ONE,
    LINK_IN,
    MKDIR_IN,
    MKNOD_IN,
    OPEN_OUT,
    PATH_MAX,
    RENAME2_IN,
    RENAME_IN,
    Opcode,
)
from vmm.devices.virtio.fs.share import Operation, Request, Share, checked, decode_device

_RENAME_KNOWN: Final = host.RENAME_NOREPLACE | host.RENAME_EXCHANGE | host.RENAME_WHITEOUT
_MODE: Final = 0o7777
_DEVICES: Final = (stat.S_IFCHR, stat.S_IFBLK)


class Names:
    """The operations, on one share."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._inodes = share.inodes
        self.operations: dict[int, Operation] = {
            Opcode.LOOKUP: self.lookup,
            Opcode.FORGET: self.forget,
            Opcode.BATCH_FORGET: self.batch_forget,
            Opcode.READLINK: self.readlink,
            Opcode.SYMLINK: self.symlink,
            Opcode.MKNOD: self.mknod,
            Opcode.MKDIR: self.mkdir,
            Opcode.UNLINK: self.unlink,
            Opcode.RMDIR: self.rmdir,
            Opcode.RENAME: self.rename,
            Opcode.RENAME2: self.rename2,
            Opcode.LINK: self.link,
            Opcode.CREATE: self.create,
            Opcode.TMPFILE: self.tmpfile,
        }

    def lookup(self, request: Request) -> bytes:
        name = request.name(ARGUMENTS)
        share = self._share
        directory = share.directory(request.node)
        try:
            return share.entry_out(*self._inodes.lookup(directory, name))
        except FileNotFoundError:
            if share.cache != "always" or (directory is self._inodes.root and self._inodes.virtual):
                raise
            # Node 0 is a name that is known not to exist, for as long as it is valid.
            return ENTRY_OUT.pack(0, 0, share.validity, *(0,) * (len(ENTRY_OUT.fields) - 3))

    def forget(self, request: Request) -> None:
        (count,) = FORGET_IN.unpack(request.data, ARGUMENTS)
        self._forget(request.node, count)

    def batch_forget(self, request: Request) -> None:
        (count,) = BATCH_FORGET_IN.unpack(request.data, ARGUMENTS)
        start = ARGUMENTS + BATCH_FORGET_IN.size
        count = min(count, (request.length - start) // FORGET_ONE.size, 4096)
        if count > 0:
            data = request.body(start, count * FORGET_ONE.size)
            for offset in range(0, len(data), FORGET_ONE.size):
                self._forget(*FORGET_ONE.unpack(data, offset))

    def _forget(self, node: int, count: int) -> None:
        inode = self._inodes.forget(node, count)
        if inode is not None:
            self._share.locks.forget(inode)

    def readlink(self, request: Request) -> bytes:
        inode = self._inodes.get(request.node)
        if inode.kind != stat.S_IFLNK:
            raise failure(errno.EINVAL)
        return os.readlink(b"", dir_fd=self._inodes.descriptor(inode))

    def symlink(self, request: Request) -> bytes:
        name, target = request.names(ARGUMENTS, 2)
        checked(name)
        if not target:
            raise failure(errno.ENOENT)
        if len(target) >= PATH_MAX:
            raise failure(errno.ENAMETOOLONG)
        directory = self._writable(request.node)
        above = self._inodes.descriptor(directory)
        with self._share.identity.acting(request.uid, request.gid):
            os.symlink(target, name, dir_fd=above)
        return self._share.entry(directory, name)

    def mknod(self, request: Request) -> bytes:
        mode, device, _ = MKNOD_IN.unpack(request.data, ARGUMENTS)
        name = request.name(ARGUMENTS + MKNOD_IN.size)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise failure(errno.EINVAL)
        directory = self._writable(request.node)
        above = self._inodes.descriptor(directory)
        if directory.export.override_stat:
            os.mknod(name, _host_mode(mode), dir_fd=above)
            return self._recorded(
                request, directory, name, (stat.S_IFMT(mode) or stat.S_IFREG) | mode & _MODE, decode_device(device)
            )
        with self._share.identity.acting(request.uid, request.gid):
            os.mknod(name, mode, decode_device(device), dir_fd=above)
        return self._made(directory, name, mode)

    def mkdir(self, request: Request) -> bytes:
        mode, _ = MKDIR_IN.unpack(request.data, ARGUMENTS)
        name = request.name(ARGUMENTS + MKDIR_IN.size)
        directory = self._writable(request.node)
        above = self._inodes.descriptor(directory)
        if directory.export.override_stat:
            os.mkdir(name, _host_mode(mode) | stat.S_IXUSR, dir_fd=above)
            return self._recorded(request, directory, name, stat.S_IFDIR | mode & _MODE)
        with self._share.identity.acting(request.uid, request.gid):
            os.mkdir(name, mode & _MODE, dir_fd=above)
        return self._made(directory, name, mode)

    def _made(self, directory: Inode, name: bytes, mode: int) -> bytes:
        inode, status = self._inodes.lookup(directory, name)
        if inode.kind != stat.S_IFLNK and self._lacks(status, mode):
            path = host.proc_path(self._inodes.descriptor(inode))
            os.chmod(path, stat.S_IMODE(status.st_mode) | mode & 0o777)
            status = self._inodes.status(inode)
        return self._share.entry_out(inode, status)

    def _recorded(self, request: Request, directory: Inode, name: bytes, mode: int, device: int = 0) -> bytes:
        inode, _ = self._inodes.lookup(directory, name)
        self._record(request, directory, inode, name, mode, device)
        return self._share.entry_out(inode, self._inodes.status(inode))

    def _record(
        self, request: Request, directory: Inode, inode: Inode, name: bytes, mode: int, device: int = 0
    ) -> None:
        """Have the attribute of what was just made as ``name`` tell whose it is; without that it is not made."""
        try:
            told = Told(mode, request.uid, request.gid, device if stat.S_IFMT(mode) in _DEVICES else 0)
            above = self._share.told(directory, self._inodes.status(directory))
            self._share.record(inode, _inheriting(told, above))
        except OSError:
            self._forget(inode.node, 1)
            if name:
                remove = os.rmdir if stat.S_ISDIR(mode) else os.unlink
                remove(name, dir_fd=self._inodes.descriptor(directory))
            raise

    @staticmethod
    def _lacks(status: os.stat_result, mode: int) -> int:
        """The permissions that the umask of this process took."""
        return mode & 0o777 & ~status.st_mode

    def unlink(self, request: Request) -> bytes:
        name = request.name(ARGUMENTS)
        os.unlink(name, dir_fd=self._inodes.descriptor(self._writable(request.node)))
        return b""

    def rmdir(self, request: Request) -> bytes:
        name = request.name(ARGUMENTS)
        os.rmdir(name, dir_fd=self._inodes.descriptor(self._writable(request.node)))
        return b""

    def rename(self, request: Request) -> bytes:
        (target,) = RENAME_IN.unpack(request.data, ARGUMENTS)
        return self._rename(request, target, 0, ARGUMENTS + RENAME_IN.size)

    def rename2(self, request: Request) -> bytes:
        target, flags = RENAME2_IN.unpack(request.data, ARGUMENTS)
        if flags & ~_RENAME_KNOWN:
            raise failure(errno.EINVAL)
        return self._rename(request, target, flags, ARGUMENTS + RENAME2_IN.size)

    def _rename(self, request: Request, target: int, flags: int, offset: int) -> bytes:
        old, new = request.names(offset, 2)
        checked(old)
        checked(new)
        source, destination = self._writable(request.node), self._share.directory(target)
        if source.export is not destination.export:
            raise failure(errno.EXDEV)
        with self._inodes.both(source, destination) as (one, other):
            host.rename(one, old, other, new, flags)
        self._inodes.moved(destination, new)
        if flags & host.RENAME_EXCHANGE:
            self._inodes.moved(source, old)
        return b""

    def link(self, request: Request) -> bytes:
        (node,) = LINK_IN.unpack(request.data, ARGUMENTS)
        name = request.name(ARGUMENTS + LINK_IN.size)
        directory, inode = self._writable(request.node), self._inodes.get(node)
        if inode.kind == stat.S_IFDIR:
            raise failure(errno.EPERM)
        if inode.export is not directory.export:
            raise failure(errno.EXDEV)
        with self._inodes.both(directory, inode) as (above, descriptor):
            # The last component is no symbolic link but what leads to the descriptor's own file.
            os.link(host.proc_path(descriptor), name, dst_dir_fd=above, follow_symlinks=True)
        return self._share.entry(directory, name)

    def create(self, request: Request) -> bytes:
        flags, mode, _, _ = CREATE_IN.unpack(request.data, ARGUMENTS)
        name = request.name(ARGUMENTS + CREATE_IN.size)
        share, directory = self._share, self._writable(request.node)
        share.opened.check_room()
        try:
            descriptor = self._create(request, directory, name, flags, os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            inode, status = self._inodes.lookup(directory, name)
            try:
                descriptor = share.opened.open(inode, flags & ~os.O_CREAT, share.writeback)
                status = os.fstat(descriptor)
            except OSError:
                self._forget(inode.node, 1)
                raise
        else:
            inode, status = self._adopted(request, descriptor, directory, name, mode)
        return self._opened(inode, status, descriptor, flags)

    def tmpfile(self, request: Request) -> bytes:
        flags, mode, _, _ = CREATE_IN.unpack(request.data, ARGUMENTS)
        share, directory = self._share, self._writable(request.node)
        share.opened.check_room()
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise failure(errno.EINVAL)
        descriptor = self._create(request, directory, b".", flags, os.O_TMPFILE | flags & os.O_EXCL, mode)
        # It has no name until the guest links it.
        inode, status = self._adopted(request, descriptor, directory, b"", mode)
        return self._opened(inode, status, descriptor, flags)

    def _create(self, request: Request, directory: Inode, name: bytes, flags: int, how: int, mode: int) -> int:
        access = flags & os.O_ACCMODE
        if self._share.writeback and access == os.O_WRONLY:
            access = os.O_RDWR
        kept = flags & (os.O_SYNC | os.O_DSYNC) | access | os.O_NOFOLLOW | os.O_CLOEXEC
        if directory.export.override_stat:
            return self._inodes.open(name, kept | how, _host_mode(mode), directory)
        with self._share.identity.acting(request.uid, request.gid):
            return self._inodes.open(name, kept | how, mode & _MODE, directory)

    def _adopted(
        self, request: Request, descriptor: int, directory: Inode, name: bytes, mode: int
    ) -> tuple[Inode, os.stat_result]:
        try:
            inode, status = self._inodes.adopt(descriptor, directory, name)
            if directory.export.override_stat:
                self._record(request, directory, inode, name, stat.S_IFREG | mode & _MODE)
            elif self._lacks(status, mode):
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode) | mode & 0o777)
            else:
                return inode, status
            status = os.fstat(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return inode, status

    def _opened(self, inode: Inode, status: os.stat_result, descriptor: int, flags: int) -> bytes:
        share = self._share
        handle = share.opened.add_file(inode, descriptor, flags)
        direct = FOPEN_DIRECT_IO if share.cache == "none" else 0
        return share.entry_out(inode, status) + OPEN_OUT.pack(handle, direct)

    def _writable(self, node: int) -> Inode:
        directory = self._share.directory(node)
        self._share.require_writable(directory)
        return directory


def _host_mode(mode: int) -> int:
    """Permissions on the host of what an attribute tells more about: the VMM's own can read and write it."""
    return mode & 0o777 | stat.S_IRUSR | stat.S_IWUSR


def _inheriting(told: Told, above: Told) -> Told:
    """What is made in a directory with set-group-id has its group (inode(7)); a directory hands the bit on."""
    if not above.mode & stat.S_ISGID:
        return told
    mode = told.mode
    if stat.S_ISDIR(mode):
        mode |= stat.S_ISGID
    elif mode & stat.S_IXGRP and told.uid and told.gid != above.gid:
        mode &= ~stat.S_ISGID
    return told._replace(mode=mode, gid=above.gid)
