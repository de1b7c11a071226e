"""Who sees what a process writes: its log, and any number of viewers that come and go.

A viewer that is slow makes the process wait, as a slow terminal would, since nothing may be lost; one that has gone
does not.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator
from typing import Final

from kata_lab.shim.output_log import OutputLog, Piece

WAITING_PIECES: Final = 16  #: of one viewer, before the process waits


class Stream(enum.Enum):
    """Of a process."""

    STDOUT = "stdout"
    STDERR = "stderr"


class Viewer:
    """Sees everything from now on until the end. Iterate over it for (stream, bytes) as they come."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._waiting: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue(WAITING_PIECES)
        self._closed = False

    async def put(self, item: tuple[Stream, bytes] | None) -> None:
        """Hand over output, or None for the end."""
        if not self._closed:
            await self._waiting.put(item)

    async def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        while (item := await self._waiting.get()) is not None:
            yield item

    def close(self) -> None:
        """See no more; whoever waits to hand over goes on."""
        self._closed = True
        self._hub.leave(self)
        while not self._waiting.empty():
            self._waiting.get_nowait()


class Hub:
    """Hands on what one process writes.

    Args:
        log: keeps it too, unless None.
    """

    def __init__(self, log: OutputLog | None = None) -> None:
        self._log = log
        self._viewers: set[Viewer] = set()
        self._over = False

    async def view(self) -> Viewer:
        """A new viewer; it sees the end at once where that has passed."""
        viewer = Viewer(self)
        if self._over:
            await viewer.put(None)
        else:
            self._viewers.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """A viewer is gone."""
        self._viewers.discard(viewer)

    async def publish(self, stream: Stream, data: bytes) -> None:
        """The process wrote something; returns when every viewer has room for more."""
        if self._log is not None:
            self._log.write(Piece(time.time(), stream.value, data))
        for viewer in tuple(self._viewers):
            await viewer.put((stream, data))

    async def finish(self) -> None:
        """Nothing more comes."""
        self._over = True
        for viewer in tuple(self._viewers):
            await viewer.put(None)
