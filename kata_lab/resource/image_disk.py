"""A disk with the files of an OCI image, made once and kept in the cache: a read-only ext4 for ``rootfs="block"``.

mke2fs(8) fills it from a directory (``-d``), which needs no mount and no root. Where the host's files could not be
given their owners, debugfs(8) gives the disk's inodes theirs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kata_lab.errors import KataLabError
from kata_lab.image.store import exclusive, scratch
from kata_lab.paths import cache_directory
from kata_lab.resource.scratch import make_ext4, run_tool

if TYPE_CHECKING:
    from kata_lab.oci import ImageHandle

BLOCK: Final = 4096
_SPECIAL: Final = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}  #: as debugfs' mknod has them
INODE_ROOM: Final = 512  #: bytes for an inode and its share of the tables


def image_serial(image: ImageHandle) -> str:
    """The serial number that the disk of an image has in a guest."""
    return f"image-{image.digest.rpartition(':')[2][:12]}"


def image_disk(image: ImageHandle) -> Path:
    """The disk of an image; made if need be.

    Raises:
        KataLabError: a tool is missing or fails, or a file's name cannot be told to it.
        OciError: the image cannot be unpacked.
    """
    from kata_lab.oci import unpack_rootfs

    place = cache_directory() / "disks" / f"{image.digest.rpartition(':')[2]}.ext4"
    if place.exists():
        return place
    with exclusive(place.parent), scratch(place.parent) as work:
        if not place.exists():
            root, disk = work / "root", work / "disk"
            unpack_rootfs(image, root)
            found = list(_walk(root))
            blocks = sum(-(-info.st_size // BLOCK) + 1 for _, info in found)
            size = (blocks * BLOCK + (len(found) + 64) * INODE_ROOM) * 5 // 4 + (8 << 20)
            make_ext4(disk, -(-size // BLOCK) * BLOCK, "-b", str(BLOCK), "-N", str(len(found) + 64), "-d", str(root))
            if image.override_stat:
                _dress(disk, root, found, work / "inodes")
            disk.rename(place)
    return place


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a directory and itself, by its path in the disk."""
    yield "/", root.lstat()
    for parent, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(parent, name)
            yield f"/{path.relative_to(root)}", path.lstat()


def _dress(disk: Path, root: Path, found: list[tuple[str, os.stat_result]], script: Path) -> None:
    """Give inodes the owners and modes that their files' attributes tell."""
    from kata_lab.oci.attributes import OVERRIDE, read_attributes

    lines = []
    for name, info in found:
        if '"' in name or "\n" in name:
            raise KataLabError(f"the image has a file {name!r}, whose name debugfs cannot be told; use rootfs='split'")
        attributes = read_attributes(root / name.lstrip("/"), True)
        fields = [f"uid {attributes.uid}", f"gid {attributes.gid}"]
        if not stat.S_ISLNK(info.st_mode):
            fields.append(f"mode 0{attributes.mode:o}")
        if kind := _SPECIAL.get(stat.S_IFMT(attributes.mode)):
            # On the host it is an empty file, and so its name in the directory says; it is made anew.
            parent, _, last = name.rpartition("/")
            lines += [f'rm "{name}"', f'cd "{parent or "/"}"', f'mknod "{last}" {kind} {"" if kind == "p" else "0 0"}']
            # debugfs takes no minor number above 65535; an inode has the number where a file has its extents.
            major, minor = os.major(attributes.device), os.minor(attributes.device)
            fields.append(f"block[1] {major << 8 | minor & 0xFF | minor >> 8 << 20}")
        else:
            lines.append(f'ea_rm "{name}" {OVERRIDE}')
        lines += [f'sif "{name}" {each}' for each in fields]
    script.write_text("\n".join(lines) + "\n")
    disk.chmod(0o600)
    run_tool("debugfs", "-w", "-f", os.fspath(script), os.fspath(disk))
    disk.chmod(0o400)
