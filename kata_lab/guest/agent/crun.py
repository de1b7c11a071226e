"""Runs ``crun``, the OCI runtime that makes containers and enters them.

It is run from a copy in memory that is sealed: a container cannot write to the runtime through /proc/<n>/exe, and crun,
which would make such a copy of itself each time, finds that it is one (CVE-2019-5736).
"""

import asyncio
import os

import linux
from rpc import INTERNAL, RpcError

PROGRAM = "/usr/bin/crun"
STATE = "/run/crun"
PLACE = "/run/kata-agent"  # for logs and sockets
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin",)
_AT_ONCE = 4


class Crun:
    """Runs crun, not too many at once: more would share the same processors and take memory."""

    def __init__(self, children):
        self._children = children
        self._program = None
        self._running = 0
        self._changed = asyncio.Event()
        self._number = 0

    def path(self, what):
        """A name for a file or socket that nobody else uses."""
        if not self._number:
            linux.make_directories(PLACE)
        self._number += 1
        return f"{PLACE}/{what}{self._number}"

    async def run(self, arguments, standard=(-1, -1, -1)):
        """Run it to its end.

        It raises RpcError with crun's own words. If the task is cancelled, crun is killed.
        """
        if self._program is None:
            self._program = f"/proc/self/fd/{linux.sealed_copy(PROGRAM)}"
        while self._running >= _AT_ONCE:
            self._changed.clear()
            await self._changed.wait()
        self._running += 1
        log = self.path("log")
        try:
            command = [PROGRAM, "--root", STATE, "--log", log] + arguments
            child = self._children.spawn(command, ENVIRONMENT, standard, program=self._program)
            try:
                status = await child.wait()
            except BaseException:
                child.kill(linux.SIGKILL)
                raise
            if status != 0:
                raise RpcError(INTERNAL, _last_words(log) or f"crun {arguments[0]} ended with status {status}")
        finally:
            self._running -= 1
            self._changed.set()
            try:
                os.remove(log)
            except OSError:
                pass


def _last_words(log):
    """What it wrote last, without the time."""
    try:
        with open(log) as file:
            said = file.read().strip().split("\n")[-1]
    except OSError:
        return ""
    if said[:4].isdigit() and ": " in said:
        said = said.split(": ", 1)[1]
    return said
