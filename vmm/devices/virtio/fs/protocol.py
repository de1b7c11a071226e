"""The FUSE protocol as Linux 6.12 speaks it over virtio-fs (``include/uapi/linux/fuse.h``, protocol 7.31 to 7.39).

A request is a header and arguments; a reply is a header and results. All words are little-endian, and structures are
padded to eight bytes::

    request   u32 len │ u32 opcode │ u64 unique │ u64 nodeid │ u32 uid │ u32 gid │ u32 pid │ u16 extlen │ arguments …
    reply     u32 len │ i32 error  │ u64 unique │ results …          error is 0 or a negated errno

Every structure is declared below as a :class:`Layout`, field by field. Left out: DAX mappings, ioctl, poll,
notifications from the server, security contexts, and what FUSE has for other systems than Linux.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum, IntFlag
from typing import Any, Final

MAJOR: Final = 7
MINOR: Final = 39  #: the newest that this server knows: STATX
OLDEST_MINOR: Final = 31  #: Linux 5.4, where virtio-fs begins
ROOT: Final = 1  #: the node id of the share's root
NAME_MAX: Final = 255
PATH_MAX: Final = 4096
XATTR_MAX: Final = 65536

_CODES: Final = {"u16": "H", "u32": "I", "u64": "Q", "i32": "i", "i64": "q"}
_FIELD: Final = re.compile(r"(u16|u32|u64|i32|i64) (\w+)|pad (\d+)")


class Layout:
    """A structure of the protocol: its name in Linux's header, and its fields in order.

    Args:
        name: ``fuse_read_in``, say.
        fields: text such as ``"u64 fh, u32 size, pad 4"``.

    Raises:
        ValueError: a field that is none of u16, u32, u64, i32, i64, pad.
    """

    __slots__ = ("_struct", "fields", "name", "pack", "size", "unpack")

    def __init__(self, name: str, fields: str) -> None:
        codes, names = [], []
        for field in fields.split(", "):
            match = _FIELD.fullmatch(field)
            if match is None:
                raise ValueError(f"field {field!r} of {name} must look like 'u64 size' or 'pad 4'")
            kind, called, padding = match.groups()
            codes.append(f"{padding}x" if padding else _CODES[kind])
            if called:
                names.append(called)
        self.name = name
        self.fields: tuple[str, ...] = tuple(names)
        self._struct = struct.Struct("<" + "".join(codes))
        self.size = self._struct.size
        #: The fields as bytes, in order; ``struct.error`` for a value that does not fit.
        self.pack = self._struct.pack
        #: The fields at an offset of a buffer, in order; ``struct.error`` if the buffer is too short.
        self.unpack = self._struct.unpack_from

    def decode(self, data: bytes | memoryview, offset: int = 0) -> dict[str, Any]:
        """The fields by name, for whoever wants to look."""
        return dict(zip(self.fields, self.unpack(data, offset), strict=True))


class Opcode(IntEnum):
    """What a request asks for (``enum fuse_opcode``)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


#: Requests that are never answered.
UNANSWERED: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class Feature(IntFlag):
    """What client and server agree on in INIT; bits from 32 on travel in ``flags2``."""

    ASYNC_READ = 1 << 0  #: several reads of a file at once
    POSIX_LOCKS = 1 << 1  #: fcntl's locks come to the server
    ATOMIC_O_TRUNC = 1 << 3  #: OPEN truncates
    BIG_WRITES = 1 << 5  #: more than a page in a WRITE
    FLOCK_LOCKS = 1 << 10  #: flock's locks come to the server
    AUTO_INVAL_DATA = 1 << 12  #: pages are dropped when size or mtime changed
    DO_READDIRPLUS = 1 << 13  #: READDIRPLUS is known
    READDIRPLUS_AUTO = 1 << 14  #: and used where it pays
    ASYNC_DIO = 1 << 15  #: direct I/O in several requests at once
    WRITEBACK_CACHE = 1 << 16  #: writes may stay in the client
    PARALLEL_DIROPS = 1 << 18  #: lookups and listings of a directory at once
    MAX_PAGES = 1 << 22  #: max_pages is given
    CACHE_SYMLINKS = 1 << 23  #: the client keeps what READLINK said
    HANDLE_KILLPRIV_V2 = 1 << 28  #: the server clears set-user-id bits when it is asked to
    SETXATTR_EXT = 1 << 29  #: the longer fuse_setxattr_in
    INIT_EXT = 1 << 30  #: flags2 is there
    DIRECT_IO_ALLOW_MMAP = 1 << 36  #: files without page cache may be mapped shared


class SetAttr(IntFlag):
    """Which fields of fuse_setattr_in count (FATTR_*)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


# fuse_open_out.open_flags
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6

OPEN_KILL_SUIDGID: Final = 1 << 0  # fuse_open_in.open_flags
GETATTR_FH: Final = 1 << 0  # fuse_getattr_in.getattr_flags
WRITE_CACHE: Final = 1 << 0  # fuse_write_in.write_flags: from the page cache, the file handle is guessed
WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0  # fuse_fsync_in.fsync_flags
LK_FLOCK: Final = 1 << 0  # fuse_lk_in.lk_flags

IN_HEADER: Final = Layout(
    "fuse_in_header", "u32 len, u32 opcode, u64 unique, u64 nodeid, u32 uid, u32 gid, u32 pid, u16 total_extlen, pad 2"
)
OUT_HEADER: Final = Layout("fuse_out_header", "u32 len, i32 error, u64 unique")
ARGUMENTS: Final = IN_HEADER.size  #: where a request's arguments begin
RESULTS: Final = OUT_HEADER.size  #: where a reply's results begin

_ATTR: Final = (
    "u64 ino, u64 size, u64 blocks, i64 atime, i64 mtime, i64 ctime, u32 atimensec, u32 mtimensec, u32 ctimensec,"
    " u32 mode, u32 nlink, u32 uid, u32 gid, u32 rdev, u32 blksize, u32 flags"
)
ENTRY_OUT: Final = Layout(
    "fuse_entry_out",
    "u64 nodeid, u64 generation, u64 entry_valid, u64 attr_valid, u32 entry_valid_nsec, u32 attr_valid_nsec, " + _ATTR,
)
ATTR_OUT: Final = Layout("fuse_attr_out", "u64 attr_valid, u32 attr_valid_nsec, pad 4, " + _ATTR)

INIT_IN: Final = Layout("fuse_init_in", "u32 major, u32 minor, u32 max_readahead, u32 flags")
INIT_IN_EXT: Final = Layout("fuse_init_in", "u32 flags2")  #: behind INIT_IN where INIT_EXT is set
INIT_OUT: Final = Layout(
    "fuse_init_out",
    "u32 major, u32 minor, u32 max_readahead, u32 flags, u16 max_background, u16 congestion_threshold, u32 max_write,"
    " u32 time_gran, u16 max_pages, u16 map_alignment, u32 flags2, pad 28",
)
FORGET_IN: Final = Layout("fuse_forget_in", "u64 nlookup")
BATCH_FORGET_IN: Final = Layout("fuse_batch_forget_in", "u32 count, pad 4")
FORGET_ONE: Final = Layout("fuse_forget_one", "u64 nodeid, u64 nlookup")
GETATTR_IN: Final = Layout("fuse_getattr_in", "u32 getattr_flags, pad 4, u64 fh")
SETATTR_IN: Final = Layout(
    "fuse_setattr_in",
    "u32 valid, pad 4, u64 fh, u64 size, u64 lock_owner, i64 atime, i64 mtime, i64 ctime, u32 atimensec,"
    " u32 mtimensec, u32 ctimensec, u32 mode, pad 4, u32 uid, u32 gid, pad 4",
)
MKNOD_IN: Final = Layout("fuse_mknod_in", "u32 mode, u32 rdev, u32 umask, pad 4")
MKDIR_IN: Final = Layout("fuse_mkdir_in", "u32 mode, u32 umask")
RENAME_IN: Final = Layout("fuse_rename_in", "u64 newdir")
RENAME2_IN: Final = Layout("fuse_rename2_in", "u64 newdir, u32 flags, pad 4")
LINK_IN: Final = Layout("fuse_link_in", "u64 oldnodeid")
OPEN_IN: Final = Layout("fuse_open_in", "u32 flags, u32 open_flags")
OPEN_OUT: Final = Layout("fuse_open_out", "u64 fh, u32 open_flags, pad 4")
CREATE_IN: Final = Layout("fuse_create_in", "u32 flags, u32 mode, u32 umask, u32 open_flags")
READ_IN: Final = Layout(
    "fuse_read_in", "u64 fh, u64 offset, u32 size, u32 read_flags, u64 lock_owner, u32 flags, pad 4"
)
WRITE_IN: Final = Layout(
    "fuse_write_in", "u64 fh, u64 offset, u32 size, u32 write_flags, u64 lock_owner, u32 flags, pad 4"
)
WRITE_OUT: Final = Layout("fuse_write_out", "u32 size, pad 4")
RELEASE_IN: Final = Layout("fuse_release_in", "u64 fh, u32 flags, u32 release_flags, u64 lock_owner")
FLUSH_IN: Final = Layout("fuse_flush_in", "u64 fh, pad 8, u64 lock_owner")
FSYNC_IN: Final = Layout("fuse_fsync_in", "u64 fh, u32 fsync_flags, pad 4")
STATFS_OUT: Final = Layout(
    "fuse_statfs_out",
    "u64 blocks, u64 bfree, u64 bavail, u64 files, u64 ffree, u32 bsize, u32 namelen, u32 frsize, pad 28",
)
SETXATTR_IN: Final = Layout("fuse_setxattr_in", "u32 size, u32 flags")
SETXATTR_IN_EXT: Final = Layout("fuse_setxattr_in", "u32 size, u32 flags, u32 setxattr_flags, pad 4")
GETXATTR_IN: Final = Layout("fuse_getxattr_in", "u32 size, pad 4")
GETXATTR_OUT: Final = Layout("fuse_getxattr_out", "u32 size, pad 4")
LK_IN: Final = Layout("fuse_lk_in", "u64 fh, u64 owner, u64 start, u64 end, u32 type, u32 pid, u32 lk_flags, pad 4")
LK_OUT: Final = Layout("fuse_lk_out", "u64 start, u64 end, u32 type, u32 pid")
ACCESS_IN: Final = Layout("fuse_access_in", "u32 mask, pad 4")
INTERRUPT_IN: Final = Layout("fuse_interrupt_in", "u64 unique")
FALLOCATE_IN: Final = Layout("fuse_fallocate_in", "u64 fh, u64 offset, u64 length, u32 mode, pad 4")
LSEEK_IN: Final = Layout("fuse_lseek_in", "u64 fh, u64 offset, u32 whence, pad 4")
LSEEK_OUT: Final = Layout("fuse_lseek_out", "u64 offset")
COPY_FILE_RANGE_IN: Final = Layout(
    "fuse_copy_file_range_in",
    "u64 fh_in, u64 off_in, u64 nodeid_out, u64 fh_out, u64 off_out, u64 len, u64 flags",
)
STATX_IN: Final = Layout("fuse_statx_in", "u32 getattr_flags, pad 4, u64 fh, u32 sx_flags, u32 sx_mask")
STATX_OUT: Final = Layout("fuse_statx_out", "u64 attr_valid, u32 attr_valid_nsec, u32 flags, pad 16")
DIRENT: Final = Layout("fuse_dirent", "u64 ino, u64 off, u32 namelen, u32 type")
