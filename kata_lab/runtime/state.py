"""What is on disk of a sandbox that exists: one directory with a record, private to its user.

The record (``sandbox.json``) is written whole, synced and renamed, so that no half of it is ever read; it carries the
version of its format. A process is known by its number and the time it started (proc(5), ``stat`` field 22), since
numbers are used again.

A directory appears together with its record, and whoever makes one clears away those whose processes are dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from kata_lab.paths import state_directory
from kata_lab.runtime.errors import RuntimeFault

VERSION: Final = 1
RECORD: Final = "sandbox.json"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(what: str, name: str) -> str:
    """``name``, if it can be one.

    Raises:
        RuntimeFault: it cannot.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RuntimeFault(
            f"{what} {name!r} must have 1 to 64 letters, digits, '_', '.' and '-', and begin with a letter or digit"
        )
    return name


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process of this machine; it is another one once the number is used again."""

    pid: int
    started: int  #: clock ticks since the machine booted

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The process that has this number now; None if there is none."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self == ProcessIdentity.of(self.pid)


@dataclass(slots=True)
class SandboxRecord:
    """What the record says."""

    id: str
    state: str
    owner: ProcessIdentity
    created: float  #: seconds since the epoch
    config: dict[str, Any] = field(default_factory=dict)
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)


class StateDirectory:
    """The directory of one sandbox.

    Args:
        sandbox_id: its name.
    """

    def __init__(self, sandbox_id: str) -> None:
        self.id = check_name("the sandbox's name", sandbox_id)
        self.path = sandboxes_directory() / sandbox_id

    def make(self, record: SandboxRecord) -> None:
        """Make it with its first record. Those that dead processes left behind are cleared away.

        Raises:
            RuntimeFault: a sandbox of that name exists, or it cannot be made.
        """
        try:
            with _alone(self.path.parent):
                _clear(self.path.parent)
                if self.path.exists():
                    raise RuntimeFault(f"a sandbox {self.id!r} exists already; choose another name or remove it")
                new = self.path.parent / f".new-{os.getpid()}-{secrets.token_hex(4)}"
                try:
                    new.mkdir(mode=0o700)
                    _write(new, record)
                    new.rename(self.path)
                except BaseException:
                    shutil.rmtree(new, ignore_errors=True)
                    raise
        except OSError as error:
            raise RuntimeFault(f"the directory {self.path} cannot be made: {error.strerror}") from error

    def write(self, record: SandboxRecord) -> None:
        """Replace the record.

        Raises:
            RuntimeFault: it cannot be written.
        """
        try:
            _write(self.path, record)
        except OSError as error:
            raise RuntimeFault(f"the record of sandbox {self.id} cannot be written: {error.strerror}") from error

    def read(self) -> SandboxRecord | None:
        """The record; None while there is none.

        Raises:
            RuntimeFault: it is of another version, or no record at all.
        """
        try:
            data = json.loads((self.path / RECORD).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RuntimeFault(f"the record {self.path / RECORD} cannot be read: {error}") from error
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise RuntimeFault(f"the record {self.path / RECORD} is not of version {VERSION}; remove its directory")
        try:
            return SandboxRecord(**{**data, "owner": ProcessIdentity(**data["owner"])})
        except (TypeError, KeyError) as error:
            raise RuntimeFault(f"the record {self.path / RECORD} is damaged ({error}); remove its directory") from error

    def remove(self) -> None:
        """Take the directory away, with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _write(directory: Path, record: SandboxRecord) -> None:
    text = json.dumps({"version": VERSION, **asdict(record)}, indent=1)
    write_whole(directory / f".{RECORD}.{os.getpid()}", directory / RECORD, text)


def write_whole(partial: Path, place: Path, text: str) -> None:
    """Write ``partial``, wait until the disk has it, and give it its name. OSError leaves what was there before."""
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else makes or clears directories of sandboxes meanwhile."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear(directory: Path) -> None:
    """Take away what nobody can own any more."""
    for each in os.listdir(directory):
        # One that is being made has its maker in here, with the lock: it is not now.
        if each.startswith(".new-"):
            shutil.rmtree(directory / each, ignore_errors=True)
        elif NAME.fullmatch(each):
            found = StateDirectory(each)
            # A record that is not understood is for a person to judge.
            with contextlib.suppress(RuntimeFault):
                record = found.read()
                if record is not None and not record.owner.alive:
                    found.remove()


def sandboxes_directory() -> Path:
    """Where the directories of sandboxes are."""
    path = state_directory() / "sandboxes"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def list_sandboxes() -> list[StateDirectory]:
    """All that have a directory, by name."""
    return [StateDirectory(each.name) for each in sorted(sandboxes_directory().iterdir()) if NAME.fullmatch(each.name)]
