"""Layouts against skopeo and umoci, and unpacked layers against umoci and the kernel's own overlayfs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kata_lab.oci import open_image, unpack_rootfs
from kata_lab.oci.layers import LayerSource, LayerStore
from kata_lab.oci.unpack import OVERLAY_OPTIONS
from kata_lab.oci.writer import LayerArchive
from tests.kata_lab.oci.conftest import need
from tests.kata_lab.oci.layer_cases import base, described, layout, opened, random_layers, upper


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _umoci(reference: str, bundle: Path) -> Path:
    options = [] if os.geteuid() == 0 else ["--rootless"]
    _run(need("umoci"), "unpack", *options, "--image", reference.removeprefix("oci:"), str(bundle))
    return bundle / "rootfs"


@contextmanager
def _overlay(layers: list[Path], place: Path) -> Iterator[Path]:
    """The layers as the kernel shows them, under an empty upper directory."""
    for name in ("upper", "work", "merged"):
        (place / name).mkdir(parents=True)
    lower = ":".join(str(each) for each in reversed(layers))
    options = f"{','.join(OVERLAY_OPTIONS)},lowerdir={lower},upperdir={place}/upper,workdir={place}/work"
    _run("mount", "-t", "overlay", "overlay", "-o", options, str(place / "merged"))
    try:
        yield place / "merged"
    finally:
        _run("umount", str(place / "merged"))


def test_skopeo_reads_our_layout_as_we_do(tmp_path: Path) -> None:
    reference = layout(tmp_path / "layout", base, upper)

    told = json.loads(_run(need("skopeo"), "--override-arch", "riscv64", "inspect", reference))

    with open_image(reference) as image:
        assert told["Digest"] == image.digest
        assert told["Architecture"] == "riscv64"
        assert told["Layers"] == [each.digest for each in image.manifest.layers]


@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive"])
def test_image_comes_back_from_skopeo_the_same(tmp_path: Path, transport: str) -> None:
    reference = layout(tmp_path / "layout", base, upper)
    name = ":lab/test:1.0" if transport == "docker-archive" else ":test"
    archive = f"{transport}:{tmp_path}/image.tar{name}"
    skopeo = [need("skopeo"), "--override-arch", "riscv64", "--insecure-policy", "copy"]

    _run(*skopeo, reference, archive)
    _run(*skopeo, archive, f"oci:{tmp_path}/back:test")

    with (
        open_image(reference) as ours,
        open_image(archive) as archived,
        open_image(f"oci:{tmp_path}/back:test") as back,
    ):
        assert archived.config.diff_ids == back.config.diff_ids == ours.config.diff_ids
        assert archived.layers() == back.layers() == ours.layers()


def test_unpacked_as_umoci_does(tmp_path: Path, root: None) -> None:
    def devices(layer: LayerArchive) -> None:
        layer.device("dev/null", "c", 1, 3, 0o666)
        layer.device("dev/disk", "b", 7, 300)
        capability = bytes.fromhex("0100000200040000000000000000000000000000")
        layer.file("bin/ping", b"ping", 0o755, xattrs={"security.capability": capability})

    image = opened(tmp_path / "layout", base, upper, devices)

    with image:
        unpack_rootfs(image, tmp_path / "ours")

    theirs = _umoci(image.reference, tmp_path / "bundle")
    assert described(tmp_path / "ours", times=True) == described(theirs, times=True)


@pytest.mark.parametrize("seed", range(12))
def test_random_layers_are_unpacked_as_umoci_does(tmp_path: Path, root: None, seed: int) -> None:
    image = opened(tmp_path / "layout", *random_layers(seed))

    with image:
        unpack_rootfs(image, tmp_path / "ours")

    assert described(tmp_path / "ours") == described(_umoci(image.reference, tmp_path / "bundle"))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("devices", [True, False], ids=["devices", "attributes"])
def test_kernel_shows_the_layers_as_they_are_flattened(
    tmp_path: Path, root: None, seed: int, devices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not devices:  # as where whiteouts cannot be devices

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "mknod", refuse)
    image = opened(tmp_path / "layout", *random_layers(seed))

    with image:
        unpack_rootfs(image, tmp_path / "flat")
        with _overlay(image.layers(), tmp_path / "overlay") as merged:
            shown = described(merged, image.override_stat)

    assert image.override_stat is False or not devices
    assert shown == described(tmp_path / "flat", not devices)


@pytest.mark.parametrize("seed", range(6))
def test_mapped_layers_say_what_owned_layers_have(tmp_path: Path, root: None, seed: int) -> None:
    image = opened(tmp_path / "layout", base, upper, *random_layers(seed))
    layers = [LayerSource(*each) for each in zip(image.manifest.layers, image.config.diff_ids, strict=True)]

    with (
        image,
        LayerStore(mapped=False).ensure(image.source, layers) as owned,
        LayerStore(mapped=True).ensure(image.source, layers) as mapped,
    ):
        for one, other in zip(owned.paths, mapped.paths, strict=True):
            assert _without_owners_of_links(described(other, mapped=True)) == _without_owners_of_links(described(one))


def _without_owners_of_links(tree: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """Of what is said of links, which keep no attributes, only where they lead."""
    return {path: entry[4:5] if str(entry[0]).startswith("0o12") else entry for path, entry in tree.items()}


def test_somebody_else_than_root_unpacks_as_umoci_does(tmp_path: Path) -> None:
    image = opened(tmp_path / "layout", base, upper)

    with image:
        unpack_rootfs(image, tmp_path / "ours")

    ours = described(tmp_path / "ours", image.override_stat)
    theirs = described(_umoci(image.reference, tmp_path / "bundle"))
    assert {path: entry[4] for path, entry in ours.items()} == {path: entry[4] for path, entry in theirs.items()}
