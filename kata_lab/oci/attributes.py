"""Owner, permissions and type of the files in a layer, kept where the host's user may keep them.

As root a file simply has them. Anybody else can neither give files away nor make devices, so what the guest is to see
is written beside the file, into the extended attribute ``user.containers.override_stat``, as container engines without
root do and as virtio-fs reads it again::

    uid:gid:mode[:type]     0:0:4755     0:0:0755:dir     0:42:0640:file     0:0:0666:char-1-3     0:0:0644:pipe

The mode is octal; a device or a pipe is an empty regular file on the host. The host's own mode lets the owner read (and
enter, and search) and never has set-user-ID bits. Linux keeps no such attribute for a symbolic link: links belong to
root in the guest. Neither does it for a whiteout, which has no owner to speak of.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kata_lab.oci.descriptor import OciError
from kata_lab.paths import HOME_VARIABLE

OVERRIDE: Final = "user.containers.override_stat"
OVERLAY_PREFIX: Final = "user.overlay."
OPAQUE: Final = "user.overlay.opaque"
WHITEOUT: Final = "user.overlay.whiteout"

_OVERRIDE_FORM = re.compile(
    rb"(?P<uid>\d{1,10}):(?P<gid>\d{1,10}):(?P<mode>[0-7]{1,7})"
    rb"(:(?P<type>file|dir|symlink|pipe|socket|(?P<device>char|block)-(?P<major>\d{1,10})-(?P<minor>\d{1,10})))?"
)
_TYPE_NAMES = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
_TOO_LARGE = (errno.ENOSPC, errno.ERANGE, errno.E2BIG)
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Attributes:
    """What the guest is to see of a file.

    Args:
        mode: type and permissions, as in ``st_mode``.
        uid, gid: owner and group.
        device: of a device node, as in ``st_rdev``.
        xattrs: other extended attributes.
        mtime_ns: time of the last change, nanoseconds since 1970; None leaves it as it is.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    device: int = 0
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    mtime_ns: int | None = None

    @property
    def override(self) -> bytes:
        """As the extended attribute says it."""
        kind = stat.S_IFMT(self.mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            name = "char" if kind == stat.S_IFCHR else "block"
            suffix = f"{name}-{os.major(self.device)}-{os.minor(self.device)}"
        else:
            suffix = _TYPE_NAMES[kind]
        return f"{self.uid}:{self.gid}:{stat.S_IMODE(self.mode):04o}:{suffix}".encode()


def can_own(directory: Path) -> bool:
    """Whether this process can give files in `directory` away and make devices there, as root usually can."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory(dir=directory) as place:
        try:
            os.mknod(f"{place}/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            os.chown(f"{place}/null", 1, 1)
        except OSError:
            return False
    return True


def write_attributes(path: Path, attributes: Attributes, mapped: bool) -> None:
    """Give a file that was just made what the guest is to see of it; a symbolic link only if it can have it.

    Raises:
        OciError: the file system keeps no extended attributes.
    """
    kind = stat.S_IFMT(attributes.mode)
    permissions = stat.S_IMODE(attributes.mode)
    if not mapped:
        os.chown(path, attributes.uid, attributes.gid, follow_symlinks=False)
        if kind != stat.S_IFLNK:
            os.chmod(path, permissions)
    elif kind == stat.S_IFDIR:
        os.chmod(path, permissions & 0o777 | 0o700)
    elif kind != stat.S_IFLNK:
        os.chmod(path, permissions & 0o777 | 0o600)
    if mapped and kind != stat.S_IFLNK:
        set_xattr(path, OVERRIDE, attributes.override)
    for name, value in attributes.xattrs.items():
        if name.startswith("user.") or not mapped:
            set_xattr(path, name, value)
    if attributes.mtime_ns is not None:
        os.utime(path, ns=(attributes.mtime_ns, attributes.mtime_ns), follow_symlinks=False)


def read_attributes(path: Path, mapped: bool) -> Attributes:
    """What the guest sees of a file; of a symbolic link in a mapped layer, that it is root's.

    Raises:
        OciError: the file's override attribute is none.
    """
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    xattrs: dict[str, bytes] = {}
    if kind in (stat.S_IFDIR, stat.S_IFREG):
        for name in os.listxattr(path, follow_symlinks=False):
            if not name.startswith(OVERLAY_PREFIX) and name.startswith(("user.", "security.capability")):
                xattrs[name] = os.getxattr(path, name, follow_symlinks=False)
    if not mapped:
        return Attributes(found.st_mode, found.st_uid, found.st_gid, found.st_rdev, xattrs, found.st_mtime_ns)
    override = xattrs.pop(OVERRIDE, None)
    if override is None:
        return Attributes(found.st_mode, 0, 0, found.st_rdev, xattrs, found.st_mtime_ns)
    match = _OVERRIDE_FORM.fullmatch(override)
    if match is None:
        raise OciError(f"{path} has the attribute {OVERRIDE} with {override!r}: it must be uid:gid:mode[:type]")
    device = 0
    if match["device"]:
        kind = stat.S_IFCHR if match["device"] == b"char" else stat.S_IFBLK
        device = os.makedev(int(match["major"]), int(match["minor"]))
    elif match["type"] in (b"pipe", b"socket"):
        kind = stat.S_IFIFO if match["type"] == b"pipe" else stat.S_IFSOCK
    mode = kind | int(match["mode"], 8) & 0o7777
    return Attributes(mode, int(match["uid"]), int(match["gid"]), device, xattrs, found.st_mtime_ns)


def set_xattr(path: Path, name: str, value: bytes) -> None:
    """Set an extended attribute, of a link itself.

    Raises:
        OciError: the file system keeps none.
    """
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_ATTRIBUTES:
            raise OciError(
                f"the file system of {path.parent} keeps no extended attributes {name!r}: set {HOME_VARIABLE} to a "
                "directory on one that does, such as ext4, xfs or btrfs"
            ) from error
        if error.errno in _TOO_LARGE:
            raise OciError(
                f"the attribute {name!r} of {path.name!r} has {len(value)} bytes: it must be so short that the file "
                "system takes it beside the others (ext4 some 4000 bytes in all)"
            ) from error
        raise


def is_whiteout(path: Path, found: os.stat_result) -> bool:
    """Whether a file in a layer says that lower layers' file of that name is gone; `found` is its lstat()."""
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == 0
    return stat.S_ISREG(found.st_mode) and found.st_size == 0 and WHITEOUT in os.listxattr(path, follow_symlinks=False)


def is_opaque(path: Path) -> bool:
    """Whether a directory in a layer says that nothing of the lower layers is in it."""
    try:
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False
