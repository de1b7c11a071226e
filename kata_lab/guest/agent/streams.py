"""Descriptors that asyncio waits for: streams with an owner, and the poller below them.

asyncio's own queue of MicroPython 1.25 takes one task for each way of a descriptor, and keeps one that was closed while
somebody waited. This one, which takes its place, lets any number wait, wakes them when a stream is closed, and gives up
a task that is cancelled.
"""

import asyncio
import select
from asyncio import core

import linux

_READ, _WRITE = 0, 1
_UNPOLLED_PASSES = 3  # of tasks that can run, before the descriptors are looked at again


class Poller:
    """What asyncio's core asks for descriptors; the core knows ``map``, ``remove`` and ``wait_io_event``."""

    def __init__(self):
        self.map = {}  # descriptor → the tasks that wait to read, and those that wait to write
        self._poll = select.poll()
        self._passes = 0

    def wait(self, descriptor, way):
        entry = self.map.get(descriptor)
        if entry is None:
            entry = self.map[descriptor] = ([], [])
        entry[way].append(core.cur_task)
        core.cur_task.data = self
        self._arm(descriptor, entry)

    def _arm(self, descriptor, entry):
        events = (select.POLLIN if entry[_READ] else 0) | (select.POLLOUT if entry[_WRITE] else 0)
        if events:
            self._poll.register(descriptor, events)
        else:
            del self.map[descriptor]
            self._poll.unregister(descriptor)

    def remove(self, task):
        """The task is cancelled and waits no more."""
        for descriptor in list(self.map):
            entry = self.map[descriptor]
            for waiting in entry:
                if task in waiting:
                    waiting.remove(task)
                    self._arm(descriptor, entry)
                    return

    def forget(self, descriptor):
        """The descriptor is about to be closed: who waits for it shall look again."""
        entry = self.map.pop(descriptor, None)
        if entry is not None:
            self._poll.unregister(descriptor)
            for waiting in entry:
                for task in waiting:
                    core._task_queue.push(task)

    def wait_io_event(self, milliseconds):
        if milliseconds == 0 and self._passes < _UNPOLLED_PASSES:
            self._passes += 1
            return
        self._passes = 0
        for descriptor, events in self._poll.ipoll(milliseconds):
            entry = self.map[descriptor]
            for way, other in ((_READ, select.POLLOUT), (_WRITE, select.POLLIN)):
                # An error or a hang-up concerns both ways.
                if events & ~other:
                    while entry[way]:
                        core._task_queue.push(entry[way].pop())
            self._arm(descriptor, entry)


class _Ready:
    """Suspends the task until a descriptor can be read or written, or is closed."""

    def __init__(self, descriptor, way):
        self._descriptor = descriptor
        self._way = way

    def __iter__(self):
        return self

    __await__ = __iter__

    def __next__(self):
        if self._descriptor is None:
            raise StopIteration
        descriptor, self._descriptor = self._descriptor, None
        _poller.wait(descriptor, self._way)


class Stream:
    """A descriptor in non-blocking mode, and its owner."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    @property
    def closed(self):
        return self.descriptor < 0

    def close(self):
        """Close it; who waits for it finds its end. A second time is nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            _poller.forget(descriptor)
            linux.close(descriptor)

    async def readable(self):
        if self.descriptor >= 0:
            await _Ready(self.descriptor, _READ)

    def read_now(self, buffer, length):
        """Bytes read into ``buffer``: 0 at the end, -1 if there are none yet."""
        return linux.read(self.descriptor, buffer, length) if self.descriptor >= 0 else 0

    async def read(self, buffer, length):
        """Bytes read into ``buffer``, at least one; 0 at the end."""
        while True:
            count = self.read_now(buffer, length)
            if count >= 0:
                return count
            await self.readable()

    async def write(self, data):
        """Write all. OSError if that cannot be, EPIPE also if it is closed meanwhile."""
        view = memoryview(data)
        while len(view):
            if self.descriptor < 0:
                raise OSError(linux.EPIPE, "writing to a closed stream")
            count = linux.write(self.descriptor, view, len(view))
            if count < 0:
                await _Ready(self.descriptor, _WRITE)
            else:
                view = view[count:]


class Listener(Stream):
    """A socket that listens."""

    async def accept(self):
        """The next connection, as a stream."""
        while True:
            descriptor = linux.accept(self.descriptor)
            if descriptor >= 0:
                return Stream(descriptor)
            await self.readable()
            if self.closed:
                raise OSError(linux.EPIPE, "a listener that was closed")


async def listen(port):
    """A listener on a vsock port of this guest, or on a virtio port in its place, once there is one of them.

    Their drivers come with the devices.
    """
    pause = 0.02
    while True:
        try:
            return Listener(linux.listen_vsock(port))
        except OSError as error:
            if error.args[0] != linux.EAFNOSUPPORT:
                raise
        import ports

        listener = ports.find(port)
        if listener is not None:
            return listener
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1)


class FileWatch:
    """Tells which of the files that are watched were changed (inotify(7))."""

    def __init__(self):
        self._stream = Stream(linux.watch_files())

    def add(self, path):
        """The number by which its changes are told."""
        return linux.watch_file(self._stream.descriptor, path)

    def remove(self, number):
        linux.unwatch_file(self._stream.descriptor, number)

    async def changed(self):
        """Numbers of the files that were changed, after at least one was."""
        buffer = bytearray(4096)
        count = await self._stream.read(buffer, len(buffer))
        found, at = [], 0
        while at < count:
            found.append(int.from_bytes(buffer[at : at + 4], "little"))
            at += 16 + int.from_bytes(buffer[at + 12 : at + 16], "little")
        return found


def pipe():
    """Our end that reads, as a stream, and their end that writes, a descriptor."""
    reading, writing = linux.pipe()
    linux.set_nonblocking(reading)
    return Stream(reading), writing


async def output_of(children, command, environment):
    """Run a program; its exit status, and what it writes to both its outputs, as bytes."""
    ours, theirs = pipe()
    try:
        try:
            child = children.spawn(command, environment, (-1, theirs, theirs))
        finally:
            linux.close(theirs)
        said, buffer = bytearray(), bytearray(4096)
        while count := await ours.read(buffer, len(buffer)):
            said += memoryview(buffer)[:count]
        return await child.wait(), bytes(said)
    finally:
        ours.close()


def begin():
    """Take the place of asyncio's queue."""
    core._io_queue = _poller


_poller = Poller()
