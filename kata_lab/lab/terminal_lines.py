"""What a terminal of the notebook can be connected to: a serial console, or a process with a terminal in a sandbox.

A line is opened once, with a :class:`Screen` to print on, and closed once; all its methods may be called on any thread.
A serial port has no size and cannot be stopped from printing: who wants the guest to know the window's size has
``stty`` typed. A process has both: its output is read only as fast as the page draws it, so that it waits in a
``write`` meanwhile, and each change of the window's size reaches its terminal (TIOCSWINSZ, tty_ioctl(4)).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

from kata_lab.errors import KataLabError
from kata_lab.lab.redraw import Redraw
from kata_lab.runtime.process import Process
from kata_lab.terminal import WindowSize
from vmm.console import Console
from vmm.errors import VmmError

CONSOLE_SECONDS: Final = 0.02  #: for which a console's output is collected before it is shown
TYPE_SECONDS: Final = 5.0  #: that a guest may take to read what is typed


class Screen(Protocol):
    """Where a line prints."""

    def show(self, data: bytes) -> Future[None] | None:
        """Take output; if there is a future, wait for it before there is more."""
        ...

    def say(self, text: str, over: bool = False) -> None:
        """Say how things are, in one sentence; ``over``: nothing more comes."""
        ...


class Line(Protocol):
    """One end of a terminal; the other is a :class:`Screen`.

    Attributes:
        sized: whether the far end learns the window's size by itself.
        closed: done when nothing of it is left.
    """

    sized: bool
    closed: Future[None]

    def open(self, screen: Screen) -> None:
        """Begin."""
        ...

    def type(self, data: bytes) -> None:
        """Pass on what was typed; returns at once."""
        ...

    def resize(self, size: WindowSize) -> None:
        """Tell the far end the window's size, if that can be."""
        ...

    def close(self) -> None:
        """End it, if it has not ended; returns at once. A second call does nothing."""
        ...


class ConsoleLine:
    """The serial console of a VM.

    Args:
        console: of a VM, which may start later.
    """

    sized = False

    def __init__(self, console: Console) -> None:
        self._console = console
        self._screen: Screen | None = None
        self._fresh = bytearray()
        self._lock = threading.Lock()
        self._redraw = Redraw(self._show, "terminal-console", CONSOLE_SECONDS)
        self._keys: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._typist = threading.Thread(target=self._pass_keys, name="terminal-keys", daemon=True)
        self.closed: Future[None] = Future()

    def open(self, screen: Screen) -> None:
        self._screen = screen
        self._fresh += self._console.output
        self._console.subscribe(self._printed)
        self._redraw.soon()
        self._typist.start()
        screen.say("the guest's serial console")

    def type(self, data: bytes) -> None:
        self._keys.put(data)

    def resize(self, size: WindowSize) -> None:
        self.type(size.command.encode())

    def close(self) -> None:
        self._console.unsubscribe(self._printed)
        self._keys.put(None)
        self._redraw.close()
        if not self.closed.done():
            self.closed.set_result(None)
            if self._screen is not None:
                self._screen.say("closed; the guest goes on", over=True)

    def _printed(self, data: bytes) -> None:
        """On the guest's thread."""
        with self._lock:
            self._fresh += data
        self._redraw.soon()

    def _show(self) -> None:
        with self._lock:
            data, self._fresh = bytes(self._fresh), bytearray()
        if data and self._screen is not None:
            self._screen.show(data)

    def _pass_keys(self) -> None:
        assert self._screen is not None
        while (data := self._keys.get()) is not None:
            try:
                self._console.write(data, TYPE_SECONDS)
            except VmmError as error:
                self._screen.say(str(error))


Opening = Callable[[], AbstractAsyncContextManager[tuple[Process, str]]]


class ProcessLine:
    """A process with a terminal, in a container.

    Args:
        loop: the event loop to which its sandbox belongs.
        opening: begins it, and ends it; gives the process and what to call it.
    """

    sized = True

    def __init__(self, loop: asyncio.AbstractEventLoop, opening: Opening) -> None:
        self._loop = loop
        self._opening = opening
        self._screen: Screen | None = None
        self._keys: asyncio.Queue[bytes | WindowSize] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self.closed: Future[None] = Future()

    def open(self, screen: Screen) -> None:
        self._screen = screen
        screen.say("starting…")
        self._on_loop(self._begin)

    def type(self, data: bytes) -> None:
        self._on_loop(lambda: self._keys.put_nowait(data))

    def resize(self, size: WindowSize) -> None:
        self._on_loop(lambda: self._keys.put_nowait(size))

    def close(self) -> None:
        self._closing = True
        self._on_loop(lambda: self._task.cancel() if self._task is not None else self._over("closed"))

    def _on_loop(self, call: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            # The loop has ended, and with it every sandbox that belonged to it.
            self._over("the sandbox has ended")

    def _begin(self) -> None:
        if not self._closing:
            self._task = self._loop.create_task(self._live(), name="terminal")

    def _over(self, why: str) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
            if self._screen is not None:
                self._screen.say(why, over=True)

    async def _live(self) -> None:
        why = "closed"
        try:
            why = await self._carry()
        except KataLabError as error:
            why = str(error)
        finally:
            self._over(why)

    async def _carry(self) -> str:
        assert self._screen is not None
        async with self._opening() as (process, name):
            self._screen.say(name)
            typing = asyncio.create_task(self._pass_keys(process))
            try:
                async for data in process.stdout:
                    room = self._screen.show(data)
                    if room is not None:
                        await asyncio.wrap_future(room)
                status = await process.wait()
            finally:
                typing.cancel()
                await asyncio.gather(typing, return_exceptions=True)
        return f"{name} has ended with status {status}; run the cell again for a new one"

    async def _pass_keys(self, process: Process) -> None:
        while True:
            key = await self._keys.get()
            # One that reads no more, or has just ended, says so by its output's end.
            with contextlib.suppress(KataLabError):
                if isinstance(key, WindowSize):
                    await process.resize(key.rows, key.columns)
                else:
                    await process.stdin.write(key)


@contextlib.asynccontextmanager
async def killed_at_end(process: Process) -> AsyncIterator[Process]:
    """A process that nobody needs afterwards."""
    try:
        yield process
    finally:
        if process.status is None:
            with contextlib.suppress(KataLabError):
                await process.kill(9)
