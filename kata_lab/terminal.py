"""A person's terminal and the signals that end a program, for the interactive console of a guest.

In raw mode every key goes to the guest, Ctrl-C too (termios(3), cfmakeraw), but for the escape key Ctrl-]:

=================  ==================================================================
Ctrl-] then q      pull the guest's plug and quit
Ctrl-] then w      type the ``stty`` command that tells the guest the window's size
Ctrl-] then ?      help
Ctrl-] Ctrl-]      send Ctrl-] to the guest
=================  ==================================================================

Leaves out job control: Ctrl-Z is the guest's.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

ESCAPE = b"\x1d"
HELP = (
    "Ctrl-] then q quits, w types the stty command for this window's size, Ctrl-] sends Ctrl-] to the guest, "
    "? shows this"
)
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Key(enum.Enum):
    """What the escape key asks for."""

    QUIT = "q"
    WINDOW = "w"
    HELP = "?"


class EscapeKey:
    """Splits what is typed into bytes for the guest and wishes of the person; keeps an unfinished escape."""

    def __init__(self) -> None:
        self._pending = False

    def split(self, data: bytes) -> Iterator[bytes | Key]:
        """Bytes and wishes in the order in which they were typed; an unknown key after Ctrl-] asks for help."""
        while data:
            if self._pending:
                self._pending = False
                key, data = data[:1], data[1:]
                if key == ESCAPE:
                    yield ESCAPE
                else:
                    yield Key(key.decode()) if key in (b"q", b"w") else Key.HELP
                continue
            plain, found, data = data.partition(ESCAPE)
            self._pending = bool(found)
            if plain:
                yield plain


class RawTerminal:
    """A terminal in raw mode, as a context manager; the mode that it had comes back whatever happens.

    What was typed before is kept, to be read next.

    Args:
        descriptor: of the terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._saved: list[Any] = []

    def __enter__(self) -> RawTerminal:
        import termios
        import tty

        self._saved = termios.tcgetattr(self._descriptor)
        try:
            tty.setraw(self._descriptor, termios.TCSANOW)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        import termios

        # The terminal may be gone by now: its window was closed.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._saved)


@dataclass(frozen=True, slots=True)
class WindowSize:
    """Of a terminal, in characters."""

    rows: int
    columns: int

    @classmethod
    def of(cls, descriptor: int) -> WindowSize | None:
        """The size; None for what is no terminal or does not know."""
        try:
            columns, rows = os.get_terminal_size(descriptor)
        except OSError:
            return None
        return cls(rows, columns) if rows and columns else None

    @property
    def command(self) -> str:
        """What a guest's shell must be told."""
        return f"stty rows {self.rows} columns {self.columns}\n"


class Ended(BaseException):
    """A signal asks the program to end. Not an Exception, so that nothing but an owner's release catches it.

    Attributes:
        status: what the process then exits with, 128 + the signal's number as a shell has it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class EndingSignals:
    """Ctrl-C, SIGTERM and SIGHUP raise :class:`Ended` once; then they are ignored, so that releasing is not cut short.

    A context manager for the main thread; the handlers that were there come back.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._raised = False

    def __enter__(self) -> EndingSignals:
        for number in ENDING_SIGNALS:
            self._before[number] = signal.getsignal(number)
            if self._before[number] is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._raised:
            self._raised = True
            raise Ended(number)
