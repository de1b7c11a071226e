"""Owner, mode and kind of a file in an extended attribute, where the host's own may not be set.

Container tools that are not root keep in ``user.containers.override_stat`` what a file is to a container (containers'
storage library, fuse-overlayfs): ``uid:gid:mode``, the mode in octal, and the kind of a special file, which is a
regular one on the host, as in ``0:0:644``, ``0:0:666:char-1-3`` or ``0:0:644:pipe``. Linux keeps ``user`` attributes
for regular files and directories only, so a symbolic link has none.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Final, NamedTuple

OVERRIDE: Final = b"user.containers.override_stat"
"""The attribute's name. Guests neither see it nor set it by that name."""

_FORM: Final = re.compile(
    rb"(?P<uid>\d{1,10}):(?P<gid>\d{1,10}):(?P<mode>[0-7]{1,6})"
    rb"(?::(?P<kind>file|dir|symlink|pipe|fifo|socket|char|block)(?:-(?P<major>\d{1,10})-(?P<minor>\d{1,10}))?)?"
)
_KINDS: Final = {
    b"file": stat.S_IFREG,
    b"dir": stat.S_IFREG,
    b"symlink": stat.S_IFREG,
    b"pipe": stat.S_IFIFO,
    b"fifo": stat.S_IFIFO,
    b"socket": stat.S_IFSOCK,
    b"char": stat.S_IFCHR,
    b"block": stat.S_IFBLK,
}
_NAMES: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


class Told(NamedTuple):
    """What the attribute tells.

    Attributes:
        mode: kind and permissions, as in ``st_mode``.
        uid: the owner.
        gid: the group.
        device: of a device node, as in ``st_rdev``; else 0.
    """

    mode: int
    uid: int
    gid: int
    device: int = 0

    @property
    def text(self) -> bytes:
        """As the attribute has it."""
        kind = stat.S_IFMT(self.mode)
        suffix = _NAMES[kind]
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            suffix += f"-{os.major(self.device)}-{os.minor(self.device)}"
        return f"{self.uid}:{self.gid}:{stat.S_IMODE(self.mode):04o}:{suffix}".encode()

    def without_set_id(self) -> Told:
        """After a write or a change of the owner: see :func:`killed_bits`."""
        return self._replace(mode=self.mode & ~killed_bits(self.mode))


def can_tell(mode: int) -> bool:
    """Whether a file of that kind on the host can have the attribute."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def told_by(text: bytes, mode: int) -> Told | None:
    """What an attribute's ``text`` tells of a file with ``mode`` on the host; None if it is nonsense."""
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    kind, device = stat.S_IFMT(mode), 0
    if found["kind"] is not None and stat.S_ISREG(mode):
        kind = _KINDS[found["kind"]]
        if found["major"] is not None:
            device = os.makedev(int(found["major"]) & 0xFFF, int(found["minor"]) & 0xFFFFF)
    uid, gid = int(found["uid"]) & 0xFFFF_FFFF, int(found["gid"]) & 0xFFFF_FFFF
    return Told(kind | int(found["mode"], 8) & 0o7777, uid, gid, device)


def killed_bits(mode: int) -> int:
    """What Linux clears when a file is written to: set-user-id, and set-group-id where the group may execute."""
    if stat.S_ISDIR(mode):
        return 0
    killed = mode & stat.S_ISUID
    if mode & stat.S_ISGID and mode & stat.S_IXGRP:
        killed |= stat.S_ISGID
    return killed
