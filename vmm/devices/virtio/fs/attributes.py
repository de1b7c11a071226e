"""Operations on what a file is besides its bytes: attributes, extended attributes, access, and the file system's size.

Extended attributes are those of the host, names and all, in the namespaces ``user``, ``trusted`` and ``security``;
``system``, that is POSIX ACLs, is EOPNOTSUPP and not listed, since the guest's kernel would not obey them. A VMM that
is not root may not set more than ``user`` ones on the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from typing import Final

from vmm.devices.virtio.fs import host
from vmm.devices.virtio.fs.inodes import Inode, failure
from vmm.devices.virtio.fs.override import OVERRIDE, can_tell
from vmm.devices.virtio.fs.protocol import (
    ACCESS_IN,
    ARGUMENTS,
    GETATTR_FH,
    GETATTR_IN,
    GETXATTR_IN,
    GETXATTR_OUT,
    NAME_MAX,
    SETATTR_IN,
    SETXATTR_IN,
    SETXATTR_IN_EXT,
    STATFS_OUT,
    STATX_IN,
    STATX_OUT,
    XATTR_MAX,
    Feature,
    Opcode,
    SetAttr,
)
from vmm.devices.virtio.fs.share import Operation, Request, Share, decode_device

_XATTR_NAMESPACES: Final = (b"user.", b"trusted.", b"security.")
_XATTR_FLAGS: Final = os.XATTR_CREATE | os.XATTR_REPLACE
_UNCHANGED: Final = -1
_OWNERS_OF_STATX: Final = struct.Struct("<2I")  # struct statx, at 20: uid, gid
_LINKS_OF_STATX: Final = struct.Struct("<I")  # struct statx, at 16
_MODE_OF_STATX: Final = struct.Struct("<H")  # struct statx, at 28
_NUMBER_OF_STATX: Final = struct.Struct("<Q")  # struct statx, at 32: ino
_DEVICE_OF_STATX: Final = struct.Struct("<2I")  # struct statx, at 128: major and minor of a device
_STATX_FLAGS: Final = 0x6000  # AT_STATX_FORCE_SYNC, AT_STATX_DONT_SYNC
_WORD: Final = 0xFFFF_FFFF


class Attributes:
    """The operations, on one share."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._inodes = share.inodes
        self.operations: dict[int, Operation] = {
            Opcode.GETATTR: self.getattr,
            Opcode.SETATTR: self.setattr,
            Opcode.STATX: self.statx,
            Opcode.SETXATTR: self.setxattr,
            Opcode.GETXATTR: self.getxattr,
            Opcode.LISTXATTR: self.listxattr,
            Opcode.REMOVEXATTR: self.removexattr,
            Opcode.STATFS: self.statfs,
            Opcode.ACCESS: self.access,
        }

    def _descriptor(self, node: int, handle: int | None) -> int:
        """The open file's descriptor where the guest named one, else the node's."""
        if handle is not None:
            return self._share.opened.file(handle).descriptor
        return self._inodes.descriptor(self._inodes.get(node))

    def getattr(self, request: Request) -> bytes:
        flags, handle = GETATTR_IN.unpack(request.data, ARGUMENTS)
        inode = self._inodes.get(request.node)
        descriptor = self._descriptor(request.node, handle if flags & GETATTR_FH else None)
        return self._share.attr_out(inode, os.fstat(descriptor))

    def statx(self, request: Request) -> bytes:
        flags, handle, how, mask = STATX_IN.unpack(request.data, ARGUMENTS)
        inode = self._inodes.get(request.node)
        descriptor = self._descriptor(request.node, handle if flags & GETATTR_FH else None)
        found = host.statx(descriptor, how & _STATX_FLAGS, mask & ~(1 << 31))
        number, *_, mode, links, uid, gid, device, _, _ = self._share.attributes(inode, os.fstat(descriptor))
        _LINKS_OF_STATX.pack_into(found, 16, links)
        _OWNERS_OF_STATX.pack_into(found, 20, uid, gid)
        _MODE_OF_STATX.pack_into(found, 28, mode)
        _NUMBER_OF_STATX.pack_into(found, 32, number)
        device = decode_device(device)
        _DEVICE_OF_STATX.pack_into(found, 128, os.major(device), os.minor(device))
        return STATX_OUT.pack(self._share.validity, 0, 0) + bytes(found)

    def setattr(self, request: Request) -> bytes:
        (
            valid,
            handle,
            size,
            _,
            *times,
            mode,
            uid,
            gid,
        ) = SETATTR_IN.unpack(request.data, ARGUMENTS)
        valid = SetAttr(valid & 0xFFF)
        inode = self._inodes.get(request.node)
        descriptor = self._descriptor(request.node, handle if valid & SetAttr.FH else None)
        if valid & SetAttr.FH:
            # The guest may name a handle of another file.
            inode = self._share.opened.file(handle).inode
        self._share.require_writable(inode)
        path = host.proc_path(descriptor)
        if inode.export.override_stat and can_tell(inode.kind):
            self._record(inode, descriptor, valid, mode, uid, gid)
        else:
            self._change(inode, path, valid, mode, uid, gid)
        if valid & SetAttr.SIZE:
            self._truncate(inode, descriptor, bool(valid & SetAttr.FH), size)
            if valid & SetAttr.KILL_SUIDGID:
                self._share.kill_set_id(inode, descriptor)
        if valid & (SetAttr.ATIME | SetAttr.MTIME):
            access = self._time(valid, SetAttr.ATIME, SetAttr.ATIME_NOW, times[0], times[3])
            modification = self._time(valid, SetAttr.MTIME, SetAttr.MTIME_NOW, times[1], times[4])
            host.set_times(descriptor, access, modification)
        return self._share.attr_out(inode, os.fstat(descriptor))

    def _change(self, inode: Inode, path: bytes, valid: SetAttr, mode: int, uid: int, gid: int) -> None:
        """Change owner and mode on the host."""
        if valid & (SetAttr.UID | SetAttr.GID):
            identity = self._share.identity
            owner = identity.host_uid(uid) if valid & SetAttr.UID else _UNCHANGED
            group = identity.host_gid(gid) if valid & SetAttr.GID else _UNCHANGED
            os.chown(path, owner, group)
        if valid & SetAttr.MODE:
            if inode.kind == stat.S_IFLNK:
                raise failure(errno.EOPNOTSUPP)
            os.chmod(path, stat.S_IMODE(mode))

    def _record(self, inode: Inode, descriptor: int, valid: SetAttr, mode: int, uid: int, gid: int) -> None:
        """Change owner and mode where the file's attribute tells them."""
        if not valid & (SetAttr.UID | SetAttr.GID | SetAttr.MODE):
            return
        told = self._share.told(inode, os.fstat(descriptor))
        if valid & (SetAttr.UID | SetAttr.GID):
            told = told.without_set_id()._replace(
                uid=uid if valid & SetAttr.UID else told.uid, gid=gid if valid & SetAttr.GID else told.gid
            )
            with contextlib.suppress(OSError):
                os.removexattr(host.proc_path(descriptor), "security.capability")
        if valid & SetAttr.MODE:
            told = told._replace(mode=stat.S_IFMT(told.mode) | stat.S_IMODE(mode))
        self._share.record(inode, told)

    @staticmethod
    def _time(valid: SetAttr, given: SetAttr, now: SetAttr, seconds: int, rest: int) -> tuple[int, int]:
        if not valid & given:
            return 0, host.UTIME_OMIT
        if valid & now:
            return 0, host.UTIME_NOW
        if rest >= 1_000_000_000:
            raise failure(errno.EINVAL)
        return seconds, rest

    def _truncate(self, inode: Inode, descriptor: int, is_open: bool, size: int) -> None:
        if inode.kind != stat.S_IFREG:
            raise failure(errno.EISDIR if inode.kind == stat.S_IFDIR else errno.EINVAL)
        if is_open:
            os.ftruncate(descriptor, size)
        else:
            os.truncate(host.proc_path(descriptor), size)

    def _xattr_path(self, node: int, name: bytes) -> bytes:
        if len(name) > NAME_MAX:
            raise failure(errno.ERANGE)
        if name == OVERRIDE or not name.startswith(_XATTR_NAMESPACES):
            raise failure(errno.EOPNOTSUPP)
        return host.proc_path(self._inodes.descriptor(self._inodes.get(node)))

    def setxattr(self, request: Request) -> bytes:
        layout = SETXATTR_IN_EXT if self._share.features & Feature.SETXATTR_EXT else SETXATTR_IN
        size, flags = layout.unpack(request.data, ARGUMENTS)[:2]
        offset = ARGUMENTS + layout.size
        (name,) = request.names(offset, 1)
        if size > XATTR_MAX:
            raise failure(errno.E2BIG)
        if flags & ~_XATTR_FLAGS:
            raise failure(errno.EINVAL)
        value = request.body(offset + len(name) + 1, size)
        self._share.require_writable(self._inodes.get(request.node))
        os.setxattr(self._xattr_path(request.node, name), name, value, flags)
        return b""

    def getxattr(self, request: Request) -> bytes:
        (size,) = GETXATTR_IN.unpack(request.data, ARGUMENTS)
        (name,) = request.names(ARGUMENTS + GETXATTR_IN.size, 1)
        return self._sized(os.getxattr(self._xattr_path(request.node, name), name), size)

    def listxattr(self, request: Request) -> bytes:
        (size,) = GETXATTR_IN.unpack(request.data, ARGUMENTS)
        path = host.proc_path(self._inodes.descriptor(self._inodes.get(request.node)))
        names = [os.fsencode(name) for name in os.listxattr(path)]
        shown = b"".join(name + b"\0" for name in names if name.startswith(_XATTR_NAMESPACES) and name != OVERRIDE)
        return self._sized(shown, size)

    @staticmethod
    def _sized(value: bytes, size: int) -> bytes:
        if not size:
            return GETXATTR_OUT.pack(len(value))
        if len(value) > size:
            raise failure(errno.ERANGE)
        return value

    def removexattr(self, request: Request) -> bytes:
        (name,) = request.names(ARGUMENTS, 1)
        self._share.require_writable(self._inodes.get(request.node))
        os.removexattr(self._xattr_path(request.node, name), name)
        return b""

    def statfs(self, request: Request) -> bytes:
        inode = self._inodes.get(request.node)
        # statvfs of an O_PATH descriptor needs the way over its path.
        found = os.statvfs(host.proc_path(self._inodes.descriptor(inode)))
        return STATFS_OUT.pack(
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            found.f_bsize & _WORD,
            found.f_namemax,
            found.f_frsize & _WORD,
        )

    def access(self, request: Request) -> bytes:
        (mask,) = ACCESS_IN.unpack(request.data, ARGUMENTS)
        if mask & ~(os.R_OK | os.W_OK | os.X_OK):
            raise failure(errno.EINVAL)
        inode = self._inodes.get(request.node)
        status = self._inodes.status(inode)
        if mask & os.W_OK:
            self._share.require_writable(inode)
        mode, uid, gid = self._share.permissions(inode, status)
        if request.uid == uid:
            allowed = mode >> 6
        elif request.gid == gid:
            allowed = mode >> 3
        else:
            allowed = mode
        if request.uid == 0:
            allowed = 7 if stat.S_ISDIR(mode) or mode & 0o111 else 6
        if mask & ~allowed:
            raise failure(errno.EACCES)
        return b""
