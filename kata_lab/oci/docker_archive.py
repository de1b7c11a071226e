"""An image out of the archive that ``docker save`` (or ``skopeo copy docker-archive:``) wrote, as a layout.

Follows Docker's image specification 1.2 ("combined image JSON and filesystem changeset format"): ``manifest.json``
names the configuration and the layers by file. Left out: the older ``repositories`` file and layers' own ``json``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Final

from kata_lab.oci.blobs import DOCKER_FILE, INDEX_FILE, LAYOUT_FILE, ArchiveSource, read_named
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
    parse_config,
    parse_docker_manifest,
    sha256_digest,
)

LATEST: Final = "latest"

_NAMED_DIGEST = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?")
_CHUNK = 1 << 20


class DockerSource:
    """The archive as a source of blobs.

    ``manifest.json`` names files rather than digests; a manifest is made of them, so that the same image always
    has the same digest. Layers are verified against the configuration, and the configuration against its name when
    that is a digest.

    Raises:
        OciError: no such archive, no such tag, several images and no tag, or a configuration that is not as named.
    """

    def __init__(self, archive: ArchiveSource, tag: str) -> None:
        self.origin = archive.origin
        self._archive = archive
        self._made: dict[str, bytes] = {}
        self._members: dict[str, str] = {}
        data = read_named(archive, DOCKER_FILE)
        if data is None:
            raise OciError(f"{self.origin} is no archive of an image: it has neither {LAYOUT_FILE} nor {DOCKER_FILE}")
        images = parse_docker_manifest(data, f"{DOCKER_FILE} in {self.origin}")
        tags = [tag for image in images for tag in image.get("RepoTags") or ()]
        chosen = [image for image in images if not tag or _same_tag(tag, image.get("RepoTags") or ())]
        if len(chosen) != 1:
            raise OciError(
                f"{self.origin} has {len(chosen)} images{f' with the tag {tag!r}' if tag else ''}: "
                f"choose one of its tags, {', '.join(tags) or 'of which it has none'}"
            )
        names = chosen[0].get("RepoTags") or ()
        self._make(chosen[0], {NAME_ANNOTATION: names[0]} if names else {})

    def _make(self, image: Mapping[str, Any], annotations: Mapping[str, str]) -> None:
        name = image["Config"]
        data = read_named(self._archive, name)
        if data is None:
            raise OciError(f"{self.origin} has no {name!r}, which its {DOCKER_FILE} names")
        config = Descriptor(CONFIG_TYPE, sha256_digest(data), len(data))
        match = _NAMED_DIGEST.fullmatch(name)
        if match and config.digest != f"sha256:{match[1]}":
            raise OciError(f"{name} in {self.origin} has the digest {config.digest}, so it was changed or damaged")
        parsed = parse_config(data, f"{name} in {self.origin}")
        names = image["Layers"] or []
        if len(names) != len(parsed.diff_ids):
            raise OciError(f"{self.origin} does not have as many layers as its configuration {name} names")
        self._made[str(blob_path(config.digest))] = data
        layers = tuple(self._layer(*each) for each in zip(names, parsed.diff_ids, strict=True))
        manifest = json.dumps(Manifest(config, layers).plain(), sort_keys=True).encode()
        descriptor = Descriptor(MANIFEST_TYPE, sha256_digest(manifest), len(manifest), annotations)
        self._made[str(blob_path(descriptor.digest))] = manifest
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [descriptor.plain()]}
        self._made[INDEX_FILE] = json.dumps(index).encode()
        self._made[LAYOUT_FILE] = b'{"imageLayoutVersion": "1.0.0"}'

    def _layer(self, name: str, diff_id: str) -> Descriptor:
        """Layers are plain archives, so that a blob's digest is its diff_id; compressed ones are hashed."""
        file = self._archive.file(name)
        if file is None:
            raise OciError(f"{self.origin} has no layer {name!r}, which its {DOCKER_FILE} names")
        with file:
            media_type, digest, size = LAYER_TYPE, diff_id, 0
            if _is_gzip(file):
                media_type, digest = f"{LAYER_TYPE}+gzip", ""
            found = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if not digest:
                    found.update(chunk)
        digest = digest or f"sha256:{found.hexdigest()}"
        self._members[str(blob_path(digest))] = name
        return Descriptor(media_type, digest, size)

    def file(self, name: str) -> BinaryIO | None:
        if name in self._made:
            return io.BytesIO(self._made[name])
        return self._archive.file(self._members[name]) if name in self._members else None

    def close(self) -> None:
        self._archive.close()


def _same_tag(tag: str, names: Sequence[str]) -> bool:
    """Whether a tag names an image as Docker would: ``latest`` and a registry's name may be left out."""
    wanted = tag if ":" in tag.rpartition("/")[2] else f"{tag}:{LATEST}"
    return any(name in (tag, wanted) or name.endswith(f"/{wanted}") for name in names)


def _is_gzip(file: BinaryIO) -> bool:
    return isinstance(file, io.BufferedReader) and file.peek(2)[:2] == b"\x1f\x8b"
