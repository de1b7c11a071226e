"""Images are found by name, replaced in one step, and handed on as one file that is verified when it comes in."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.library import Image, Library


def add(name: str = "tiny", root: bytes = b"root") -> Image:
    manifest = {"name": name, "format_of_root": "initramfs", "command_line": "quiet"}
    return Library().add(manifest, {"kernel": b"kernel", "root.cpio": root})


def contents(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        found = {}
        for member in archive:
            source = archive.extractfile(member)
            assert source is not None
            found[member.name] = source.read()
        return found


def pack(file: Path, members: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    file.write_bytes(gzip.compress(buffer.getvalue()))


def test_image_is_found_by_its_name(home: Path) -> None:
    added = add()

    assert Library().find("tiny") == added
    assert (added.kernel.read_bytes(), added.root.read_bytes()) == (b"kernel", b"root")


def test_unknown_image_is_refused_with_those_that_there_are(home: Path) -> None:
    add()

    with pytest.raises(ImageError, match=r"no image 'huge' on this machine \(tiny\): build it with"):
        Library().find("huge")


def test_name_that_is_a_path_is_refused(home: Path) -> None:
    with pytest.raises(ImageError, match="cannot be the name of an image"):
        Library().find("../tiny")


def test_new_image_takes_the_name_and_the_old_one_is_removed(home: Path) -> None:
    old = add().directory
    new = add(root=b"another root")

    assert Library().find("tiny") == new
    assert not old.exists()


def test_replaced_image_stays_while_somebody_uses_it_and_goes_with_the_next_change(home: Path) -> None:
    used = add()
    add(root=b"another root")
    used.verify()
    place = used.directory

    del used
    add(root=b"a third root")

    assert not place.exists()


def test_image_that_another_process_uses_stays_until_that_ends(home: Path) -> None:
    place = add().directory
    code = (
        "import sys; from kata_lab.image.library import Library\n"
        "image = Library().find('tiny'); print('found', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"found\n"
        Library().remove("tiny")
        while_used = sorted(each.name for each in place.iterdir())
        user.kill()
    add(root=b"another root")

    assert while_used == ["kernel", "manifest.json", "root.cpio"]
    assert not place.exists()


def test_image_built_again_as_it_was_is_not_replaced_while_it_is_used(home: Path) -> None:
    used = add()
    before = used.kernel.stat()

    assert add() == used
    assert used.kernel.stat().st_ino == before.st_ino


def test_damaged_image_built_again_is_whole(home: Path) -> None:
    add().root.write_bytes(b"toor")

    add().verify()


def test_image_is_found_while_its_name_goes_to_others(home: Path) -> None:
    add(root=b"0" * 100)
    over = threading.Event()

    def replace() -> None:
        for number in range(60):
            add(root=bytes([48 + number % 2]) * 100)
        over.set()

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        while not over.is_set():
            assert len(Library().find("tiny").root.read_bytes()) == 100
    finally:
        thread.join()


def test_interrupted_replacement_leaves_the_previous_image(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = add()

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add(root=b"another root")

    assert Library().find("tiny") == old
    old.verify()


def test_removed_image_is_gone(home: Path) -> None:
    place = add().directory
    Library().remove("tiny")

    assert Library().names() == []
    assert not place.exists()


def test_damaged_image_is_noticed(home: Path) -> None:
    image = add()
    image.root.write_bytes(b"toor")

    with pytest.raises(ImageError, match=r"root\.cpio is not what it was"):
        image.verify()


def test_exported_image_comes_back_as_it_was(home: Path, tmp_path: Path) -> None:
    image = add()
    Library().export("tiny", tmp_path / "tiny.img")
    Library().remove("tiny")

    assert Library().import_file(tmp_path / "tiny.img") == image
    Library().find("tiny").verify()


def test_export_is_reproducible(home: Path, tmp_path: Path) -> None:
    add()
    for name in ("one", "two"):
        Library().export("tiny", tmp_path / name)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    "change", ["content", "size", "missing", "extra", "path", "manifest name", "cut", "no manifest"]
)
def test_changed_export_is_refused_and_the_present_image_stays(home: Path, tmp_path: Path, change: str) -> None:
    image = add()
    file = tmp_path / "tiny.img"
    Library().export("tiny", file)
    members = contents(file)
    match change:
        case "content":
            members["kernel"] = b"KERNEL"
        case "size":
            members["kernel"] += b"more"
        case "missing":
            del members["root.cpio"]
        case "extra":
            members["extra"] = b"extra"
        case "path":
            members["../../escaped"] = b"escaped"
        case "manifest name":
            manifest = json.loads(members["manifest.json"])
            manifest["name"] = "../escaped"
            members["manifest.json"] = json.dumps(manifest).encode()
        case "no manifest":
            del members["manifest.json"]
    pack(file, members)
    if change == "cut":
        file.write_bytes(file.read_bytes()[:300])

    with pytest.raises(ImageError, match="no image that can be imported"):
        Library().import_file(file)

    assert Library().find("tiny") == image
    assert not list(tmp_path.rglob("*escaped*"))


def test_identity_is_the_hash_of_the_manifest(home: Path) -> None:
    image = add()

    assert hashlib.sha256((image.directory / "manifest.json").read_bytes()).hexdigest().startswith(image.identity)
