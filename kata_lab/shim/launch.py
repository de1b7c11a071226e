"""How a command starts a shim: as a process of its own session, and waits until it serves."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Final

from kata_lab.errors import KataLabError
from kata_lab.progress import MODE_VARIABLE, resolved_mode
from kata_lab.shim.records import ShimDirectory

PROGRAM: tuple[str, ...] = ("-m", "kata_lab.shim")
END_SECONDS: Final = 5.0  #: that a shim may take to undo what it began
_READY: Final = 3


class ShimError(KataLabError):
    """A shim that did not come up, with the sentence that it said."""


class StartingShim:
    """A shim on its way; a context manager that ends one that nobody waited for.

    Args:
        sandbox_id: its sandbox.
        container_ids: containers with records that it begins with.
        program: arguments to Python; PROGRAM if there are none.
    """

    def __init__(self, sandbox_id: str, container_ids: Sequence[str], program: Sequence[str] = ()) -> None:
        self._directory = ShimDirectory(sandbox_id)
        # What a dead one left.
        self._directory.remove()
        self._directory.make()
        arguments = [sys.executable, *(program or PROGRAM), "--id", sandbox_id, "--ready", str(_READY)]
        for each in container_ids:
            arguments += ["--container", each]
        self._reader, writer = os.pipe()
        try:
            log = os.open(self._directory.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                self._pid = os.posix_spawn(
                    sys.executable,
                    arguments,
                    {**os.environ, MODE_VARIABLE: "steps"},
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, log, 1),
                        (os.POSIX_SPAWN_DUP2, log, 2),
                        (os.POSIX_SPAWN_DUP2, writer, _READY),
                    ],
                    setsid=True,
                    setsigdef=(signal.SIGINT, signal.SIGPIPE, signal.SIGHUP),
                )
            finally:
                os.close(log)
        except BaseException:
            os.close(self._reader)
            self._directory.remove()
            raise
        finally:
            os.close(writer)
        self._ready = False

    def wait(self) -> None:
        """Wait until it serves; what it does meanwhile that takes long is shown on standard error.

        Raises:
            ShimError: it does not.
        """
        shown = resolved_mode("auto", sys.stderr) != "off"
        answer: dict[str, str] | None = None
        rest = b""
        while data := os.read(self._reader, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if shown and answer and "progress" in answer:
                    print(answer["progress"], file=sys.stderr, flush=True)
        if answer is None or "progress" in answer:
            _, status = os.waitpid(self._pid, 0)
            self._pid = 0
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            last = self._last_line()
            self._directory.remove()
            raise ShimError(f"the process of sandbox {self._directory.id} {how} before it was ready{last}")
        if answer:
            os.waitpid(self._pid, 0)
            self._pid = 0
            raise ShimError(answer["error"])
        self._ready = True

    def _last_line(self) -> str:
        try:
            lines = self._directory.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {lines[-1][-300:]}" if lines else ""

    def __enter__(self) -> StartingShim:
        return self

    def __exit__(self, *ended: object) -> None:
        os.close(self._reader)
        if not self._ready and self._pid:
            self._end()
            self._directory.remove()

    def _end(self) -> None:
        """Ask it to end; one that is in the middle of something long, such as a build, is killed."""
        os.kill(self._pid, signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                return
            time.sleep(0.01)
