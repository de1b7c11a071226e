"""Bundles: made of parts, installed into a directory without a network, refused when they are not what they should be.

The Kata Lab in these bundles is a small one, which notes how it was called; guests and the real packages are large.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kata_lab.lab import bundle_content, installer
from kata_lab.lab.bundle import BundleError, install_bundle, own_wheel, repacked, write_bundle
from kata_lab.lab.course import notebooks

MAIN = """
import os, pathlib, sys
if sys.argv[1:3] == ["lab", "copy"]:
    pathlib.Path(sys.argv[3], "course.ipynb").write_text("a notebook")
"""
CONTENT = """
import os, pathlib, sys
pathlib.Path(os.environ["KATA_LAB_HOME"], "taken-in").write_text(sys.argv[1])
if "WAIT" in os.environ:
    os.write(os.open(os.environ["WAIT"], os.O_WRONLY), b"came")
    import time
    time.sleep(600)
"""


def small_wheel(directory: Path, content: str = CONTENT) -> None:
    """A wheel of a Kata Lab with two modules."""
    files = {
        "kata_lab/__init__.py": "",
        "kata_lab/__main__.py": MAIN,
        "kata_lab/lab/__init__.py": "",
        "kata_lab/lab/bundle_content.py": content,
        "kata_lab-9.dist-info/METADATA": "Metadata-Version: 2.1\nName: kata-lab\nVersion: 9\nRequires-Python: >=3.11\n",
        "kata_lab-9.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(directory / "kata_lab-9-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr("kata_lab-9.dist-info/RECORD", "".join(f"{name},,\n" for name in files))


@pytest.fixture(scope="module")
def pip_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repacked("pip", tmp_path_factory.mktemp("pip"))


@pytest.fixture
def content(tmp_path: Path, pip_wheel: Path) -> Path:
    """The parts of a bundle."""
    place = tmp_path / "content"
    (place / "wheels").mkdir(parents=True)
    shutil.copy(pip_wheel, place / "wheels")
    small_wheel(place / "wheels")
    return place


@pytest.fixture
def bundle(tmp_path: Path, content: Path) -> Path:
    place = tmp_path / "course.pyz"
    write_bundle(content, place)
    return place


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("KATA_LAB_HOME", str(place))
    return place


def changed(bundle: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """A copy of a bundle with another manifest."""
    place = bundle.with_name("changed.pyz")
    with zipfile.ZipFile(bundle) as before, zipfile.ZipFile(place, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            if name == installer.MANIFEST:
                manifest = json.loads(data)
                change(manifest)
                data = json.dumps(manifest).encode()
            after.writestr(name, data)
    return place


def test_a_bundle_installs_itself_without_a_network(bundle: Path, tmp_path: Path, home: Path) -> None:
    alone = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-r", "-n"]

    done = subprocess.run(
        [*alone, sys.executable, "-S", bundle, tmp_path / "mine"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    mine = tmp_path / "mine"
    assert done.returncode == 0, done.stderr
    assert f"cd {mine}" in done.stdout
    assert (mine / "course.ipynb").read_text() == "a notebook"
    assert (home / "taken-in").exists()
    assert [path.name for path in mine.iterdir() if path.name[0] != "."] == ["course.ipynb"]
    program = "import kata_lab, pip; print(kata_lab.__file__)"
    command = [mine / ".venv/bin/python", "-c", program]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=mine)
    assert told.stdout.startswith(str(mine))


def test_an_installation_takes_the_place_of_the_one_before(bundle: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("environment-before", "environment-killed"):
        (mine / ".kata-lab" / name).mkdir(parents=True)
    (mine / ".venv").symlink_to(".kata-lab/environment-before")

    install_bundle(bundle, mine, "off")

    assert (mine / ".venv" / "bin" / "python").exists()
    left = {path.name for path in (mine / ".kata-lab").iterdir()}
    assert left == {"lock", Path(os.readlink(mine / ".venv")).name}
    assert not left & {"environment-before", "environment-killed"}


@pytest.fixture
def interrupted(content: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A bundle's installation that has come to its last but one step, and stays there."""
    os.mkfifo(tmp_path / "came")
    monkeypatch.setenv("WAIT", str(tmp_path / "came"))
    write_bundle(content, tmp_path / "course.pyz")
    came = os.open(tmp_path / "came", os.O_RDONLY | os.O_NONBLOCK)
    with (
        os.fdopen(came, "rb"),
        subprocess.Popen([sys.executable, tmp_path / "course.pyz", tmp_path / "mine"]) as process,
    ):
        ended = os.pidfd_open(process.pid)
        try:
            assert select.select([came, ended], [], [], 120)[0] == [came], "it ended before its last step but one"
            yield process
        finally:
            os.close(ended)
            process.terminate()


def test_an_interrupted_installation_leaves_nothing_and_allows_no_second_one_beside_it(
    interrupted: subprocess.Popen[bytes], bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="another installation is going on"):
        install_bundle(bundle, tmp_path / "mine", "off")
    assert interrupted.poll() is None
    assert (tmp_path / "mine").exists()

    interrupted.send_signal(signal.SIGTERM)

    assert interrupted.wait(120) == 128 + signal.SIGTERM
    assert not (tmp_path / "mine").exists()


def test_a_step_that_fails_is_told_and_undone(content: Path, tmp_path: Path) -> None:
    small_wheel(content / "wheels", "import sys; sys.exit('the guests are too large')")
    write_bundle(content, tmp_path / "course.pyz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own").write_text("")

    with pytest.raises(BundleError, match=r"taking in the guests failed with status 1.*the guests are too large"):
        install_bundle(tmp_path / "course.pyz", tmp_path / "mine", "off")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"own", ".kata-lab"}
    assert [path.name for path in (tmp_path / "mine" / ".kata-lab").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("kind", "a song", "holds 'a song'"),
        ("format", 2, "its format is 2"),
        ("python", "cpython 2.7", "made for cpython 2.7"),
        ("platform", "linux-vax", "made for linux-vax"),
        ("python_patch", 999, r"needs cpython 3\.\d+\.999 or newer"),
        ("glibc", [99, 1], r"needs the GNU C library 99\.1"),
        ("glibc", "new", "does not say for which C library"),
        ("files", {}, "its members are not those that it names"),
        ("files", {"../evil": {"size": 1, "sha256": "0" * 64}}, "'../evil' is no name"),
        ("files", {"wheels/x": {"size": "1", "sha256": ""}}, "has no size and hash"),
        ("files", [], "manifest is missing or wrong"),
    ],
)
def test_a_bundle_that_is_not_for_us_is_refused(
    name: str, value: object, told: str, bundle: Path, tmp_path: Path
) -> None:
    foreign = changed(bundle, lambda manifest: manifest.__setitem__(name, value))

    with pytest.raises(BundleError, match=told):
        install_bundle(foreign, tmp_path / "mine", "off")
    assert not (tmp_path / "mine").exists()


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("file", "")
    for name, told in (("text", "not a zip file"), ("nothing", "No such file"), ("other.zip", "manifest is missing")):
        with pytest.raises(BundleError, match=f"is no bundle that can be installed.*{told}"):
            install_bundle(tmp_path / name, tmp_path / "mine", "off")


def test_damage_anywhere_is_found(bundle: Path, tmp_path: Path) -> None:
    whole = bundle.read_bytes()
    damaged = tmp_path / "damaged.pyz"
    for place in range(len(whole) // 9, len(whole), len(whole) // 9):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(BundleError, match=r"is damaged|cannot be read|missing or wrong"):
            install_bundle(damaged, tmp_path / "mine", "off")
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="cannot be read"):
        install_bundle(damaged, tmp_path / "mine", "off")
    assert not (tmp_path / "mine").exists()


def test_a_directory_with_an_environment_of_its_own_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / ".venv").mkdir(parents=True)

    with pytest.raises(BundleError, match="was not made by an installation"):
        install_bundle(bundle, tmp_path / "mine", "off")
    with pytest.raises(BundleError, match="cannot be written"):
        install_bundle(bundle, bundle / "mine", "off")


def test_a_bundle_asks_for_what_its_wheels_ask_for(content: Path, tmp_path: Path) -> None:
    wheel = "numba-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(content / "wheels" / wheel, "w") as archive:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        archive.writestr("numba-1.dist-info/METADATA", f"Name: numba\nRequires-Python: <4,>={version}.4\n\n")
    write_bundle(content, tmp_path / "course.pyz")

    with installer.Bundle(tmp_path / "course.pyz") as opened:
        assert opened.manifest["glibc"] == [2, 17]
        assert opened.manifest["python_patch"] == 4


def test_an_installed_project_becomes_a_wheel_again(pip_wheel: Path) -> None:
    version = importlib.metadata.version("pip")
    with zipfile.ZipFile(pip_wheel) as archive:
        names = archive.namelist()
        record = archive.read(f"pip-{version}.dist-info/RECORD").decode()

    assert pip_wheel.name == f"pip-{version}-py3-none-any.whl"
    assert "pip/__main__.py" in names
    assert not any(name.endswith(".pyc") or ".." in name for name in names)
    assert len(record.splitlines()) == len(names)


def test_a_project_that_was_not_installed_from_a_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not installed in this environment"):
        repacked("no-such-project", tmp_path)


def test_the_wheel_has_notebooks_descriptions_and_guest_files(tmp_path: Path) -> None:
    wheel = own_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    wanted = {f"kata_lab/lab/notebooks/{path.name}" for path in notebooks()}
    wanted |= {f"kata_lab/image/descriptions/{name}.json" for name in ("lifsea", "debian", "toolbox", "image.schema")}
    wanted |= {f"kata_lab/guest/{name}" for name in ("init.py", "agent/agent.py", "upcall/devices.py")}
    wanted |= {"kata_lab/image/init.sh", "kata_lab/protocol/agent.proto", "kata_lab/image/kernels/riscv64.modules"}
    assert wanted <= names
    assert not any(re.search(r"\.pyc$|^tests/|^build/", name) for name in names)


def test_guests_go_from_one_cache_into_another(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, boot_guest: object
) -> None:
    from kata_lab.image.boot import build_boot_guest
    from kata_lab.image.build import build_named
    from kata_lab.oci import ensure_busybox
    from vmm.engine.rv64.library import ensure

    monkeypatch.delenv("KATA_LAB_HOME")
    monkeypatch.setattr(bundle_content, "IF_BUILT", ())
    bundle_content.gather(tmp_path / "content")
    monkeypatch.setenv("KATA_LAB_HOME", str(home))
    monkeypatch.setenv("KATA_LAB_MIRROR", "http://192.0.2.1/nowhere")
    bundle_content.take_in(tmp_path / "content")

    for name in bundle_content.IMAGES:
        build_named(name, progress="off").verify()
    assert build_boot_guest("off").kernel.is_relative_to(home)
    with ensure_busybox("off") as image:
        assert image.tree().resolve("/bin/busybox")
    assert ensure().is_relative_to(home)
