"""A QEMU process of the ACPI comparison: its command line, its QMP connection, and what its guest reports.

QMP (docs/interop/qmp-spec.rst, QEMU 7.2) and the guest's second serial port are two socket pairs whose other ends the
process inherits, so that there is nothing to wait for and nothing to find in a file system. What QEMU and the guest
tell is noted with the moment when it was read, in one journal:

::

    QMP event       DEVICE_DELETED {"device": "vcpu1"}      ─┐
                                                             ├─→ Journal: (moment, source, text, data)
    serial port     online cpu 0-1                          ─┘

Whatever is waited for ends with an AcpiError when QEMU ends or a time limit passes. Leaves out everything that a guest
of this comparison has no use for: graphics, network, USB, and firmware settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kata_lab.bench.peer import Peer
from kata_lab.errors import KataLabError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

    from kata_lab.image.library import Image

PROGRAM: Final = "qemu-system-x86_64"
PORTS: Final = 6  #: devices that can be plugged in: each needs a PCI Express port of its own
DIMMS: Final = 8  #: pieces of memory that can be plugged in
HOTPLUG_MIB: Final = 4096  #: how much memory can be plugged in at most, in MiB
LONGEST_BOOT: Final = 180.0
LONGEST_REQUEST: Final = 60.0
_MOST_WORDS: Final = 4096
_LONGEST_WORD: Final = 4096
_TAIL: Final = 300

T = TypeVar("T")


class AcpiError(KataLabError):
    """QEMU, or the guest in it, does not do its part of the comparison."""


@dataclass(frozen=True, slots=True)
class Word:
    """One thing that was told.

    Attributes:
        at: when it was read (``time.monotonic``).
        source: "QEMU" or "guest".
        text: the name of the event, or the guest's line.
        data: of the event.
    """

    at: float
    source: str
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """What QEMU and its guest told since the last request; bounded, since the guest can tell as much as it likes."""

    def __init__(self) -> None:
        self.words: list[Word] = []
        self._grown = asyncio.Event()

    def clear(self) -> None:
        self.words = []

    def note(self, source: str, text: str, data: Mapping[str, Any] | None = None) -> None:
        if len(self.words) < _MOST_WORDS:
            self.words.append(Word(time.monotonic(), source, text, data or {}))
        self._grown.set()

    async def find(self, wanted: Callable[[Word], bool], count: int = 1) -> Word:
        """Wait for the word that completes so many that are wanted.

        Raises:
            AcpiError: the journal is full.
        """
        while True:
            self._grown.clear()
            found = [word for word in self.words if wanted(word)]
            if len(found) >= count:
                return found[count - 1]
            if len(self.words) == _MOST_WORDS:
                raise AcpiError(f"the guest told {_MOST_WORDS} things and not what it was asked for")
            await self._grown.wait()


class AcpiMachine:
    """A running QEMU; made by :meth:`boot`."""

    def __init__(self, directory: Path, process: asyncio.subprocess.Process, qmp: QMPClient) -> None:
        self.directory = directory
        self.journal = Journal()
        self._process = process
        self._qmp = qmp
        self._ended = asyncio.create_task(process.wait(), name="QEMU")

    @property
    def pid(self) -> int:
        """Of QEMU's process."""
        return self._process.pid

    @classmethod
    @contextlib.asynccontextmanager
    async def boot(cls, peer: Peer, image: Image, max_vcpus: int, memory_mib: int) -> AsyncIterator[AcpiMachine]:
        """Start QEMU and follow what it tells; when this ends, nothing of it is left.

        Raises:
            AcpiError: QEMU does not start.
        """
        from qemu.qmp import QMPClient

        async with contextlib.AsyncExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="kata-lab-acpi-"))
            control, its_control = _pair(stack)
            reports, its_reports = _pair(stack)
            command = _command(peer.program, image, max_vcpus, memory_mib, its_control.fileno(), its_reports.fileno())
            process = await _start(command, Path(name), (its_control.fileno(), its_reports.fileno()))
            stack.push_async_callback(_kill, process)
            its_control.close()
            its_reports.close()
            machine = cls(Path(name), process, QMPClient("kata-lab"))
            stack.push_async_callback(machine._ended_too)
            await stack.enter_async_context(machine._following(control, reports))
            yield machine

    async def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Have QEMU carry out a QMP command.

        Raises:
            AcpiError: it refuses, or ends.
        """
        from qemu.qmp import ExecuteError, QMPError

        try:
            return await self.while_running(self._qmp.execute(name, dict(arguments or {})), f"answering {name}")
        except ExecuteError as error:
            raise AcpiError(f"QEMU refuses {name}: {str(error).rstrip('.')}") from error
        except QMPError as error:
            # The connection is lost a moment before the process can be waited for.
            await asyncio.wait({self._ended}, timeout=LONGEST_REQUEST)
            raise self._failure(f"answering {name}", LONGEST_REQUEST) from error

    async def while_running(self, awaited: Awaitable[T], what: str, limit: float = LONGEST_REQUEST) -> T:
        """Wait for something that only a running QEMU can bring about; `what` it does in the form "answering …".

        Raises:
            AcpiError: QEMU ended, or `limit` seconds passed.
        """
        task = asyncio.ensure_future(awaited)
        try:
            await asyncio.wait({task, self._ended}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._failure(what, limit)
        finally:
            task.cancel()
            await asyncio.wait({task})

    def _failure(self, what: str, limit: float) -> AcpiError:
        if not self._ended.done():
            told = f"; its console's last words are {console!r}" if (console := self._tail("console")) else ""
            return AcpiError(f"QEMU did not come to {what} within {limit:g} s{told}")
        status = self._ended.result()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        said = self._tail("messages") or (self._tail("console") if status >= 0 else "")
        return AcpiError(f"QEMU {how} before {what}" + (f"; it said {said!r}" if said else ""))

    def _tail(self, name: str) -> str:
        try:
            return (self.directory / name).read_bytes()[-_TAIL:].decode(errors="replace").strip()
        except OSError:
            return ""

    @contextlib.asynccontextmanager
    async def _following(self, control: socket.socket, reports: socket.socket) -> AsyncIterator[None]:
        """The journal is kept for as long as this lasts."""
        from qemu.qmp import EventListener, QMPError

        reader, writer = await asyncio.open_unix_connection(sock=reports, limit=_LONGEST_WORD)
        listener = EventListener()
        self._qmp.register_listener(listener)
        followers = {
            asyncio.create_task(self._follow_guest(reader), name="the guest's reports"),
            asyncio.create_task(self._follow_qemu(listener), name="QEMU's events"),
        }
        try:
            try:
                await self.while_running(self._qmp.connect(control), "answering at all")
            except QMPError as error:
                await asyncio.wait({self._ended}, timeout=LONGEST_REQUEST)
                raise self._failure("answering at all", LONGEST_REQUEST) from error
            yield
        finally:
            for task in followers:
                task.cancel()
            await asyncio.wait(followers)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            with contextlib.suppress(QMPError, EOFError, OSError):
                await self._qmp.disconnect()

    async def _follow_guest(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ValueError, OSError):  # a line without end, or an end without a line
            while line := await reader.readline():
                self.journal.note("guest", line.decode(errors="replace").strip())

    async def _follow_qemu(self, listener: Any) -> None:
        async for event in listener:
            self.journal.note("QEMU", str(event["event"]), event.get("data"))

    async def _ended_too(self) -> None:
        """The task that waits for the process is done once the process is."""
        if self._process.returncode is None:
            self._process.kill()
        await self._ended


def _pair(stack: contextlib.AsyncExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        stack.callback(each.close)
    ours.setblocking(False)
    return ours, theirs


async def _start(command: Sequence[str], directory: Path, descriptors: tuple[int, ...]) -> asyncio.subprocess.Process:
    with (directory / "messages").open("wb") as messages:
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                cwd=directory,
                pass_fds=descriptors,
                process_group=0,
            )
        except OSError as error:
            raise AcpiError(f"{command[0]} cannot be started ({error.strerror})") from error


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


def _command(program: Path, image: Image, max_vcpus: int, memory_mib: int, control: int, reports: int) -> Sequence[str]:
    """A machine of type q35 with what the guest uses, and the slots and ports for what is to come."""
    ports = [
        ("-device", f"pcie-root-port,id=port{number},chassis={number},slot={number}") for number in range(1, PORTS + 1)
    ]
    return (
        *(os.fspath(program), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,memory-backend=ram,vmport=on", "-accel", "tcg,thread=multi"),
        *("-cpu", "qemu64,hypervisor=off", "-smbios", "type=1,serial=VMware"),
        *("-smp", f"1,maxcpus={max_vcpus}", "-m", f"{memory_mib}M,slots={DIMMS},maxmem={memory_mib + HOTPLUG_MIB}M"),
        # Shared, as a process that serves directories must see it.
        *("-object", f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on"),
        *(word for port in ports for word in port),
        *("-chardev", f"socket,id=control,fd={control}", "-mon", "chardev=control,mode=control"),
        *("-serial", "file:console", "-chardev", f"socket,id=reports,fd={reports}", "-serial", "chardev:reports"),
        *("-kernel", os.fspath(image.kernel), "-initrd", os.fspath(image.root), "-append", image.append),
    )
