"""A QEMU process: started so that it cannot outlive this one, followed, and ended.

QEMU has no option to end with its parent before version 9.2. The kernel has one (PR_SET_PDEATHSIG, prctl(2)), which
setpriv(1) sets: it kills QEMU at the end of the *thread* that started it. That is a thread of its own here, which waits
for QEMU's end, so that only the end of the whole process can be meant. A parent that died before the kernel was told is
noticed by a shell, which then does not become QEMU.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Final

from kata_lab.hypervisor.base import HypervisorError

SHUT_DOWN: Final = "the guest shut down"
_SAID: Final = 4096  # bytes of what it said last
_ONLY_BELOW: Final = '[ "$PPID" = "$0" ] && exec "$@"'


class QemuProcess:
    """QEMU, with a thread of ours that waits for it.

    Args:
        command: the program and its arguments.
        descriptors: what it inherits.

    Raises:
        HypervisorError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], descriptors: Sequence[int]) -> None:
        self._errors = os.memfd_create("qemu-errors")
        self._started: concurrent.futures.Future[subprocess.Popen[bytes]] = concurrent.futures.Future()
        #: How it ended, as a sentence without its full stop.
        self.ended: concurrent.futures.Future[str] = concurrent.futures.Future()
        self.ended.set_running_or_notify_cancel()  # nobody who waits can cancel it
        leased = [find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"]
        leased += [find_program("sh", "dash"), "-c", _ONLY_BELOW, str(os.getpid()), *command]
        self._thread = threading.Thread(target=self._live, args=(leased, descriptors), name="qemu", daemon=True)
        self._thread.start()
        try:
            self._process = self._started.result()
        except OSError as error:
            self.close()
            raise HypervisorError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        self.pid = self._process.pid

    def _live(self, command: Sequence[str], descriptors: Sequence[int]) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C at a terminal is for the runtime
            )
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(process)
        self.ended.set_result(self._sentence(process.wait()))

    def _sentence(self, status: int) -> str:
        name = f"QEMU (process {self._started.result().pid})"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"{name} was killed by {signal.Signals(-status).name}"
            return f"{name} was killed by signal {-status}"
        if status == 0:
            # The machine's power switch (hw/misc/sifive_test.c) ends the process, and QMP says nothing of it.
            return SHUT_DOWN
        said = self.last_words()
        return f"{name} ended with status {status}" + (f": {said}" if said else "")

    def last_words(self) -> str:
        """The last line that it wrote, without its own name."""
        size = os.fstat(self._errors).st_size
        lines = os.pread(self._errors, _SAID, max(size - _SAID, 0)).decode(errors="replace").strip().splitlines()
        return lines[-1].partition(": ")[2] or lines[-1] if lines else ""

    def kill(self) -> None:
        """End it at once, if it still is."""
        self._process.kill()

    def close(self) -> None:
        """Make sure that it has ended; blocks until it has. A second time is nothing."""
        if self._errors < 0:
            return
        if self._started.exception() is None:
            self.kill()
        self._thread.join()
        os.close(self._errors)
        self._errors = -1


def find_program(name: str, package: str) -> str:
    """Where a program is.

    Raises:
        HypervisorError: this machine has none; the package that has it is told.
    """
    found = shutil.which(name)
    if found is None:
        raise HypervisorError(f"this machine has no {name}, which the arrangement 'qemu' needs: install {package}")
    return found
