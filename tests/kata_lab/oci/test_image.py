"""Images are found by reference, tag and architecture, and everything of them is verified while it is read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kata_lab.oci import OciError, open_image
from kata_lab.oci.descriptor import Descriptor, ImageConfig
from kata_lab.oci.writer import ImageWriter, LayerArchive, WrittenLayer
from tests.kata_lab.oci.layer_cases import base, layout, opened, upper


def _archive(directory: Path, file: Path, mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        archive.add(directory, ".")
    return file


def _layer(writer: ImageWriter, text: bytes = b"") -> WrittenLayer:
    archive = LayerArchive()
    archive.file("file", text)
    return writer.layer(archive.finish())


def test_configuration_is_what_was_written(tmp_path: Path) -> None:
    writer = ImageWriter(tmp_path / "layout")
    run = {
        "Entrypoint": ["/init"],
        "Cmd": ["one", "two"],
        "Env": ["A=b"],
        "User": "nobody",
        "WorkingDir": "/srv",
        "Labels": {"note": "text"},
        "StopSignal": "SIGQUIT",
    }
    layer = _layer(writer)
    writer.tag(writer.image([layer], run), "1.0")

    with open_image(f"oci:{tmp_path}/layout:1.0") as image:
        assert image.config == ImageConfig(
            architecture="riscv64",
            diff_ids=(layer.diff_id,),
            entrypoint=("/init",),
            cmd=("one", "two"),
            env=("A=b",),
            user="nobody",
            working_directory="/srv",
            labels={"note": "text"},
            stop_signal="SIGQUIT",
        )
        assert image.architecture == "riscv64"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("form", ["oci-archive:{}", "oci-archive:{}:test", "{}", "{}:test"])
def test_archive_of_a_layout_is_the_same_image(tmp_path: Path, mode: str, form: str) -> None:
    reference = layout(tmp_path / "layout", base, upper)
    archive = _archive(tmp_path / "layout", tmp_path / "with:colon.tar", mode)

    with open_image(reference) as expected, open_image(form.format(archive)) as image:
        assert image.digest == expected.digest
        assert image.layers() == expected.layers()


def test_plain_and_compressed_layers_are_the_same_layer(tmp_path: Path) -> None:
    plain = layout(tmp_path / "plain", base, compress=False)
    packed = layout(tmp_path / "packed", base)

    with open_image(plain) as one, open_image(packed) as other:
        assert one.digest != other.digest
        assert one.layers() == other.layers()


def test_layer_is_shared_by_images_with_the_same_base(tmp_path: Path) -> None:
    with opened(tmp_path / "one", base) as one, opened(tmp_path / "two", base, upper) as two:
        assert one.layers() == two.layers()[:1]


def test_equal_inputs_give_equal_images(tmp_path: Path) -> None:
    with opened(tmp_path / "one", base, upper) as one, opened(tmp_path / "two", base, upper) as two:
        assert one.digest == two.digest


def _several(directory: Path, *architectures: str, platform: bool = True, nested: bool = False) -> None:
    writer = ImageWriter(directory)
    images = [writer.image([_layer(writer, each.encode())], architecture=each) for each in architectures]
    if not platform:
        images = [replace(each, platform={}) for each in images]
    index = writer.index(images)
    writer.tag(writer.index([index]) if nested else index, "several")


@pytest.mark.parametrize("platform", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_image_for_the_guest_is_chosen_of_several(tmp_path: Path, platform: bool, nested: bool) -> None:
    _several(tmp_path / "layout", "amd64", "riscv64", "arm64", platform=platform, nested=nested)

    with open_image(f"oci:{tmp_path}/layout") as image, open_image(f"oci:{tmp_path}/layout", "arm64") as other:
        assert image.read("file") == b"riscv64"
        assert other.read("file") == b"arm64"


@pytest.mark.parametrize("platform", [True, False])
def test_existing_architectures_are_named(tmp_path: Path, platform: bool) -> None:
    _several(tmp_path / "layout", "amd64", "arm64", platform=platform)

    with pytest.raises(OciError, match=r"not there for riscv64: there is amd64, arm64"):
        open_image(f"oci:{tmp_path}/layout")


def test_tag_must_be_chosen_of_several(tmp_path: Path) -> None:
    layout(tmp_path / "layout", base, tag="one")
    layout(tmp_path / "layout", upper, tag="two")

    with pytest.raises(OciError, match="several images: choose one of its tags, one, two"):
        open_image(f"oci:{tmp_path}/layout")
    with pytest.raises(OciError, match="no image with the tag 'three': it has 'one', 'two'"):
        open_image(f"oci:{tmp_path}/layout:three")
    with open_image(f"oci:{tmp_path}/layout:two") as image:
        assert image.read("home/user/new") == b"new"


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("oci:", "names no file"),
        ("oci:/nowhere", "no file or directory '/nowhere'"),
        ("/nowhere", "no file or directory"),
        ("Not A Name", "is no name of an image"),
        ("", "is no name of an image"),
        ("busybox", "no image 'busybox' in the local store: there is none yet"),
        ("sha256:" + "0" * 64, "in the local store"),
    ],
)
def test_reference_to_nothing_is_refused(reference: str, complaint: str) -> None:
    with pytest.raises(OciError, match=complaint):
        open_image(reference)


def test_directory_that_is_no_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(OciError, match="is no OCI image layout: it has no oci-layout"):
        open_image(f"oci:{tmp_path}/empty")


@pytest.mark.parametrize("content", [b"", b"no archive at all" * 100, b"\x1f\x8bdamaged"])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.tar").write_bytes(content)

    with pytest.raises(OciError, match=r"no tar archive|cannot be unpacked|neither"):
        open_image(str(tmp_path / "file.tar"))


def test_layout_and_archive_are_told_apart(tmp_path: Path) -> None:
    layout(tmp_path / "layout", base)
    archive = _archive(tmp_path / "layout", tmp_path / "file.tar")

    with pytest.raises(OciError, match="is a directory"):
        open_image(f"oci-archive:{tmp_path}/layout")
    with pytest.raises(OciError, match="is a file"):
        open_image(f"oci:{archive}")


def _blob(directory: Path, digest: str) -> Path:
    return directory / "blobs" / digest.replace(":", "/")


@pytest.mark.parametrize("kind", ["manifest", "config", "layer"])
@pytest.mark.parametrize("damage", ["flip", "append", "cut", "remove", "link"])
def test_blob_that_is_not_what_it_should_be_is_refused(tmp_path: Path, kind: str, damage: str) -> None:
    reference = layout(tmp_path / "layout", base, compress=False)
    with open_image(reference) as image:
        digest = {
            "manifest": image.digest,
            "config": image.manifest.config.digest,
            "layer": image.manifest.layers[0].digest,
        }[kind]
    path = _blob(tmp_path / "layout", digest)
    data = path.read_bytes()
    path.unlink()
    match damage:
        case "flip":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "append":
            path.write_bytes(data + b" ")
        case "cut":
            path.write_bytes(data[:-1])
        case "link":
            (tmp_path / "elsewhere").write_bytes(data)
            path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OciError, match=digest.partition(":")[2]) as caught, open_image(reference) as image:
        image.layers()

    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "home/cache").glob("layers/v1/[0-9a-f]*"))


def test_layer_that_unpacks_to_something_else_is_refused(tmp_path: Path) -> None:
    writer = ImageWriter(tmp_path / "layout")
    layer = replace(_layer(writer), diff_id="sha256:" + "5" * 64)
    writer.tag(writer.image([layer]), "test")

    with open_image(f"oci:{tmp_path}/layout") as image, pytest.raises(OciError, match="wants 5555"):
        image.layers()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda plain: plain.update(schemaVersion=1), r"\$\.schemaVersion is 1"),
        (
            lambda plain: plain["layers"][0].update(digest="sha256:short"),
            r"\$\.layers\[0\]\.digest is \"sha256:short\"",
        ),
        (lambda plain: plain["layers"][0].update(digest="sha256:../../../etc/passwd"), r"\$\.layers\[0\]\.digest"),
        (lambda plain: plain["layers"][0].update(size=-1), r"\$\.layers\[0\]\.size is -1"),
        (
            lambda plain: plain["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar+zstd"),
            r"\$\.layers\[0\]\.mediaType is .*zstd.* plain or with gzip",
        ),
        (lambda plain: plain.update(layers=plain["layers"] * 200), r"\$\.layers is a list of 200"),
        (lambda plain: plain.update(layers=plain["layers"] * 2), "2 layers and its configuration 1"),
        (lambda plain: plain.pop("config"), "has no field 'config'"),
        (lambda plain: plain["config"].update(size=1 << 40), "a .*config.* has at most 4194304"),
    ],
)
def test_manifest_with_a_mistake_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    reference = layout(tmp_path / "layout", base)
    with open_image(reference) as image:
        plain = image.manifest.plain()
    change(plain)
    writer = ImageWriter(tmp_path / "layout")
    writer.tag(writer.blob("application/vnd.oci.image.manifest.v1+json", json.dumps(plain).encode()), "test")

    with pytest.raises(OciError, match=complaint):
        open_image(reference)


def test_layer_with_zstd_under_another_name_is_refused(tmp_path: Path) -> None:
    writer = ImageWriter(tmp_path / "layout")
    blob = writer.blob("application/vnd.oci.image.layer.v1.tar", b"\x28\xb5\x2f\xfd" + bytes(100))
    writer.tag(writer.image([WrittenLayer(blob, "sha256:" + "0" * 64)]), "test")

    with open_image(f"oci:{tmp_path}/layout") as image, pytest.raises(OciError, match="compressed with zstd"):
        image.layers()


def _docker(path: Path, *, packed: bool = False, change: Callable[[dict[str, bytes]], object] | None = None) -> str:
    """What docker save writes, with one image of two layers."""
    layers = []
    for fill in (base, upper):
        archive = LayerArchive()
        fill(archive)
        layers.append(archive.finish())
    config = json.dumps(
        {
            "architecture": "riscv64",
            "os": "linux",
            "config": {"Cmd": ["sh"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers],
            },
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    files = {f"{number}/layer.tar": gzip.compress(each) if packed else each for number, each in enumerate(layers)}
    files[name] = config
    manifest = [{"Config": name, "RepoTags": ["lab/thing:2.0"], "Layers": ["0/layer.tar", "1/layer.tar"]}]
    files["manifest.json"] = json.dumps(manifest).encode()
    if change is not None:
        change(files)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("form", ["docker-archive:{}", "docker-archive:{}:lab/thing:2.0", "{}"])
def test_saved_image_is_read(tmp_path: Path, packed: bool, form: str) -> None:
    path = _docker(tmp_path / "saved.tar", packed=packed)

    with open_image(form.format(path)) as image, opened(tmp_path / "layout", base, upper) as same:
        assert image.config.cmd == ("sh",)
        assert image.layers() == same.layers()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda files: files.pop("1/layer.tar"), "has no layer '1/layer.tar'"),
        (lambda files: files.update({"1/layer.tar": files["0/layer.tar"]}), "configuration wants"),
        (lambda files: files.pop("manifest.json"), "neither oci-layout nor manifest.json"),
        (lambda files: files.update({"manifest.json": b"[]"}), "has 0 images"),
        (lambda files: files.update({"manifest.json": b"[{}]"}), "has no field 'Config'"),
        (
            lambda files: files.update(
                {name: data + b" " for name, data in files.items() if name.endswith(".json") and len(name) > 60}
            ),
            "so it was changed or damaged",
        ),
    ],
)
def test_saved_image_with_a_mistake_is_refused(
    tmp_path: Path, change: Callable[[dict[str, bytes]], object], complaint: str
) -> None:
    path = _docker(tmp_path / "saved.tar", change=change)

    with pytest.raises(OciError, match=complaint), open_image(f"docker-archive:{path}") as image:
        image.layers()


def test_unknown_tag_of_a_saved_image_is_refused(tmp_path: Path) -> None:
    path = _docker(tmp_path / "saved.tar")

    with pytest.raises(OciError, match=r"0 images with the tag 'other': choose one of its tags, lab/thing:2\.0"):
        open_image(f"docker-archive:{path}:other")


def test_descriptor_is_written_as_it_is_read() -> None:
    descriptor = Descriptor("text/plain", "sha256:" + "a" * 64, 5, {"note": "x"}, {"architecture": "arm64"})

    assert Descriptor.parse(descriptor.plain()) == descriptor
