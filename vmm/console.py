"""The host's end of a serial line: what the guest printed, and a keyboard.

The serial port calls :meth:`Console.feed` on the thread of the vCPU that printed; whoever waits in
:meth:`Console.expect` is woken only when what it waits for can have come, so that a waiting notebook does not slow the
guest. The console has no thread of its own. It interprets no terminal escape sequences.
"""

from __future__ import annotations

import codecs
import re
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from vmm.errors import ConsoleTimeout, StateError

Subscriber = Callable[[bytes], None]

_REGULAR_EXPRESSION_POLL: Final = 0.01  # seconds
_CLOSE_POLL: Final = 0.1  # seconds


class ConsoleClosed(ConsoleTimeout):
    """The machine ended, so that what was awaited can no longer come."""


class SerialInput(Protocol):
    """The device end of the line, as far as typing needs it; a :class:`~vmm.devices.uart16550.Uart16550` is one."""

    def receive(self, data: bytes) -> int:
        """Take as many of the first bytes as there is room for and return how many."""
        ...

    def wait_for_room(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for ample room, and return whether there is."""
        ...


class Console:
    """Collects what a guest prints and types what the host writes. All methods may be called from any thread.

    Args:
        limit: bytes of output to keep; what is older is forgotten.
    """

    def __init__(self, limit: int = 4 * 1024 * 1024) -> None:
        self._limit = max(limit, 1)
        self._most = self._limit + (self._limit >> 2)  # trimming costs: do it seldom
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._output = bytearray()
        # Text is decoded when somebody asks for it; _fed and _decoded count bytes from the beginning of time.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._fed = 0
        self._decoded = 0
        self._text = ""
        self._searched = 0  # index into _text: what follows has not been part of a match
        # The last byte of every literal that is awaited: output without one of them wakes nobody.
        self._awaited: list[int] = []
        self._subscribers: tuple[Subscriber, ...] = ()
        self._line: SerialInput | None = None
        self._ended: str | None = None

    @property
    def output(self) -> bytes:
        """The last ``limit`` bytes the guest printed."""
        with self._lock:
            return bytes(self._output[-self._limit :])

    @property
    def text(self) -> str:
        """The output as text; bytes that are not UTF-8 appear as U+FFFD."""
        with self._lock:
            self._decode()
            return self._text[-self._limit :]

    def lines(self, count: int) -> list[str]:
        """The last ``count`` lines, oldest first, without their line ends."""
        if count <= 0:
            return []
        return self.text.replace("\r", "").removesuffix("\n").split("\n")[-count:]

    def attach(self, line: SerialInput) -> None:
        """Connect the keyboard to a serial port; a console that was closed is open again."""
        with self._lock:
            self._line = line
            self._ended = None

    def close(self, reason: str) -> None:
        """Say that the machine has ended: ``reason`` is a clause such as "the guest shut down"."""
        with self._lock:
            self._ended = reason
            self._changed.notify_all()

    def feed(self, data: bytes) -> None:
        """Take output of the guest."""
        with self._lock:
            self._output += data
            self._fed += len(data)
            if len(self._output) > self._most:
                self._forget()
            if self._awaited and any(byte in data for byte in self._awaited):
                self._changed.notify_all()
            subscribers = self._subscribers
        for subscriber in subscribers:
            subscriber(data)

    def subscribe(self, callback: Subscriber) -> None:
        """Call ``callback(data)`` with all further output, on the guest's own thread; it must return soon."""
        with self._lock:
            self._subscribers = (*self._subscribers, callback)

    def unsubscribe(self, callback: Subscriber) -> None:
        """Undo :meth:`subscribe`; a callback that is not subscribed is no error."""
        with self._lock:
            self._subscribers = tuple(each for each in self._subscribers if each != callback)

    def write(self, data: str | bytes, timeout: float = 60.0) -> None:
        """Type ``data`` (text is sent as UTF-8), waiting while the guest is too slow to take it.

        Raises:
            StateError: no machine is connected.
            ConsoleClosed: the machine ended before it took everything.
            ConsoleTimeout: the guest took nothing for ``timeout`` seconds.
        """
        rest = memoryview(data.encode() if isinstance(data, str) else data)
        last_progress = time.monotonic()
        while rest:
            with self._lock:
                line, ended = self._line, self._ended
            if ended is not None:
                raise ConsoleClosed(f"the console cannot type {len(rest)} bytes: {ended}")
            if line is None:
                raise StateError(f"the console cannot type {len(rest)} bytes: no machine is connected to it")
            taken = line.receive(bytes(rest))
            rest = rest[taken:]
            now = time.monotonic()
            if taken:
                last_progress = now
            elif now - last_progress >= timeout:
                raise ConsoleTimeout(
                    f"the guest read nothing of its console for {timeout:g} s and {len(rest)} bytes are still to be"
                    " typed; write less at once, or read it in the guest"
                )
            if rest:
                line.wait_for_room(min(_CLOSE_POLL, timeout))

    def expect(self, pattern: str | re.Pattern[str], timeout: float = 60.0) -> re.Match[str]:
        """Wait until ``pattern`` appears in the output that follows the last match, and return the match.

        A string is searched for literally; a compiled pattern is a regular expression. ``match.string`` is all text
        since the last match, so that ``match.string[: match.start()]`` is what came before this one.

        Raises:
            ConsoleClosed: the machine ended without printing it.
            ConsoleTimeout: it did not appear in ``timeout`` seconds.
        """
        literal = pattern.encode() if isinstance(pattern, str) else None
        expression = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        deadline = time.monotonic() + timeout
        seen = -1
        with self._lock:
            if literal:
                self._awaited.append(literal[-1])
            try:
                while True:
                    if seen != self._fed and self._may_hold(literal, self._fed - max(seen, 0), seen < 0):
                        match = self._search(expression)
                        if match is not None:
                            return match
                    seen = self._fed
                    left = deadline - time.monotonic()
                    if self._ended is not None or left <= 0:
                        raise self._failure(expression if literal is None else pattern, timeout)
                    self._changed.wait(left if literal else min(left, _REGULAR_EXPRESSION_POLL))
            finally:
                if literal:
                    self._awaited.remove(literal[-1])

    def _may_hold(self, literal: bytes | None, fresh: int, first: bool) -> bool:
        """Whether the ``fresh`` last bytes can complete a match; the first look is always worth it."""
        if first or not literal or fresh >= len(self._output):
            return True
        return self._output.find(literal, max(len(self._output) - fresh - len(literal) + 1, 0)) >= 0

    def _search(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        self._decode()
        match = expression.search(self._text[self._searched :])
        if match is not None:
            self._searched += match.end()
        return match

    def _decode(self) -> None:
        fresh = self._fed - self._decoded
        if fresh:
            self._text += self._decoder.decode(bytes(self._output[-fresh:]))
            self._decoded = self._fed

    def _forget(self) -> None:
        self._decode()
        del self._output[: -self._limit]
        surplus = max(len(self._text) - self._limit, 0)
        self._text = self._text[surplus:]
        self._searched = max(self._searched - surplus, 0)

    def _failure(self, pattern: str | re.Pattern[str], timeout: float) -> ConsoleTimeout:
        self._decode()
        tail = self._text[self._searched :].replace("\r", "").removesuffix("\n").split("\n")[-5:]
        shown = "its last lines are " + repr("\n".join(tail)) if any(tail) else "it printed nothing more"
        wanted = repr(pattern) if isinstance(pattern, str) else f"/{pattern.pattern}/"
        if self._ended is not None:
            return ConsoleClosed(f"the console can no longer show {wanted}, since {self._ended}; {shown}")
        return ConsoleTimeout(f"the console did not show {wanted} within {timeout:g} s; {shown}")
