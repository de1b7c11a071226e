"""Writes images: a layer's archive out of files, and an OCI image layout out of layers; equal inputs, equal bytes.

Follows the OCI image specification 1.1: layer.md (pax archives, whiteouts), config.md, manifest.md, image-index.md,
image-layout.md. Layers are compressed with gzip, whose header has no time and no name. Blobs are written under a
temporary name, synced and renamed, and the index after them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from kata_lab.image.store import synced, write_synced
from kata_lab.oci.blobs import INDEX_FILE, LAYOUT_FILE, DirectorySource, read_named
from kata_lab.oci.descriptor import (
    CONFIG_TYPE,
    INDEX_TYPE,
    LAYER_TYPE,
    MANIFEST_TYPE,
    NAME_ANNOTATION,
    Descriptor,
    Manifest,
    OciError,
    blob_path,
    parse_index,
)
from kata_lab.oci.unpack import OPAQUE_MARK, WHITEOUT_PREFIX

LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'

_CHUNK = 1 << 20


class LayerArchive:
    """A layer's tar archive, growing; members keep the order in which they come.

    Paths are relative to the root. `mode` is permission bits; `xattrs` are extended attributes by name.
    """

    def __init__(self) -> None:
        self._data = io.BytesIO()
        self._archive = tarfile.TarFile(fileobj=self._data, mode="w", format=tarfile.PAX_FORMAT)

    def directory(
        self, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0, xattrs: Mapping[str, bytes] | None = None
    ) -> None:
        self._archive.addfile(_member(path, tarfile.DIRTYPE, mode, (uid, gid), xattrs))

    def file(
        self,
        path: str,
        data: bytes,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        xattrs: Mapping[str, bytes] | None = None,
    ) -> None:
        info = _member(path, tarfile.REGTYPE, mode, (uid, gid), xattrs)
        info.size = len(data)
        self._archive.addfile(info, io.BytesIO(data))

    def symlink(self, path: str, target: str, uid: int = 0, gid: int = 0) -> None:
        info = _member(path, tarfile.SYMTYPE, 0o777, (uid, gid))
        info.linkname = target
        self._archive.addfile(info)

    def hard_link(self, path: str, target: str) -> None:
        info = _member(path, tarfile.LNKTYPE, 0o644, (0, 0))
        info.linkname = target
        self._archive.addfile(info)

    def device(self, path: str, kind: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node; `kind` is ``"c"`` or ``"b"``."""
        info = _member(path, tarfile.CHRTYPE if kind == "c" else tarfile.BLKTYPE, mode, (0, 0))
        info.devmajor, info.devminor = major, minor
        self._archive.addfile(info)

    def pipe(self, path: str, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        self._archive.addfile(_member(path, tarfile.FIFOTYPE, mode, (uid, gid)))

    def whiteout(self, path: str) -> None:
        """Hide what lower layers have at a path."""
        parent, slash, name = path.rpartition("/")
        self.file(f"{parent}{slash}{WHITEOUT_PREFIX}{name}", b"")

    def opaque(self, path: str) -> None:
        """Hide all that lower layers have in a directory."""
        self.file(f"{path}/{OPAQUE_MARK}".lstrip("/"), b"")

    def raw(self, info: tarfile.TarInfo, data: bytes = b"") -> None:
        """A member as it is, also one that no reader should take."""
        self._archive.addfile(info, io.BytesIO(data))

    def finish(self) -> bytes:
        """The archive; nothing can be added afterwards."""
        self._archive.close()
        return self._data.getvalue()


def _member(
    path: str, kind: bytes, mode: int, owner: tuple[int, int], xattrs: Mapping[str, bytes] | None = None
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mode = kind, mode
    info.uid, info.gid = owner
    info.pax_headers = {
        f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
        for name, value in sorted((xattrs or {}).items())
    }
    return info


@dataclass(frozen=True)
class WrittenLayer:
    """A layer in a layout: its blob, and the digest of the archive within."""

    blob: Descriptor
    diff_id: str


class ImageWriter:
    """Writes into an OCI image layout, which is begun if there is none.

    Args:
        directory: of the layout. Nobody else may write there meanwhile.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / LAYOUT_FILE).exists():
            write_synced(directory / LAYOUT_FILE, LAYOUT)
        if not (directory / INDEX_FILE).exists():
            self._write_index([])

    def entries(self) -> list[Descriptor]:
        """What the index names.

        Raises:
            OciError: the index is none.
        """
        data = read_named(DirectorySource(self.directory), INDEX_FILE)
        return list(parse_index(data or b"", str(self.directory / INDEX_FILE)))

    def blob(self, media_type: str, content: bytes | BinaryIO) -> Descriptor:
        """Write a blob, a whole or an open file, unless it is there."""
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        place = self.directory / "blobs" / "sha256"
        place.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="new-", dir=place)
        try:
            digest, size = hashlib.sha256(), 0
            with os.fdopen(descriptor, "wb") as file:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                file.flush()
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            found = Descriptor(media_type, f"sha256:{digest.hexdigest()}", size)
            os.replace(name, self.directory / blob_path(found.digest))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        synced(place)
        return found

    def layer(self, archive: bytes, compress: bool = True) -> WrittenLayer:
        """Write a layer."""
        diff_id = f"sha256:{hashlib.sha256(archive).hexdigest()}"
        if not compress:
            return WrittenLayer(self.blob(LAYER_TYPE, archive), diff_id)
        return WrittenLayer(self.blob(f"{LAYER_TYPE}+gzip", gzip.compress(archive, 6, mtime=0)), diff_id)

    def image(
        self,
        layers: Sequence[WrittenLayer],
        run: Mapping[str, Any] | None = None,
        *,
        architecture: str = "riscv64",
        annotations: Mapping[str, str] | None = None,
    ) -> Descriptor:
        """Write configuration and manifest of an image.

        Args:
            layers: lowest first.
            run: the object ``config`` of the configuration: Env, Cmd, Entrypoint, User, WorkingDir, Labels.
            architecture: that its programs are for.
            annotations: of the manifest.
        """
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": dict(run or {}),
            "rootfs": {"type": "layers", "diff_ids": [each.diff_id for each in layers]},
        }
        manifest = Manifest(
            self.blob(CONFIG_TYPE, _encoded(config)), tuple(each.blob for each in layers), annotations or {}
        )
        found = self.blob(MANIFEST_TYPE, _encoded(manifest.plain()))
        return replace(found, platform={"architecture": architecture, "os": "linux"})

    def index(self, manifests: Sequence[Descriptor]) -> Descriptor:
        """Write an index of images for several architectures."""
        plain = {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": [each.plain() for each in manifests],
        }
        return self.blob(INDEX_TYPE, _encoded(plain))

    def tag(self, descriptor: Descriptor, name: str) -> None:
        """Give a manifest or an index a name, in place of what had it."""
        named = replace(descriptor, annotations={**descriptor.annotations, NAME_ANNOTATION: name})
        self._write_index([*(each for each in self.entries() if each.annotations.get(NAME_ANNOTATION) != name), named])

    def untag(self, name: str) -> Descriptor:
        """Take a name away.

        Raises:
            OciError: the layout has no such name.
        """
        entries = self.entries()
        for each in entries:
            if each.annotations.get(NAME_ANNOTATION) == name:
                self._write_index([other for other in entries if other is not each])
                return each
        raise OciError(f"{self.directory} has no image with the name {name!r}")

    def _write_index(self, entries: Sequence[Descriptor]) -> None:
        plain = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [each.plain() for each in entries]}
        new = self.directory / f".{INDEX_FILE}.new"
        write_synced(new, _encoded(plain))
        new.replace(self.directory / INDEX_FILE)
        synced(self.directory)


def _encoded(plain: Mapping[str, Any]) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
