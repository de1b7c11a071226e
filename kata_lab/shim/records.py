"""Containers and shims on disk: what every command reads, without asking anybody.

A container's directory is its lock: whoever starts, stops or removes it holds flock(2) on the directory, so two
commands on one name come one after the other; the kernel lets go when a process dies. A record is written whole and
renamed. It belongs to the command that makes the container until its shim is ready, then to the shim while that lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.paths import state_directory
from kata_lab.runtime.state import NAME, ProcessIdentity, check_name, sandboxes_directory, write_whole
from kata_lab.shim.names import made_up_name

VERSION: Final = 1
RECORD: Final = "container.json"
SHIM: Final = "shim.json"
LIVE: Final = ("creating", "created", "running", "paused", "restarting")  #: states that need a shim
UNKNOWN_STATUS: Final = 255  #: of a container whose end nobody saw, as containerd has it


class RecordError(KataLabError):
    """No such container, several, or a record that cannot be used."""


@dataclass(slots=True, kw_only=True)
class ContainerRecord:
    """What is known of a container.

    Attributes:
        id: twelve hexadecimal digits.
        name: by which people call it.
        sandbox: the sandbox that it runs in; of its own, or of a pod.
        pod: the pod's name, or empty.
        image: what it is made of, for people.
        command: its program and arguments, for people.
        request: what was asked for (:mod:`kata_lab.shim.request`).
        created, started, finished: seconds since the epoch, 0 for what has not happened.
        state: creating, created, running, paused, restarting or stopped.
        status: exit status; None while it has none.
        reason: why it stopped, if not by itself.
        out_of_memory: whether its guest killed a process of it for want of memory.
        restarts: how often it was started again.
        auto_remove: it is removed when it ends.
        terminal: its first process has a terminal.
        stdin: its first process has a standard input.
        stop_signal: how its program wants to be asked to end.
        creator: the command that makes it.
    """

    id: str
    name: str
    sandbox: str
    pod: str = ""
    image: str = ""
    command: list[str] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    state: str = "creating"
    status: int | None = None
    reason: str = ""
    out_of_memory: bool = False
    restarts: int = 0
    auto_remove: bool = False
    terminal: bool = False
    stdin: bool = False
    stop_signal: str = ""
    creator: ProcessIdentity | None = None

    @property
    def live(self) -> bool:
        """Whether its state needs somebody who keeps it."""
        return self.state in LIVE


class ContainerDirectory:
    """The directory of one container.

    Args:
        container_id: its name there.
    """

    def __init__(self, container_id: str) -> None:
        self.id = check_name("the container's id", container_id)
        self.path = containers_directory() / container_id
        self.log = self.path / "output.log"
        #: The disk with what it wrote, from one start to the next.
        self.scratch = self.path / "scratch"

    def read(self) -> ContainerRecord:
        """The record as it is now; one whose keeper is dead says that it has stopped.

        Raises:
            RecordError: there is none, or it is of another version.
        """
        record = self._read()
        if record.live and not _kept(record):
            record.state, record.status = "stopped", UNKNOWN_STATUS
            record.reason = "the process of its sandbox is gone"
        return record

    def _read(self) -> ContainerRecord:
        path = self.path / RECORD
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise RecordError(f"there is no container {self.id} any more") from None
        except (OSError, ValueError) as error:
            raise RecordError(f"the record {path} cannot be read: {error}") from error
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise RecordError(f"the record {path} is not of version {VERSION}; remove its directory")
        known = {each.name for each in fields(ContainerRecord)}
        if not data.keys() <= known or not {"id", "name", "sandbox"} <= data.keys():
            raise RecordError(f"the record {path} is damaged; remove its directory")
        creator = data.get("creator")
        return ContainerRecord(**{**data, "creator": None if creator is None else ProcessIdentity(**creator)})

    def write(self, record: ContainerRecord) -> None:
        """Replace the record; nothing happens if the container was removed."""
        text = json.dumps({"version": VERSION, **asdict(record)}, indent=1)
        partial = self.path / f".{RECORD}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            write_whole(partial, self.path / RECORD, text)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RecordError(f"the record of container {self.id} cannot be written: {error.strerror}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands off it; waits for them first.

        Raises:
            RecordError: it was removed meanwhile.
        """
        gone = RecordError(f"there is no container {self.id} any more")
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise gone from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(descriptor), self.path.stat())
            except FileNotFoundError:
                same = False
            if not same:
                raise gone
            yield
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Take it away; the record goes at once, so that nobody reads half of it."""
        doomed = self.path.with_name(f".{self.id}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class ShimDirectory:
    """The directory of one shim.

    Args:
        sandbox_id: its sandbox.
    """

    def __init__(self, sandbox_id: str) -> None:
        self.id = check_name("the sandbox's name", sandbox_id)
        self.path = _made(state_directory() / "shims") / sandbox_id
        self.socket = self.path / "shim.sock"
        self.log = self.path / "shim.log"

    def make(self) -> None:
        """Make it, if need be."""
        _made(self.path)

    def claim(self) -> None:
        """This process is the shim from now on."""
        identity = ProcessIdentity.of(os.getpid())
        assert identity is not None
        text = json.dumps({"version": VERSION, **asdict(identity)})
        try:
            write_whole(self.path / f".{SHIM}", self.path / SHIM, text)
        except OSError as error:
            raise RecordError(f"the record {self.path / SHIM} cannot be written: {error.strerror}") from error

    def owner(self) -> ProcessIdentity | None:
        """The process that claimed it and lives; None if there is none."""
        try:
            data = json.loads((self.path / SHIM).read_text())
            found = ProcessIdentity(data["pid"], data["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.alive else None

    def remove(self) -> None:
        """Take it away, and what the runtime kept of the sandbox."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(sandboxes_directory() / self.id, ignore_errors=True)


def containers_directory() -> Path:
    """Where the directories of containers are."""
    return _made(state_directory() / "containers")


def list_containers() -> list[ContainerRecord]:
    """All containers, the newest first; damaged records are left out."""
    found = []
    with os.scandir(containers_directory()) as entries:
        names = [each.name for each in entries if NAME.fullmatch(each.name)]
    for name in names:
        with contextlib.suppress(RecordError):
            found.append(ContainerDirectory(name).read())
    return sorted(found, key=lambda each: (-each.created, each.id))


def others_in(record: ContainerRecord) -> list[ContainerRecord]:
    """Other containers that live in the same sandbox."""
    return [each for each in list_containers() if each.live and each.sandbox == record.sandbox and each.id != record.id]


def find_container(name: str) -> ContainerDirectory:
    """By name, by id, or by what only one id begins with.

    Raises:
        RecordError: there is none, or several ids begin so.
    """
    records = list_containers()
    for record in records:
        if name in (record.name, record.id):
            return ContainerDirectory(record.id)
    matching = [record.id for record in records if name and record.id.startswith(name)]
    if len(matching) > 1:
        raise RecordError(f"{len(matching)} containers have an id that begins with {name!r}: give more of it")
    if not matching:
        raise RecordError(f"there is no container {name!r}: kata-lab ps -a lists those that there are")
    return ContainerDirectory(matching[0])


def new_container(record: ContainerRecord) -> ContainerDirectory:
    """Give a container its id, its name if it has none, and its directory with this record.

    Args:
        record: what is asked for; id, name, sandbox (if empty: of its own), created and creator are filled in.

    Raises:
        RecordError: the name is taken.
        RuntimeFault: the name cannot be one.
    """
    place = containers_directory()
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Between the look at all names and the directory nobody else may come.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        records = list_containers()
        taken = {each.name for each in records} | {each.id for each in records}
        if record.name:
            check_name("the container's name", record.name)
            if record.name in taken:
                raise RecordError(f"there is a container {record.name!r} already: choose another name or remove it")
        else:
            record.name = made_up_name(taken)
        record.id = secrets.token_hex(6)
        record.sandbox = record.sandbox or record.id
        record.created = time.time()
        record.creator = ProcessIdentity.of(os.getpid())
        directory = ContainerDirectory(record.id)
        partial = place / f".{record.id}.new"
        partial.mkdir(mode=0o700)
        try:
            text = json.dumps({"version": VERSION, **asdict(record)}, indent=1)
            write_whole(partial / f".{RECORD}", partial / RECORD, text)
            partial.rename(directory.path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return directory
    finally:
        os.close(descriptor)


def _kept(record: ContainerRecord) -> bool:
    """Whether somebody keeps a container alive: its shim, or the command that is making it."""
    if record.state == "creating" and record.creator is not None and record.creator.alive:
        return True
    return ShimDirectory(record.sandbox).owner() is not None


def _made(path: Path) -> Path:
    path.mkdir(mode=0o700, exist_ok=True)
    return path
