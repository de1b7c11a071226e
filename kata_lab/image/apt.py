"""Debian packages of another architecture, through the host's own APT, without root and without touching the host's.

APT does the whole of it: the archive's signature is verified against Debian's keyring (Signed-By), the index against
the signature, each package against the index, as apt-secure(8) says. It runs with its own configuration, lists and
cache beneath the cache directory (``APT_CONFIG``, apt.conf(5)); of the host's configuration only what says how to
reach the network is taken over: proxies, time-outs, TLS certificates, login data (apt_auth.conf(5)). A package in the
cache is hashed again before it is used. Where a mirror serves an index that the signature of a suite does not cover,
the suite is looked for under its other name (``stable``), whose signature must say the same code name. Dependencies
are resolved by APT as if nothing were installed; what packages recommend is left out. Which files a package has is
known before it is fetched from the archive's index Contents, 11 MB that are fetched only when they are asked for, and
verified as the other index.

Tools: ``apt-config dump``, ``apt-get update``, ``apt-get download``, ``apt-get indextargets``, ``apt-get --simulate
install``, ``apt-cache show``, ``apt-cache pkgnames``.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from kata_lab.errors import ImageError
from kata_lab.image.deb import parse_fields
from kata_lab.image.mirror import find_mirror
from kata_lab.image.store import disk_is_full, exclusive, publish, scratch, sha256_of
from kata_lab.paths import cache_directory
from kata_lab.programs import run_apart
from kata_lab.progress import Progress, ProgressMode

SUITE = "trixie"
ARCHITECTURE = "riscv64"
KEYRING_VARIABLE = "KATA_LAB_KEYRING"
ATTEMPTS = 3

_KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
_KEYRING_ADVICE = (
    "install the package debian-archive-keyring (2023.3+deb12u2 or later, which has trixie's keys) "
    f"or name such a keyring with {KEYRING_VARIABLE}"
)
_NETWORK_SETTING = re.compile(
    r"Acquire::(https?|ftp|tor|tor\+https?|Retries|ForceIPv[46]|Send-URI-Encoded)(::|$)|Dir::Etc::netrc(parts)?$"
    r"|Dir::Bin::methods$",
    re.IGNORECASE,
)
_WEAKENING_SETTING = re.compile(r"::Verify-|::AllowDowngrade", re.IGNORECASE)
_SETTING = re.compile(r'(?P<name>[^\s"]+) "(?P<value>[^"]*)";')
_SIGNATURE = re.compile(
    r"NO_PUBKEY|BADSIG|EXPKEYSIG|REVKEYSIG|couldn't be verified|is not signed|invalid signature"
    r"|signatures? were invalid|GPG error|OpenPGP signature verification failed|Missing key"
    r"|Release file.* is not valid yet|Release file.* expired"
)
_WRONG_CONTENT = re.compile(
    r"Hash Sum mismatch|unexpected size|Clearsigned file isn't valid|Mirror sync in progress"
    r"|Unable to find expected entry|Maximum size exceeded"
)
_MISSING = re.compile(r"\b404\b|File not found|does not have a Release file|doesn't support architecture")
_FULL = re.compile(r"No space left on device|Disk quota exceeded|enough free space")
_SUITE = re.compile(r"^Suite: ([a-z][a-z0-9-]*)$", re.MULTILINE)
_CONTENTS = "Contents-deb"
_LONGEST_COMPLAINT = 400
_INSTALLED = re.compile(r"Inst (?P<name>\S+) (?:\[\S+\] )?\((?P<version>\S+) ")


@dataclass(frozen=True)
class Package:
    """A package as the signed index describes it. `sha256` (hexadecimal) and `size` (bytes) are those of the file."""

    name: str
    version: str
    architecture: str
    size: int
    sha256: str
    depends: str = ""

    @property
    def file_name(self) -> str:
        """The name under which the cache holds it; the hash tells two builds of one version apart."""
        version = self.version.replace(":", "%3a")
        return f"{self.name}_{version}_{self.architecture}_{self.sha256[:16]}.deb"


class PackageGoneError(ImageError):
    """The mirror no longer has a file that the index names: the index is out of date."""


class UnknownPackageError(ImageError):
    """The suite has no package of this name; `near` is one with a similar name, or empty."""

    def __init__(self, message: str, name: str, near: str) -> None:
        super().__init__(message)
        self.name = name
        self.near = near


class Archive:
    """One suite of a Debian archive, for one architecture.

    Args:
        mirror: URI of the archive; None takes ``KATA_LAB_MIRROR`` or what the host's APT sources name.
        suite: release code name.
        architecture: of the packages, as Debian names it.
        keyring: file of the OpenPGP keys to trust; None takes ``KATA_LAB_KEYRING`` or the host's Debian keyring.
        progress: how to show downloads.

    Raises:
        ImageError: this machine has no APT, no Debian keyring, or APT's sources name no Debian archive.
    """

    def __init__(
        self,
        mirror: str | None = None,
        *,
        suite: str = SUITE,
        architecture: str = ARCHITECTURE,
        keyring: Path | None = None,
        progress: ProgressMode = "auto",
    ) -> None:
        for program in ("apt-get", "apt-cache", "apt-config"):
            if shutil.which(program) is None:
                raise ImageError(
                    f"this machine has no {program}: guest software comes from Debian packages through APT, so "
                    "build on a Debian or Ubuntu machine and copy its cache directory here"
                )
        self.mirror = find_mirror(mirror)
        self.suite = suite
        self.architecture = architecture
        self.keyring = find_keyring(keyring)
        self._progress = progress
        self._packages = cache_directory() / "packages"
        identity = "\n".join((self.mirror, str(self.keyring), sha256_of(self.keyring)))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._directory = cache_directory() / "apt" / f"{suite}-{architecture}-{digest}"

    def update(self) -> None:
        """Fetch the archive's index and verify its signature.

        Raises:
            ImageError: no network, no such suite, a signature that does not verify, or a mirror that serves something
                else than what the signature covers, also when asked again.
        """
        complaint = self._update("Reading Debian's package index", [])
        if complaint:
            raise self._error(f"the package index of Debian {self.suite}", complaint)

    def _update(self, title: str, options: Sequence[str]) -> str:
        with self._exclusive() as lock:
            complaint = self._update_as(self.suite, title, options, lock)
            if not complaint:
                self._served_as.unlink(missing_ok=True)
            elif _is_wrong_content(complaint) and self._update_by_other_name(title, options, lock):
                complaint = ""
            self._configure()
        return complaint

    def _update_by_other_name(self, title: str, options: Sequence[str], lock: int) -> bool:
        """Where a mirror is half way to a new version, or caches each file for itself, another name may be whole."""
        name = self._other_name()
        if not name or self._update_as(name, title, options, lock) or not self._is_suite(name):
            return False
        self._served_as.write_text(name)
        return True

    def _update_as(self, name: str, title: str, options: Sequence[str], lock: int) -> str:
        self._configure(name)
        for _ in range(ATTEMPTS):
            complaint = self._apt_get(title, [*options, "update"], self._directory, lock)
            if not _is_wrong_content(complaint):
                break
        return complaint

    @property
    def _served_as(self) -> Path:
        """The file with the name under which the index that is here was fetched, if that is not the code name."""
        return self._directory / "served-as"

    def _other_name(self) -> str:
        """What else the archive calls the suite, as "stable"; empty if it has no other name. Only a name to try."""
        for place in (self._directory / "lists").glob(f"**/*_dists_{self.suite}_InRelease"):
            found = _SUITE.search(place.read_text(errors="replace"))
            if found and found[1] != self.suite:
                return found[1]
        return ""

    def _is_suite(self, name: str) -> bool:
        """Whether what the archive signed under another name says that it is this suite."""
        places = (self._directory / "lists").glob(f"*_dists_{name}_InRelease")
        return any(f"\nCodename: {self.suite}\n" in place.read_text(errors="replace") for place in places)

    def _exclusive(self) -> AbstractContextManager[int]:
        return exclusive(self._directory, self._progress)

    def find(self, name: str) -> Package:
        """What the index says about the newest version of a package; fetches the index first if there is none yet.

        Raises:
            ImageError: the suite has no such package; or as update().
        """
        self._need_index()
        return self._describe([name])[0]

    def resolve(self, names: Sequence[str]) -> list[Package]:
        """Packages and everything that they depend on, sorted by name; fetches the index first if there is none yet.

        Raises:
            UnknownPackageError: the suite has no package of that name.
            ImageError: their dependencies contradict each other or are not in the suite; or as update().
        """
        self._need_index()
        self._describe(names)
        answer = self._ask("apt-get", "-q", "--simulate", "--no-install-recommends", "install", "--", *names)
        found = [match for line in answer.stdout.splitlines() if (match := _INSTALLED.match(line))]
        if answer.returncode != 0 or not found:
            complaint = " ".join(answer.stdout.partition("The following information")[2].split()[8:])
            complaint = complaint or " ".join(answer.stderr.split())
            raise ImageError(
                f"the packages {', '.join(names)} of Debian {self.suite} cannot be installed together: "
                f"take one of them out (APT says: {complaint[:_LONGEST_COMPLAINT]})"
            )
        packages = self._describe([f"{match['name']}={match['version']}" for match in found])
        return sorted(packages, key=lambda package: package.name)

    def paths_of(self, package: str) -> frozenset[str] | None:
        """The files that a package would install, without fetching it; fetches the index Contents if it is not there.

        Returns:
            paths relative to the root; None when the archive does not say, since it has no such index, or an older one.

        Raises:
            ImageError: as update().
        """
        place = self._contents()
        if place is None:
            complaint = self._update("Reading what is in Debian's packages", self._contents_options())
            if complaint and not _MISSING.search(complaint):
                raise self._error(f"the list of files of Debian {self.suite}", complaint)
            place = self._contents()
        return None if place is None else _paths_in(place, package)

    def _contents(self) -> Path | None:
        """The file with the index Contents, if it was fetched since the last update()."""
        question = ("indextargets", "--format", "$(FILENAME)", f"Created-By: {_CONTENTS}")
        answer = self._ask("apt-get", *self._contents_options(), *question)
        name = answer.stdout.strip()
        return Path(name) if name and Path(name).is_file() else None

    def _contents_options(self) -> list[str]:
        """Settings that let APT take the index Contents for one of its own (apt.conf(5), Acquire::IndexTargets)."""
        name = f"Contents-{self.architecture}"
        settings = {
            "MetaKey": f"$(COMPONENT)/{name}",
            "ShortDescription": name,
            "Description": f"$(RELEASE)/$(COMPONENT) {name}",
            "KeepCompressed": "true",
            "KeepCompressedAs": "gz",
        }
        return [f"-oAcquire::IndexTargets::deb::{_CONTENTS}::{key}={value}" for key, value in settings.items()]

    def _need_index(self) -> None:
        if not any((self._directory / "lists").glob("*_Packages*")):
            self.update()

    def _describe(self, wanted: Sequence[str]) -> list[Package]:
        """What the index says of packages, each ``name`` or ``name=version``."""
        answer = self._ask("apt-cache", "show", "--no-all-versions", "--", *wanted)
        packages: dict[str, Package] = {}
        for paragraph in answer.stdout.split("\n\n"):
            if record := parse_fields(paragraph):
                package = self._package(record)
                packages[package.name] = package
        for each in wanted:
            name = each.partition("=")[0]
            if name not in packages:
                if _FULL.search(answer.stderr):
                    raise disk_is_full(self._directory)
                raise self._unknown(name)
        return [packages[each.partition("=")[0]] for each in wanted]

    def _package(self, record: dict[str, str]) -> Package:
        try:
            return Package(
                name=record["Package"],
                version=record["Version"],
                architecture=record["Architecture"],
                size=int(record["Size"]),
                sha256=record["SHA256"].lower(),
                depends=record.get("Depends", ""),
            )
        except (KeyError, ValueError) as error:
            name = record.get("Package", "")
            raise ImageError(f"the index of suite {self.suite} describes {name!r} without a valid {error}") from error

    def _unknown(self, name: str) -> UnknownPackageError:
        names = self._ask("apt-cache", "pkgnames").stdout.split()
        near = next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), "")
        hint = f"did you mean {near!r}?" if near else "check its spelling"
        message = f"Debian {self.suite} has no package {name!r} for {self.architecture}: {hint}"
        return UnknownPackageError(message, name, near)

    def fetch(self, package: Package) -> Path:
        """The file of a package: the one in the cache if its hash is right, else a download, verified.

        Raises:
            PackageGoneError: the index is out of date, so update() is due.
            ImageError: no network, or a mirror that serves a wrong size or hash, also when asked again.
        """
        return self.fetch_all([package])[0]

    def fetch_all(self, packages: Sequence[Package]) -> list[Path]:
        """The files of packages, in their order; what the cache lacks is downloaded in one go, as by fetch()."""
        places = [self._packages / package.file_name for package in packages]
        with exclusive(self._packages, self._progress) as lock:
            missing = [
                (package, place)
                for package, place in zip(packages, places, strict=True)
                if sha256_of(place) != package.sha256
            ]
            if not missing:
                return places
            self._need_index()
            for _ in range(ATTEMPTS):
                with scratch(self._packages) as partial:
                    complaint = self._download([package for package, _ in missing], partial, lock)
                    got = {sha256_of(file): file for file in partial.glob("*.deb")}
                    for package, place in missing:
                        if package.sha256 in got:
                            publish(got[package.sha256], place)
                missing = [(package, place) for package, place in missing if package.sha256 not in got]
                if not missing:
                    return places
                complaint = complaint or "Hash Sum mismatch"
                if not _is_wrong_content(complaint):
                    break
        names = ", ".join(f"{package.name} {package.version}" for package, _ in missing[:3])
        what = f"the package {names}" if len(missing) == 1 else f"{len(missing)} packages ({names}…)"
        raise self._error(what, complaint)

    def _download(self, packages: Sequence[Package], partial: Path, lock: int) -> str:
        title = f"{packages[0].name} {packages[0].version}" if len(packages) == 1 else f"{len(packages)} packages"
        # "all" is no architecture that APT could be asked for.
        wanted = [
            f"{package.name}{'' if package.architecture == 'all' else ':' + package.architecture}={package.version}"
            for package in packages
        ]
        size = sum(package.size for package in packages)
        return self._apt_get(f"Fetching {title}", ["download", *wanted], partial, lock, size)

    def _configure(self, name: str = "") -> None:
        """Write APT's configuration for this archive: for the index that is here, or for one under another name."""
        directory = self._directory
        if not name:
            name = self._served_as.read_text() if self._served_as.exists() else self.suite
        for part in ("lists/partial", "archives/partial"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        settings = {
            **_host_network_settings(),
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": str(directory / "debian.sources"),
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Etc::trusted": "/dev/null",
            "Dir::Etc::trustedparts": "/dev/null",
            "Dir::State": str(directory),
            "Dir::State::lists": str(directory / "lists"),
            "Dir::State::status": str(directory / "status"),
            "Dir::Cache": str(directory),
            "Dir::Cache::archives": str(directory / "archives"),
            "Dir::Cache::srcpkgcache": "",
            "Dir::Log": str(directory),
            "APT::Architecture": self.architecture,
            "APT::Sandbox::User": "root",  # a sandbox user could not reach a private cache; only root has one at all
            "Acquire::Languages": "none",
            "Acquire::PDiffs": "false",
            "Acquire::GzipIndexes": "true",  # keeps the index compressed on disk
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "APT::Get::AllowUnauthenticated": "false",
            "APT::Update::Error-Mode": "any",
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        lines += ["#clear APT::Architectures;", f'APT::Architectures {{ "{self.architecture}"; }};', ""]
        sources = {
            "Types": "deb",
            "URIs": self.mirror,
            "Suites": name,
            "Components": "main",
            "Architectures": self.architecture,
            "Signed-By": str(self.keyring),
        }
        texts = {
            "apt.conf": "\n".join(lines),
            "debian.sources": "".join(f"{name}: {value}\n" for name, value in sources.items()),
            "status": "",
        }
        with scratch(directory) as new:
            for name, text in texts.items():
                place = directory / name
                # A new time on any of these files would make APT read the whole index again.
                if not place.exists() or place.read_text() != text:
                    (new / name).write_text(text)
                    (new / name).replace(place)

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of APT that changes nothing but its own cache."""
        with self._exclusive() as lock:
            self._configure()
            return run_apart(command, self._environment(), (lock,))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self._directory / "apt.conf"), "LC_ALL": "C"}

    def _apt_get(self, title: str, arguments: Sequence[str], place: Path, lock: int, size: int = 0) -> str:
        """Run apt-get in the directory `place`, showing how far it is; its complaint, empty when all went well."""
        complaints: list[str] = []
        with (
            Progress(title, total=size or 100, unit="B" if size else "", mode=self._progress) as bar,
            # What apt-get leaves behind when it is ended in the middle goes with this directory.
            scratch(self._directory) as temporary,
            subprocess.Popen(
                ["apt-get", "-q", "-oAPT::Status-Fd=1", *arguments],
                cwd=place,
                env={**self._environment(), "TMPDIR": str(temporary)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(lock,),
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith("dlstatus:"):
                        percent = float(line.split(":")[2])
                        bar.advance_to(percent * size / 100 if size else percent)
                    elif line.startswith(("E:", "W:")):
                        complaints.append(" ".join(line[2:].split()))
            except BaseException:
                process.terminate()
                raise
            if process.wait() == 0 and not any("Failed to fetch" in line for line in complaints):
                return ""
            bar.fail()
        return "; ".join(complaints) or f"apt-get ended with status {process.returncode}"

    def _error(self, what: str, complaint: str) -> ImageError:
        """What APT complained of, as one sentence that says what to do."""
        if _FULL.search(complaint):
            return disk_is_full(self._directory)
        says = f"(APT says: {complaint[:_LONGEST_COMPLAINT].rstrip('.')})"
        if _SIGNATURE.search(complaint):
            return ImageError(
                f"the signature of {self.mirror} does not verify with the keys in {self.keyring}: "
                f"use a Debian mirror, or {_KEYRING_ADVICE} {says}"
            )
        if _is_wrong_content(complaint):
            return ImageError(
                f"{self.mirror} served {what} with a wrong hash or size, {ATTEMPTS} times, so it is refused: "
                f"try again later or choose another mirror {says}"
            )
        if _MISSING.search(complaint):
            return PackageGoneError(
                f"{self.mirror} does not have {what} for {self.architecture}: choose a mirror that carries it {says}"
            )
        return ImageError(
            f"{what} could not be fetched from {self.mirror}: "
            f"check the network, APT's proxy settings and the mirror {says}"
        )


def _paths_in(contents: Path, package: str) -> frozenset[str] | None:
    """Follows the Debian repository format: a path, white space, and the packages as ``section/name,…``."""
    name = package.encode()
    paths = set()
    try:
        with gzip.open(contents) as lines:
            for line in lines:
                if name in line:
                    path, _, owners = line.rstrip().rpartition(b" ")
                    if any(owner.rpartition(b"/")[2] == name for owner in owners.split(b",")):
                        paths.add(path.rstrip().decode("utf-8", "replace"))
    except (OSError, EOFError, zlib.error):
        return None  # it was changed since APT verified it
    return frozenset(paths) or None


def cached(package: Package) -> Path | None:
    """The file of a package in the cache, without any network; None when it is absent or not what it should be."""
    place = cache_directory() / "packages" / package.file_name
    return place if sha256_of(place) == package.sha256 else None


def find_keyring(keyring: Path | None = None) -> Path:
    """The file of the keys that sign Debian's archive.

    Args:
        keyring: an explicit choice; else the environment's ``KATA_LAB_KEYRING``; else the host's package
            debian-archive-keyring.

    Raises:
        ImageError: there is none.
    """
    if keyring is None and os.environ.get(KEYRING_VARIABLE):
        keyring = Path(os.environ[KEYRING_VARIABLE])
    if keyring is not None:
        if not keyring.is_file():
            raise ImageError(f"the keyring {keyring} does not exist: {_KEYRING_ADVICE}")
        return keyring.absolute()
    for name in _KEYRINGS:
        found = Path("/usr/share/keyrings") / name
        if found.is_file():
            return found
    raise ImageError(f"this machine has no keys of the Debian archive: {_KEYRING_ADVICE}")


def _host_network_settings() -> dict[str, str]:
    """How the host's APT reaches the network; nothing that weakens a verification."""
    answer = run_apart(["apt-config", "dump"])
    settings: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        match = _SETTING.fullmatch(line.strip())
        if match is None or not match["value"]:
            continue
        name = match["name"]
        if _NETWORK_SETTING.match(name) and not _WEAKENING_SETTING.search(name):
            settings[name] = match["value"]
    return settings


def _is_wrong_content(complaint: str) -> bool:
    return _WRONG_CONTENT.search(complaint) is not None and _SIGNATURE.search(complaint) is None
