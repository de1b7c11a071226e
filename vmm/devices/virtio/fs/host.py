"""What the file server asks of the host's kernel that Python's ``os`` does not offer, and in whose name it does so.

Linux's manual pages, section 2, are the reference: name_to_handle_at, open_by_handle_at, renameat2, statx, fallocate,
getdents64, utimensat, syncfs, setfsuid, capset. All are reached through glibc (2.30 or newer) and raise ``OSError``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_INT, _UINT, _LONG, _TEXT, _MEMORY = ctypes.c_int, ctypes.c_uint, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
STATX_SIZE: Final = 256

_HANDLE_MAX: Final = 128  # MAX_HANDLE_SZ
_HANDLE_HEADER: Final = struct.Struct("=Ii")  # bytes, type
_DIRENT: Final = struct.Struct("=QqHB")  # inode, cookie of the next entry, bytes of this one, type
_TIMES: Final = struct.Struct("=qqqq")


def _function(name: str, *arguments: Any, result: Any = _INT) -> Any:
    found = getattr(_LIBC, name)
    found.argtypes, found.restype = arguments, result
    return found


_name_to_handle_at = _function("name_to_handle_at", _INT, _TEXT, _MEMORY, _MEMORY, _INT)
_open_by_handle_at = _function("open_by_handle_at", _INT, _TEXT, _INT)
_renameat2 = _function("renameat2", _INT, _TEXT, _INT, _TEXT, _UINT)
_statx = _function("statx", _INT, _TEXT, _INT, _UINT, _MEMORY)
_fallocate = _function("fallocate", _INT, _INT, _LONG, _LONG)
_getdents64 = _function("getdents64", _INT, _MEMORY, ctypes.c_size_t, result=ctypes.c_ssize_t)
_utimensat = _function("utimensat", _INT, _TEXT, _TEXT, _INT)
_syncfs = _function("syncfs", _INT)
_setfsuid = _function("setfsuid", _UINT)
_setfsgid = _function("setfsgid", _UINT)
_capget = _function("capget", _MEMORY, _MEMORY)
_capset = _function("capset", _MEMORY, _MEMORY)


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def proc_path(descriptor: int) -> bytes:
    """The path that leads to what an open descriptor stands for, whatever its name is by now."""
    return b"/proc/self/fd/%d" % descriptor


class FileHandle(NamedTuple):
    """What the host's file system calls a file for as long as it exists, independent of names.

    Attributes:
        mount: number of the mount that it was seen through.
        handle: ``struct file_handle`` as the kernel filled it.
    """

    mount: int
    handle: bytes


def file_handle(descriptor: int) -> FileHandle | None:
    """The handle of an open (O_PATH) file; None where the file system has none."""
    buffer = ctypes.create_string_buffer(_HANDLE_HEADER.size + _HANDLE_MAX)
    _HANDLE_HEADER.pack_into(buffer, 0, _HANDLE_MAX, 0)
    mount = ctypes.c_int()
    if _name_to_handle_at(descriptor, b"", buffer, ctypes.byref(mount), AT_EMPTY_PATH) < 0:
        return None
    length, _ = _HANDLE_HEADER.unpack_from(buffer)
    return FileHandle(mount.value, buffer.raw[: _HANDLE_HEADER.size + length])


def open_by_handle(mount_descriptor: int, handle: bytes, flags: int) -> int:
    """Open what :func:`file_handle` named; ESTALE if it is gone, EPERM without CAP_DAC_READ_SEARCH."""
    return _check(_open_by_handle_at(mount_descriptor, handle, flags))


def rename(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    if flags:
        _check(_renameat2(old_directory, old, new_directory, new, flags))
    else:
        os.rename(old, new, src_dir_fd=old_directory, dst_dir_fd=new_directory)


def statx(descriptor: int, flags: int, mask: int) -> bytearray:
    """``struct statx`` of an open file, 256 bytes."""
    buffer = bytearray(STATX_SIZE)
    target = (ctypes.c_char * STATX_SIZE).from_buffer(buffer)
    _check(_statx(descriptor, b"", flags | AT_EMPTY_PATH, mask, ctypes.byref(target)))
    del target
    return buffer


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _check(_fallocate(descriptor, mode, offset, length))


def set_times(descriptor: int, access: tuple[int, int], modification: tuple[int, int]) -> None:
    """Set the times of what a descriptor stands for: seconds and nanoseconds, or UTIME_NOW or UTIME_OMIT instead."""
    _check(_utimensat(AT_FDCWD, proc_path(descriptor), _TIMES.pack(*access, *modification), 0))


def syncfs(descriptor: int) -> None:
    """Write back everything of the file system that ``descriptor`` is on."""
    _check(_syncfs(descriptor))


class DirectoryEntry(NamedTuple):
    """An entry as getdents64 gives it; ``cookie`` is the place behind it."""

    number: int
    cookie: int
    kind: int
    name: bytes


class DirectoryReader:
    """Reads entries through one buffer. Not for two threads at once."""

    _BYTES = 32768

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(self._BYTES)
        self._view = memoryview(self._buffer).cast("B")

    def read(self, descriptor: int) -> list[DirectoryEntry]:
        """The next entries of an open directory; none at its end."""
        length = _check(_getdents64(descriptor, self._buffer, self._BYTES))
        data = bytes(self._view[:length])
        entries, at = [], 0
        while at < length:
            number, cookie, size, kind = _DIRENT.unpack_from(data, at)
            start = at + _DIRENT.size
            entries.append(DirectoryEntry(number, cookie, kind, data[start : data.index(0, start)]))
            at += size
        return entries


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as the host allows it; returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return 1 << 20 if hard == resource.RLIM_INFINITY else hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return soft
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard


_CAPABILITIES: Final = struct.Struct("=6I")  # two words each of effective, permitted, inheritable, interleaved
_CAPABILITY_HEADER: Final = struct.pack("=Ii", 0x2008_0522, 0)  # version 3, this thread
_CAP_FSETID: Final = 1 << 4


class _Acting(AbstractContextManager[None]):
    """The calling thread's file operations are another user's; see :class:`Identity`."""

    __slots__ = ("_capabilities", "_gid", "_uid")

    def __init__(self, uid: int, gid: int, capabilities: bytes) -> None:
        self._uid, self._gid, self._capabilities = uid, gid, capabilities

    def __enter__(self) -> None:
        _setfsgid(self._gid)
        _setfsuid(self._uid)
        # Neither call tells of a failure, for which the number that is no user asks.
        if _setfsuid(0xFFFF_FFFF) != self._uid or _setfsgid(0xFFFF_FFFF) != self._gid:
            self.__exit__()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        _capset(_CAPABILITY_HEADER, self._capabilities)

    def __exit__(self, *_: object) -> None:
        _setfsuid(0)
        _setfsgid(0)


_AS_OURSELVES: Final[AbstractContextManager[None]] = nullcontext()


class Identity:
    """To whom files belong that a guest makes.

    A VMM that is root makes them the caller's: the serving thread, for one system call, has the guest user's ids
    (setfsuid, setfsgid), so that no file exists for a moment with another owner. It keeps the right to pass any
    directory: the guest's kernel has checked permissions already, with the caller's supplementary groups, which the
    host does not know. A share that such a VMM may write belongs into a directory that only root can enter, since the
    guest can put set-user-id programs and device nodes there.

    Any other VMM makes them its own. To the guest its own user and group are 0, and 0 is they, so that the guest's
    root owns what it makes; giving a file to somebody else is EPERM. Other owners are shown as they are.
    """

    def __init__(self) -> None:
        self._uid, self._gid = os.geteuid(), os.getegid()
        self.switches = self._uid == 0 and self._can_switch()
        self._capabilities = b""
        if self.switches:
            self._capabilities = self._without_fsetid()
            self._uid = self._gid = 0

    @staticmethod
    def _can_switch() -> bool:
        before = _setfsuid(1)
        switched: bool = _setfsuid(before) == 1
        return switched

    @staticmethod
    def _without_fsetid() -> bytes:
        # Without CAP_FSETID the kernel clears set-group-id where it would for the caller itself.
        buffer = ctypes.create_string_buffer(_CAPABILITIES.size)
        _check(_capget(_CAPABILITY_HEADER, buffer))
        words = list(_CAPABILITIES.unpack(buffer.raw))
        words[0] &= ~_CAP_FSETID
        return _CAPABILITIES.pack(*words)

    def acting(self, uid: int, gid: int) -> AbstractContextManager[None]:
        """What is made within belongs to the guest's ``uid`` and ``gid``, where this VMM can do so."""
        if not self.switches or not (uid or gid):
            return _AS_OURSELVES
        return _Acting(uid, gid, self._capabilities)

    def guest_uid(self, uid: int) -> int:
        """What the guest calls a host user."""
        return 0 if uid == self._uid else uid

    def guest_gid(self, gid: int) -> int:
        """What the guest calls a host group."""
        return 0 if gid == self._gid else gid

    def host_uid(self, uid: int) -> int:
        """The host's user that the guest means."""
        return uid or self._uid

    def host_gid(self, gid: int) -> int:
        """The host's group that the guest means."""
        return gid or self._gid
