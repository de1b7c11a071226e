"""Makes a bundle: one file that sets up a machine like this one without a network; see :mod:`kata_lab.lab.installer`.

Python packages are fetched by this environment's pip, as it is configured; those that are installed here keep their
version, so that learners get what their instructor tried. A package without a wheel for this machine is built. Kata
Lab's own wheel is built from its sources, or, where it was itself installed from a wheel, made of the installed files
again (PyPA, "Recording installed projects" and "Binary distribution format").
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

import kata_lab
from kata_lab.image.store import publish, sha256_of
from kata_lab.lab import bundle_content, installer
from kata_lab.lab.course import CourseError
from kata_lab.progress import Progress, ProgressMode

PROJECT: Final = "kata-lab"
_SOURCES: Final = ("vmm", "kata_lab", "images", "notebooks", "pyproject.toml", "README.md", "LICENSE")
_NOT_IN_A_WHEEL: Final = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD")
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_")
_OLD_NAMES: Final = {"manylinux2014": (2, 17), "manylinux2010": (2, 12), "manylinux1": (2, 5)}


class BundleError(CourseError):
    """A bundle that cannot be made or installed."""


def make_bundle(place: Path, progress: ProgressMode = "auto") -> None:
    """Write a bundle for machines like this one; what is missing is fetched and built first.

    Raises:
        KataLabError: something cannot be fetched or built, or the file cannot be written.
    """
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".kata-lab-bundle-", dir=place.absolute().parent) as scratch,
            Progress(f"Making {place.name}", total=3, mode=progress) as bar,
        ):
            content = Path(scratch)
            bundle_content.gather(content)
            bar.advance(1, "guests")
            gather_wheels(content / "wheels")
            bar.advance(1, "Python packages")
            write_bundle(content, place)
            bar.advance(1, "written")
    except OSError as error:
        raise BundleError(
            f"{place} cannot be written ({error.strerror or error}): name a file on another disk"
        ) from error


def write_bundle(content: Path, place: Path) -> None:
    """Make one file of a directory with the parts of a bundle, whole or not at all.

    Raises:
        BundleError: the file cannot be written.
    """
    shutil.copyfile(installer.__file__, content / installer.PROGRAM)
    names = sorted(str(path.relative_to(content)) for path in content.rglob("*") if path.is_file())
    files = {name: {"size": (content / name).stat().st_size, "sha256": sha256_of(content / name)} for name in names}
    manifest = {
        "kind": installer.KIND,
        "format": installer.FORMAT,
        "version": kata_lab.__version__,
        **installer.machine(),
        "python_patch": max((_needed_patch(content / name) for name in names if name.endswith(".whl")), default=0),
        "glibc": _needed_glibc(names),
        "files": files,
    }
    partial = place.with_name(f".{place.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(installer.MANIFEST, json.dumps(manifest, indent=1))
                for name in names:
                    compression = zipfile.ZIP_STORED if name.endswith((".whl", ".gz")) else zipfile.ZIP_DEFLATED
                    archive.write(content / name, name, compression)
        partial.chmod(0o755)
        publish(partial, place)
    except OSError as error:
        raise BundleError(f"{place} cannot be written ({error.strerror}): name a file on another disk") from error
    finally:
        partial.unlink(missing_ok=True)


def gather_wheels(directory: Path) -> None:
    """Fetch or build the wheels of Kata Lab, of the lab, of all that they need, and of pip.

    Raises:
        BundleError: pip is missing or fails.
    """
    directory.mkdir()
    own = own_wheel(directory)
    with tempfile.TemporaryDirectory(prefix="kata-lab-wheels-") as scratch:
        versions = Path(scratch) / "versions"
        versions.write_text("".join(f"{line}\n" for line in _installed()))
        wanted = [f"{PROJECT}[lab] @ {own.as_uri()}", "pip"]
        _pip("wheel", "--wheel-dir", str(directory), "--constraint", str(versions), *wanted)


def _installed() -> list[str]:
    """The versions that are installed here, but of what was not installed from an index."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        name = str(each.metadata["Name"] or "").lower().replace("_", "-")
        if name and name != PROJECT and each.read_text("direct_url.json") is None:
            found.setdefault(name, f"{name}=={each.version}")
    return sorted(found.values())


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["nothing"]
        )
        raise BundleError(f"pip could not get the Python packages (status {done.returncode}); it said: {lines[0]}")


def own_wheel(directory: Path) -> Path:
    """Kata Lab's wheel, written to a directory.

    Raises:
        BundleError: it cannot be built.
    """
    sources = Path(kata_lab.__file__).resolve().parents[1]
    if not (sources / "pyproject.toml").is_file():
        return repacked(PROJECT, directory)
    with tempfile.TemporaryDirectory(prefix="kata-lab-sources-") as scratch:
        # A copy: a build leaves files behind, and takes in what an earlier one left.
        for name in _SOURCES:
            source, target = sources / name, Path(scratch) / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        _pip("wheel", "--no-deps", "--wheel-dir", str(directory), scratch)
    return next(directory.glob("kata_lab-*.whl"))


def repacked(project: str, directory: Path) -> Path:
    """The wheel of an installed project, made of its files.

    Raises:
        BundleError: it is not installed, or was not installed from a wheel.
    """
    try:
        found = importlib.metadata.distribution(project)
    except importlib.metadata.PackageNotFoundError as error:
        raise BundleError(f"{project} is not installed in this environment: install it with pip") from error
    text = found.read_text("WHEEL") or ""
    files = [each for each in found.files or () if ".." not in each.parts and not each.is_absolute()]
    tags = re.findall(r"^Tag: (\S+)$", text, re.MULTILINE)
    if not tags or not any(each.parts[-1] == "__init__.py" for each in files):
        raise BundleError(f"{project} was not installed from a wheel: install it with pip, from a wheel or an index")
    name = f"{project.replace('-', '_')}-{found.version}"
    place = directory / f"{name}-{tags[0]}.whl"
    record = f"{name}.dist-info/RECORD"
    rows = io.StringIO()
    lines = csv.writer(rows, lineterminator="\n")
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in files:
            if each.suffix == ".pyc" or (each.parts[0].endswith(".dist-info") and each.name in _NOT_IN_A_WHEEL):
                continue
            data = Path(str(found.locate_file(each))).read_bytes()
            archive.writestr(each.as_posix(), data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.writerow((each.as_posix(), f"sha256={digest}", len(data)))
        lines.writerow((record, "", ""))
        archive.writestr(record, rows.getvalue())
    return place


def _needed_patch(wheel: Path) -> int:
    """The least z of this Python x.y.z that a wheel asks for (Requires-Python)."""
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
        text = "" if name is None else archive.read(name).decode("utf-8", "replace")
    asked = re.search(r"^Requires-Python:(.*)$", text, re.MULTILINE)
    ours = rf">=\s*{sys.version_info[0]}\.{sys.version_info[1]}\.(\d+)"
    found = re.search(ours, asked[1]) if asked else None
    return int(found[1]) if found else 0


def _needed_glibc(names: list[str]) -> list[int] | None:
    """The newest version of the GNU C library that a wheel asks for; that of this machine for one built here."""
    newest: tuple[int, int] | None = None
    for name in names:
        if not name.endswith(".whl"):
            continue
        platforms = name.removesuffix(".whl").rpartition("-")[2].split(".")
        asked = [version for each in platforms if (version := _glibc_of(each)) is not None]
        if asked:  # of several, the oldest suffices
            newest = max(newest or (0, 0), min(asked))
    return list(newest) if newest is not None else None


def _glibc_of(platform: str) -> tuple[int, int] | None:
    if match := _MANYLINUX.match(platform):
        return int(match[1]), int(match[2])
    for name, version in _OLD_NAMES.items():
        if platform.startswith(f"{name}_"):
            return version
    present = installer.glibc()
    if platform.startswith("linux_") and present is not None:
        return present[0], present[1]
    return None


def install_bundle(place: Path, directory: Path, progress: ProgressMode = "auto") -> None:
    """Set up a directory from a bundle; see :func:`kata_lab.lab.installer.install`.

    Raises:
        BundleError: a bundle that is damaged or for another machine, or a directory that cannot be used.
    """
    steps: list[str] = []
    with Progress(f"Installing {place.name}", total=4, mode=progress) as bar:

        def say(step: str) -> None:
            bar.advance(1 if steps else 0, step)
            steps.append(step)

        try:
            installer.install(place, directory, say)
        except installer.InstallError as error:
            raise BundleError(str(error)) from error
        bar.advance(1, "done")
