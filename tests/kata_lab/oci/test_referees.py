"""Layouts against skopeo and umoci, and unpacked layers against umoci and the kernel's own overlayfs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kata_lab.oci import open_image, unpack_rootfs
from kata_lab.oci.attributes import read_attributes
from kata_lab.oci.descriptor import blob_path
from kata_lab.oci.layers import LayerSource, LayerStore
from kata_lab.oci.unpack import OVERLAY_OPTIONS
from kata_lab.oci.writer import LayerArchive
from tests.kata_lab.oci.conftest import need
from tests.kata_lab.oci.layer_cases import base, described, layout, opened, random_layers, upper

IS_ROOT = os.geteuid() == 0
Tree = dict[str, tuple[object, ...]]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _umoci(reference: str, bundle: Path) -> Path:
    options = [] if IS_ROOT else ["--rootless"]
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


def _comparable(tree: Tree) -> Tree:
    """Of a tree what whoever runs the test can keep: root all, somebody else only what is in files and links."""
    if IS_ROOT:
        return tree
    kept = ("0o100", "0o40", "0o12")
    return {path: entry[4:5] for path, entry in tree.items() if str(entry[0]).startswith(kept)}


def test_unpacked_as_umoci_does(tmp_path: Path) -> None:
    def devices(layer: LayerArchive) -> None:
        if IS_ROOT:
            layer.device("dev/null", "c", 1, 3, 0o666)
            layer.device("dev/disk", "b", 7, 300)
        capability = bytes.fromhex("0100000200040000000000000000000000000000")
        layer.file("bin/ping", b"ping", 0o755, xattrs={"security.capability": capability})

    image = opened(tmp_path / "layout", base, upper, devices)

    with image:
        unpack_rootfs(image, tmp_path / "ours")
        ours = described(tmp_path / "ours", image.override_stat, times=True)

    assert _comparable(ours) == _comparable(described(_umoci(image.reference, tmp_path / "bundle"), times=True))


@pytest.mark.parametrize("seed", range(12))
def test_random_layers_are_unpacked_as_umoci_does(tmp_path: Path, seed: int) -> None:
    image = opened(tmp_path / "layout", *random_layers(seed))

    with image:
        unpack_rootfs(image, tmp_path / "ours")
        ours = described(tmp_path / "ours", image.override_stat)

    assert _comparable(ours) == _comparable(described(_umoci(image.reference, tmp_path / "bundle")))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("devices", [True, False], ids=["devices", "attributes"])
def test_layers_are_shown_as_they_are_flattened(
    tmp_path: Path, seed: int, devices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root by the kernel's overlayfs, which nobody else can mount; by our own look-up in any case."""
    if not devices:  # as where whiteouts cannot be devices

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "mknod", refuse)
    image = opened(tmp_path / "layout", *random_layers(seed))

    with image:
        unpack_rootfs(image, tmp_path / "flat")
        flat = described(tmp_path / "flat", image.override_stat)
        if IS_ROOT:
            with _overlay(image.layers(), tmp_path / "overlay") as merged:
                assert described(merged, image.override_stat) == flat
        tree = image.tree()
        for path, entry in flat.items():
            found = tree.attributes(path)
            assert found is not None
            assert (oct(found.mode), found.uid, found.gid) == entry[:3]
        for layer in image.layers():
            for each in layer.rglob("*"):
                path = str(each.relative_to(layer))
                assert (tree.find(path) is not None) == (path in flat)


@pytest.mark.parametrize("seed", range(6))
def test_mapped_layers_say_what_the_archives_say(tmp_path: Path, seed: int) -> None:
    def special(layer: LayerArchive) -> None:
        base(layer)
        layer.device("dev/null", "c", 1, 3, 0o666)
        layer.device("dev/disk", "b", 259, 300)

    image = opened(tmp_path / "layout", special, *random_layers(seed))
    layers = [LayerSource(*each) for each in zip(image.manifest.layers, image.config.diff_ids, strict=True)]

    with image, LayerStore(mapped=True).ensure(image.source, layers) as mapped:
        for place, layer in zip(mapped.paths, layers, strict=True):
            with tarfile.open(tmp_path / "layout" / blob_path(layer.blob.digest)) as archive:
                last = {each.name: each for each in archive if ".wh." not in each.name and not each.islnk()}
            for name, member in last.items():
                found = read_attributes(place / name, mapped=True)
                if member.issym():
                    assert (found.uid, found.gid, os.readlink(place / name)) == (0, 0, member.linkname)
                else:
                    assert (found.uid, found.gid, found.mode & 0o7777) == (member.uid, member.gid, member.mode)
                    assert (stat.S_ISCHR(found.mode), stat.S_ISBLK(found.mode)) == (member.ischr(), member.isblk())
                    assert (stat.S_ISDIR(found.mode), stat.S_ISFIFO(found.mode)) == (member.isdir(), member.isfifo())
                    assert found.device == os.makedev(member.devmajor, member.devminor)
