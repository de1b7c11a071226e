"""Connects a guest's console to this process's standard input and output.

One loop on the main thread moves bytes between three places, each of which may be slow: standard input, the guest's
serial port, standard output. What a guest prints is handed over by its vCPU's thread and waits in a buffer; when that
is full the guest waits, as it would for a slow terminal. What is typed waits until the port has room, so that nothing
is lost. Leaves out the meaning of the bytes: they pass as they are.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kata_lab.commands import UsageError
from kata_lab.terminal import HELP, EscapeKey, Key, WindowSize
from vmm.actions import VmState
from vmm.microvm import MicroVm

END_OF_INPUT = b"\x04"
END_OF_INPUT_INTERVAL = 1.0  #: seconds between two Ctrl-D

_CHUNK = 64 * 1024
_ATOMIC_WRITE = select.PIPE_BUF  # what a pipe takes whole once select() says that it takes something
_MOST_OUTPUT = 1 << 20
_ROOM_POLL = 0.01  # seconds; the serial port tells nobody when it has room


class _Output:
    """Output on its way from a vCPU's thread to standard output."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._data = bytearray()
        self._reader, self._writer = os.pipe()
        self._told = False
        self._open = True

    @property
    def descriptor(self) -> int:
        """Readable when there is something to do."""
        return self._reader

    def put(self, data: bytes) -> None:
        """Hand over; waits while too much is waiting already."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._data) < _MOST_OUTPUT or not self._open)
            if self._open:
                self._data += data
                self._tell()

    def wake(self) -> None:
        """Make the loop look."""
        with self._changed:
            if self._open:
                self._tell()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            os.write(self._writer, b"!")

    def heard(self) -> None:
        """The descriptor was readable."""
        with self._changed:
            if self._told:
                os.read(self._reader, 1)
                self._told = False

    def __len__(self) -> int:
        return len(self._data)

    def write_some(self, descriptor: int) -> None:
        """Write what ``descriptor``, which is writable, takes without blocking."""
        written = os.write(descriptor, bytes(self._data[:_ATOMIC_WRITE]))
        with self._changed:
            del self._data[:written]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()
            os.close(self._reader)
            os.close(self._writer)


@dataclass(frozen=True, slots=True)
class Streams:
    """What the console is connected to.

    Attributes:
        input: descriptor to read from; None for a process without standard input.
        output: descriptor to write to.
        interactive: the input is a terminal in raw mode, whose escape key counts.
        type_after: input that is no terminal waits until the guest has printed this; None does not wait.
        tell: prints one line for the person at the terminal.
    """

    input: int | None
    output: int
    interactive: bool
    type_after: str | None
    tell: Callable[[str], None]


class ConsoleLoop:
    """Moves bytes until the guest has ended, the person quits or time is over; a context manager.

    Args:
        vm: a VM that has not started yet, so that no output is missed.
        streams: what to connect it to.
    """

    def __init__(self, vm: MicroVm, streams: Streams) -> None:
        self._vm = vm
        self._streams = streams
        self._output = _Output()
        self._typed = bytearray()
        self._escape = EscapeKey()
        self._reading = streams.input is not None
        self._input_ended = False
        self._last = b"\n"
        self._next_end_of_input = 0.0
        self._awaiting = None if streams.interactive or streams.type_after is None else streams.type_after.encode()
        vm.console.subscribe(self._output.put)

    def __enter__(self) -> ConsoleLoop:
        return self

    def __exit__(self, *ended: object) -> None:
        self._vm.console.unsubscribe(self._output.put)
        self._output.close()

    def run(self, timeout: float | None) -> bool:
        """Until the guest has ended (True), the person quits (True) or ``timeout`` seconds have passed (False).

        Raises:
            BrokenPipeError: nobody reads the output any more.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._vm.ended.add_done_callback(lambda _: self._output.wake())
        while True:
            over = self._vm.state is VmState.STOPPED
            if over and not len(self._output):
                return True
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return over
            if not over:
                self._type()
            if not self._turn(over, left):
                return True

    def _turn(self, over: bool, left: float | None) -> bool:
        """Wait for something to do, and do it; False if the person quits."""
        streams = self._streams
        wants_input = self._reading and not over and (streams.interactive or len(self._typed) < _CHUNK)
        reading = [self._output.descriptor, *([streams.input] if wants_input and streams.input is not None else [])]
        writing = [streams.output] if len(self._output) else []
        readable, writable, _ = select.select(reading, writing, [], self._pause(left))
        if self._output.descriptor in readable:
            self._output.heard()
        if writable:
            self._output.write_some(streams.output)
        if streams.input in readable:
            return self._read()
        return True

    def _pause(self, left: float | None) -> float | None:
        """Seconds until something is due that no descriptor tells of."""
        due = [] if left is None else [left]
        if self._typed and self._awaiting is None:
            due.append(_ROOM_POLL)
        elif self._input_ended and self._awaiting is None:
            due.append(max(self._next_end_of_input - time.monotonic(), _ROOM_POLL))
        return min(due, default=None)

    def _read(self) -> bool:
        assert self._streams.input is not None
        try:
            data = os.read(self._streams.input, _CHUNK)
        except OSError:  # the terminal was closed
            data = b""
        if not data:
            self._reading = False
            self._input_ended = not self._streams.interactive
            return not self._streams.interactive
        if not self._streams.interactive:
            self._last = data[-1:]
            self._typed += data
            return True
        for part in self._escape.split(data):
            if part is Key.QUIT:
                return False
            if isinstance(part, bytes):
                self._typed += part
            else:
                self._carry_out(part)
        return True

    def _carry_out(self, wish: Key) -> None:
        size = WindowSize.of(self._streams.output)
        if wish is Key.WINDOW and size is not None:
            self._typed += size.command.encode()
        else:
            self._streams.tell(HELP)

    def _type(self) -> None:
        """Give the serial port what it has room for."""
        if self._awaiting is not None:
            if self._awaiting not in self._vm.console.output:
                return
            self._awaiting = None
        uart = self._vm.machine.board.uart
        if self._typed:
            del self._typed[: uart.receive(bytes(self._typed[:_CHUNK]))]
        elif self._input_ended and not uart.queued and time.monotonic() >= self._next_end_of_input:
            # An unfinished line would take the first Ctrl-D for itself.
            uart.receive((b"" if self._last == b"\n" else b"\n") + END_OF_INPUT)
            self._last = b"\n"
            self._next_end_of_input = time.monotonic() + END_OF_INPUT_INTERVAL


def standard_input() -> int | None:
    """The descriptor of standard input; None if the process was started without one."""
    try:
        return sys.stdin.fileno() if sys.stdin is not None else None
    except (OSError, ValueError):
        return None


def standard_output() -> int:
    """The descriptor of standard output.

    Raises:
        UsageError: the process was started without one.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
            return sys.stdout.fileno()
    except (OSError, ValueError):
        pass
    raise UsageError("standard output is closed: the guest's console needs somewhere to print to")
