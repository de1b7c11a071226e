"""The image busybox is made out of a package, the same every time, and needs the network only once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.apt import KEYRING_VARIABLE
from kata_lab.image.mirror import MIRROR_VARIABLE
from kata_lab.oci import build_busybox, ensure_busybox, import_image, list_images, make_spec, prune, remove_image
from kata_lab.oci.busybox import applets
from tests.kata_lab.image.fake_mirror import FakeMirror, Signer, serving
from tests.kata_lab.oci.layer_cases import base, layout

NAMES = sorted({f"applet{number}" for number in range(150)} | {"sh", "uname", "ls", "[", "[["})
PROGRAM = b"\x7fELF\0code \xff" + b"\0".join(name.encode() for name in NAMES) + b"\0\0more\0words\0"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    made = Signer(tmp_path_factory.mktemp("gpg") / "home")
    yield made
    made.close()


@pytest.fixture
def mirror(tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMirror]:
    """An archive with our busybox, and an APT that knows nothing of the host's proxies."""
    settings = tmp_path / "apt.conf"
    settings.write_text('Dir::Etc::parts "/dev/null";\nDir::Etc::main "/dev/null";\nAcquire::Retries "0";\n')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = FakeMirror(signer)
    made.packages = {"busybox-static": ("", {"usr/bin/busybox": PROGRAM})}
    made.publish()
    with serving(made) as served:
        monkeypatch.setenv(MIRROR_VARIABLE, served.uri)
        monkeypatch.setenv(KEYRING_VARIABLE, str(signer.keyring))
        yield served


def test_image_has_the_program_under_all_its_names(mirror: FakeMirror) -> None:
    with ensure_busybox("off") as image:
        place = image.layers()[0]

        assert (place / "bin/busybox").read_bytes() == PROGRAM
        assert os.access(place / "bin/busybox", os.X_OK)
        assert {each.name for each in (place / "bin").iterdir()} == {*NAMES, "busybox"}
        assert (place / "bin/uname").readlink() == Path("busybox")
        assert image.architecture == "riscv64"


def test_image_runs_a_shell_as_root_and_commands_as_nobody(mirror: FakeMirror) -> None:
    with ensure_busybox("off") as image:
        shell = make_spec(image)["process"]
        other = make_spec(image, ["uname", "-a"], user="nobody:users")["process"]

    assert shell["args"] == ["sh"]
    assert shell["env"] == ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"]
    assert (other["args"], other["user"]["uid"], other["user"]["gid"]) == (["uname", "-a"], 65534, 100)


def test_image_is_the_same_every_time_and_built_once(mirror: FakeMirror) -> None:
    first = build_busybox("off")
    remove_image("busybox")
    prune()
    second = build_busybox("off")

    with ensure_busybox("off") as image:
        assert first == second == image.digest
    assert mirror.requests_for(".deb") == 1
    assert [each.name for each in list_images()] == ["busybox:latest"]


def test_image_of_another_recipe_is_made_anew_and_an_imported_one_is_kept(
    mirror: FakeMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_busybox("off").close()
    monkeypatch.setattr("kata_lab.oci.busybox._RECIPE", "2")
    monkeypatch.setattr("kata_lab.oci.busybox._PASSWD", "root:x:0:0::/:/bin/sh\n")

    with ensure_busybox("off") as image:
        assert image.read("etc/passwd") == b"root:x:0:0::/:/bin/sh\n"

    mine = import_image(layout(tmp_path / "layout", base), "busybox")
    with ensure_busybox("off") as image:
        assert image.digest == mine.digest


def test_package_without_a_program_is_refused(mirror: FakeMirror) -> None:
    mirror.packages = {"busybox-static": ("", {"usr/share/doc/busybox": b""})}
    mirror.publish()

    with pytest.raises(ImageError, match="holds no bin/busybox"):
        ensure_busybox("off")


@pytest.mark.parametrize(
    "program", [b"", b"\x7fELF", b"\0".join(b"name%d" % number for number in range(300)) + b"\0\0"]
)
def test_program_without_applets_is_refused(program: bytes) -> None:
    with pytest.raises(ImageError, match="no list of applets"):
        applets(program)
