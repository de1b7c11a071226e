"""Images: opened by a reference, verified, with their layers unpacked.

==================================  ==========================================================================
reference                           what it names
==================================  ==========================================================================
``name[:tag]``                      an image in the local store; the tag is ``latest`` when none is given
``sha256:…``                        an image in the local store by its manifest's digest
``oci:DIRECTORY[:TAG]``             an OCI image layout
``oci-archive:FILE[:TAG]``          a tar archive of one
``docker-archive:FILE[:TAG]``       what ``docker save`` wrote
``./PATH``, ``/PATH``               any of these three, found out by looking
==================================  ==========================================================================

Follows the OCI image specification 1.1. Of an index the image for one architecture is taken. Nothing is fetched from a
registry: ``skopeo copy docker://… oci:DIRECTORY`` does that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from kata_lab.oci.blobs import (
    INDEX_FILE,
    LAYOUT_FILE,
    ArchiveSource,
    BlobSource,
    DirectorySource,
    read_document,
    read_named,
)
from kata_lab.oci.descriptor import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    NAME_ANNOTATION,
    Descriptor,
    ImageConfig,
    Manifest,
    OciError,
    is_digest,
    parse_config,
    parse_index,
    parse_manifest,
)
from kata_lab.oci.docker_archive import DockerSource
from kata_lab.oci.layered import LayeredTree
from kata_lab.oci.layers import LayerSource, LayerStack, LayerStore
from kata_lab.oci.shape import nearest
from kata_lab.oci.unpack import DEFAULT_LIMITS, OVERLAY_OPTIONS, Limits
from kata_lab.paths import cache_directory

ARCHITECTURE: Final = "riscv64"
"""Of the guests that the rv64 engine runs."""

DEFAULT_TAG: Final = "latest"

_NAME = re.compile(r"[a-z0-9]+([._/-]+[a-z0-9]+)*(:\d{1,5}/[a-z0-9]+([._/-]+[a-z0-9]+)*)?", re.IGNORECASE)
_TAG = re.compile(r"\w[\w.-]{0,127}")
_MOST_INDEXES = 8


class ImageHandle:
    """An image that was found and whose documents are verified, as a context manager.

    Its layers stay in the store for as long as it is open, so whoever runs a container of it keeps it open.

    Attributes:
        reference: by which it was opened.
        architecture: that its programs are for.
        manifest, config: what the image says.
        descriptor: of the manifest; its ``digest`` is the image's identity.
    """

    def __init__(
        self,
        reference: str,
        source: BlobSource,
        descriptor: Descriptor,
        manifest: Manifest,
        config: ImageConfig,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.reference = reference
        self.source = source
        self.descriptor = descriptor
        self.manifest = manifest
        self.config = config
        self.architecture = config.architecture
        self._limits = limits
        self._stack: LayerStack | None = None
        self._owned = ExitStack()
        self._owned.callback(source.close)

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return self.descriptor.digest

    @property
    def overlay_options(self) -> tuple[str, ...]:
        """Mount options that an overlay of the layers must have in the guest; see :mod:`kata_lab.oci.unpack`."""
        return OVERLAY_OPTIONS

    @property
    def override_stat(self) -> bool:
        """Whether whoever serves the layers must honour ``user.containers.override_stat``."""
        return self._unpacked().mapped

    def layers(self) -> list[Path]:
        """The directories of the unpacked layers, lowest first; to be read only.

        Raises:
            OciError: a blob is missing or wrong, or a layer is refused; see :mod:`kata_lab.oci.unpack`.
            ImageError: the cache cannot be written to.
        """
        return list(self._unpacked().paths)

    def tree(self) -> LayeredTree:
        """The layers as one tree; raises as layers()."""
        return self._unpacked().tree

    def read(self, path: str) -> bytes | None:
        """The content of a file of the image, None when it has no such file; raises as layers()."""
        return self.tree().read(path)

    def _unpacked(self) -> LayerStack:
        if self._stack is None:
            layers = [
                LayerSource(blob, diff_id)
                for blob, diff_id in zip(self.manifest.layers, self.config.diff_ids, strict=True)
            ]
            self._stack = self._owned.enter_context(LayerStore(limits=self._limits).ensure(self.source, layers))
        return self._stack

    def close(self) -> None:
        """Release the source, and the layers to prune()."""
        self._owned.close()
        self._stack = None

    def __enter__(self) -> ImageHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Reference:
    """A reference taken apart: the transport (``store``, ``oci``, ``oci-archive``, ``docker-archive``, ``path``), what
    it names there, and a tag or empty."""

    transport: str
    place: str
    tag: str = ""


def store_directory() -> Path:
    """The local store: an OCI image layout in the cache."""
    return cache_directory() / "oci"


def parse_reference(text: str) -> Reference:
    """Take a reference apart.

    Raises:
        OciError: it has no form of a reference.
    """
    transport, colon, rest = text.partition(":")
    if colon and transport in ("oci", "oci-archive", "docker-archive"):
        return Reference(transport, *_path_and_tag(rest, text))
    if text.startswith(("./", "../", "/")):
        return Reference("path", *_path_and_tag(text, text))
    if is_digest(text):
        return Reference("store", text)
    return Reference("store", full_name(text))


def full_name(name: str) -> str:
    """The name of an image in the local store with its tag.

    Raises:
        OciError: it is no name.
    """
    base, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        base, tag = name, DEFAULT_TAG
    if not _NAME.fullmatch(base) or not _TAG.fullmatch(tag) or len(base) > 255:
        raise OciError(
            f"{name!r} is no name of an image: it must be like busybox or lab/tools:1.0, or oci:DIRECTORY[:TAG], "
            "oci-archive:FILE[:TAG] or docker-archive:FILE[:TAG]"
        )
    return f"{base}:{tag}"


def stored_name(descriptor: Descriptor) -> str:
    """The name with tag of an image of the local store, where other programs may leave the tag out; or empty."""
    name = descriptor.annotations.get(NAME_ANNOTATION, "")
    return f"{name}:{DEFAULT_TAG}" if name and ":" not in name.rpartition("/")[2] else name


def _path_and_tag(rest: str, whole: str) -> tuple[str, str]:
    """A path, and a tag if what precedes it exists; tags of Docker have colons themselves."""
    if not rest or "\0" in rest:
        raise OciError(f"the reference {whole!r} names no file: it must be like oci:DIRECTORY[:TAG]")
    parts = rest.split(":")
    for count in range(len(parts), 0, -1):
        path = ":".join(parts[:count])
        if Path(path).exists():
            return path, ":".join(parts[count:])
    raise OciError(f"there is no file or directory {rest!r}, which the reference {whole!r} names")


def open_image(reference: str, architecture: str = ARCHITECTURE, limits: Limits = DEFAULT_LIMITS) -> ImageHandle:
    """Find an image; its index, manifest and configuration are verified, its layers when they are asked for.

    Args:
        reference: see the module.
        architecture: that its programs must be for, as Go and Debian name it.
        limits: how much one layer may be.

    Raises:
        OciError: there is no such image, or none for the architecture; or it is damaged.
    """
    parsed = parse_reference(reference)
    source = _opened(parsed, reference)
    try:
        descriptor = _chosen(source, parsed, reference, architecture)
        origin = f"the manifest {descriptor.digest} in {source.origin}"
        manifest = parse_manifest(read_document(source, descriptor), origin)
        config = _config(source, manifest)
        if config.architecture != architecture or config.os != "linux":
            raise OciError(
                f"the image {reference!r} is for {config.os}/{config.architecture}: it must be for linux/{architecture}"
            )
        if len(config.diff_ids) != len(manifest.layers):
            raise OciError(
                f"{origin} has {len(manifest.layers)} layers and its configuration {len(config.diff_ids)}: "
                "they must be as many"
            )
        return ImageHandle(reference, source, descriptor, manifest, config, limits)
    except BaseException:
        source.close()
        raise


def _config(source: BlobSource, manifest: Manifest) -> ImageConfig:
    return parse_config(
        read_document(source, manifest.config), f"the configuration {manifest.config.digest} in {source.origin}"
    )


def _opened(parsed: Reference, reference: str) -> BlobSource:
    if parsed.transport == "store":
        return DirectorySource(store_directory())
    path = Path(parsed.place)
    if path.is_dir() and parsed.transport in ("oci", "path"):
        return DirectorySource(path)
    if path.is_dir() or parsed.transport == "oci":
        kind = "a directory" if path.is_dir() else "a file"
        raise OciError(f"{parsed.place} is {kind}: a layout is a directory (oci:), an archive a file (oci-archive:)")
    archive = ArchiveSource(path)
    try:
        if parsed.transport == "docker-archive" or (
            parsed.transport == "path" and read_named(archive, LAYOUT_FILE) is None
        ):
            return DockerSource(archive, parsed.tag)
    except BaseException:
        archive.close()
        raise
    return archive


def _chosen(source: BlobSource, parsed: Reference, reference: str, architecture: str) -> Descriptor:
    """The manifest of the image for an architecture."""
    data = read_named(source, INDEX_FILE)
    if data is None and parsed.transport == "store":
        raise _unknown(reference, [])
    layout = read_named(source, LAYOUT_FILE)
    if data is None or layout is None:
        raise OciError(f"{source.origin} is no OCI image layout: it has no {INDEX_FILE if layout else LAYOUT_FILE}")
    entries = parse_index(data, f"{INDEX_FILE} in {source.origin}")
    if parsed.transport == "store":
        found = [each for each in entries if parsed.place in (each.digest, stored_name(each))]
        if not found:
            raise _unknown(reference, [stored_name(each) for each in entries])
    elif isinstance(source, DockerSource):
        found = list(entries)  # of which the tag chose one
    else:
        found = _tagged(entries, parsed.tag, source.origin)
    return _for_architecture(source, found, reference, architecture)


def _unknown(reference: str, names: Sequence[str]) -> OciError:
    short = [name.removesuffix(f":{DEFAULT_TAG}") for name in names if name]
    hint = nearest(reference, short) if short else "there is none yet, import one with kata-lab images import"
    return OciError(f"there is no image {reference!r} in the local store: {hint}")


def _tagged(entries: Sequence[Descriptor], tag: str, origin: str) -> list[Descriptor]:
    names = sorted({each.annotations.get(NAME_ANNOTATION, "") for each in entries})
    if not tag and len(names) <= 1:
        return list(entries)
    if not tag:
        named = [name for name in names if name]
        raise OciError(f"{origin} has several images: choose one of its tags, {', '.join(named)}")
    found = [each for each in entries if each.annotations.get(NAME_ANNOTATION, "") == tag]
    if not found:
        raise OciError(f"{origin} has no image with the tag {tag!r}: it has {', '.join(map(repr, names)) or 'none'}")
    return found


def _for_architecture(
    source: BlobSource, entries: Sequence[Descriptor], reference: str, architecture: str
) -> Descriptor:
    """The manifest, through nested indexes; a descriptor that does not say its architecture is looked into."""
    left = list(entries)
    indexes = 0
    existing: set[str] = set()
    while left:
        each = left.pop(0)
        if each.media_type in INDEX_TYPES:
            indexes += 1
            if indexes > _MOST_INDEXES:
                raise OciError(f"the image {reference!r} has more than {_MOST_INDEXES} indexes")
            left += parse_index(read_document(source, each), f"the index {each.digest} in {source.origin}")
        elif each.media_type in MANIFEST_TYPES:
            found = each.architecture
            if not found:
                origin = f"the manifest {each.digest} in {source.origin}"
                found = _config(source, parse_manifest(read_document(source, each), origin)).architecture
            if found == architecture and each.platform.get("os", "linux") == "linux":
                return each
            if found != "unknown":  # what builders attach to images
                existing.add(found)
    raise OciError(
        f"the image {reference!r} is not there for {architecture}: there is {', '.join(sorted(existing)) or 'none'}"
    )
