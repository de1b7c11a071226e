"""The layers of an image as one plain directory, for roots that are shared writable or written to a disk.

Layers are applied from the lowest to the highest as overlayfs would show them; the result has no whiteouts. Owners are
kept as in the layers: for real as root, else in the attribute that :mod:`kata_lab.oci.attributes` names. The new
directory must be empty or not there, so no link in it can be followed; hard links within a layer stay.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from kata_lab.oci.attributes import OVERRIDE, is_opaque, is_whiteout, read_attributes, write_attributes
from kata_lab.oci.descriptor import OciError
from kata_lab.oci.image import ImageHandle


def unpack_rootfs(image: ImageHandle, directory: Path) -> None:
    """Write an image's root file system into a directory, which is made if need be.

    The files' owners are kept in attributes when ``image.override_stat`` says so.

    Raises:
        OciError: the directory is not empty or cannot be written to, or as ImageHandle.layers().
    """
    layers = image.layers()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise OciError(f"{directory} is not empty: a root file system goes into a new directory")
        for layer in layers:
            _apply(layer, directory, image.override_stat)
        if layers:
            _dress(layers[-1], directory, image.override_stat)
    except OSError as error:
        raise OciError(f"{directory} cannot be written to ({error})") from error


def _apply(layer: Path, directory: Path, mapped: bool) -> None:
    made: dict[int, Path] = {}
    directories = []
    for relative, found in _walk(layer):
        source, place = layer / relative, directory / relative
        if is_whiteout(source, found):
            _remove(place)
            continue
        if stat.S_ISDIR(found.st_mode):
            if is_opaque(source) or not place.is_dir() or place.is_symlink():
                _remove(place)
            place.mkdir(exist_ok=True)
            directories.append(relative)
            continue
        _remove(place)
        if found.st_nlink > 1 and found.st_ino in made:
            os.link(made[found.st_ino], place, follow_symlinks=False)
            continue
        made[found.st_ino] = place
        _copy(source, place, found)
        _dress(source, place, mapped)
    for relative in reversed(directories):
        _dress(layer / relative, directory / relative, mapped)


def _walk(layer: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a layer, directories before what is in them."""
    left = [""]
    while left:
        parent = left.pop()
        with os.scandir(layer / parent) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                relative = os.path.join(parent, entry.name)
                yield relative, entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    left.append(relative)


def _copy(source: Path, place: Path, found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFLNK:
        place.symlink_to(os.readlink(source))
    elif kind == stat.S_IFREG:
        _copy_content(source, place, found.st_size)
    else:
        os.mknod(place, kind | 0o600, found.st_rdev)


def _copy_content(source: Path, place: Path, size: int) -> None:
    """Holes stay holes."""
    with source.open("rb") as reader, place.open("xb") as writer:
        at = 0
        while at < size:
            try:
                start = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError:
                break  # nothing but a hole is left
            at = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            reader.seek(start)
            writer.seek(start)
            while start < at and (chunk := reader.read(min(at - start, 1 << 20))):
                writer.write(chunk)
                start += len(chunk)
        writer.truncate(size)


def _dress(source: Path, place: Path, mapped: bool) -> None:
    """Give a copy the attributes that its source has in the layer."""
    attributes = read_attributes(source, mapped)
    if stat.S_ISDIR(attributes.mode):
        for name in os.listxattr(place, follow_symlinks=False):
            if name.startswith("user.") and name != OVERRIDE and name not in attributes.xattrs:
                os.removexattr(place, name, follow_symlinks=False)  # of a lower layer's directory
    write_attributes(place, attributes, mapped)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
