"""Layers for tests: hand-made ones with every kind of member, and random ones; and how a tree is written down."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from kata_lab.oci.attributes import OVERLAY_PREFIX, read_attributes
from kata_lab.oci.image import ImageHandle, open_image
from kata_lab.oci.writer import ImageWriter, LayerArchive

Fill = Callable[[LayerArchive], None]


def layout(directory: Path, *fills: Fill, tag: str = "test", compress: bool = True) -> str:
    """A layout with one image whose layers are as the functions fill them, lowest first; its reference."""
    writer = ImageWriter(directory)
    layers = []
    for fill in fills:
        archive = LayerArchive()
        fill(archive)
        layers.append(writer.layer(archive.finish(), compress))
    writer.tag(writer.image(layers, {"Cmd": ["sh"]}), tag)
    return f"oci:{directory}:{tag}"


def opened(directory: Path, *fills: Fill) -> ImageHandle:
    """An image of such a layout, opened."""
    return open_image(layout(directory, *fills))


def described(root: Path, mapped: bool = False, times: bool = False) -> dict[str, tuple[object, ...]]:
    """Every path of a tree: type and mode, owner, device, content or target, attributes, and names of the same file."""
    found: dict[str, tuple[object, ...]] = {}
    names: dict[tuple[int, int], list[str]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        relative = str(path.relative_to(root))
        info = path.lstat()
        attributes = read_attributes(path, mapped)
        content: object = None
        if stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(attributes.mode):
            if not os.access(path, os.R_OK):
                path.chmod(0o600)  # what umoci makes for who is not root can be closed to its owner
            content = path.read_bytes()
            names.setdefault((info.st_dev, info.st_ino), []).append(relative)
        xattrs = {name: value for name, value in attributes.xattrs.items() if not name.startswith(OVERLAY_PREFIX)}
        found[relative] = (
            oct(attributes.mode),
            attributes.uid,
            attributes.gid,
            attributes.device,
            content,
            tuple(sorted(xattrs.items())),
            attributes.mtime_ns if times and not stat.S_ISDIR(info.st_mode) else None,
        )
    for same in names.values():
        for each in same:
            found[each] += (tuple(sorted(same)),)
    return found


def base(layer: LayerArchive) -> None:
    """Every kind of member that a layer can have."""
    layer.directory("etc")
    layer.file("etc/hosts", b"127.0.0.1 localhost\n")
    layer.file("etc/shadow", b"root:*\n", 0o640, 0, 42)
    layer.directory("bin")
    layer.file("bin/su", b"\x7fELF" + bytes(100), 0o4755)
    layer.file("bin/tool", b"tool", 0o755, xattrs={"user.note": b"a note", "user.binary": b"\x00\xff\x01"})
    layer.hard_link("bin/tool-too", "bin/tool")
    layer.symlink("bin/sh", "tool")
    layer.symlink("abs", "/etc/hosts")
    layer.symlink("dangling", "../../nowhere")
    layer.directory("tmp", 0o1777)
    layer.directory("home/user", 0o700, 1000, 1000)
    layer.file("home/user/file", bytes(5000) + b"x", 0o600, 1000, 1000)
    layer.pipe("run/pipe", 0o620, 5, 6)
    layer.file("größe/ü", b"utf-8")
    layer.file("a" * 200 + "/" + "b" * 200, b"long")
    layer.file("empty", b"")


def upper(layer: LayerArchive) -> None:
    """Takes away, replaces and hides what base() has."""
    layer.whiteout("etc/hosts")
    layer.whiteout("bin/sh")
    layer.file("home/user/new", b"new", 0o644, 1000, 1000)
    layer.opaque("home/user")
    layer.file("abs", b"now a file")
    layer.symlink("tmp", "var/tmp")
    layer.directory("var/tmp", 0o1777)
    layer.directory("empty")
    layer.file("empty/in", b"in")
    layer.file("etc/deep/er/file", b"deep")


def random_layers(seed: int, count: int = 4, members: int = 25) -> list[Fill]:
    """Layers that create, replace, remove and hide at random; they never write through a link."""
    rng = random.Random(seed)
    names = ["a", "b", "c", "d"]
    visible: dict[str, str] = {"": "directory"}

    def parent_of(path: str) -> str:
        return path.rpartition("/")[0]

    def forget(path: str) -> None:
        for each in [each for each in visible if each == path or each.startswith(f"{path}/")]:
            del visible[each]

    fills: list[Fill] = []
    for _ in range(count):
        steps: list[tuple[str, str, tuple[object, ...]]] = []
        written: dict[str, str] = {}
        hidden: set[str] = set()
        for _ in range(members):
            directories = [path for path, kind in visible.items() if kind == "directory" and path.count("/") < 3]
            path = f"{rng.choice(sorted(directories))}/{rng.choice(names)}".lstrip("/")
            if path in written or path in hidden or any(hid == parent_of(path) for hid in hidden):
                continue
            action = rng.choice(
                ["directory", "directory", "file", "file", "file", "symlink", "hard_link", "remove", "opaque"]
            )
            owner = rng.choice([0, 1, 1000, 65534])
            if action == "remove":
                if path in visible and not any(each == path or each.startswith(f"{path}/") for each in written):
                    steps.append(("whiteout", path, ()))
                    hidden.add(path)
                    forget(path)
                continue
            if action == "opaque":
                if visible.get(path) == "directory" and not any(each.startswith(f"{path}/") for each in written):
                    steps += [("directory", path, (0o755, owner, owner)), ("opaque", path, ())]
                    forget(path)
                    visible[path] = written[path] = "directory"
                continue
            if any(each.startswith(f"{path}/") for each in written) and action != "directory":
                continue
            files = sorted(each for each, kind in written.items() if kind == "file")
            if action == "hard_link":
                if not files:
                    continue
                steps.append(("hard_link", path, (rng.choice(files),)))
                kind = "file"
            elif action == "directory":
                steps.append(("directory", path, (rng.choice([0o755, 0o700, 0o1777, 0o2755]), owner, owner)))
                kind = "directory"
            elif action == "symlink":
                steps.append(("symlink", path, (rng.choice(["a", "../b", "/c/d", "nowhere"]), owner, owner)))
                kind = "symlink"
            else:
                mode = rng.choice([0o644, 0o600, 0o4755, 0o000])
                steps.append(("file", path, (rng.randbytes(rng.choice([0, 1, 5000])), mode, owner, owner)))
                kind = "file"
            if not (kind == "directory" and visible.get(path) == "directory"):
                forget(path)
            visible[path] = written[path] = kind

        def fill(layer: LayerArchive, steps: Sequence[tuple[str, str, tuple[object, ...]]] = tuple(steps)) -> None:
            for action, path, arguments in steps:
                getattr(layer, action)(path, *arguments)

        fills.append(fill)
    return fills
