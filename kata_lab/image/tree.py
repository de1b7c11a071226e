"""A root file system, put together from packages and files of one's own; contents of packages lie in a spool.

Nothing of a package touches the host's file system: its members become nodes of this tree, which then becomes an
initramfs or is handed to a file system's own tool. Follows hier(7) with a merged ``/usr`` (``/bin``, ``/sbin`` and
``/lib`` are links, as in Debian since bookworm) and dpkg(1) in that a directory which is already there as a link to one
stays a link. A member is refused when its path, or the target of its link, would leave the root. Leaves out maintainer
scripts, diversions, and extended attributes.
"""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from kata_lab.errors import ImageError
from kata_lab.image.cpio import Initramfs, Node
from kata_lab.image.deb import DebPackage, PackagedFile
from kata_lab.image.spool import Content, Spool

MERGED = {"riscv64": ("bin", "sbin", "lib"), "amd64": ("bin", "sbin", "lib", "lib64")}
OWN = "(kata-lab)"
"""The owner of what no package brought."""

_MOST_LINKS = 40  # as the kernel's own limit, MAXSYMLINKS
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TYPES = {"file": stat.S_IFREG, "hardlink": stat.S_IFREG, "character": stat.S_IFCHR, "block": stat.S_IFBLK}


class RootTree:
    """The root of a guest, growing; paths are relative to it, such as ``usr/bin/busybox``.

    Args:
        architecture: as Debian names it; decides which top directories are links.
        spool: where contents of packages are kept; it must stay open for as long as the tree is of use.
        excluded: patterns of what is left out of packages, see Patterns.
    """

    def __init__(self, architecture: str, spool: Spool, excluded: Sequence[str] = ()) -> None:
        self._spool = spool
        self._nodes: dict[str, Node] = {}
        self._owners: dict[str, str] = {}
        self._excluded = Patterns(excluded)
        for name in MERGED[architecture]:
            self._put(f"usr/{name}", Node(stat.S_IFDIR | 0o755), OWN)
            self._put(name, Node(stat.S_IFLNK | 0o777, f"usr/{name}".encode()), OWN)

    def install(self, package: Path, owner: str) -> None:
        """Take in what a package would install, as it would be installed by dpkg with no maintainer script.

        Raises:
            ImageError: a damaged package; a path or link that leaves the root; a file that another package has too.
        """
        with DebPackage(package) as opened:
            shared = {file.target for file in opened.files() if file.kind == "hardlink"}

            def wanted(file: PackagedFile) -> bool:
                return not self._excluded.match(file.path) or file.path in shared

            contents: dict[str, Content] = {}
            for file, chunks in opened.entries(wanted):
                content: Content = self._spool.add(chunks) if file.kind == "file" else b""
                if file.path in shared:
                    contents[file.path] = content
                if file.path and not self._excluded.match(file.path):
                    self._install(file, contents.get(file.target, content), owner)

    def file(self, path: str, data: Content, permissions: int = 0o644, owner: str = OWN) -> None:
        """Write a regular file, in place of one that is there."""
        self._replace(path, Node(stat.S_IFREG | permissions, data), owner)

    def directory(self, path: str, permissions: int = 0o755, owner: str = OWN) -> None:
        """Make a directory, or give the one that is there these permissions."""
        place = self._resolve(path)
        present = self._nodes.get(place)
        if present is not None and not stat.S_ISDIR(present.mode):
            raise ImageError(f"/{path} cannot be a directory: the image has a file of that name")
        self._put(place, Node(stat.S_IFDIR | permissions), self._owners.get(place, owner))

    def symlink(self, path: str, target: str, owner: str = OWN) -> None:
        """Make a symbolic link, in place of a file that is there.

        Raises:
            ImageError: the target would lie outside the root.
        """
        self._replace(path, Node(stat.S_IFLNK | 0o777, self._target(path, target, owner)), owner)

    def device(self, path: str, major: int, minor: int, permissions: int = 0o600) -> None:
        """Make a character device node."""
        self._replace(path, Node(stat.S_IFCHR | permissions, device=(major, minor)), OWN)

    def read(self, path: str) -> bytes | None:
        """The content of a regular file, links followed; None when there is none."""
        try:
            node = self._nodes.get(self._resolve(path, last=True))
        except ImageError:
            return None
        return node.content if node is not None and stat.S_ISREG(node.mode) else None

    def has(self, path: str) -> bool:
        """Whether there is something of this name, links followed."""
        try:
            return self._resolve(path, last=True) in self._nodes
        except ImageError:
            return False

    def nodes(self) -> Iterable[tuple[str, Node]]:
        """Everything, sorted by path: a directory comes before what is in it."""
        return sorted(self._nodes.items(), key=lambda item: item[0].split("/"))

    def sizes(self) -> dict[str, int]:
        """Bytes of regular files by the package that brought them, the largest first."""
        sizes: Counter[str] = Counter()
        for path, node in self._nodes.items():
            if stat.S_ISREG(node.mode):
                sizes[self._owners[path]] += len(node.data)
        return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def total(self) -> int:
        """Bytes of all regular files."""
        return sum(len(node.data) for node in self._nodes.values() if stat.S_ISREG(node.mode))

    def chunks(self) -> Iterator[bytes]:
        """The tree as an initramfs, a part at a time; equal trees give equal bytes."""
        archive = Initramfs()
        for path, node in self.nodes():
            archive.add(path, node)
        return archive.chunks()

    def _install(self, file: PackagedFile, content: Content, owner: str) -> None:
        match file.kind:
            case "directory":
                place = self._resolve(file.path)
                present = self._nodes.get(place)
                if present is None:
                    self._put(place, Node(stat.S_IFDIR | file.permissions, uid=file.uid, gid=file.gid), owner)
                elif stat.S_ISDIR(present.mode):
                    if self._owners[place] == OWN:
                        self._put(place, Node(stat.S_IFDIR | file.permissions, uid=file.uid, gid=file.gid), owner)
                elif not self._leads_to_directory(place):
                    raise self._conflict(file.path, place, owner)
            case "symlink":
                target = self._target(file.path, file.target, owner)
                self._add(file.path, Node(stat.S_IFLNK | 0o777, target, uid=file.uid, gid=file.gid), owner)
            case "fifo":
                raise ImageError(
                    f"the package {owner} is refused: /{file.path} is a named pipe, which no package needs"
                )
            case _:
                mode = _TYPES[file.kind] | file.permissions
                self._add(file.path, Node(mode, content, device=file.device, uid=file.uid, gid=file.gid), owner)

    def _add(self, path: str, node: Node, owner: str) -> None:
        place = self._resolve(path)
        present = self._nodes.get(place)
        if present is not None:
            if present == node:
                return
            if not (stat.S_ISLNK(node.mode) and stat.S_ISLNK(present.mode) and self._owners[place] == OWN):
                raise self._conflict(path, place, owner)
        self._put(place, node, owner)

    def _replace(self, path: str, node: Node, owner: str) -> None:
        place = self._resolve(path)
        present = self._nodes.get(place)
        if present is not None and stat.S_ISDIR(present.mode):
            raise ImageError(f"/{path} cannot be a file or link: the image has a directory of that name")
        self._put(place, node, owner)

    def _put(self, place: str, node: Node, owner: str) -> None:
        parts = place.split("/")
        for length in range(1, len(parts)):
            parent = "/".join(parts[:length])
            if parent not in self._nodes:
                self._nodes[parent] = Node(stat.S_IFDIR | 0o755)
                self._owners[parent] = OWN
        self._nodes[place] = node
        self._owners[place] = owner

    def _conflict(self, path: str, place: str, owner: str) -> ImageError:
        return ImageError(
            f"the packages {self._owners[place]} and {owner} both have /{path}, differently: "
            "exclude one of them, or the path"
        )

    def _resolve(self, path: str, last: bool = False) -> str:
        """The place of a path once links among its directories (and `last`, of its own) are followed within the tree.

        Raises:
            ImageError: it leaves the root, goes through a file, or its links go in a circle.
        """
        if _CONTROL.search(path):
            raise ImageError(f"{path!r} is refused: the name of a file should have no control characters")
        waiting = [part for part in path.split("/") if part not in ("", ".")][::-1]
        done: list[str] = []
        links = 0
        while waiting:
            part = waiting.pop()
            if part == "..":
                if not done:
                    raise ImageError(f"{path!r} is refused: it would lie outside the root")
                done.pop()
                continue
            done.append(part)
            node = self._nodes.get("/".join(done))
            if node is None or not (waiting or last):
                continue
            if stat.S_ISLNK(node.mode):
                links += 1
                if links > _MOST_LINKS:
                    raise ImageError(f"{path!r} is refused: its links go in a circle")
                target = node.content.decode("utf-8", "surrogateescape")
                done = [] if target.startswith("/") else done[:-1]
                waiting += [each for each in target.split("/") if each not in ("", ".")][::-1]
            elif waiting and not stat.S_ISDIR(node.mode):
                raise ImageError(f"{path!r} is refused: {'/'.join(done)!r} is a file, not a directory")
        return "/".join(done)

    def _leads_to_directory(self, place: str) -> bool:
        if not stat.S_ISLNK(self._nodes[place].mode):
            return False
        node = self._nodes.get(self._resolve(place, last=True))
        return node is None or stat.S_ISDIR(node.mode)

    def _target(self, path: str, target: str, owner: str) -> bytes:
        """The target of a link, once it is certain that it stays within the root."""
        depth = 0 if target.startswith("/") else len(self._resolve(path).split("/")) - 1
        for part in target.split("/"):
            depth += 0 if part in ("", ".") else -1 if part == ".." else 1
            if depth < 0:
                whose = "your link" if owner == OWN else f"the package {owner} is refused: its link"
                raise ImageError(f"{whose} /{path} leads to {target!r}, which would lie outside the root")
        if not target or "\0" in target:
            raise ImageError(f"the link /{path} has the target {target!r}: it must be a path")
        return target.encode("utf-8", "surrogateescape")


class Patterns:
    """Patterns of paths: ``*`` and ``?`` stay within a directory, ``**`` does not; a directory covers what is in it."""

    def __init__(self, patterns: Sequence[str]) -> None:
        texts = [_translate(pattern.strip("/")) for pattern in patterns]
        self._expression = re.compile("|".join(f"(?:{text})(?:/.*)?" for text in texts)) if texts else None
        self.match = lru_cache(maxsize=4096)(self._match)

    def _match(self, path: str) -> bool:
        return self._expression is not None and self._expression.fullmatch(path) is not None


def _translate(pattern: str) -> str:
    words = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(words.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*|\?)", pattern))
