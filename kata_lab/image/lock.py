"""The lock of an image: exactly which packages it is made of, so that another day or machine builds the same bytes.

A JSON file, beside a description of one's own (``<name>.lock.json``) or, for those that come with Kata Lab, in the
cache. It holds for as long as the description asks for the same packages; every package has the version, size and hash
that the archive's signed index told when it was resolved.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kata_lab.errors import ImageError
from kata_lab.image.apt import Package
from kata_lab.image.description import Description, descriptions
from kata_lab.image.store import publish, write_synced
from kata_lab.paths import cache_directory

FORMAT = 1


@dataclass(frozen=True)
class Lock:
    """The kernel package and all others (sorted by name); ``inputs`` is Description.package_inputs."""

    inputs: str
    kernel: Package
    packages: tuple[Package, ...]

    def encode(self) -> bytes:
        """As JSON; equal locks give equal bytes."""
        data = {
            "format": FORMAT,
            "inputs": self.inputs,
            "kernel": _plain(self.kernel),
            "packages": [_plain(each) for each in self.packages],
        }
        return json.dumps(data, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, origin: str) -> Lock:
        """The lock in JSON.

        Raises:
            ImageError: it is something else; `origin` names it in the message.
        """
        try:
            plain: dict[str, Any] = json.loads(data)
            if plain["format"] != FORMAT:
                raise ImageError(f"the lock {origin} has format {plain['format']!r}: this version reads {FORMAT}")
            packages = tuple(_package(each) for each in plain["packages"])
            return cls(str(plain["inputs"]), _package(plain["kernel"]), packages)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"{origin} is no lock of an image ({error}): delete it and build again") from error


def lock_path(description_file: Path) -> Path:
    """Where the lock of a description is kept."""
    name = f"{description_file.stem}.lock.json"
    if description_file in descriptions().values():
        return cache_directory() / "locks" / name
    return description_file.with_name(name)


def read_lock(path: Path) -> Lock | None:
    """The lock in a file, None if there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ImageError(f"the lock {path} cannot be read ({error.strerror})") from error
    return Lock.decode(data, str(path))


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock, whole or not at all.

    Raises:
        ImageError: the file cannot be written.
    """
    place = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(place, lock.encode())
        publish(place, path)
    except OSError as error:
        raise ImageError(f"the lock {path} cannot be written ({error.strerror})") from error
    finally:
        place.unlink(missing_ok=True)


def check_covers(lock: Lock | None, description: Description, path: Path) -> Lock:
    """The lock, if it is one of this description.

    Raises:
        ImageError: there is none, or the description asks for other packages by now.
    """
    if lock is None:
        raise ImageError(f"there is no lock {path}: build {description.name!r} once without --locked and --offline")
    if lock.inputs != description.package_inputs:
        raise ImageError(
            f"the lock {path} is of other packages than {description.origin} asks for now: "
            "build once without --locked and --offline"
        )
    return lock


def _plain(package: Package) -> dict[str, Any]:
    plain = asdict(package)
    del plain["depends"]
    return plain


def _package(plain: dict[str, Any]) -> Package:
    package = Package(**plain)
    texts = (package.name, package.version, package.architecture, package.sha256)
    if not all(isinstance(each, str) and "/" not in each for each in texts) or not isinstance(package.size, int):
        raise ValueError(f"{plain} describes no package")
    return package
