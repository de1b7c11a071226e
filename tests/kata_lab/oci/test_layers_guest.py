"""Layers under a guest's own overlayfs, read through virtio-fs, as the root of a container is."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.oci import unpack_rootfs
from kata_lab.shell import GuestShell, boot_image
from tests.kata_lab.oci.layer_cases import base, opened, random_layers, upper
from vmm.config import FsConfig

LIST = r"""cd /merged && find . ! -name . | while IFS= read -r name; do
    if [ -L "$name" ]; then echo "$name link $(readlink "$name")"
    elif [ -d "$name" ]; then echo "$name directory"
    elif [ -p "$name" ]; then echo "$name pipe"
    elif [ -f "$name" ]; then echo "$name file $(sha256sum < "$name" | cut -c1-64)"
    else echo "$name other"; fi
done"""


class Guest:
    """A guest that shares a directory with us."""

    def __init__(self, shell: GuestShell, share: Path) -> None:
        self.shell = shell
        self.share = share

    def shown(self, layers: list[Path], options: tuple[str, ...]) -> list[str]:
        """What the guest sees in an overlay of layers, whose upper directory is empty."""
        lower = ":".join(f"/share/{each.relative_to(self.share)}" for each in reversed(layers))
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
    with boot_image("toolbox", devices=[FsConfig(name="share", path=share, tag="share")], memory_mib=256) as (_, shell):
        shell.run("mkdir -p /share && mount -t virtiofs share /share", check=True)
        yield Guest(shell, share)


def _expected(root: Path) -> list[str]:
    found = []
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            what = f"link {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            what = f"file {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            what = "directory" if stat.S_ISDIR(mode) else "pipe"
        found.append(f"./{path.relative_to(root)} {what}")
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

            shown = guest.shown(image.layers(), image.overlay_options)

        assert shown == _expected(tmp_path / f"flat{number}")
