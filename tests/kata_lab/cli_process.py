"""The command line as a process of its own, as a person starts it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMAND = (sys.executable, "-m", "kata_lab")
REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 200.0


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "KATA_LAB_PROGRESS": "auto", **changes}


def kata_lab(
    *arguments: str, typed: bytes = b"", changes: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end, with ``typed`` as standard input."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=typed,
        capture_output=True,
        env=environment(**(changes or {})),
        timeout=SECONDS,
        check=False,
    )


class Started:
    """A running command line whose standard input stays open; a context manager that leaves nothing running."""

    def __init__(self, arguments: Sequence[str], changes: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**(changes or {})),
            # A shell's background jobs ignore Ctrl-C; this one shall not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def wait_for(self, text: str) -> None:
        assert self._process.stdout is not None
        seen = b""
        while text.encode() not in seen:
            data = os.read(self._process.stdout.fileno(), 4096)
            assert data, seen.decode(errors="replace")
            seen += data

    def stop_reading(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()

    def type(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def status(self) -> int:
        return self._process.wait(SECONDS)

    def errors(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read().decode()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *ended: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


class OnTerminal:
    """A running command line on a terminal of its own; a context manager that leaves nothing running.

    Args:
        command: with its program.
        rows, columns: the window's size.

    Attributes:
        device: its side of the terminal.
    """

    def __init__(self, command: Sequence[str], rows: int, columns: int) -> None:
        self._ours, self.device = pty.openpty()
        try:
            self._set_size(rows, columns)
            self._process = subprocess.Popen(
                command,
                stdin=self.device,
                stdout=self.device,
                stderr=self.device,
                env=environment(),
                start_new_session=True,
            )
        except BaseException:
            self._close()
            raise
        self._seen = b""

    def _set_size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.device, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, rows: int, columns: int) -> None:
        self._set_size(rows, columns)
        # The kernel tells only those whose controlling terminal it is.
        self._process.send_signal(signal.SIGWINCH)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def see(self, text: bytes) -> None:
        """Wait until it is shown, after what was seen before."""
        deadline = time.monotonic() + SECONDS
        while text not in self._seen:
            if select.select([self._ours], [], [], 1.0)[0]:
                self._seen += os.read(self._ours, 4096)
                continue
            assert self._process.poll() is None, f"it ended and had not shown {text!r}, but {self._seen!r}"
            assert time.monotonic() < deadline, f"{text!r} was not shown in {SECONDS:g} s, but {self._seen!r}"
        self._seen = self._seen.partition(text)[2]

    def status(self) -> int:
        return self._process.wait(SECONDS)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *ended: object) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        os.close(self._ours)
        os.close(self.device)
