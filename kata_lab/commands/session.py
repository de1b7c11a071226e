"""A process in a container connected to this process's standard streams: what ``run``, ``exec`` and ``attach`` do.

Bytes pass as they are. Signals go to the process; of those that ask to end, the third one ends this command instead.
With a terminal, Ctrl-P Ctrl-Q detaches and leaves the process running, and the window's size follows this terminal's.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.shim.client import ShimClient
from kata_lab.terminal import RawTerminal, WindowSize
from kata_lab.ttrpc import RpcError, StatusCode
from kata_lab.ttrpc.client import ClientStream

CHUNK: Final = 1 << 16
DETACH: Final = (b"\x10", b"\x11")  #: Ctrl-P, Ctrl-Q
FORWARDED: Final = tuple(
    getattr(signal, f"SIG{name}") for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "CONT")
)
ENDING: Final = (signal.SIGINT, signal.SIGTERM)
PATIENCE: Final = 3  #: signals that ask to end


class Detached(enum.Enum):
    """How a session ends that leaves the process running."""

    BY_KEYS = "keys"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to connect to what.

    Attributes:
        container_id: the container.
        exec_id: the process; empty for the first one.
        stdin: connect standard input.
        ends_input: at the end of standard input, or at once without, the process reads the end of its own.
        terminal: the process has a terminal.
        owned: the process is this command's, and killed when nobody reads its output any more.
    """

    container_id: str
    exec_id: str = ""
    stdin: bool = False
    ends_input: bool = False
    terminal: bool = False
    owned: bool = False


class Session:
    """The connection, once.

    Args:
        client: connected to the shim.
        wanted: what to connect.
    """

    def __init__(self, client: ShimClient, wanted: Wanted) -> None:
        self._client = client
        self._wanted = wanted
        self._input = _standard_input()
        self._interactive = wanted.terminal and wanted.stdin and self._input is not None and os.isatty(self._input)
        self._asked_to_end = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._detached = asyncio.Event()
        self._held = b""

    async def run(self, begin: Callable[[], Awaitable[None]] | None = None) -> int | Detached:
        """Attach, ``begin``, and pass everything on until the process has ended; its exit status.

        Raises:
            RpcError: the process cannot be attached to, or the sandbox is gone.
            BrokenPipeError: nobody reads the output.
        """
        async with self._client.attach(self._wanted.container_id, self._wanted.exec_id) as stream:
            with contextlib.ExitStack() as undo:
                undo.enter_context(self._signals(stream))
                if self._interactive:
                    assert self._input is not None
                    undo.enter_context(RawTerminal(self._input))
                if self._wanted.terminal:
                    await self._tell_size(stream)
                if begin is not None:
                    await begin()
                return await self._pass(stream)

    async def _pass(self, stream: ClientStream) -> int | Detached:
        typing = asyncio.create_task(self._type(stream))
        showing = asyncio.create_task(self._show(stream))
        leaving = asyncio.create_task(self._detached.wait())
        try:
            await asyncio.wait((showing, leaving), return_when=asyncio.FIRST_COMPLETED)
            return showing.result() if showing.done() else Detached.BY_KEYS
        except BrokenPipeError:
            if self._wanted.owned:
                await self._kill(signal.SIGKILL)
            raise
        finally:
            for task in (typing, showing, leaving, *self._tasks):
                task.cancel()
            await asyncio.gather(typing, showing, leaving, *self._tasks, return_exceptions=True)

    async def _show(self, stream: ClientStream) -> int:
        async for message in stream:
            for name, output in (("stdout", sys.stdout), ("stderr", sys.stderr)):
                if message[name] and output is not None:
                    await asyncio.to_thread(_write_all, output.fileno(), message[name])
            if message["ended"]:
                return int(message["exit_status"])
        raise RpcError(StatusCode.UNAVAILABLE, "the shim ended the stream before the process had ended")

    async def _type(self, stream: ClientStream) -> None:
        with contextlib.suppress(RpcError):
            if self._wanted.stdin and self._input is not None:
                while data := await _read(self._input):
                    if self._interactive:
                        data = self._without_keys(data)
                    if self._detached.is_set():
                        return
                    if data:
                        await stream.send({"stdin": data})
            if self._wanted.ends_input:
                await stream.send({"close_stdin": True})

    def _without_keys(self, data: bytes) -> bytes:
        """What is typed but for Ctrl-P Ctrl-Q, also where the two come apart."""
        data, self._held = self._held + data, b""
        before, found, _ = data.partition(b"".join(DETACH))
        if found:
            self._detached.set()
            return before
        if data.endswith(DETACH[0]):
            self._held = DETACH[0]
            return data[:-1]
        return data

    async def _tell_size(self, stream: ClientStream) -> None:
        size = None
        for descriptor in (1, 0, 2):
            size = size or WindowSize.of(descriptor)
        if size is not None:
            with contextlib.suppress(RpcError):
                await stream.send({"rows": size.rows, "columns": size.columns})

    async def _kill(self, number: int) -> None:
        # It may have ended, or not begun.
        with contextlib.suppress(RpcError):
            ids = {"id": self._wanted.container_id, "exec_id": self._wanted.exec_id}
            await self._client.task("Kill", **ids, signal=int(number))

    def _signals(self, stream: ClientStream) -> _Signals:
        def received(number: int) -> None:
            if number == signal.SIGWINCH:
                self._spawn(self._tell_size(stream))
                return
            if number in ENDING:
                self._asked_to_end += 1
                if self._asked_to_end >= PATIENCE:
                    os._exit(128 + number)
            self._spawn(self._kill(number))

        return _Signals((*FORWARDED, signal.SIGWINCH) if self._wanted.terminal else FORWARDED, received)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Signals:
    """Calls a function of the event loop for each signal; a context manager."""

    def __init__(self, numbers: tuple[int, ...], received: Callable[[int], None]) -> None:
        self._numbers = [each for each in numbers if signal.getsignal(each) is not signal.SIG_IGN]
        self._received = received
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in self._numbers:
            self._before[number] = signal.getsignal(number)
            asyncio.get_running_loop().add_signal_handler(number, self._received, number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handler)


def _standard_input() -> int | None:
    """The descriptor of standard input; None if the process was started without one."""
    try:
        return sys.stdin.fileno() if sys.stdin is not None else None
    except (OSError, ValueError):
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            import select

            select.select([], [descriptor], [])


async def _read(descriptor: int) -> bytes:
    """Some bytes; none at the end, or where the terminal has gone."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def happened() -> None:
        if not ready.done():
            ready.set_result(None)

    try:
        loop.add_reader(descriptor, happened)
    except PermissionError:
        # A file: it never makes one wait.
        await asyncio.sleep(0)
    else:
        try:
            await ready
        finally:
            loop.remove_reader(descriptor)
    try:
        return os.read(descriptor, CHUNK)
    except BlockingIOError:
        return await _read(descriptor)
    except OSError:
        return b""


def refuse_without_terminal(terminal: bool, stdin: bool) -> None:
    """KataLabError where a terminal is wanted and the standard input is none."""
    descriptor = _standard_input()
    if terminal and stdin and (descriptor is None or not os.isatty(descriptor)):
        raise KataLabError("the standard input is no terminal: leave out -t, or -i")
