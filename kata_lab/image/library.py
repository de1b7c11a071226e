"""The images on this machine: found by name, replaced in one step, handed on as one file.

::

    <cache>/images/<name>.json   which image has this name now: {"format": 1, "id": …}
    <cache>/images/<id>/         manifest.json  kernel  root.cpio (or root.erofs, root.ext4, and boot.cpio)

The identity of an image is the hash of its manifest, which has the hash of everything else; so two builds that gave the
same bytes are the same image. A name changes hands by one rename: whoever interrupts a build finds the image of before.
Whoever has an :class:`Image` holds a shared lock (flock(2)) on its directory, which stays until nobody does: an image
that lost its name meanwhile is removed by the next one who adds or removes one. An exported file is a gzip-compressed
tar of an image's files, the manifest first.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import weakref
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kata_lab.errors import ImageError
from kata_lab.image.store import exclusive, publish, scratch, sha256_of, synced, write_synced
from kata_lab.paths import cache_directory
from kata_lab.progress import ProgressMode

FORMAT = 1
MANIFEST = "manifest.json"
KERNEL = "kernel"
BOOT = "boot.cpio"
"""The initramfs that mounts a root which is on a disk."""


_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_IDENTITY = re.compile(r"[0-9a-f]{32}")
_LARGEST_MANIFEST = 16 << 20
_ROOT_FILES = {"initramfs": "root.cpio", "erofs": "root.erofs", "ext4": "root.ext4"}


def root_file(format: str) -> str:
    """The name of the file with the root, by its format."""
    return _ROOT_FILES[format]


def image_files(format: str) -> set[str]:
    """The names of all files of an image besides its manifest, by the format of its root."""
    return {KERNEL, root_file(format)} | (set() if format == "initramfs" else {BOOT})


class Hold:
    """Keeps an image's files where they are, until it is released or nobody refers to it any more.

    Args:
        directory: of the image.

    Raises:
        FileNotFoundError: it is gone.
    """

    def __init__(self, directory: Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        #: Let the files go; a second call does nothing.
        self.release = weakref.finalize(self, os.close, descriptor)
        # Whoever removes it has a lock of its own meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(descriptor), directory.stat()):
            raise FileNotFoundError(directory)


@dataclass(frozen=True)
class Image:
    """An image on this machine.

    Attributes:
        identity: hash of the manifest.
        directory: where its files are.
        manifest: as the builder wrote it; see :mod:`kata_lab.image.build`.
        hold: keeps the files for as long as the image is used.
    """

    identity: str
    directory: Path
    manifest: Mapping[str, Any]
    hold: Hold | None = field(default=None, repr=False, compare=False)

    def release(self) -> None:
        """Let its files go, which may be removed from now on."""
        if self.hold is not None:
            self.hold.release()

    @property
    def name(self) -> str:
        """What its description calls it."""
        return str(self.manifest["name"])

    @property
    def architecture(self) -> str:
        """Of the machines that it is for, as Debian names it."""
        return str(self.manifest["architecture"])

    @property
    def kernel(self) -> Path:
        """The file of the uncompressed kernel."""
        return self.directory / KERNEL

    @property
    def root(self) -> Path:
        """The file with the root: an initramfs, or a file system for a disk."""
        return self.directory / root_file(self.manifest["format_of_root"])

    @property
    def initrd(self) -> Path:
        """The file of the initramfs: that with the root, or the one that mounts it from a disk."""
        return self.root if self.manifest["format_of_root"] == "initramfs" else self.directory / BOOT

    @property
    def append(self) -> str:
        """The kernel command line."""
        return str(self.manifest["command_line"])

    @property
    def bytes(self) -> int:
        """Of the file with the root."""
        return int(self.manifest["files"][self.root.name]["size"])

    def verify(self) -> None:
        """Hash every file.

        Raises:
            ImageError: one is not what it was.
        """
        for name, written in self.manifest["files"].items():
            if sha256_of(self.directory / name) != written["sha256"]:
                raise ImageError(f"the image {self.name!r} is damaged: {name} is not what it was, so build it again")


class Library:
    """The images of this user.

    Args:
        progress: how to show that another process must be waited for.
    """

    def __init__(self, progress: ProgressMode = "auto") -> None:
        self.directory = cache_directory() / "images"
        self._progress = progress

    def names(self) -> list[str]:
        """The names of all images."""
        return sorted(path.stem for path in self.directory.glob("*.json"))

    def find(self, name: str) -> Image:
        """An image by name.

        Raises:
            ImageError: there is none, or it cannot be read.
        """
        if not _NAME.fullmatch(name):
            raise ImageError(f"{name!r} cannot be the name of an image: it has small letters, digits and '-'")
        try:
            return self._named(name)
        except FileNotFoundError:
            raise ImageError(
                f"there is no image {name!r} on this machine ({', '.join(self.names()) or 'there is none at all'}): "
                f"build it with kata-lab image build {name}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ImageError(f"the image {name!r} cannot be read ({error}): build it again") from error

    def _named(self, name: str) -> Image:
        """An image by name, also while the name goes to another one."""
        gone = ""
        while True:
            identity = json.loads((self.directory / f"{name}.json").read_bytes())["id"]
            try:
                return self._load(identity)
            except FileNotFoundError:
                if identity == gone:
                    raise
                gone = identity

    def add(self, manifest: dict[str, Any], files: Mapping[str, bytes | Iterable[bytes] | Path]) -> Image:
        """Take in an image and give it its name; one that had the name is removed once nobody uses it.

        Args:
            manifest: without ``files``, which is added here.
            files: name → content, as a whole or in chunks, or a file that is moved away from where it is.

        Raises:
            ImageError: the disk is full.
        """
        with exclusive(self.directory, self._progress), scratch(self.directory) as partial:
            new = partial / "new"
            new.mkdir()
            written = {}
            for name, content in files.items():
                if isinstance(content, Path):
                    shutil.move(content, new / name)
                    synced(new / name)
                else:
                    write_synced(new / name, content)
                written[name] = {"size": (new / name).stat().st_size, "sha256": sha256_of(new / name)}
            text = (
                json.dumps({**manifest, "format": FORMAT, "files": written}, indent=1, sort_keys=True).encode() + b"\n"
            )
            return self._publish(new, text, str(manifest["name"]), partial)

    def remove(self, name: str) -> None:
        """Forget an image, and remove its files once nobody uses them.

        Raises:
            ImageError: there is no such image.
        """
        if name not in self.names():
            self.find(name)
        with exclusive(self.directory, self._progress):
            (self.directory / f"{name}.json").unlink(missing_ok=True)
            self._sweep()

    def export(self, name: str, place: Path) -> None:
        """Write an image to one file; the same image gives the same bytes.

        Raises:
            ImageError: no such image, a damaged one, or a file that cannot be written.
        """
        image = self.find(name)
        image.verify()
        partial = place.with_name(f".{place.name}.partial")
        try:
            with (
                partial.open("wb") as raw,
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
            ):
                for file in (MANIFEST, *sorted(image.manifest["files"])):
                    info = tarfile.TarInfo(file)
                    info.size = (image.directory / file).stat().st_size
                    info.mode = 0o644
                    with (image.directory / file).open("rb") as source:
                        archive.addfile(info, source)
            publish(partial, place)
        except OSError as error:
            raise ImageError(f"{place} cannot be written ({error.strerror})") from error
        finally:
            partial.unlink(missing_ok=True)

    def import_file(self, place: Path) -> Image:
        """Take in an exported image; every hash is verified before it gets its name.

        Raises:
            ImageError: not an exported image, or one that was changed, is cut short, or holds anything else.
        """
        refusal = f"{place} is no image that can be imported"
        with exclusive(self.directory, self._progress), scratch(self.directory) as partial:
            new = partial / "new"
            new.mkdir()
            try:
                with tarfile.open(place, "r|gz") as archive:
                    members = iter(archive)
                    text = _read_manifest(archive, next(members, None), refusal)
                    manifest = _checked_manifest(text, refusal)
                    missing = dict(manifest["files"])
                    for member in members:
                        _unpack(archive, member, missing, new, refusal)
                    if missing:
                        raise ImageError(f"{refusal}: {', '.join(sorted(missing))} is missing")
            except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
                raise ImageError(f"{refusal}: it cannot be read ({error})") from error
            return self._publish(new, text, manifest["name"], partial)

    def _load(self, identity: str) -> Image:
        if not isinstance(identity, str) or not _IDENTITY.fullmatch(identity):
            raise ValueError(f"{identity!r} is no identity")
        directory = self.directory / identity
        hold = Hold(directory)
        text = (directory / MANIFEST).read_bytes()
        if _identity(text) != identity:
            raise ValueError("its manifest was changed")
        image = Image(identity, directory, json.loads(text), hold)
        if image.manifest["format"] != FORMAT:
            raise ValueError(f"it has format {image.manifest['format']!r}, and this version reads {FORMAT}")
        for name, written in image.manifest["files"].items():
            if (directory / name).stat().st_size != written["size"]:
                raise ValueError(f"{name} has another size than it had")
        return image

    def _publish(self, new: Path, text: bytes, name: str, partial: Path) -> Image:
        write_synced(new / MANIFEST, text)
        identity = _identity(text)
        if not self._has(identity):
            publish(new, self.directory / identity)
        pointer = partial / "pointer"
        write_synced(pointer, json.dumps({"format": FORMAT, "id": identity}).encode())
        publish(pointer, self.directory / f"{name}.json")
        self._sweep()
        return self._load(identity)

    def _has(self, identity: str) -> bool:
        """Whether an image is here as it should be, though perhaps without a name."""
        try:
            self._load(identity).verify()
        except (OSError, ValueError, ImageError):
            return False
        return True

    def _sweep(self) -> None:
        """Remove images that have no name any more and that nobody uses."""
        kept = set()
        for pointer in self.directory.glob("*.json"):
            try:
                kept.add(json.loads(pointer.read_bytes())["id"])
            except (ValueError, KeyError, TypeError):
                continue
        for path in self.directory.iterdir():
            if _IDENTITY.fullmatch(path.name) and path.name not in kept:
                _remove_unused(path)


def _remove_unused(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def _identity(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:32]


def _read_manifest(archive: tarfile.TarFile, first: tarfile.TarInfo | None, refusal: str) -> bytes:
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > _LARGEST_MANIFEST:
        raise ImageError(f"{refusal}: it should begin with a file {MANIFEST}")
    source = archive.extractfile(first)
    return b"" if source is None else source.read()


def _checked_manifest(text: bytes, refusal: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ImageError(f"{refusal}: it has format {manifest['format']!r}, and this version reads {FORMAT}")
        files = manifest["files"]
        if not _NAME.fullmatch(manifest["name"]) or set(files) != image_files(manifest["format_of_root"]):
            raise ValueError("its name or its files are not those of an image")
        for written in files.values():
            if not isinstance(written["size"], int) or not re.fullmatch(r"[0-9a-f]{64}", written["sha256"]):
                raise ValueError("a file has no size and hash")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"{refusal}: its manifest is wrong ({error})") from error
    return manifest


def _unpack(
    archive: tarfile.TarFile, member: tarfile.TarInfo, missing: dict[str, Any], directory: Path, refusal: str
) -> None:
    """Write one of the files that the manifest names, and no other; its name is no path before it was compared."""
    written = missing.pop(member.name, None)
    if written is None or not member.isreg():
        raise ImageError(f"{refusal}: it holds {member.name!r}, which its manifest does not name")
    source = archive.extractfile(member)
    if source is None or member.size != written["size"]:
        raise ImageError(f"{refusal}: {member.name} has {member.size} bytes and should have {written['size']}")
    digest = hashlib.sha256()
    with (directory / member.name).open("wb") as target:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != written["sha256"]:
        raise ImageError(f"{refusal}: {member.name} is not what its manifest says, so it was changed on the way")
