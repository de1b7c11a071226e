"""Layers under a guest's own overlayfs, read through virtio-fs, as the root of a container is."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kata_lab.oci import ImageHandle, unpack_rootfs
from kata_lab.oci.attributes import read_attributes
from kata_lab.shell import GuestShell, boot_image
from tests.kata_lab.oci.layer_cases import base, opened, random_layers, upper
from vmm.config import FsConfig
from vmm.devices.virtio.fs.device import FsDevice

LIST = r"""cd /merged && find . ! -name . | while IFS= read -r name; do
    owned=$(stat -c '%u:%g %a' "$name")
    if [ -L "$name" ]; then echo "$name  link $(readlink "$name")"
    elif [ -d "$name" ]; then echo "$name $owned directory"
    elif [ -p "$name" ]; then echo "$name $owned pipe"
    elif [ -f "$name" ]; then echo "$name $owned file $(sha256sum < "$name" | cut -c1-64)"
    else echo "$name $owned other"; fi
done"""


class Guest:
    """A guest that shares a directory with us."""

    def __init__(self, shell: GuestShell, device: FsDevice, share: Path) -> None:
        self.shell = shell
        self.device = device
        self.share = share
        self._count = 0

    def shown(self, image: ImageHandle) -> list[str]:
        """What the guest sees in an overlay of an image's layers, whose upper directory is empty."""
        with ExitStack() as removed:
            names = []
            for layer in image.layers():
                self._count += 1
                names.append(f"layer{self._count}")
                self.device.add(names[-1], layer, read_only=True, override_stat=image.override_stat)
                removed.callback(self.device.remove, names[-1])
            return self._listed([f"/share/{name}" for name in reversed(names)], image)

    def _listed(self, layers: list[str], image: ImageHandle) -> list[str]:
        lower, options = ":".join(layers), image.overlay_options
        mount = ",".join([*options, f"lowerdir={lower}", "upperdir=/scratch/upper", "workdir=/scratch/work"])
        self.shell.run(
            "mkdir -p /scratch /merged && mount -t tmpfs none /scratch && mkdir /scratch/upper /scratch/work && "
            f"mount -t overlay -o {mount} none /merged",
            check=True,
        )
        try:
            return sorted(self.shell.run(LIST, check=True).output.splitlines())
        finally:
            self.shell.run("cd /; umount /merged; umount /scratch", check=True)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    share = tmp_path_factory.mktemp("share")
    with boot_image("toolbox", devices=[FsConfig(name="share", path=None, tag="share")], memory_mib=256) as (vm, shell):
        shell.run("mkdir -p /share && mount -t virtiofs share /share", check=True)
        device = vm.machine.device("share")
        assert isinstance(device, FsDevice)
        yield Guest(shell, device, share)


def _expected(root: Path, mapped: bool) -> list[str]:
    found = []
    for path in root.rglob("*"):
        attributes = read_attributes(path, mapped)
        if stat.S_ISLNK(attributes.mode):
            what = f"link {os.readlink(path)}"
        elif stat.S_ISREG(attributes.mode):
            what = f"file {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            what = "directory" if stat.S_ISDIR(attributes.mode) else "pipe"
        owned = f"{attributes.uid}:{attributes.gid} {stat.S_IMODE(attributes.mode):o}"
        found.append(f"./{path.relative_to(root)} {'' if stat.S_ISLNK(attributes.mode) else owned} {what}")
    return sorted(found)


@pytest.mark.parametrize("whiteouts", ["devices", "attributes"])
def test_guest_shows_layers_as_they_are_flattened(
    guest: Guest, whiteouts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(guest.share / whiteouts))
    if whiteouts == "attributes":  # as where whiteouts cannot be devices

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "mknod", refuse)
    stacks = [(base, upper), tuple(random_layers(1)), tuple(random_layers(2)), tuple(random_layers(3))]

    for number, fills in enumerate(stacks):
        with opened(tmp_path / f"layout{number}", *fills) as image:
            unpack_rootfs(image, tmp_path / f"flat{number}")

            shown = guest.shown(image)
            expected = _expected(tmp_path / f"flat{number}", image.override_stat)

        assert shown == expected
