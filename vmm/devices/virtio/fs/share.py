"""What all operations of a share work with: the request, the tables, and how the guest may cache.

An operation is a function of a :class:`Request`. It returns the results as bytes, or :class:`Filled` with the number of
bytes that it put into the guest's buffer itself, or :class:`Slow` or :class:`Waiting` if the answer comes later. It
raises ``OSError`` with what the guest shall see.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmm.devices.virtio.fs import host
from vmm.devices.virtio.fs.inodes import Inode, Inodes, failure
from vmm.devices.virtio.fs.opened import Locks, Opened
from vmm.devices.virtio.fs.override import OVERRIDE, Told, can_tell, killed_bits, told_by
from vmm.devices.virtio.fs.protocol import ATTR_OUT, ENTRY_OUT, NAME_MAX, RESULTS, Feature
from vmm.devices.virtio.queue import Chain

_NANOSECONDS: Final = 1_000_000_000
_DAY: Final = 86_400
_MINIMUM_DESCRIPTORS: Final = 64


class Request:
    """One request of the guest.

    Attributes:
        chain: where it is in guest memory.
        data: its first bytes, copied: the header, the arguments, and what follows as far as ``HEAD``.
        length: how many bytes it has altogether.
        unique: the number by which it is answered.
        node: the node id that it is about.
        uid: the user in the guest who asks.
        gid: and the group.
        capacity: bytes that the results may have.
    """

    HEAD: Final = 4736  #: header, arguments, and a symbolic link's name and target

    __slots__ = ("capacity", "chain", "data", "gid", "length", "node", "uid", "unique")

    def __init__(self, chain: Chain, data: bytes, length: int, unique: int, node: int, uid: int, gid: int) -> None:
        self.chain = chain
        self.data = data
        self.length = length
        self.unique = unique
        self.node = node
        self.uid = uid
        self.gid = gid
        self.capacity = chain.writable_bytes - RESULTS

    def names(self, offset: int, count: int) -> list[bytes]:
        """``count`` texts behind the arguments, which end at ``offset``; EINVAL if one lacks its zero."""
        parts = self.data[offset:].split(b"\0", count)
        if len(parts) <= count:
            # A text longer than what is copied of a request is too long in any case.
            raise failure(errno.EINVAL if len(self.data) < self.HEAD else errno.ENAMETOOLONG)
        return parts[:count]

    def name(self, offset: int) -> bytes:
        """The one name behind the arguments, which is one component of a path."""
        return checked(self.names(offset, 1)[0])

    def body(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` of the request; EINVAL if it is shorter."""
        if offset + length > self.length:
            raise failure(errno.EINVAL)
        return self.chain.read(offset, length)

    def payload(self, offset: int, length: int) -> list[memoryview]:
        """The same bytes where they are in guest memory, which the guest may change any time."""
        if offset + length > self.length:
            raise failure(errno.EINVAL)
        return self.chain.readable_views(offset, length)

    def space(self, length: int) -> list[memoryview]:
        """Where the first ``length`` bytes of the results go."""
        return self.chain.writable_views(RESULTS, length)


def checked(name: bytes) -> bytes:
    """A name that is one component of a path and no way up.

    Raises:
        OSError: EINVAL for an empty one, ``.``, ``..`` and one with a slash; ENAMETOOLONG beyond 255 bytes.
    """
    if not name or name == b"." or name == b".." or b"/" in name:
        raise failure(errno.EINVAL)
    if len(name) > NAME_MAX:
        raise failure(errno.ENAMETOOLONG)
    return name


class Filled(int):
    """So many bytes of results are in the guest's buffer already."""


@dataclass(frozen=True, slots=True)
class Slow:
    """The answer needs the host's disk: ``work`` is called on another thread, then ``finish`` whatever became of it."""

    work: Callable[[], bytes]
    finish: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Waiting:
    """The answer is that ``attempt`` succeeded, which is asked again until it does."""

    attempt: Callable[[], bool]


Answer = bytes | Filled | Slow | Waiting | None
Operation = Callable[[Request], Answer]


class Share:
    """A host directory that is served to one guest.

    Args:
        path: the directory; None for a top directory in which there is only what :meth:`FsDevice.add` puts there.
        read_only: the guest can only read.
        cache: ``"none"``, ``"auto"`` or ``"always"``.
        descriptors: how many of the host's descriptors may be used, 0 for a quarter of what the process may have.

    Raises:
        OSError: the directory cannot be opened.
    """

    def __init__(self, path: os.PathLike[str] | None, read_only: bool, cache: str, descriptors: int = 0) -> None:
        descriptors = max(descriptors or host.raise_descriptor_limit() // 4, _MINIMUM_DESCRIPTORS)
        self.read_only = read_only
        self.cache = cache
        #: What the guest accepted in INIT.
        self.features = Feature(0)
        self.writeback = False
        #: Seconds that the guest may trust names and attributes.
        self.validity = {"none": 0, "auto": 1, "always": _DAY}[cache]
        self.identity = host.Identity()
        self.reader = host.DirectoryReader()
        self.inodes = Inodes(path, read_only, min(descriptors // 2, 1 << 16))
        self.opened = Opened(self.inodes, min(descriptors // 2, 1 << 15))
        self.locks = Locks(self.inodes, min(descriptors // 16, 1 << 10))

    def agree(self, features: Feature) -> None:
        """A session begins: nothing is known and open, and this is what both sides can do."""
        self.forget()
        self.features = features
        self.writeback = bool(features & Feature.WRITEBACK_CACHE)

    def forget(self) -> None:
        """The session is over."""
        self.locks.clear()
        self.opened.clear()
        self.inodes.clear()

    def remove(self, name: bytes) -> None:
        """An export is over: what the guest has open of it is closed, what it knows of it is ESTALE.

        Raises:
            OSError: ENOENT, there is no export of that name.
        """
        export = self.inodes.exports.get(name)
        if export is not None:
            self.locks.clear(export)
            self.opened.clear(export)
        self.inodes.remove(name)

    def close(self) -> None:
        """Close every descriptor."""
        self.forget()
        self.inodes.close()

    def require_writable(self, inode: Inode) -> None:
        """Raise EROFS for what is in a read-only share or export."""
        if inode.export.read_only:
            raise failure(errno.EROFS)

    def directory(self, node: int) -> Inode:
        """The directory of that node id; ESTALE or ENOTDIR."""
        inode = self.inodes.get(node)
        if inode.kind != stat.S_IFDIR:
            raise failure(errno.ENOTDIR)
        return inode

    def attributes(self, inode: Inode, status: os.stat_result) -> tuple[int, ...]:
        """The fields of fuse_attr."""
        mode, uid, gid, device = status.st_mode, status.st_uid, status.st_gid, status.st_rdev
        links = status.st_nlink
        if inode is self.inodes.root and self.inodes.virtual:
            links = 2 + len(self.inodes.exports)  # on the host it has none
        if inode.export.override_stat and (told := self.overridden(inode, status)) is not None:
            mode, uid, gid, device = told
        else:
            uid, gid = self.identity.guest_uid(uid), self.identity.guest_gid(gid)
        access, access_rest = divmod(status.st_atime_ns, _NANOSECONDS)
        modification, modification_rest = divmod(status.st_mtime_ns, _NANOSECONDS)
        change, change_rest = divmod(status.st_ctime_ns, _NANOSECONDS)
        return (
            self.inodes.number(inode, status),
            status.st_size,
            status.st_blocks,
            access,
            modification,
            change,
            access_rest,
            modification_rest,
            change_rest,
            mode,
            links & 0xFFFF_FFFF,
            uid,
            gid,
            encode_device(device) if device else 0,
            status.st_blksize,
            0,
        )

    def overridden(self, inode: Inode, status: os.stat_result) -> Told | None:
        """What the file's attribute tells; None if there is none, or nonsense in it."""
        if not can_tell(status.st_mode):
            return None
        try:
            text = os.getxattr(host.proc_path(self.inodes.descriptor(inode)), OVERRIDE)
        except OSError:
            return None
        return told_by(text, status.st_mode)

    def told(self, inode: Inode, status: os.stat_result) -> Told:
        """What the guest sees of the file, whether an attribute tells it or not."""
        return self.overridden(inode, status) or Told(
            status.st_mode, self.identity.guest_uid(status.st_uid), self.identity.guest_gid(status.st_gid)
        )

    def record(self, inode: Inode, told: Told) -> None:
        """Have the file's attribute tell this; what the host says where the file system has no attributes."""
        os.setxattr(host.proc_path(self.inodes.descriptor(inode)), OVERRIDE, told.text)

    def kill_set_id(self, inode: Inode, descriptor: int) -> None:
        """Clear the set-id bits of a file that was written to, wherever its mode is kept."""
        status = os.fstat(descriptor)
        if inode.export.override_stat and (told := self.overridden(inode, status)) is not None:
            if killed_bits(told.mode):
                self.record(inode, told.without_set_id())
        elif killed := killed_bits(status.st_mode):
            os.chmod(host.proc_path(descriptor), stat.S_IMODE(status.st_mode & ~killed))

    def permissions(self, inode: Inode, status: os.stat_result) -> tuple[int, int, int]:
        """Mode, owner and group as the guest sees them."""
        if inode.export.override_stat and (told := self.overridden(inode, status)) is not None:
            return told[:3]
        return status.st_mode, self.identity.guest_uid(status.st_uid), self.identity.guest_gid(status.st_gid)

    def attr_out(self, inode: Inode, status: os.stat_result) -> bytes:
        """The reply of GETATTR and SETATTR."""
        return ATTR_OUT.pack(self.validity, 0, *self.attributes(inode, status))

    def entry_out(self, inode: Inode, status: os.stat_result) -> bytes:
        """The reply of LOOKUP and of everything that makes a name."""
        # An export leaves, and another one may come by its name, any time.
        named = 0 if inode is inode.export.inode else self.validity
        return ENTRY_OUT.pack(inode.node, 0, named, self.validity, 0, 0, *self.attributes(inode, status))

    def entry(self, directory: Inode, name: bytes) -> bytes:
        """Look ``name`` up, count it, and say what it is."""
        return self.entry_out(*self.inodes.lookup(directory, name))


def encode_device(device: int) -> int:
    """A device number as FUSE carries it: 12 bits of major, 20 of minor (``new_encode_dev``)."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


def decode_device(device: int) -> int:
    """The host's number of a device as FUSE carries it."""
    return os.makedev((device & 0xFFF00) >> 8, (device & 0xFF) | (device >> 12 & 0xFFF00))
