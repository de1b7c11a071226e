"""Sets a machine up from a bundle, without a network: ``python3 BUNDLE [DIRECTORY]``, or ``kata-lab lab install``.

A bundle is a zip file that Python can run, which has this module as its ``__main__``; so it imports nothing but the
standard library, and says in one sentence what is wrong also to a Python that is too old for the rest of it::

    __main__.py                   this module
    manifest.json                 for which Python and machine it was made; size and SHA-256 of every other member
    wheels/*.whl                  Kata Lab, JupyterLab and what they need
    images/ locks/ boot/ oci/     guests, as :mod:`kata_lab.lab.bundle_content` puts them into the cache
    code/                         the compiled CPU of the machine on which the bundle was made

What is made, in the directory of the learner::

    *.ipynb                       the notebooks; what is there already stays as it is
    .venv                         a link to the environment that is complete
    .kata-lab/environment-*/      environments (venv, PEP 405); those that no link leads to are removed by the next run

The link is set last, by one rename; whoever interrupts an installation finds the directory as it was before. The hashes
find damage, not malice: a bundle is a program, so take it from somebody whom you trust.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

KIND = "kata-lab course"
FORMAT = 1
MANIFEST = "manifest.json"
PROGRAM = "__main__.py"
DIRECTORY = "kata-lab-course"
LEAST_PYTHON = (3, 11)

_LINK = ".venv"
_OWN = ".kata-lab"
_LARGEST_MANIFEST = 4 << 20
_CHUNK = 1 << 20
_MEMBER = re.compile(r"[a-z]+(/[A-Za-z0-9_][A-Za-z0-9_.+!-]*){1,4}")
_PIP = re.compile(r"wheels/pip-[0-9][^/]*\.whl")


class InstallError(Exception):
    """A bundle or a directory that cannot be used. (Its base is not Kata Lab's, which is not installed yet.)"""


def machine() -> dict[str, str]:
    """What a bundle depends on of the machine: interpreter and platform, with the version of a GNU C library."""
    return {
        "python": f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}",
        "platform": sysconfig.get_platform(),
    }


def glibc() -> list[int] | None:
    """The version of the GNU C library; None on a machine with another one."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):
        return None
    return [int(part) for part in version.split(".")[:2]] if name == "glibc" else None


class Bundle:
    """An open bundle whose manifest was checked, as a context manager.

    Args:
        place: of the file.

    Raises:
        InstallError: no bundle, a damaged one, or one of another version.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._refusal = f"{place} is no bundle that can be installed"
        try:
            self._archive = zipfile.ZipFile(place)
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise InstallError(f"{self._refusal}: it cannot be read ({error})") from error
        try:
            self.manifest = self._read_manifest()
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *ended: object) -> None:
        self._archive.close()

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and hash of each member."""
        found: dict[str, dict[str, Any]] = self.manifest["files"]
        return found

    def _read_manifest(self) -> dict[str, Any]:
        try:
            if self._archive.getinfo(MANIFEST).file_size > _LARGEST_MANIFEST:
                raise InstallError(f"{self._refusal}: its manifest is too large")
            manifest: dict[str, Any] = json.loads(self._archive.read(MANIFEST))
            if manifest["kind"] != KIND:
                raise InstallError(f"{self._refusal}: it holds {manifest['kind']!r}, not {KIND!r}")
            if manifest["format"] != FORMAT:
                raise InstallError(f"{self._refusal}: its format is {manifest['format']!r}, and this reads {FORMAT}")
            self._check(manifest)
        except (KeyError, ValueError, TypeError, AttributeError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise InstallError(f"{self._refusal}: its manifest is missing or wrong ({error})") from error
        return manifest

    def _check(self, manifest: dict[str, Any]) -> None:
        files = manifest["files"]
        for name in files:
            if name != PROGRAM and not _MEMBER.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a member")
            if not isinstance(files[name]["size"], int) or not re.fullmatch("[0-9a-f]{64}", files[name]["sha256"]):
                raise ValueError(f"{name} has no size and hash")
        if not all(isinstance(manifest[key], str) for key in ("python", "platform", "version")):
            raise ValueError("it does not say for which machine it was made")
        if not isinstance(manifest["python_patch"], int):
            raise ValueError("it does not say for which Python it was made")
        if manifest["glibc"] is not None and not all(isinstance(part, int) for part in manifest["glibc"]):
            raise ValueError("it does not say for which C library it was made")
        members = sorted(self._archive.namelist())
        if members != sorted([*files, MANIFEST]):
            raise ValueError("its members are not those that it names")

    def check_machine(self) -> None:
        """Whether it was made for a machine like this one.

        Raises:
            InstallError: it was not.
        """
        ours = machine()
        for key, what in (("python", "Python"), ("platform", "machine")):
            if self.manifest[key] != ours[key]:
                raise InstallError(
                    f"{self.place} was made for {self.manifest[key]} and this {what} is {ours[key]}: "
                    "have a bundle made on a machine like this one"
                )
        patch = self.manifest["python_patch"]
        if sys.version_info[2] < patch:
            raise InstallError(
                f"{self.place} needs {ours['python']}.{patch} or newer, and this is {ours['python']}."
                f"{sys.version_info[2]}: run it with such a one, or have a bundle made with this one"
            )
        needed, present = self.manifest["glibc"], glibc()
        if needed is not None and (present is None or present < needed):
            is_here = "has none" if present is None else f"has {'.'.join(map(str, present))}"
            raise InstallError(
                f"{self.place} needs the GNU C library {'.'.join(map(str, needed))} or newer, and this machine "
                f"{is_here}: have a bundle made on a machine like this one"
            )

    def unpack(self, directory: Path) -> None:
        """Write all members beneath a directory, and verify each.

        Raises:
            InstallError: one is not what the manifest says, or the disk is full.
        """
        for name, written in self.files.items():
            self._unpack(name, written, directory / name)

    def _unpack(self, name: str, written: dict[str, Any], place: Path) -> None:
        damaged = InstallError(f"{self._refusal}: {name} is damaged, so get the file once more")
        place.parent.mkdir(parents=True, exist_ok=True)
        digest, left = hashlib.sha256(), written["size"]
        try:
            source = self._archive.open(name)
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise damaged from error
        with source, open(place, "wb") as target:
            while True:
                try:
                    chunk = source.read(_CHUNK)
                except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise damaged from error
                left -= len(chunk)
                if not chunk or left < 0:
                    break
                digest.update(chunk)
                target.write(chunk)
        if left or digest.hexdigest() != written["sha256"]:
            raise damaged


def install(place: Path, directory: Path, say: Callable[[str], object]) -> None:
    """Set up a directory from a bundle.

    Args:
        place: of the bundle.
        directory: of the learner; made if need be.
        say: is told each step.

    Raises:
        InstallError: a bundle that is damaged or for another machine, or a directory that cannot be used.
    """
    if sys.version_info < LEAST_PYTHON:
        found, wanted = (".".join(map(str, version)) for version in (sys.version_info[:2], LEAST_PYTHON))
        raise InstallError(
            f"this is Python {found}, and Kata Lab needs {wanted} or newer: run the file with such a one"
        )
    with Bundle(place) as bundle:
        bundle.check_machine()
        try:
            with _prepared(directory) as own:
                _install(bundle, directory.resolve(), own, say)
        except OSError as error:
            what = error.filename or directory
            raise InstallError(f"{what} cannot be written ({error.strerror}): choose another directory") from error


def _install(bundle: Bundle, directory: Path, own: Path, say: Callable[[str], object]) -> None:
    with contextlib.ExitStack() as undo:
        staging = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="staging-", dir=own)))
        say(f"Unpacking {bundle.place.name}, and verifying it")
        bundle.unpack(staging)
        environment = Path(tempfile.mkdtemp(prefix="environment-", dir=own))
        environment.chmod(0o755)
        undone = undo.enter_context(contextlib.ExitStack())
        undone.callback(shutil.rmtree, environment, ignore_errors=True)
        say("Installing the Python packages")
        _make_environment(environment, staging, bundle.files)
        python = environment / "bin" / "python"
        say("Putting the guests into the cache")
        _run([str(python), "-P", "-m", "kata_lab.lab.bundle_content", str(staging)], "taking in the guests")
        say("Copying the notebooks")
        _run([str(python), "-P", "-m", "kata_lab", "lab", "copy", str(directory)], "copying the notebooks")
        _set_link(directory, environment)
        undone.pop_all()
    _remove_unlinked(directory, own)


@contextlib.contextmanager
def _prepared(directory: Path) -> Iterator[Path]:
    """Our own part of the learner's directory, while nobody else installs there; nothing stays of a failure."""
    link = directory / _LINK
    if os.path.lexists(link) and not link.is_symlink():
        raise InstallError(f"{link} is there, and was not made by an installation: choose another directory")
    new = not directory.exists()
    own = directory / _OWN
    own.mkdir(parents=True, exist_ok=True)
    try:
        with open(own / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InstallError(f"another installation is going on in {directory}: wait for its end") from None
            _remove_unlinked(directory, own)
            yield own
    except BaseException:
        if new and not os.path.lexists(link):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _remove_unlinked(directory: Path, own: Path) -> None:
    """Remove environments of before, and what was left by an installation that was killed."""
    link = directory / _LINK
    kept = os.path.basename(os.readlink(link)) if link.is_symlink() else ""
    for each in own.iterdir():
        if each.name.startswith(("environment-", "staging-")) and each.name != kept:
            shutil.rmtree(each, ignore_errors=True)


def _set_link(directory: Path, environment: Path) -> None:
    partial = environment.parent / "link"
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.join(_OWN, environment.name))
    os.replace(partial, directory / _LINK)


def _make_environment(environment: Path, staging: Path, files: Iterable[str]) -> None:
    """A virtual environment with every wheel of the bundle, made by the pip that is one of them."""
    names = sorted(files)
    pip = next((name for name in names if _PIP.fullmatch(name)), None)
    if pip is None:
        raise InstallError("the bundle has no pip, which installs what is in it: have it made again")
    venv.create(environment, symlinks=True, with_pip=False)
    wheels = [str(staging / name) for name in names if name.startswith("wheels/")]
    program = [str(environment / "bin" / "python"), str(staging / pip / "pip")]
    options = ["--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    _run([*program, "install", *options, "--no-warn-script-location", *wheels], "installing the Python packages")


def _run(command: Sequence[str], what: str) -> None:
    """Run a program to its end; the user's settings of Python and pip have no say in it.

    With ``-P``, Python does not import from where the user happens to be, such as Kata Lab's own sources.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment["PIP_CONFIG_FILE"] = os.devnull
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise InstallError(f"{what} failed with status {process.returncode}; the last that was said: {lines[-1]}")


def what_next(directory: Path) -> str:
    """What a learner does after an installation."""
    return f"ready; begin with:\n  cd {directory}\n  .venv/bin/kata-lab doctor\n  .venv/bin/jupyter lab"


def _end(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # releasing is not to be cut short
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Run as the program of a bundle; its exit status: 0, 1 for what cannot be done, 2 for a wrong command line."""
    if len(arguments) > 1 or any(each.startswith("-") for each in arguments):
        print(f"python3 {sys.argv[0]} [DIRECTORY]  (default {DIRECTORY}): installs Kata Lab and its course there")
        return 0 if arguments[0] in ("-h", "--help") else 2
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _end)
    directory = Path(arguments[0] if arguments else DIRECTORY)
    try:
        install(Path(sys.argv[0]), directory, lambda step: print(step, flush=True))
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    print(what_next(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
