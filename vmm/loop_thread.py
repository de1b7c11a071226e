"""A thread that runs an event loop, for who is not asynchronous but needs what only a loop does."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class LoopThread:
    """A thread that runs an event loop. It can be stopped even if an exception cut its start short, as Ctrl-C does.

    Args:
        name: the thread's.
    """

    _START_SECONDS = 1.0  #: a thread that was started runs by then

    def __init__(self, name: str = "vm-loop") -> None:
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave: asyncio.Event | None = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._live()), name=name, daemon=True)

    def start(self) -> asyncio.AbstractEventLoop:
        """Start the thread; returns when the loop runs."""
        self.thread.start()
        self._ready.wait()
        assert self._loop is not None
        return self._loop

    async def _live(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._leave.wait()

    def stop(self) -> None:
        """End the loop and its tasks, and wait for the thread."""
        if self._ready.wait(self._START_SECONDS) and self._loop is not None and self._leave is not None:
            # Closed already by an earlier call.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._leave.set)
            self.thread.join()
