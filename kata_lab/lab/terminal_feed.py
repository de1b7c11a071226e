"""Bytes on their way from a guest to the pages that show them: no more than the slowest part can take.

A page says how far it has drawn; at most :data:`WINDOW` bytes are under way to it, so that neither the kernel, the
notebook's server nor the page keeps what nobody has seen yet. What waits here is bounded, too: who can, stops reading
until there is room (:meth:`Feed.push`), as a pipe makes its writer wait; for who cannot, such as a serial port, the
oldest bytes are left out, and the page is told how many. Of several pages the one that is ahead counts, so that a page
that went away without a word stops nobody; with no page at all the last :data:`KEPT` bytes are kept for the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

WINDOW: Final = 1 << 18  #: bytes that a page has not drawn yet
KEPT: Final = 1 << 18  #: bytes that a page gets which comes later
WAITING: Final = 1 << 20  #: bytes that wait for a page before the oldest are left out
CHUNK: Final = 1 << 16  #: bytes of a message

Send = Callable[[dict[str, Any], bytes], None]


class Feed:
    """The way to the pages. All methods may be called on any thread.

    Args:
        send: takes a message and the bytes that go with it; called with the feed's lock held, so that messages keep
            their order.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._kept = bytearray()
        self._waiting = bytearray()
        self._left_out = 0
        self._sent = 0  # bytes since the beginning
        self._drawn: dict[str, int] = {}  # page → of those, how many it has drawn
        self._room: list[Future[None]] = []

    @property
    def kept(self) -> bytes:
        """The last bytes, whether a page has them or not."""
        with self._lock:
            return bytes(self._kept + self._waiting)[-KEPT:]

    def push(self, data: bytes) -> Future[None] | None:
        """Take output; who can wait does so for what is returned, before there is more."""
        with self._lock:
            self._waiting += data
            surplus = len(self._waiting) - WAITING
            if surplus > 0:
                del self._waiting[:surplus]
                self._left_out += surplus
            self._flush()
            if not self._waiting:
                return None
            room: Future[None] = Future()
            self._room.append(room)
            return room

    def join(self, page: str) -> None:
        """A page begins to show this: it gets the last bytes, and from now on all others."""
        with self._lock:
            self._drawn[page] = self._sent
            self._send({"kind": "replay", "page": page, "upto": self._sent}, bytes(self._kept))
            self._flush()

    def leave(self, page: str) -> None:
        """A page shows this no more."""
        with self._lock:
            self._drawn.pop(page, None)
            self._flush()

    def drawn(self, page: str, upto: int) -> None:
        """A page has drawn so many bytes, counted from the beginning."""
        with self._lock:
            if page in self._drawn:
                self._drawn[page] = max(self._drawn[page], min(upto, self._sent))
                self._flush()

    def _flush(self) -> None:
        while self._waiting and (not self._drawn or self._sent - max(self._drawn.values()) < WINDOW):
            chunk = bytes(self._waiting[:CHUNK])
            del self._waiting[: len(chunk)]
            if self._left_out:
                chunk = _gap(self._left_out) + chunk
                self._left_out = 0
            self._sent += len(chunk)
            self._kept += chunk
            del self._kept[:-KEPT]
            if self._drawn:
                self._send({"kind": "output", "upto": self._sent}, chunk)
        if not self._waiting:
            while self._room:
                self._room.pop().set_result(None)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            while self._room:
                self._room.pop().set_result(None)


def _gap(count: int) -> bytes:
    # CAN ends an escape sequence that was cut in two (ECMA-48, 8.3.6), SGR 0 its colours.
    return b"\x18\x1b[0m\r\n[%d bytes are left out: the guest prints faster than this page draws]\r\n" % count
