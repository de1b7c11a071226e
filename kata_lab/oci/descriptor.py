"""What an image's documents say: descriptors, index, manifest and configuration, checked while they are read.

Follows the OCI image specification 1.1 (descriptor.md, image-index.md, manifest.md, config.md), and takes Docker's
image manifest version 2, schema 2, whose documents have the same form under other media types. Unknown fields are let
pass, as the specification wants. Left out: artifacts and referrers (``subject``), and layers compressed with zstd,
which Python 3.11 cannot unpack.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.oci.shape import (
    INT64,
    Check,
    ShapeError,
    list_of,
    map_of,
    matching,
    parse_json,
    record,
    text,
    whole,
)

INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX_TYPE: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
INDEX_TYPES: Final = (INDEX_TYPE, DOCKER_INDEX_TYPE)
MANIFEST_TYPES: Final = (MANIFEST_TYPE, DOCKER_MANIFEST_TYPE)
LAYER_COMPRESSIONS: Final[dict[str, str]] = {
    LAYER_TYPE: "",
    f"{LAYER_TYPE}+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar": "",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}
NAME_ANNOTATION: Final = "org.opencontainers.image.ref.name"

LARGEST_DOCUMENT: Final = 4 << 20
"""Bytes of an index, manifest or configuration."""

MOST_LAYERS: Final = 127
"""Of one image; the same as Docker's."""

_DIGEST: Final = r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}"
_ARCHITECTURE_NAMES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


class OciError(KataLabError):
    """An image that cannot be found, read, verified or unpacked."""


@dataclass(frozen=True)
class Descriptor:
    """What points to a blob.

    Args:
        media_type: what the blob is.
        digest: ``sha256:…`` or ``sha512:…`` of the blob.
        size: bytes of the blob.
        annotations: anything more, by name.
        platform: ``architecture`` and more, in an index.
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Descriptor:
        """From JSON that has the form."""
        return cls(
            plain["mediaType"], plain["digest"], plain["size"], plain.get("annotations", {}), plain.get("platform", {})
        )

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.platform:
            found["platform"] = dict(self.platform)
        return found

    @property
    def architecture(self) -> str:
        """As Debian and Go name it; empty when the descriptor does not say."""
        name = str(self.platform.get("architecture", ""))
        return _ARCHITECTURE_NAMES.get(name, name)


@dataclass(frozen=True)
class Manifest:
    """One image for one architecture: its configuration and its layers, lowest first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self.config.plain(),
            "layers": [each.plain() for each in self.layers],
        }
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found


@dataclass(frozen=True)
class ImageConfig:
    """What an image wants of whoever runs it (config.md).

    Args:
        architecture: that its programs are for, as Go names it (``riscv64``, ``amd64``).
        diff_ids: digests of the unpacked layers, lowest first.
        entrypoint, cmd: the program and its arguments; the user's own arguments replace `cmd`.
        env: each ``NAME=value``.
        user: ``name|uid[:group|gid]``, or empty for root.
        working_directory: absolute, or empty for ``/``.
        labels: anything more, by name.
        stop_signal: how the program wants to be asked to end, such as ``SIGTERM``; empty when it does not say.
    """

    architecture: str
    diff_ids: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    working_directory: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = ""
    os: str = "linux"


def sha256_digest(data: bytes) -> str:
    """The digest of a blob, as descriptors write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blob_path(digest: str) -> Path:
    """Where a layout keeps a blob, relative to its directory."""
    algorithm, _, encoded = digest.partition(":")
    return Path("blobs", algorithm, encoded)


def parse_index(data: bytes, origin: str) -> tuple[Descriptor, ...]:
    """The descriptors in an index.

    Raises:
        OciError: it is something else; `origin` names it in the message.
    """
    plain = _parsed(_index, data, origin)
    return tuple(Descriptor.parse(each) for each in plain["manifests"])


def parse_manifest(data: bytes, origin: str) -> Manifest:
    """A manifest.

    Raises:
        OciError: it is something else, has too many layers, or layers of a kind that cannot be unpacked.
    """
    plain = _parsed(_manifest, data, origin)
    manifest = Manifest(
        Descriptor.parse(plain["config"]),
        tuple(Descriptor.parse(each) for each in plain["layers"]),
        plain.get("annotations", {}),
    )
    for index, layer in enumerate(manifest.layers):
        if layer.media_type not in LAYER_COMPRESSIONS:
            raise OciError(
                f"{origin}: $.layers[{index}].mediaType is {layer.media_type!r}: it must be a tar archive, plain or "
                "with gzip (convert others with skopeo copy --dest-compress-format gzip)"
            )
    return manifest


def parse_config(data: bytes, origin: str) -> ImageConfig:
    """An image's configuration.

    Raises:
        OciError: it is something else.
    """
    plain = _parsed(_config, data, origin)
    run = plain.get("config") or {}
    return ImageConfig(
        architecture=_ARCHITECTURE_NAMES.get(plain["architecture"], plain["architecture"]),
        diff_ids=tuple(plain["rootfs"]["diff_ids"] or ()),
        entrypoint=tuple(run.get("Entrypoint") or ()),
        cmd=tuple(run.get("Cmd") or ()),
        env=tuple(run.get("Env") or ()),
        user=run.get("User") or "",
        working_directory=run.get("WorkingDir") or "",
        labels=run.get("Labels") or {},
        stop_signal=run.get("StopSignal") or "",
        os=plain["os"],
    )


def parse_docker_manifest(data: bytes, origin: str) -> tuple[dict[str, Any], ...]:
    """The images in the ``manifest.json`` of an archive that ``docker save`` wrote: Config, Layers and RepoTags.

    Raises:
        OciError: it is something else.
    """
    return tuple(_parsed(_docker_manifest, data, origin))


def _parsed(check: Check, data: bytes, origin: str) -> Any:
    try:
        plain = parse_json(data, origin, LARGEST_DOCUMENT)
    except ShapeError as error:
        raise OciError(str(error)) from error
    try:
        check(plain, "$")
    except ShapeError as error:
        raise OciError(f"{origin}: {error}") from error
    return plain


def _nullable(check: Check) -> Check:
    """What Go writes as null when it is empty."""

    def checked(value: Any, path: str) -> None:
        if value is not None:
            check(value, path)

    return checked


_digest = matching(_DIGEST, "it must be sha256: or sha512: with the hexadecimal digits of a hash")
_texts = map_of(text(), text(longest=1 << 18))
_descriptor = record(
    {
        "mediaType": text(empty=False),
        "digest": _digest,
        "size": whole(0, INT64),
        "annotations": _nullable(_texts),
        "platform": _nullable(record({"architecture": text(), "os": text()}, open_ended=True)),
    },
    required=("mediaType", "digest", "size"),
    open_ended=True,
)
_index = record(
    {"schemaVersion": whole(2, 2), "manifests": list_of(_descriptor)},
    required=("schemaVersion", "manifests"),
    open_ended=True,
)
_manifest = record(
    {
        "schemaVersion": whole(2, 2),
        "config": _descriptor,
        "layers": list_of(_descriptor, most=MOST_LAYERS),
        "annotations": _nullable(_texts),
    },
    required=("schemaVersion", "config", "layers"),
    open_ended=True,
)
_arguments = _nullable(list_of(text(longest=1 << 17)))
_config = record(
    {
        "architecture": text(empty=False),
        "os": text(empty=False),
        "rootfs": record(
            {"diff_ids": _nullable(list_of(_digest, most=MOST_LAYERS))}, required=("diff_ids",), open_ended=True
        ),
        "config": _nullable(
            record(
                {
                    "Entrypoint": _arguments,
                    "Cmd": _arguments,
                    "Env": _arguments,
                    "User": text(),
                    "WorkingDir": text(),
                    "Labels": _nullable(_texts),
                    "StopSignal": text(),
                },
                open_ended=True,
            )
        ),
    },
    required=("architecture", "os", "rootfs"),
    open_ended=True,
)
_docker_manifest = list_of(
    record(
        {
            "Config": text(empty=False),
            "Layers": _nullable(list_of(text(empty=False), most=MOST_LAYERS)),
            "RepoTags": _nullable(list_of(text(empty=False))),
        },
        required=("Config", "Layers"),
        open_ended=True,
    )
)


def is_digest(value: str) -> bool:
    """Whether a text is a digest."""
    return re.fullmatch(_DIGEST, value) is not None
