"""An image is built from its description alone: the same inputs give the same bytes, and hostile inputs give none."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.build import BuildOptions, build_image
from kata_lab.image.description import DescriptionError, parse_description
from kata_lab.image.library import Image, Library
from tests.kata_lab.image.fake_mirror import CONTENTS, KERNEL, RELEASE, X86_KERNEL, FakeMirror, Signer, build_module
from tests.kata_lab.image.test_cpio import read_newc

DESCRIPTION: dict[str, Any] = {
    "name": "tiny",
    "base": {"suite": "trixie", "architecture": "riscv64"},
    "kernel": {"package": "linux-image-riscv64", "modules": ["upper"]},
    "packages": ["micropython"],
    "exclude": {"packages": ["unwanted"], "paths": ["/usr/share/doc/**"]},
    "files": {"/etc/motd": {"text": "hello\n"}},
    "links": {"/usr/bin/micropython": ["/bin/upy"]},
    "users": [{"name": "root", "uid": 0, "home": "/root"}],
    "services": [{"name": "demo", "command": ["/bin/micropython", "-h"], "restart": "always"}],
}


@pytest.fixture
def archive(mirror: FakeMirror) -> FakeMirror:
    """A mirror with an interpreter, a library that it depends on, and two modules of which one needs the other."""
    mirror.packages = {
        "micropython": ("libc6, unwanted", {"usr/bin/micropython": b"interpreter", "usr/share/doc/x": b"text"}),
        "libc6": ("", {"lib/libc.so.6": b"library", "usr/lib/libc.so": "libc.so.6"}),
        "unwanted": ("", {"usr/lib/unwanted": b"unwanted"}),
    }
    mirror.modules = {"lower": build_module(), "upper": build_module("lower", "fs-upper"), "other": build_module()}
    mirror.publish()
    return mirror


def build(mirror: FakeMirror, signer: Signer, home: Path, data: dict[str, Any] | None = None, **how: bool) -> Image:
    options = BuildOptions(
        lock=home / "tiny.lock.json", mirror=mirror.uri, keyring=signer.keyring, progress="off", **how
    )
    return build_image(parse_description(DESCRIPTION if data is None else data, "tiny.json"), options)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = copy.deepcopy(DESCRIPTION)
    change(data)
    return data


def test_image_has_packages_dependencies_modules_files_and_init(
    archive: FakeMirror, signer: Signer, home: Path
) -> None:
    image = build(archive, signer, home)

    root = read_newc(image.root.read_bytes())
    assert image.kernel.read_bytes() == KERNEL + RELEASE.encode()
    assert root["usr/bin/micropython"].data == b"interpreter"
    assert root["usr/lib/libc.so.6"].data == b"library"
    assert root["usr/bin/upy"].data == b"/usr/bin/micropython"
    assert root["etc/motd"].data == b"hello\n"
    assert root["etc/passwd"].data == b"root:x:0:0:root:/root:/bin/sh\n"
    assert root["init"].data == b"/usr/lib/kata-lab/init"
    assert not {"usr/share/doc/x", "usr/lib/unwanted"} & root.keys()
    assert [each["name"] for each in image.manifest["packages"]] == ["libc6", "micropython"]


def test_modules_come_after_what_they_need_without_those_that_nobody_needs(
    archive: FakeMirror, signer: Signer, home: Path
) -> None:
    root = read_newc(build(archive, signer, home).root.read_bytes())

    base = f"usr/lib/modules/{RELEASE}"
    modules = json.loads(root["etc/kata-lab/init.json"].data)["modules"]
    assert modules == [f"/{base}/kernel/lower.ko", f"/{base}/kernel/upper.ko"]
    assert root[f"{base}/modules.dep"].data == b"kernel/lower.ko:\nkernel/upper.ko: kernel/lower.ko\n"
    assert root[f"{base}/modules.alias"].data == b"alias fs-upper upper\n"
    assert root[f"{base}/kernel/lower.ko"].data.startswith(b"\x7fELF")
    assert b"Module signature" not in root[f"{base}/kernel/lower.ko"].data
    assert f"{base}/kernel/other.ko" not in root


def test_two_builds_are_byte_identical(archive: FakeMirror, signer: Signer, home: Path) -> None:
    first = build(archive, signer, home)
    files = {path.name: path.read_bytes() for path in first.directory.iterdir()}
    shutil.rmtree(home)

    second = build(archive, signer, home)

    assert {path.name: path.read_bytes() for path in second.directory.iterdir()} == files
    assert second.identity == first.identity


def test_built_image_is_built_once(archive: FakeMirror, signer: Signer, home: Path) -> None:
    build(archive, signer, home)
    asked = archive.requests.total()

    build(archive, signer, home)

    assert archive.requests.total() == asked


def test_build_from_lock_and_cache_needs_no_network(archive: FakeMirror, signer: Signer, home: Path) -> None:
    first = build(archive, signer, home)
    files = {path.name: path.read_bytes() for path in first.directory.iterdir()}
    Library().remove("tiny")
    asked = archive.requests.total()

    second = build(archive, signer, home, offline=True)

    assert {path.name: path.read_bytes() for path in second.directory.iterdir()} == files
    assert archive.requests.total() == asked


def corrupt(home: Path, package: str) -> None:
    (file,) = (home / "cache" / "packages").glob(f"{package}_*.deb")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_corrupted_cache_is_refused_offline(archive: FakeMirror, signer: Signer, home: Path) -> None:
    build(archive, signer, home)
    Library().remove("tiny")
    corrupt(home, "libc6")

    with pytest.raises(ImageError, match="libc6 is not in the cache, or not as the lock"):
        build(archive, signer, home, offline=True)


def test_corrupted_cache_is_fetched_again(archive: FakeMirror, signer: Signer, home: Path) -> None:
    first = build(archive, signer, home)
    Library().remove("tiny")
    corrupt(home, "libc6")

    assert build(archive, signer, home, locked=True).identity == first.identity
    assert archive.requests_for("libc6_1-1_riscv64.deb") == 2


def test_lock_keeps_versions_until_a_refresh(archive: FakeMirror, signer: Signer, home: Path) -> None:
    first = build(archive, signer, home)
    archive.packages["libc6"] = ("", {"lib/libc.so.6": b"newer library"})
    archive.publish()
    Library().remove("tiny")

    assert build(archive, signer, home).identity == first.identity
    newer = read_newc(build(archive, signer, home, refresh=True).root.read_bytes())
    assert newer["usr/lib/libc.so.6"].data == b"newer library"


def test_lock_of_other_packages_is_refused(archive: FakeMirror, signer: Signer, home: Path) -> None:
    build(archive, signer, home)

    with pytest.raises(ImageError, match=r"is of other packages than tiny\.json asks for"):
        build(archive, signer, home, changed(lambda data: data["packages"].append("busybox-static")), locked=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data["packages"].append("micropythn"), r"\$\.packages\[1\]: .*did you mean 'micropython'"),
        (
            lambda data: data["kernel"].update(package="linux-image-riscv"),
            r"\$\.kernel\.package: .*'linux-image-riscv64'",
        ),
        (lambda data: data["exclude"].update(packages=["unwantd"]), r"\$\.exclude\.packages\[0\]: .*'unwanted'"),
    ],
)
def test_unknown_package_is_refused_before_anything_is_downloaded(
    archive: FakeMirror, signer: Signer, home: Path, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    with pytest.raises(ImageError, match=complaint):
        build(archive, signer, home, changed(change))

    assert archive.requests_for(".deb") == 0


def with_modules(*names: str) -> dict[str, Any]:
    return changed(lambda data: data["kernel"].update(modules=list(names)))


@pytest.mark.parametrize("field", ["modules", "modules_on_demand"])
def test_unknown_module_is_refused_before_any_package_is_downloaded(
    archive: FakeMirror, signer: Signer, home: Path, field: str
) -> None:
    data = changed(lambda data: data["kernel"].update({field: ["upper", "uper"]}))

    with pytest.raises(
        DescriptionError, match=rf"\$\.kernel\.{field}\[1\]: kernel {RELEASE} has no module 'uper': .*'upper'"
    ):
        build(archive, signer, home, data)

    assert not [path for path in archive.requests if path.startswith("/pool/")]
    assert not (home / "tiny.lock.json").exists()


def test_module_that_only_the_index_of_files_knows_is_taken(archive: FakeMirror, signer: Signer, home: Path) -> None:
    archive.modules["dashed-name"] = build_module()
    archive.publish()

    image = build(archive, signer, home, with_modules("dashed_name", "upper"))

    assert image.manifest["modules"] == ["dashed_name", "lower", "upper"]
    assert archive.requests_for(f"{CONTENTS}.gz") == 1


def test_usual_modules_need_no_index_of_files(archive: FakeMirror, signer: Signer, home: Path) -> None:
    archive.modules = {"virtio_net": build_module("net-failover"), "net_failover": build_module()}
    archive.built_in = ["virtio_console"]
    archive.publish()

    image = build(archive, signer, home, with_modules("virtio-net", "virtio-console"))

    assert image.manifest["modules"] == ["net_failover", "virtio_net"]
    assert archive.requests_for(f"{CONTENTS}.gz") == 0


def test_kernel_that_was_unpacked_once_is_known_without_its_package(
    archive: FakeMirror, signer: Signer, home: Path
) -> None:
    archive.built_in = ["unheard_of"]
    archive.publish()
    build(archive, signer, home)
    shutil.rmtree(home / "cache" / "packages")
    asked = archive.requests.total()

    with pytest.raises(DescriptionError, match=r"has no module 'unheard_off': did you mean 'unheard_of'\?"):
        build(archive, signer, home, with_modules("unheard_of", "unheard_off"))

    assert archive.requests.total() == asked


def test_damaged_list_of_modules_is_not_believed(archive: FakeMirror, signer: Signer, home: Path) -> None:
    build(archive, signer, home)
    (names,) = (home / "cache" / "modules").glob("*.modules")
    names.write_bytes(names.read_bytes().replace(b"other", b"ofher"))
    shutil.rmtree(home / "cache" / "packages")

    assert build(archive, signer, home, with_modules("other")).manifest["modules"] == ["other"]


def test_index_of_files_that_the_signature_does_not_cover_is_refused(
    archive: FakeMirror, signer: Signer, home: Path
) -> None:
    archive.faults[f"{CONTENTS}.gz"] = "wrong hash"

    with pytest.raises(ImageError, match="the list of files of Debian trixie with a wrong hash or size"):
        build(archive, signer, home)

    assert archive.requests_for(".deb") == 0


@pytest.mark.parametrize("lost", ["index", "file", "package"])
def test_unknown_module_is_refused_before_any_other_package_where_its_files_are_not_listed(
    archive: FakeMirror, signer: Signer, home: Path, lost: str
) -> None:
    archive.contents = lost != "index"
    archive.unlisted = f"linux-image-{RELEASE}" if lost == "package" else ""
    archive.publish()
    if lost == "file":
        del archive.files[f"/dists/trixie/{CONTENTS}.gz"]

    with pytest.raises(ImageError, match=r"\$\.kernel\.modules\[0\]: kernel .* has no module 'uper': .*'upper'"):
        build(archive, signer, home, with_modules("uper"))

    assert archive.requests_for(".deb") == 1


def test_service_without_its_program_is_refused(archive: FakeMirror, signer: Signer, home: Path) -> None:
    with pytest.raises(ImageError, match=r"\$\.services\[0\]\.command\[0\]: the image has no program '/bin/nothing'"):
        build(archive, signer, home, changed(lambda data: data["services"][0].update(command=["/bin/nothing"])))


def test_link_to_a_program_that_is_not_there_is_refused(archive: FakeMirror, signer: Signer, home: Path) -> None:
    data = changed(lambda data: data.update(links={"/usr/bin/micropythn": ["/bin/upy"]}))

    with pytest.raises(
        DescriptionError, match=r'links\["/usr/bin/micropythn"\]: .*did you mean .*/usr/bin/micropython'
    ):
        build(archive, signer, home, data)


def test_link_to_what_is_made_at_boot_is_taken(archive: FakeMirror, signer: Signer, home: Path) -> None:
    image = build(archive, signer, home, changed(lambda data: data.update(links={"/proc/mounts": ["/etc/mtab"]})))

    assert read_newc(image.root.read_bytes())["etc/mtab"].data == b"/proc/mounts"


def test_unknown_suite_is_refused(archive: FakeMirror, signer: Signer, home: Path) -> None:
    with pytest.raises(DescriptionError, match=r"\$\.base\.suite: there is no suite 'trixi': did you mean 'trixie'"):
        build(archive, signer, home, changed(lambda data: data["base"].update(suite="trixi")))


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"/etc/absolute": b"x"}, "outside the root"),
        ({"usr/../../escape": b"x"}, "outside the root"),
        ({"usr/lib/link": "../../../etc/passwd"}, "outside the root"),
        ({"link": "/../etc"}, "outside the root"),
        ({"usr/a": "b", "usr/b": "a", "usr/a/file": b"x"}, "in a circle"),
        ({"usr/line\nbreak": b"x"}, "no control characters"),
        ({"usr/file": b"x", "usr/file/below": b"x"}, "not a directory"),
        ({"lib/libc.so.6": b"another library"}, "both have"),
    ],
)
def test_hostile_package_is_refused_and_nothing_is_written_outside(
    archive: FakeMirror, signer: Signer, home: Path, tmp_path: Path, files: dict[str, bytes | str], complaint: str
) -> None:
    archive.packages["hostile"] = ("", files)
    archive.publish()
    before = {path for path in tmp_path.rglob("*") if home not in path.parents}

    with pytest.raises(ImageError, match=complaint):
        build(archive, signer, home, changed(lambda data: data["packages"].append("hostile")))

    assert {path for path in tmp_path.rglob("*") if home not in path.parents} - {home} == before - {home}
    assert Library().names() == []


def test_link_within_the_root_is_followed_there(archive: FakeMirror, signer: Signer, home: Path) -> None:
    archive.packages["linked"] = ("", {"opt": "/usr/lib", "opt/file": b"inside"})
    archive.publish()

    image = build(archive, signer, home, changed(lambda data: data["packages"].append("linked")))

    assert read_newc(image.root.read_bytes())["usr/lib/file"].data == b"inside"


def test_unsigned_archive_gives_no_image(archive: FakeMirror, stranger: Signer, signer: Signer, home: Path) -> None:
    archive.publish(signer=stranger)

    with pytest.raises(ImageError, match="signature"):
        build(archive, signer, home)


def test_package_that_does_not_match_its_hash_gives_no_image(archive: FakeMirror, signer: Signer, home: Path) -> None:
    archive.faults["libc6_1-1_riscv64.deb"] = "wrong hash"

    with pytest.raises(ImageError, match="wrong hash or size"):
        build(archive, signer, home)
    assert Library().names() == []


def test_failed_build_leaves_the_previous_image(archive: FakeMirror, signer: Signer, home: Path) -> None:
    first = build(archive, signer, home)
    broken = changed(lambda data: data["services"][0].update(command=["/bin/nothing"]))

    with pytest.raises(ImageError):
        build(archive, signer, home, broken)

    kept = Library().find("tiny")
    kept.verify()
    assert kept == first


def test_killed_build_leaves_the_previous_image_and_hinders_no_other(
    archive: FakeMirror, signer: Signer, home: Path, tmp_path: Path
) -> None:
    first = build(archive, signer, home)
    data = changed(lambda data: data["packages"].append("busybox-static"))
    (tmp_path / "tiny.json").write_text(json.dumps(data))
    archive.faults["busybox-static_1-1_riscv64.deb"] = "stall"
    building = subprocess.Popen(
        [sys.executable, "-m", "kata_lab", "image", "build", str(tmp_path / "tiny.json"), "--mirror", archive.uri],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "KATA_LAB_KEYRING": str(signer.keyring)},
        stderr=subprocess.DEVNULL,
    )
    assert archive.stalled.wait(60)
    building.kill()
    building.wait()

    assert Library().find("tiny") == first
    archive.faults.clear()
    archive.release.set()
    second = build(archive, signer, home, data)
    assert "usr/bin/busybox" in read_newc(second.root.read_bytes())


def test_amd64_image_has_its_kernel_loader_and_system_call(archive: FakeMirror, signer: Signer, home: Path) -> None:
    archive.architecture = "amd64"
    archive.packages["libc6"] = ("", {"lib64/ld-linux-x86-64.so.2": b"loader"})
    archive.publish()

    def change(data: dict[str, Any]) -> None:
        data["base"]["architecture"] = "amd64"
        data["kernel"]["package"] = "linux-image-amd64"

    image = build(archive, signer, home, changed(change))

    root = read_newc(image.root.read_bytes())
    assert image.kernel.read_bytes() == X86_KERNEL + RELEASE.encode()
    assert root["usr/lib64/ld-linux-x86-64.so.2"].data == b"loader"
    assert root["lib64"].data == b"usr/lib64"
    assert json.loads(root["etc/kata-lab/init.json"].data)["finit_module"] == 313


def test_kernel_of_another_architecture_is_refused(archive: FakeMirror, signer: Signer, home: Path) -> None:
    archive.architecture = "amd64"
    archive.packages["linux-image-amd64"] = ("", {f"boot/vmlinuz-{RELEASE}": KERNEL})
    archive.publish()

    def change(data: dict[str, Any]) -> None:
        data["base"]["architecture"] = "amd64"
        data["kernel"]["package"] = "linux-image-amd64"

    with pytest.raises(ImageError, match="not an x86 bzImage"):
        build(archive, signer, home, changed(change))


def test_name_that_would_be_a_command_of_the_disk_tool_is_refused(
    archive: FakeMirror, signer: Signer, home: Path
) -> None:
    archive.packages["hostile"] = ("", {'usr/x" mode 0': b"x"})
    archive.publish()
    data = changed(lambda data: data.update(root={"format": "ext4"}, packages=["micropython", "hostile"]))

    with pytest.raises(ImageError, match="has a quotation mark"):
        build(archive, signer, home, data)


@pytest.mark.parametrize(
    ("format", "check"), [("ext4", ["e2fsck", "-fn"]), ("erofs", ["fsck.erofs"])], ids=["ext4", "erofs"]
)
def test_disk_root_passes_its_own_checker_and_is_reproducible(
    archive: FakeMirror, signer: Signer, home: Path, format: str, check: list[str]
) -> None:
    data = changed(lambda data: data.update(root={"format": format}))
    first = build(archive, signer, home, data)
    content = first.root.read_bytes()
    Library().remove("tiny")

    second = build(archive, signer, home, data)

    checked = subprocess.run([*check, str(second.root)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert second.root.read_bytes() == content
