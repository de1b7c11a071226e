"""What the guest has open: files and directories by file handle, and locks.

A file handle is a number that is never used twice, for a node and a descriptor that was opened for reading or writing.
Only regular files and directories are ever opened: what opening a FIFO or a device does on the host is not the guest's
to decide.

Locks are the host's, so that guest and host processes, and several guests, see each other's. A lock of ``flock``
belongs to the file handle. A lock of ``fcntl`` belongs to an owner, the guest's table of a process's files; the host's
open file description locks (F_OFD_SETLK) stand for them, one descriptor for each owner and file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from vmm.devices.virtio.fs import host
from vmm.devices.virtio.fs.inodes import Export, Inode, Inodes, failure

_FLOCK: Final = struct.Struct("=hh4xqqi4x")  # struct flock: type, whence, start, length, pid
_OFFSET_MAX: Final = (1 << 63) - 1
_OPEN_KEPT: Final = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
_FLOCK_OPERATIONS: Final = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}


class File:
    """An open regular file.

    Attributes:
        inode: which file.
        descriptor: the host's, which nothing but reads, writes and the like uses.
        flags: the guest's flags for open.
    """

    __slots__ = ("descriptor", "flags", "inode")

    def __init__(self, inode: Inode, descriptor: int, flags: int) -> None:
        self.inode = inode
        self.descriptor = descriptor
        self.flags = flags


class Directory:
    """An open directory.

    Attributes:
        inode: which directory.
        descriptor: the host's.
        place: the cookie of the entry that comes next.
    """

    __slots__ = ("_waiting", "descriptor", "inode", "place")

    def __init__(self, inode: Inode, descriptor: int) -> None:
        self.inode = inode
        self.descriptor = descriptor
        self.place = 0
        self._waiting: deque[host.DirectoryEntry] = deque()

    def seek(self, cookie: int) -> None:
        """Go on behind the entry that came with ``cookie``, 0 for the beginning."""
        if cookie != self.place or not cookie:
            self._waiting.clear()
            os.lseek(self.descriptor, cookie, os.SEEK_SET)
            self.place = cookie

    def peek(self, reader: host.DirectoryReader) -> host.DirectoryEntry | None:
        """The next entry, which stays the next until :meth:`take`; None at the end."""
        if not self._waiting:
            self._waiting.extend(reader.read(self.descriptor))
        return self._waiting[0] if self._waiting else None

    def take(self) -> None:
        """The entry that :meth:`peek` showed was given to the guest."""
        self.place = self._waiting.popleft().cookie


class TopDirectory(Directory):
    """The top directory of a share that has nothing but exports, as it was when its listing began."""

    def __init__(self, inode: Inode, descriptor: int, listing: Callable[[], list[host.DirectoryEntry]]) -> None:
        super().__init__(inode, descriptor)
        self._listing = listing
        self._entries = listing()

    def seek(self, cookie: int) -> None:
        if not cookie:
            self._entries = self._listing()
        self.place = cookie

    def peek(self, reader: host.DirectoryReader) -> host.DirectoryEntry | None:
        return self._entries[self.place] if 0 <= self.place < len(self._entries) else None

    def take(self) -> None:
        self.place += 1


class Opened:
    """The table of file handles.

    Args:
        inodes: the nodes, whose descriptors make room where there are too many.
        limit: how many files and directories the guest may have open.
    """

    def __init__(self, inodes: Inodes, limit: int) -> None:
        self._inodes = inodes
        self._limit = limit
        self._handles: dict[int, File | Directory] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._handles)

    def file(self, handle: int) -> File:
        """The open file of that number; EBADF if it is none."""
        found = self._handles.get(handle)
        if not isinstance(found, File):
            raise failure(errno.EBADF)
        return found

    def directory(self, handle: int) -> Directory:
        """The open directory of that number; EBADF if it is none."""
        found = self._handles.get(handle)
        if not isinstance(found, Directory):
            raise failure(errno.EBADF)
        return found

    def open(self, inode: Inode, flags: int, writeback: bool) -> int:
        """Open a regular file on the host with what counts of the guest's flags; returns its descriptor.

        Raises:
            OSError: ENFILE, too many; ENXIO, ELOOP, EISDIR, no regular file; and what the host says.
        """
        self.check_room()
        if inode.kind != 0o100000:
            raise failure({0o040000: errno.EISDIR, 0o120000: errno.ELOOP}.get(inode.kind, errno.ENXIO))
        path = host.proc_path(self._inodes.descriptor(inode))
        kept = (flags & _OPEN_KEPT) | os.O_CLOEXEC | os.O_NOCTTY
        if writeback and flags & os.O_ACCMODE == os.O_WRONLY:
            # The guest fills pages that it writes to in part.
            try:
                return self._inodes.open(path, kept & ~os.O_ACCMODE | os.O_RDWR)
            except PermissionError:
                pass
        return self._inodes.open(path, kept)

    def check_room(self) -> None:
        """Raise ENFILE where the guest has too much open."""
        if len(self._handles) >= self._limit:
            raise failure(errno.ENFILE)

    def add_file(self, inode: Inode, descriptor: int, flags: int) -> int:
        """The handle for an open file; the descriptor is the table's from now on."""
        return self._add(File(inode, descriptor, flags))

    def add_directory(self, inode: Inode) -> int:
        """Open a directory for listing; returns its handle."""
        self.check_room()
        if inode.kind != 0o040000:
            raise failure(errno.ENOTDIR)
        path = host.proc_path(self._inodes.descriptor(inode))
        descriptor = self._inodes.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._inodes.virtual and inode is self._inodes.root:
            return self._add(TopDirectory(inode, descriptor, self._inodes.top_entries))
        return self._add(Directory(inode, descriptor))

    def _add(self, opened: File | Directory) -> int:
        handle = self._next
        self._next += 1
        self._handles[handle] = opened
        opened.inode.uses += 1
        return handle

    def release(self, opened: File | Directory, handle: int) -> None:
        """Close a file or directory."""
        del self._handles[handle]
        opened.inode.uses -= 1
        os.close(opened.descriptor)

    def clear(self, export: Export | None = None) -> None:
        """Close everything, or what is open of one export."""
        for handle, opened in list(self._handles.items()):
            if export is None or opened.inode.export is export:
                self.release(opened, handle)

    def save(self) -> list[dict[str, Any]]:
        """Everything that is open, as plain data."""
        return [
            {
                "handle": handle,
                "node": opened.inode.node,
                "flags": opened.flags if isinstance(opened, File) else None,
                "place": opened.place if isinstance(opened, Directory) else 0,
            }
            for handle, opened in self._handles.items()
        ]

    def restore(self, saved: list[dict[str, Any]], writeback: bool) -> None:
        """Open again what :meth:`save` saw. What cannot be opened any more is EBADF to the guest."""
        self.clear()
        for each in saved:
            self._next = max(self._next, each["handle"] + 1)
            try:
                inode = self._inodes.get(each["node"])
                if each["flags"] is None:
                    handle = self.add_directory(inode)
                    self.directory(handle).seek(each["place"])
                else:
                    flags = each["flags"] & ~os.O_TRUNC
                    handle = self.add_file(inode, self.open(inode, flags, writeback), flags)
            except OSError:
                continue
            self._handles[each["handle"]] = self._handles.pop(handle)


class Locks:
    """The guest's ``fcntl`` locks.

    Args:
        inodes: the nodes, whose descriptors make room where there are too many.
        limit: how many owners of locks there may be.
    """

    def __init__(self, inodes: Inodes, limit: int) -> None:
        self._inodes = inodes
        self._limit = limit
        self._owners: dict[tuple[Inode, int], int] = {}  # inode and owner → descriptor

    def __len__(self) -> int:
        return len(self._owners)

    def _descriptor(self, file: File, owner: int) -> int:
        descriptor = self._owners.get((file.inode, owner))
        if descriptor is None:
            if len(self._owners) >= self._limit:
                raise failure(errno.ENOLCK)
            path = host.proc_path(file.descriptor)
            as_opened = file.flags & os.O_ACCMODE
            try:
                # For locks of both kinds. What is read-only is not opened for writing, which the host would notice.
                wanted = as_opened if file.inode.export.read_only else os.O_RDWR
                descriptor = self._inodes.open(path, wanted | os.O_CLOEXEC)
            except OSError:
                descriptor = self._inodes.open(path, as_opened | os.O_CLOEXEC)
            self._owners[file.inode, owner] = descriptor
            file.inode.uses += 1
        return descriptor

    @staticmethod
    def _flock(start: int, end: int, kind: int) -> bytes:
        if not start <= end <= _OFFSET_MAX or kind not in _FLOCK_OPERATIONS:
            raise failure(errno.EINVAL)
        length = 0 if end == _OFFSET_MAX else end - start + 1
        return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)

    def test(self, file: File, owner: int, start: int, end: int, kind: int) -> tuple[int, int, int]:
        """What stands in the way of a lock: start, end and kind, F_UNLCK if nothing does."""
        wanted = self._flock(start, end, kind)
        known = (file.inode, owner) in self._owners
        answer = fcntl.fcntl(self._descriptor(file, owner), fcntl.F_OFD_GETLK, wanted)
        if not known:
            self._drop((file.inode, owner))
        found, _, begin, length, _ = _FLOCK.unpack(answer)
        return begin, begin + length - 1 if length else _OFFSET_MAX, found

    def set(self, file: File, owner: int, start: int, end: int, kind: int) -> bool:
        """Set or drop a lock; False if another one stands in the way."""
        wanted = self._flock(start, end, kind)
        if kind == fcntl.F_UNLCK and (file.inode, owner) not in self._owners:
            return True
        try:
            fcntl.fcntl(self._descriptor(file, owner), fcntl.F_OFD_SETLK, wanted)
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def set_whole(file: File, kind: int) -> bool:
        """``flock`` on a file handle; False if another one stands in the way."""
        operation = _FLOCK_OPERATIONS.get(kind)
        if operation is None:
            raise failure(errno.EINVAL)
        try:
            fcntl.flock(file.descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def drop(self, inode: Inode, owner: int) -> None:
        """The owner closed the file: its locks go (POSIX)."""
        if (inode, owner) in self._owners:
            self._drop((inode, owner))

    def _drop(self, key: tuple[Inode, int]) -> None:
        os.close(self._owners.pop(key))
        key[0].uses -= 1

    def forget(self, inode: Inode) -> None:
        """The guest forgot a file: so are its locks."""
        for key in [key for key in self._owners if key[0] is inode]:
            self._drop(key)

    def clear(self, export: Export | None = None) -> None:
        """Drop all locks, or those of one export."""
        for key in list(self._owners):
            if export is None or key[0].export is export:
                self._drop(key)
