"""A process of this package that serves a unix socket and does not outlive the one that started it.

Its standard error is a pipe to its parent and the only thing that it inherits: it says one line when it listens, or
one sentence why it cannot. The pipe is a lease as well: who holds the reading end is the parent alone, so that its
writing end turns bad (EPOLLERR, pipe(7)) the moment the parent is gone, however it went. PR_SET_PDEATHSIG would not do:
it tells of the end of a thread.

The parent hears of the end of the process through a pidfd (pidfd_open(2), Linux 5.3), at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from vmm.rpc.wire import RpcError

LISTENING: Final = "listening"  #: the line by which the process says that it can be connected to
STANDARD_ERROR: Final = 2
_KEPT: Final = 16 << 10  # bytes of what it said last
_SOURCE = Path(__file__).parents[2]


class ServerProcess:
    """Starts ``python -m module arguments…`` and waits until it listens. A context manager.

    Args:
        module: such as ``vmm.rpc``.
        arguments: of its command line.
        what: what errors call it, such as ``the VMM process``.
        timeout: seconds until it must listen.

    Raises:
        RpcError: it ends, or does not listen in time; in its own words.
    """

    def __init__(self, module: str, arguments: Sequence[str], what: str, timeout: float = 60.0) -> None:
        self._what = what
        self._ended: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._ready = threading.Event()
        self._said = bytearray()
        path = os.pathsep.join([str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C at a terminal is for the parent
        )
        self.pid = self._process.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)
            self._watcher = threading.Thread(target=self._watch, name=f"watch-{self.pid}", daemon=True)
            self._watcher.start()
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._release()
            raise
        try:
            self._await_ready(timeout)
        except BaseException:
            self.close(0)
            raise

    @property
    def ended(self) -> concurrent.futures.Future[str]:
        """A future, a new one each time, of how the process ended, as a sentence without its full stop."""
        given: concurrent.futures.Future[str] = concurrent.futures.Future()

        def pass_on(source: concurrent.futures.Future[str]) -> None:
            if given.set_running_or_notify_cancel():
                given.set_result(source.result())

        self._ended.add_done_callback(pass_on)
        return given

    @property
    def status(self) -> int | None:
        """With what status the process ended, -n after signal n; None while it has not."""
        return self._process.returncode

    def _await_ready(self, timeout: float) -> None:
        in_time = self._ready.wait(timeout)
        if self._ended.done():
            raise RpcError(f"{self._what} did not start: {self._last_words() or self._ended.result()}")
        if not in_time:
            raise RpcError(f"{self._what} (process {self.pid}) does not listen after {timeout:g} s")

    def _last_words(self) -> str:
        lines = self._said.decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines and lines[-1] != LISTENING else ""

    def _watch(self) -> None:
        """Until the process has ended: take what it says, so that it never waits for us, and reap it."""
        assert self._process.stderr is not None
        pipe = self._process.stderr.fileno()
        os.set_blocking(pipe, False)
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        alive = True
        while alive:
            found = {descriptor for descriptor, _ in poll.poll()}
            alive = self._pidfd not in found
            if pipe in found and not self._listen(pipe):
                poll.unregister(pipe)
        status = self._process.wait()
        self._ended.set_result(self._sentence(status))
        self._ready.set()

    def _listen(self, pipe: int) -> bool:
        """Take what is in the pipe; False at its end."""
        while True:
            try:
                data = os.read(pipe, _KEPT)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._said += data
            del self._said[:-_KEPT]
            if not self._ready.is_set() and LISTENING.encode() in self._said.splitlines():
                self._ready.set()

    def _sentence(self, status: int) -> str:
        name = f"{self._what} (process {self.pid})"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"{name} was killed by {signal.Signals(-status).name}"
            return f"{name} was killed by signal {-status}"
        said = self._last_words()
        return f"{name} ended with status {status}" + (f": {said}" if said else "")

    def signal(self, number: int) -> None:
        """Send a signal, if the process still is; it cannot hit another one."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self, timeout: float = 10.0) -> str:
        """Wait ``timeout`` seconds for the process to end by itself or upon SIGTERM, then kill it; says how it ended. A
        second call does nothing."""
        if timeout:
            self.signal(signal.SIGTERM)
            concurrent.futures.wait([self._ended], timeout)
        if not self._ended.done():
            self.signal(signal.SIGKILL)
        self._watcher.join()
        self._release()
        return self._ended.result()

    def _release(self) -> None:
        if self._process.stderr is not None:
            self._process.stderr.close()
        pidfd, self._pidfd = getattr(self, "_pidfd", -1), -1
        if pidfd >= 0:
            os.close(pidfd)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# On the side of the process itself.


def say_listening() -> None:
    """Tell the parent that the socket can be connected to."""
    with contextlib.suppress(OSError):
        os.write(STANDARD_ERROR, LISTENING.encode() + b"\n")


def on_orphaned(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call ``callback`` on ``loop`` when the parent has gone; never, where standard error is no pipe of a parent."""

    def gone() -> None:
        loop.remove_reader(STANDARD_ERROR)
        callback()

    if stat.S_ISFIFO(os.fstat(STANDARD_ERROR).st_mode):
        loop.add_reader(STANDARD_ERROR, gone)


def end_within(seconds: float) -> None:
    """End this process now, if it has not ended after so many ``seconds``: something in it hangs."""
    timer = threading.Timer(seconds, os._exit, (3,))
    timer.daemon = True
    timer.start()
