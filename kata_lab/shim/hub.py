"""Who sees what a process writes: its log, and any number of viewers that come and go.

A viewer that is slow makes the process wait, as a slow terminal would, since nothing may be lost; one that has gone
does not.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
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
        self._pieces: deque[tuple[Stream, bytes]] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._closed = False
        self._over = False

    async def put(self, piece: tuple[Stream, bytes]) -> None:
        """Hand over output; waits while too much is waiting already."""
        while len(self._pieces) >= WAITING_PIECES and not self._closed:
            self._room.clear()
            await self._room.wait()
        if not self._closed:
            self._pieces.append(piece)
            self._changed.set()

    def finish(self) -> None:
        """Nothing more comes."""
        self._over = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        while True:
            if self._pieces:
                piece = self._pieces.popleft()
                self._room.set()
                yield piece
            elif self._over:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    def close(self) -> None:
        """See no more; whoever waits to hand over goes on."""
        self._closed = True
        self._hub.leave(self)
        self._pieces.clear()
        self._room.set()


class Hub:
    """Hands on what one process writes.

    Args:
        log: keeps it too, unless None.
    """

    def __init__(self, log: OutputLog | None = None) -> None:
        self._log = log
        self._viewers: set[Viewer] = set()
        self._over = False
        #: When the process first wrote something (``time.monotonic``); 0 before.
        self.first_output = 0.0

    def view(self) -> Viewer:
        """A new viewer; it sees the end at once where that has passed."""
        viewer = Viewer(self)
        if self._over:
            viewer.finish()
        else:
            self._viewers.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """A viewer is gone."""
        self._viewers.discard(viewer)

    async def publish(self, stream: Stream, data: bytes) -> None:
        """The process wrote something; returns when every viewer has room for more."""
        self.first_output = self.first_output or time.monotonic()
        if self._log is not None:
            self._log.write(Piece(time.time(), stream.value, data))
        for viewer in tuple(self._viewers):
            await viewer.put((stream, data))

    def finish(self) -> None:
        """Nothing more comes."""
        self._over = True
        for viewer in self._viewers:
            viewer.finish()
