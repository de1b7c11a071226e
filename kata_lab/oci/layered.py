"""What a stack of unpacked layers looks like as one tree, without a mount: files looked up as overlayfs would.

Follows the kernel's Documentation/filesystems/overlayfs.rst (6.12): the upper of two wins, directories merge, a
whiteout hides, and an opaque directory hides all of its namesakes beneath. Symbolic links are followed within the tree,
never out of it. Read-only; for what a container's root says of users, and for what lower layers say of a directory.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Sequence
from pathlib import Path

from kata_lab.oci.attributes import Attributes, is_opaque, is_whiteout, read_attributes
from kata_lab.oci.descriptor import OciError

MOST_LINKS = 40
"""That are followed on the way to a file; as the kernel."""


class LayeredTree:
    """Layers, lowest first, as one tree.

    Args:
        layers: directories of unpacked layers.
        mapped: whether their files' owners are kept as :mod:`kata_lab.oci.attributes` says.
    """

    def __init__(self, layers: Sequence[Path], mapped: bool = False) -> None:
        self.layers = tuple(layers)
        self.mapped = mapped

    def find(self, path: str) -> Path | None:
        """The file that is seen at a path, which has no links on its way; None when there is none."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        for layer in reversed(self.layers):
            found, is_last = _within(layer, parts)
            if found is not None:
                return found
            if is_last:
                return None
        return None

    def resolve(self, path: str) -> Path | None:
        """The file that is seen at a path when all links are followed; None when there is none.

        Raises:
            OciError: too many links.
        """
        left = [part for part in path.split("/") if part not in ("", ".")][::-1]
        seen: list[str] = []
        links = 0
        place = self.find("")
        while left:
            part = left.pop()
            if part == "..":
                seen = seen[:-1]
                continue
            place = self.find("/".join([*seen, part]))
            if place is None:
                return None
            if place.is_symlink():
                links += 1
                if links > MOST_LINKS:
                    raise OciError(f"/{path} in the image has more than {MOST_LINKS} links on its way")
                target = os.readlink(place)
                if posixpath.isabs(target):
                    seen = []
                left += [each for each in target.split("/") if each not in ("", ".")][::-1]
            else:
                seen.append(part)
        return self.find("/".join(seen))

    def read(self, path: str, most: int = 1 << 20) -> bytes | None:
        """The content of the regular file at a path, of at most `most` bytes; None when there is no such file.

        Raises:
            OciError: too many links, or a larger file.
        """
        place = self.resolve(path)
        if place is None or not stat.S_ISREG(place.lstat().st_mode):
            return None
        with place.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise OciError(f"/{path} in the image has more than {most} bytes")
        return data

    def attributes(self, path: str) -> Attributes | None:
        """Owner, mode and more of the file at a path, which has no links on its way; None when there is none."""
        place = self.find(path)
        return None if place is None else read_attributes(place, self.mapped)


def _within(layer: Path, parts: Sequence[str]) -> tuple[Path | None, bool]:
    """The file in one layer, or None; and whether lower layers need not be asked."""
    place, hides = layer, is_opaque(layer)
    for index, part in enumerate(parts):
        place = place / part
        try:
            found = place.lstat()
        except FileNotFoundError:
            return None, hides
        if is_whiteout(place, found):
            return None, True
        if not stat.S_ISDIR(found.st_mode):
            return (place, True) if index == len(parts) - 1 else (None, True)
        hides = hides or is_opaque(place)
    return place, True
