"""The local store of images: names, import, removal, and giving back what nobody needs.

The store is an OCI image layout, ``<cache>/oci``, whose names are the annotation org.opencontainers.image.ref.name;
``skopeo`` reads it, too. One process at a time changes it; readers need no lock, since an index is replaced as a whole
and blobs are only taken away by prune().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from kata_lab.image.store import exclusive
from kata_lab.oci.blobs import DirectorySource, opened_blob, read_document
from kata_lab.oci.descriptor import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    NAME_ANNOTATION,
    Descriptor,
    OciError,
    parse_config,
    parse_index,
    parse_manifest,
)
from kata_lab.oci.image import (
    ARCHITECTURE,
    ImageHandle,
    full_name,
    open_image,
    parse_reference,
    store_directory,
    stored_name,
)
from kata_lab.oci.layers import LayerStore, chain_ids
from kata_lab.oci.unpack import DEFAULT_LIMITS, Limits
from kata_lab.oci.writer import ImageWriter


@dataclass(frozen=True)
class StoredImage:
    """An image of the local store: its name with tag, its digest, what its programs are for, and bytes of its blobs."""

    name: str
    digest: str
    architecture: str
    size: int


@dataclass(frozen=True)
class Pruned:
    """What prune() took away: blobs with their bytes, and unpacked layers."""

    blobs: int
    size: int
    layers: int


def list_images() -> list[StoredImage]:
    """The images of the local store, by name.

    Raises:
        OciError: the store is damaged.
    """
    if not store_directory().exists():
        return []
    source = DirectorySource(store_directory())
    found = []
    for each in ImageWriter(store_directory()).entries():
        size, architecture = each.size, each.architecture
        if each.media_type in MANIFEST_TYPES:
            manifest = parse_manifest(read_document(source, each), f"the manifest {each.digest}")
            size += manifest.config.size + sum(layer.size for layer in manifest.layers)
            if not architecture:  # copied here by another program
                data = read_document(source, manifest.config)
                architecture = parse_config(data, f"the configuration {manifest.config.digest}").architecture
        name = stored_name(each)
        found.append(StoredImage(name, each.digest, architecture or "several", size))
    return sorted(found, key=lambda image: image.name)


def import_image(
    reference: str, name: str | None = None, architecture: str = ARCHITECTURE, limits: Limits = DEFAULT_LIMITS
) -> StoredImage:
    """Copy an image into the local store, verified; of an index, the image for one architecture.

    Args:
        reference: see open_image().
        name: in the store; None takes the tag that it has, else its file's name.
        architecture: which of several.
        limits: how much one layer may be.

    Raises:
        OciError: as open_image(); no name can be made out of the reference.
        ImageError: the cache cannot be written to.
    """
    with open_image(reference, architecture, limits) as handle:
        handle.layers()  # an image that cannot be unpacked does not come in
        chosen = full_name(name or _name_of(reference, handle.descriptor))
        with writing() as writer:
            for layer in handle.manifest.layers:
                _copy(handle, layer, writer)
            _copy(handle, handle.manifest.config, writer)
            _copy(handle, handle.descriptor, writer)
            writer.tag(
                replace(
                    handle.descriptor, annotations={}, platform={"architecture": handle.architecture, "os": "linux"}
                ),
                chosen,
            )
    return next(each for each in list_images() if each.name == chosen)


def remove_image(name: str) -> None:
    """Take a name out of the local store; prune() gives its space back.

    Raises:
        OciError: there is no such image.
    """
    wanted = full_name(name)
    with writing() as writer:
        for each in writer.entries():
            if stored_name(each) == wanted:
                writer.untag(each.annotations[NAME_ANNOTATION])
                return
    open_image(name).close()  # says which names there are


def prune() -> Pruned:
    """Remove blobs that no image of the local store has, and unpacked layers that no image has and nobody uses."""
    with writing() as writer:
        blobs, chains = _reachable(writer)
        count = size = 0
        for place in sorted((writer.directory / "blobs").glob("*/*")):
            if f"{place.parent.name}:{place.name}" not in blobs:
                count, size = count + 1, size + place.stat().st_size
                place.unlink()
        return Pruned(count, size, LayerStore().prune(chains))


@contextmanager
def writing() -> Iterator[ImageWriter]:
    """The local store, to be changed by nobody else for the time of the ``with`` block.

    Raises:
        ImageError: the cache cannot be written to.
    """
    with exclusive(store_directory()):
        yield ImageWriter(store_directory())


def _copy(handle: ImageHandle, descriptor: Descriptor, writer: ImageWriter) -> None:
    with opened_blob(handle.source, descriptor) as reader:
        if descriptor.digest.startswith("sha256:"):
            writer.blob(descriptor.media_type, cast(BinaryIO, reader))
        else:
            raise OciError(f"the blob {descriptor.digest} cannot be stored: its digest must be a sha256")


def _name_of(reference: str, descriptor: Descriptor) -> str:
    parsed = parse_reference(reference)
    if parsed.transport == "store":
        raise OciError(f"{reference!r} is in the local store already: import an archive or a layout")
    name = (
        parsed.tag
        or descriptor.annotations.get(NAME_ANNOTATION)
        or Path(parsed.place).resolve().name.split(".")[0].lower()
    )
    try:
        return full_name(name)
    except OciError as error:
        raise OciError(f"no name can be made out of {reference!r}: give one") from error


def _reachable(writer: ImageWriter) -> tuple[set[str], set[str]]:
    """Digests of the blobs, and of the chains of layers, that the index leads to."""
    source = DirectorySource(writer.directory)
    blobs: set[str] = set()
    chains: set[str] = set()
    left = writer.entries()
    while left:
        each = left.pop()
        if each.digest in blobs:
            continue
        blobs.add(each.digest)
        origin = f"the blob {each.digest} in {writer.directory}"
        if each.media_type in INDEX_TYPES:
            left += parse_index(read_document(source, each), origin)
        elif each.media_type in MANIFEST_TYPES:
            manifest = parse_manifest(read_document(source, each), origin)
            blobs |= {manifest.config.digest, *(layer.digest for layer in manifest.layers)}
            chains |= set(chain_ids(parse_config(read_document(source, manifest.config), origin).diff_ids))
    return blobs, chains
