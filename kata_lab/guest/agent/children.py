"""Processes that the agent started or that were left to it: it is the reaper of all below it (prctl(2)).

A process number is used again once its process was reaped, so that an end is matched with who asks for it by order: who
takes over a process that another program started says since when that can have been.
"""

import asyncio

import linux
from streams import Stream

_FORGOTTEN_AFTER = 256  # ends of processes that nobody has asked for


class Child:
    """A process and, once it has ended, its exit status: 128 + n after signal n."""

    def __init__(self, number, on_end=None):
        self.number = number
        self.status = None
        self._on_end = on_end
        self._ended = asyncio.Event()

    def end(self, status):
        self.status = status
        self._ended.set()
        if self._on_end is not None:
            self._on_end()

    async def wait(self):
        if self.status is None:
            await self._ended.wait()
        return self.status

    def kill(self, signal):
        """False if it has ended."""
        return self.status is None and linux.kill(self.number, signal)


class Children:
    """All that are waited for."""

    def __init__(self):
        self.reaped = 0
        self._waited = {}
        self._orphans = {}  # number → status, and how many were reaped before

    def begin(self):
        self._signals = Stream(linux.become_reaper())
        asyncio.create_task(self._watch())

    def spawn(self, command, environment, standard=(-1, -1, -1), terminal=False, program=None):
        """Start a program; see linux.spawn."""
        return self.made(linux.spawn(command, environment, standard, terminal, program))

    def spawn_reaper(self):
        """Start the first process of a new PID namespace."""
        return self.made(linux.spawn_reaper())

    def made(self, number, on_end=None):
        """A process that was just forked."""
        child = self._waited[number] = Child(number, on_end)
        self._orphans.pop(number, None)
        return child

    def take_over(self, number, since, on_end):
        """A process that a child started after ``since`` had been reaped, and left to us, or soon will."""
        child = Child(number, on_end)
        status, when = self._orphans.pop(number, (None, 0))
        if status is not None and when >= since:
            child.end(status)
        else:
            self._waited[number] = child
        return child

    async def _watch(self):
        told = bytearray(128 * 8)
        while True:
            await self._signals.read(told, len(told))
            while (ended := linux.reap()) is not None:
                number, status = ended
                child = self._waited.pop(number, None)
                if child is not None:
                    child.end(status)
                else:
                    self._orphans[number] = status, self.reaped
                self.reaped += 1
            if len(self._orphans) > _FORGOTTEN_AFTER:
                for number in list(self._orphans):
                    if self._orphans[number][1] < self.reaped - _FORGOTTEN_AFTER // 2:
                        del self._orphans[number]
