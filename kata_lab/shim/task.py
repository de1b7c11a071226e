"""Containers and processes as the services of the shim know them (containerd calls a container that runs a task)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.runtime.container import Container
from kata_lab.runtime.process import OutputStream, Process
from kata_lab.shim.hub import Hub, Stream
from kata_lab.shim.records import UNKNOWN_STATUS, ContainerDirectory, ContainerRecord
from kata_lab.shim.stdio import InputFile, OutputFile, StdioPaths, copy_outputs, plain_path
from kata_lab.ttrpc import RpcError, StatusCode

QUIET_SECONDS: Final = 1.0  #: after a process has ended, its output has too once so long nothing came

_log = logging.getLogger(__name__)


class TaskProcess:
    """A process: the first one of a container, or one of an exec. Made before it is started.

    Args:
        exec_id: its name; empty for the first one.
        terminal: whether it has a terminal.
        stdin: whether it has a standard input; without, it reads its end.
        hub: who sees its output.
        paths: named pipes and files of its streams, of the Task API.
    """

    def __init__(self, exec_id: str, terminal: bool, stdin: bool, hub: Hub, paths: StdioPaths | None = None) -> None:
        self.exec_id = exec_id
        self.terminal = terminal
        self.has_stdin = stdin
        self.hub = hub
        self.paths = paths or StdioPaths()
        self.paths.check()
        self.process: Process | None = None
        self.status: int | None = None
        self.exited_at = 0.0
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        #: The window's size, if it was told before there was a terminal.
        self._size: tuple[int, int] | None = None
        self._order = asyncio.Lock()
        self._input: InputFile | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, begin: Callable[[], Awaitable[Process]], ended: Callable[[], Awaitable[None]]) -> None:
        """Start it.

        Args:
            begin: does so.
            ended: is awaited when it has ended, before anybody is told.
        """
        copy = await self._connect()
        try:
            self.process = await begin()
        except BaseException:
            for task in copy:
                task.cancel()
            await asyncio.gather(*copy, return_exceptions=True)
            raise
        self._tasks.update(copy)
        if self._size is not None:
            self._spawn(self._resize_quietly(*self._size))
        if self._input is not None:
            self._spawn(self._feed(self._input))
        elif not self.has_stdin and not self.terminal:
            self._spawn(self._close_quietly())
        self.started.set()
        self._spawn(self._follow(self.process, ended))

    async def _connect(self) -> list[asyncio.Task[None]]:
        """Open the named pipes before the process runs, so that nothing is missed."""
        files: dict[Stream, OutputFile] = {}
        try:
            for stream, path in ((Stream.STDOUT, self.paths.stdout), (Stream.STDERR, self.paths.stderr)):
                if path and not (self.terminal and stream is Stream.STDERR):
                    files[stream] = OutputFile(stream.value, plain_path(stream.value, path))
            if self.paths.stdin:
                self._input = InputFile(plain_path("stdin", self.paths.stdin))
        except BaseException:
            for file in files.values():
                file.close()
            raise
        if not files:
            return []
        return [asyncio.create_task(copy_outputs(self.hub.view(), files), name=f"output-{self.exec_id}")]

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, process: Process, ended: Callable[[], Awaitable[None]]) -> None:
        end = asyncio.create_task(process.wait())
        pumps = [self._pump(process.stdout, Stream.STDOUT, end)]
        if not self.terminal:
            pumps.append(self._pump(process.stderr, Stream.STDERR, end))
        await asyncio.gather(*pumps)
        try:
            status = await end
        except KataLabError:
            # The guest is gone, and nobody knows.
            status = UNKNOWN_STATUS
        except Exception:
            _log.exception("the end of %s was not understood", self.exec_id or "a container")
            status = UNKNOWN_STATUS
        self.status = status
        self.exited_at = time.time()
        try:
            await ended()
        except Exception:
            _log.exception("what follows the end of %s failed", self.exec_id or "a container")
        self.ended.set()
        self.hub.finish()

    async def _pump(self, source: OutputStream, stream: Stream, end: asyncio.Task[int]) -> None:
        """Hand output on until its end; where a child of the process keeps it open, until it is quiet."""
        while True:
            read = asyncio.create_task(source.read())
            try:
                if not end.done():
                    await asyncio.wait((read, end), return_when=asyncio.FIRST_COMPLETED)
                if not read.done():
                    await asyncio.wait((read,), timeout=QUIET_SECONDS)
                if not read.done():
                    return
                data = read.result()
            except KataLabError:
                return
            finally:
                read.cancel()
                await asyncio.gather(read, return_exceptions=True)
            if not data:
                return
            await self.hub.publish(stream, data)

    async def _feed(self, source: InputFile) -> None:
        try:
            while data := await source.read():
                await self.write(data)
            await self.close_stdin()
        except KataLabError:
            # The process reads no more.
            return
        finally:
            source.close()

    async def write(self, data: bytes) -> None:
        """Type into its standard input, once it runs.

        Raises:
            RpcError: it reads no more.
        """
        await self.started.wait()
        assert self.process is not None
        async with self._order:
            await self.process.stdin.write(data)

    async def close_stdin(self) -> None:
        """It reads the end of its input, after what was written before."""
        await self.started.wait()
        assert self.process is not None
        async with self._order:
            await self.process.stdin.close()

    async def end_input(self) -> None:
        """CloseIO: what is in the named pipe is the last."""
        if self._input is not None:
            self._input.end()
        else:
            await self.close_stdin()

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal the window's size; before it runs, the size is kept until then."""
        self._size = rows, columns
        if self.process is not None and self.status is None:
            await self.process.resize(rows, columns)

    async def _resize_quietly(self, rows: int, columns: int) -> None:
        with contextlib.suppress(KataLabError):
            assert self.process is not None
            await self.process.resize(rows, columns)

    async def _close_quietly(self) -> None:
        with contextlib.suppress(KataLabError):
            await self.close_stdin()

    async def abandon(self) -> None:
        """Stop handing anything on; it is taken away with its container."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.status is None:
            self.status, self.exited_at = UNKNOWN_STATUS, time.time()
        self.ended.set()
        self.hub.finish()


@dataclass(slots=True)
class ExecTask:
    """An exec: its process, and how it is described until it is started."""

    process: TaskProcess
    description: dict[str, Any]


@dataclass(slots=True)
class Task:
    """A container.

    Attributes:
        id: its name.
        container: in the guest; None once it has been removed there.
        process: its first process.
        state: created, running, paused or stopped.
        bundle: directory of its configuration, of the Task API.
        directory, record: on disk, for those that ``kata-lab`` made.
        execs: by name.
        order: calls that change its state come one after the other.
        noting: so do writes of its record.
        release: gives back what belongs to it on the host.
    """

    id: str
    container: Container | None
    process: TaskProcess
    state: str = "created"
    bundle: str = ""
    directory: ContainerDirectory | None = None
    record: ContainerRecord | None = None
    execs: dict[str, ExecTask] = field(default_factory=dict)
    order: asyncio.Lock = field(default_factory=asyncio.Lock)
    noting: asyncio.Lock = field(default_factory=asyncio.Lock)
    release: Callable[[], None] = lambda: None

    def find(self, exec_id: str) -> TaskProcess:
        """One of its processes; the first for an empty name.

        Raises:
            RpcError: there is none of that name.
        """
        if not exec_id:
            return self.process
        if exec_id not in self.execs:
            raise RpcError(StatusCode.NOT_FOUND, f"container {self.id} has no process {exec_id!r}")
        return self.execs[exec_id].process

    def require(self, what: str, *states: str) -> Container:
        """The container, if its state is one of these.

        Raises:
            RpcError: it is not (FAILED_PRECONDITION).
        """
        if self.state not in states or self.container is None:
            wanted = " or ".join(states)
            text = f"container {self.id} is {self.state}; to be {what} it must be {wanted}"
            raise RpcError(StatusCode.FAILED_PRECONDITION, text)
        return self.container
