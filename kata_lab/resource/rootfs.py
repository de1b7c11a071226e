"""Root file systems of containers, and how they get into the guest.

``split`` is RunD's way (RunD, USENIX ATC 2022, 4.1): the layers of an image are read-only directories of the host,
shared by virtio-fs among all containers, and what a container writes goes to a disk of its sandbox; the guest overlays
the one with the other. ``fs`` is one directory of the host, shared as it is. ``block`` is a disk with an image's files
(:mod:`kata_lab.resource.image_disk`), read-only, overlaid in the same way; it is there when the VM starts, so that a
sandbox's images are known before.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

SHARED: Final = "/run/kata-containers/shared/containers"  #: where the guest mounts the shared directory
SCRATCH: Final = "/run/kata-containers/scratch"  #: where it mounts the disk for what containers write
IMAGES: Final = "/run/kata-containers/images"  #: where it mounts disks of images, by their serial numbers
CONTAINERS: Final = "/run/kata-containers"


class Shares(Protocol):
    """Who makes directories of the host appear in the guest's shared directory."""

    async def share(self, name: str, path: Path, read_only: bool, override_stat: bool = False) -> str:
        """Returns the path in the guest. The same name may be shared several times, by the same path."""
        ...

    async def unshare(self, name: str) -> None:
        """Undo one :meth:`share`."""
        ...


Writes = Literal["own", "kept", "last"]
"""What a container writes is its own, and gone with it; or kept for the next one of the same name and layers, which
sees it; or there from the one before, and gone with this one."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A root file system in the guest.

    Attributes:
        path: where it is there.
        storages: what the agent mounts before, in this order (``Storage`` of agent.proto).
        shares: names to unshare when the container is gone.
        own: what is written to it is the container's alone, so that files may be made in it to mount something over.
    """

    path: str
    storages: list[dict[str, Any]] = field(default_factory=list)
    shares: tuple[str, ...] = ()
    own: bool = True


@dataclass(frozen=True, slots=True)
class LayeredRoot:
    """RunD's split.

    Attributes:
        layers: read-only directories of the host, the lowest first.
        override_stat: owner and mode of their files are in an extended attribute.
        options: with which the overlay must be mounted, besides its directories.
        writes: what becomes of what the container writes.
    """

    layers: Sequence[Path]
    override_stat: bool = False
    options: Sequence[str] = ()
    writes: Writes = "own"

    async def attach(self, container_id: str, shares: Shares) -> Attached:
        """Make it available to the guest."""
        names: list[str] = []
        lower: list[str] = []
        try:
            for layer in self.layers:
                # A name for each place, so that containers share what they have in common.
                name = f"layer-{hashlib.sha256(bytes(layer)).hexdigest()[:12]}"
                lower.append(await shares.share(name, layer, True, self.override_stat))
                names.append(name)
        except BaseException:
            for name in names:
                await shares.unshare(name)
            raise
        if self.writes == "own":
            return _overlaid(container_id, lower, self.options, tuple(names))
        # Under what was written there must be the same files as before.
        mark = hashlib.sha256(b"\0".join(map(bytes, self.layers))).hexdigest()[:8]
        return _overlaid(container_id, lower, self.options, tuple(names), mark, self.writes == "kept")


@dataclass(frozen=True, slots=True)
class DirectoryRoot:
    """One directory of the host.

    Attributes:
        path: the directory.
        read_only: nothing is written to it: not by the guest either, which makes places to mount on in an overlay.
        override_stat: owner and mode of its files are in an extended attribute.
    """

    path: Path
    read_only: bool = False
    override_stat: bool = False

    async def attach(self, container_id: str, shares: Shares) -> Attached:
        """Make it available to the guest."""
        name = f"{container_id}-rootfs"
        inside = await shares.share(name, self.path, self.read_only, self.override_stat)
        if self.read_only:
            return _overlaid(container_id, [inside], (), (name,))
        return Attached(inside, [], (name,), own=False)


@dataclass(frozen=True, slots=True)
class BlockRoot:
    """A disk with an image's files, which the sandbox has mounted.

    Attributes:
        serial: the disk's serial number.
    """

    serial: str

    async def attach(self, container_id: str, shares: Shares) -> Attached:
        """Make it available to the guest."""
        return _overlaid(container_id, [f"{IMAGES}/{self.serial}"], (), ())


def _overlaid(
    container_id: str,
    lower: Sequence[str],
    options: Sequence[str],
    shares: tuple[str, ...],
    mark: str = "",
    kept: bool = False,
) -> Attached:
    """Directories of the guest, the lowest first, under what the container writes to the sandbox's disk.

    Args:
        container_id: its name.
        lower: the directories.
        options: of the overlay.
        shares: names to unshare.
        mark: containers of one name and mark see what the others wrote; empty for one of its own.
        kept: what is written stays when the container goes.
    """
    place, own = f"{CONTAINERS}/{container_id}/rootfs", f"{SCRATCH}/{container_id}.{mark or secrets.token_hex(4)}"
    directories = [f"lowerdir={':'.join(reversed(lower))}", f"upperdir={own}-upper", f"workdir={own}-work"]
    overlay = {
        "driver": "overlayfs",
        "driver_options": ["keep"] if kept else [],
        "source": "overlay",
        "fstype": "overlay",
        "options": [*directories, *options],
        "mount_point": place,
    }
    return Attached(place, [overlay], shares)


RootFs = LayeredRoot | DirectoryRoot | BlockRoot
