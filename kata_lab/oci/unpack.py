"""A layer's tar archive unpacked into a directory, in the form that the guest's overlayfs takes for a lower layer.

Follows the OCI image specification 1.1, layer.md, with pax headers of POSIX.1-2001 and GNU tar's long names and sparse
files. The archive is not trusted: nothing is written but into the one new directory, and no link is ever followed,
since a member's parent must be a directory that this archive made there. A member is refused whose name is absolute,
has ``..`` in it or is longer than Linux takes, that would pass through a link, or is a hard link to what the layer has
not; and the archive, when it has more members or bytes than its limits say.

Whiteouts. A layer that removes ``x`` has an empty file ``.wh.x``; one that replaces a directory has ``.wh..wh..opq`` in
it. Both concern lower layers only, wherever in the archive they stand. overlayfs knows them as

========================================  ======================================================================
a character device 0:0                    since the beginning, made without root since Linux 5.8 of the host
``user.overlay.opaque`` is ``y``          with the mount option ``userxattr``, since 5.11 of the guest; the other
                                          spelling, ``trusted.overlay.opaque``, only root of the host can write
``user.overlay.whiteout`` on an empty     the same whiteout where the host makes no device 0:0; the directory's
regular file                              ``user.overlay.opaque`` is then ``x``; since 6.8 of the guest
========================================  ======================================================================

so that layers have one form whoever unpacks them, and are always mounted with ``userxattr`` (Debian's guest kernel is
6.12). A whiteout is only made where the lower layers show something, for overlayfs would list another one as a file. An
image's own attributes of these names are left out.

Directories that only occur as part of a longer name get owner and mode from the lower layers, for otherwise the upper
layer's would be seen; where the lower ones have none, they are root's, 0755. Kept: owner, permissions with set-user-ID,
times of change, ``user.*`` and ``security.capability`` (the latter as root only). Left out: other attributes, access
control lists, and aufs's own files (``.wh..wh.*``).
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from kata_lab.oci.attributes import (
    OPAQUE,
    OVERLAY_PREFIX,
    OVERRIDE,
    WHITEOUT,
    Attributes,
    set_xattr,
    write_attributes,
)
from kata_lab.oci.blobs import BoundedTarInfo
from kata_lab.oci.descriptor import OciError
from kata_lab.oci.layered import LayeredTree
from kata_lab.oci.shape import UINT32

OVERLAY_OPTIONS: Final = ("userxattr",)
"""With which the guest must mount an overlay of such layers."""

WHITEOUT_PREFIX: Final = ".wh."
OPAQUE_MARK: Final = ".wh..wh..opq"

_AUFS_PREFIX = ".wh..wh."
_XATTR_PREFIX = "SCHILY.xattr."
_CHUNK = 1 << 20
_HEADER_BYTES = 4 << 20
_LATEST_TIME = 1 << 34
_OUR_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class Limits:
    """How much one layer may be.

    Args:
        members: files, directories and links.
        size: bytes of the unpacked archive, and of all its files (a sparse file counts with its holes).
        path: bytes of a path.
        name: bytes of one name in it.
        depth: names in a path.
    """

    members: int = 1_000_000
    size: int = 16 << 30
    path: int = 4095
    name: int = 255
    depth: int = 200


DEFAULT_LIMITS: Final = Limits()


class LayerWriter:
    """Unpacks one layer into a directory that does not exist yet.

    Args:
        directory: what becomes the layer's root.
        lower: the layers beneath.
        mapped: keep owners as :mod:`kata_lab.oci.attributes` says, for who is not root.
        limits: how much the layer may be.
        origin: what to call the layer in messages.
    """

    def __init__(
        self,
        directory: Path,
        lower: LayeredTree,
        mapped: bool,
        limits: Limits = DEFAULT_LIMITS,
        origin: str = "the layer",
    ) -> None:
        self._directory = directory
        self._lower = lower
        self._mapped = mapped
        self._limits = limits
        self._origin = origin
        self._kinds: dict[str, int] = {}
        self._directories: dict[str, Attributes] = {}
        self._whiteouts: set[str] = set()
        self._opaque: set[str] = set()
        self._size = 0

    def unpack(self, archive: BinaryIO) -> None:
        """Take in a plain tar archive, wholly read at the end.

        Raises:
            OciError: as the module says.
            OSError: the disk is full, or the like.
        """
        self._directory.mkdir()
        self._kinds[""] = stat.S_IFDIR
        self._directories[""] = self._inherited("")
        reader = _Counted(archive, self._limits.size + (self._limits.members << 12), self._origin)
        try:
            with tarfile.open(fileobj=reader, mode="r|", tarinfo=BoundedTarInfo, bufsize=_CHUNK) as members:
                for info in _members(members, reader):
                    if len(self._kinds) + len(self._whiteouts) > self._limits.members:
                        raise OciError(f"{self._origin} has more than {self._limits.members} members")
                    self._take(members, info)
            reader.budget = None
            while reader.read(_CHUNK):
                pass
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise OciError(f"{self._origin} is no tar archive that can be read ({error})") from error
        self._finish()

    def _take(self, archive: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        path = self._checked(info.name)
        parent, _, name = path.rpartition("/")
        if name.startswith(_AUFS_PREFIX) and name != OPAQUE_MARK:
            return
        with self._writing(info.name):
            if name == OPAQUE_MARK:
                self._opaque.add(parent)
            elif name.startswith(WHITEOUT_PREFIX):
                hidden = name.removeprefix(WHITEOUT_PREFIX)
                if hidden in ("", ".", ".."):
                    raise self._refused(info.name, "it must hide a file, and names none")
                self._whiteouts.add(f"{parent}/{hidden}".lstrip("/"))
            else:
                self._need_directory(parent)
                self._write(archive, info, path)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """What the system does not let be written is the layer's fault, unless the system is out of something."""
        try:
            yield
        except OSError as error:
            if error.errno in _OUR_FAULT:
                raise
            raise self._refused(name, f"it cannot be written ({error.strerror})") from error

    def _checked(self, name: str) -> str:
        """A member's path: relative, in its shortest form; empty for the root."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/"):
            raise self._refused(name, "it must have a relative name")
        if ".." in parts:
            raise self._refused(name, "it must not lead out of the layer with '..'")
        if "\0" in name:
            raise self._refused(name, "it must not have a NUL byte in its name")
        path = "/".join(parts)
        if len(os.fsencode(path)) > self._limits.path or any(
            len(os.fsencode(each)) > self._limits.name for each in parts
        ):
            raise self._refused(
                name, f"its path must have at most {self._limits.path} bytes, and {self._limits.name} in each name"
            )
        if len(parts) > self._limits.depth:
            raise self._refused(name, f"its path must have at most {self._limits.depth} names")
        return path

    def _refused(self, name: str, why: str) -> OciError:
        short = name if len(name) <= 200 else f"{name[:200]}…"
        return OciError(f"{self._origin} is refused for its member {short!r}: {why}")

    def _need_directory(self, path: str) -> None:
        """Make a directory, and those above it, unless this archive did."""
        kind = self._kinds.get(path)
        if kind == stat.S_IFDIR:
            return
        if kind is not None:
            raise self._refused(path, "other members lie beneath it, so it must be a directory")
        self._need_directory(path.rpartition("/")[0])
        (self._directory / path).mkdir()
        self._kinds[path] = stat.S_IFDIR
        self._directories[path] = self._inherited(path)

    def _inherited(self, path: str) -> Attributes:
        found = self._lower.attributes(path)
        if found is None or not stat.S_ISDIR(found.mode):
            return Attributes(stat.S_IFDIR | 0o755)
        return found

    def _write(self, archive: tarfile.TarFile, info: tarfile.TarInfo, path: str) -> None:
        place = self._directory / path
        attributes = self._attributes(info)
        kind = stat.S_IFMT(attributes.mode)
        if kind == stat.S_IFDIR:
            if self._kinds.get(path) != stat.S_IFDIR:
                self._remove(path)
                place.mkdir()
                self._kinds[path] = kind
            self._directories[path] = attributes
            return
        if path == "":
            raise self._refused(info.name, "the root must be a directory")
        if info.islnk():
            target = self._checked(info.linkname)
            if target == path:
                return
            if self._kinds.get(target, stat.S_IFDIR) == stat.S_IFDIR:
                raise self._refused(info.name, f"it is a hard link to {info.linkname!r}, which the layer does not have")
            self._remove(path)
            os.link(self._directory / target, place, follow_symlinks=False)
            self._kinds[path] = self._kinds[target]
            return
        self._remove(path)
        if kind == stat.S_IFLNK:
            if not info.linkname or "\0" in info.linkname or len(os.fsencode(info.linkname)) > self._limits.path:
                raise self._refused(
                    info.name, f"it is a link that must have a target of 1 to {self._limits.path} bytes"
                )
            place.symlink_to(info.linkname)
        elif kind == stat.S_IFREG:
            self._copy(archive, info, place)
        elif self._mapped:
            place.touch(exist_ok=False)
        else:
            os.mknod(place, kind | 0o600, attributes.device)
        self._kinds[path] = kind
        write_attributes(place, attributes, self._mapped)

    def _attributes(self, info: tarfile.TarInfo) -> Attributes:
        kind, device = _kind(info), 0
        if kind == 0:
            raise self._refused(info.name, f"its type {info.type!r} is unknown")
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            if not (0 <= info.devmajor < 1 << 12 and 0 <= info.devminor < 1 << 20):
                raise self._refused(info.name, f"Linux has no device {info.devmajor}:{info.devminor}")
            device = os.makedev(info.devmajor, info.devminor)
            if kind == stat.S_IFCHR and device == 0:
                raise self._refused(info.name, "a device 0:0 is a whiteout of overlayfs, a layer names them .wh.…")
        for what, number in (("owner", info.uid), ("group", info.gid)):
            if not 0 <= number < UINT32:
                raise self._refused(info.name, f"its {what} is {number}, it must be from 0 to {UINT32 - 1}")
        xattrs = {}
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            for key, value in info.pax_headers.items():
                name = key.removeprefix(_XATTR_PREFIX)
                if name != key and _is_kept(name):
                    xattrs[name] = value.encode("utf-8", "surrogateescape")
        seconds = min(max(float(info.mtime), 0.0), float(_LATEST_TIME))
        return Attributes(kind | info.mode & 0o7777, info.uid, info.gid, device, xattrs, int(seconds * 1_000_000_000))

    def _copy(self, archive: tarfile.TarFile, info: tarfile.TarInfo, place: Path) -> None:
        self._size += info.size
        if info.size < 0 or self._size > self._limits.size:
            raise OciError(f"the files of {self._origin} have more than {self._limits.size} bytes")
        source = archive.extractfile(info)
        left = info.size
        with place.open("xb") as file:
            while left and source is not None and (chunk := source.read(min(left, _CHUNK))):
                left -= len(chunk)
                if chunk.count(0) == len(chunk):
                    file.seek(len(chunk), io.SEEK_CUR)  # leaves a hole
                else:
                    file.write(chunk)
            file.truncate(info.size)
        if left:
            raise self._refused(info.name, "the archive ends within it")

    def _remove(self, path: str) -> None:
        """Make room for a member that comes again."""
        kind = self._kinds.pop(path, None)
        if kind == stat.S_IFDIR:
            shutil.rmtree(self._directory / path)
            self._directories.pop(path)
            for known in [each for each in self._kinds if each.startswith(f"{path}/")]:
                del self._kinds[known]
                self._directories.pop(known, None)
            self._opaque = {each for each in self._opaque if each != path and not each.startswith(f"{path}/")}
            self._whiteouts = {each for each in self._whiteouts if not each.startswith(f"{path}/")}
        elif kind is not None:
            (self._directory / path).unlink()

    def _finish(self) -> None:
        """Whiteouts, and then the directories' own attributes, the deepest first."""
        extended = False
        self._opaque = {path for path in self._opaque if not self._is_gone(path)}
        for path in self._opaque:
            with self._writing(path):
                self._need_directory(path)
        for path in sorted(self._whiteouts):
            parent = path.rpartition("/")[0]
            if self._kinds.get(path) == stat.S_IFDIR:
                self._opaque.add(path)
            elif path not in self._kinds and not self._is_gone(parent) and self._is_seen(path):
                with self._writing(path):
                    self._need_directory(parent)
                    extended |= self._hide(path)
        if extended and "" not in self._opaque:
            set_xattr(self._directory, OPAQUE, b"x")
        for path in self._opaque:
            set_xattr(self._directory / path, OPAQUE, b"y")
        for path in sorted(self._directories, reverse=True):
            write_attributes(self._directory / path, self._directories[path], self._mapped)

    def _is_gone(self, path: str) -> bool:
        """Whether nothing is left of what lower layers have at a path: a whiteout or another file is in its place."""
        return any(
            self._kinds[each] != stat.S_IFDIR if each in self._kinds else each in self._whiteouts
            for each in _and_above(path)
        )

    def _is_seen(self, path: str) -> bool:
        """Whether lower layers show a file there; a whiteout of nothing would be seen in the directory's list."""
        return not any(each in self._opaque for each in _and_above(path)) and self._lower.find(path) is not None

    def _hide(self, path: str) -> bool:
        """Make a whiteout; true when it needed an attribute."""
        place = self._directory / path
        try:
            os.mknod(place, stat.S_IFCHR, 0)
        except PermissionError:
            place.touch(exist_ok=False)
            set_xattr(place, WHITEOUT, b"y")
            set_xattr(place.parent, OPAQUE, b"x")
            return True
        return False


def _and_above(path: str) -> Iterator[str]:
    """The root, and all on the way to a path, the path itself at last."""
    parts = path.split("/") if path else []
    return ("/".join(parts[:count]) for count in range(len(parts) + 1))


def _is_kept(name: str) -> bool:
    """Whether an attribute of the archive comes into the layer."""
    if name == OVERRIDE or name.startswith(OVERLAY_PREFIX) or "\0" in name or len(name) > 255:
        return False
    return name.startswith("user.") or name == "security.capability"


def _kind(info: tarfile.TarInfo) -> int:
    """The type of a member, as in ``st_mode``; a hard link's is a regular file's, 0 is unknown."""
    if info.isreg() or info.islnk():
        return stat.S_IFREG
    if info.isdir():
        return stat.S_IFDIR
    if info.issym():
        return stat.S_IFLNK
    if info.ischr():
        return stat.S_IFCHR
    if info.isblk():
        return stat.S_IFBLK
    return stat.S_IFIFO if info.isfifo() else 0


def _members(archive: tarfile.TarFile, reader: _Counted) -> Iterator[tarfile.TarInfo]:
    """The members one by one; while a header is read, no more is taken in than headers have."""
    while True:
        reader.budget = _HEADER_BYTES
        info = archive.next()
        if info is None:
            return
        reader.budget = None
        yield info
        vars(archive)["members"].clear()  # what was seen is not kept


class _Counted(io.RawIOBase):
    """Passes on an archive, and ends it when it is longer than it may be."""

    def __init__(self, source: BinaryIO, most: int, origin: str) -> None:
        self._source = source
        self._left = most
        self._origin = origin
        self.budget: int | None = None

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise OciError(f"{self._origin} unpacks to more bytes than it may")
        if self.budget is not None:
            self.budget -= len(data)
            if self.budget < 0:
                raise OciError(f"{self._origin} has a header of more than {_HEADER_BYTES} bytes")
        return data
