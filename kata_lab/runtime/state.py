"""What is on disk of a sandbox that exists: one directory with a record, private to its user.

The record (``sandbox.json``) is written whole, synchronised and renamed, so that no half of it is ever read; it carries
the version of its format. A process is known by its number and the time it started (proc(5), ``stat`` field 22), since
numbers are used again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
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

    def make(self) -> None:
        """Make it; one that a dead process left behind is cleared away first.

        Raises:
            RuntimeFault: a sandbox of that name exists, or it cannot be made.
        """
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            record = self.read()
            if record is None or record.owner.alive:
                raise RuntimeFault(f"a sandbox {self.id!r} exists already; choose another name or remove it") from None
            self.remove()
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise RuntimeFault(f"the directory {self.path} cannot be made: {error.strerror}") from error

    def write(self, record: SandboxRecord) -> None:
        """Replace the record."""
        text = json.dumps({"version": VERSION, **asdict(record)}, indent=1)
        partial = self.path / f".{RECORD}.{os.getpid()}"
        try:
            with partial.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path / RECORD)
        except OSError as error:
            partial.unlink(missing_ok=True)
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


def sandboxes_directory() -> Path:
    """Where the directories of sandboxes are."""
    path = state_directory() / "sandboxes"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def list_sandboxes() -> list[StateDirectory]:
    """All that have a directory, by name."""
    return [StateDirectory(each.name) for each in sorted(sandboxes_directory().iterdir()) if NAME.fullmatch(each.name)]
