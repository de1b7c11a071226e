"""Ports of a virtio console (virtio 1.2, 5.3) in place of vsock, for a guest whose VMM offers no vsock.

A port is a device of the name ``kata.agent.<number>`` that carries one connection at a time. Linux has it
(drivers/char/virtio_console.c) as a file that one process can open; it hangs up while nobody is at the host's end, and
closing it tells the host.
"""

import asyncio
import os
import select

import linux
from streams import Stream

_NAME = "kata.agent."
_NAMES = "/sys/class/virtio-ports"
_BUSY_SECONDS = 0.005


class PortStream(Stream):
    """The connection of a port, from the time when the host is there."""

    def __init__(self, descriptor):
        super().__init__(descriptor)
        # A descriptor that can be read when the connection comes, later when it goes: poll(2) alone would tell again
        # and again that nobody is there.
        self._watch = Stream(linux.watch_edges(descriptor))

    async def connected(self):
        """Wait for the host."""
        while linux.next_edge(self._watch.descriptor) & (select.POLLOUT | select.POLLHUP) != select.POLLOUT:
            await self._watch.readable()
        linux.watch_hang_up(self._watch.descriptor, self.descriptor)

    async def hung_up(self):
        """Wait until the host is gone, or the stream is closed here."""
        while not self.closed and not linux.next_edge(self._watch.descriptor) & select.POLLHUP:
            await self._watch.readable()

    def close(self):
        super().close()
        self._watch.close()


class PortListener:
    """Takes the connections of a port, one after the other."""

    def __init__(self, path):
        self._path = path
        self._stream = None

    async def accept(self):
        """The next connection, as a stream; whoever has the one before finds its end first."""
        if self._stream is not None:
            await self._stream.hung_up()
            self._stream.close()
        self._stream = PortStream(await self._open())
        await self._stream.connected()
        return self._stream

    async def _open(self):
        """Its descriptor, once a process that was forked meanwhile is a program of its own and has it no more."""
        while True:
            try:
                return linux.open_file(self._path, linux.O_RDWR | linux.O_NONBLOCK)
            except OSError as error:
                if error.args[0] != linux.EBUSY:
                    raise
            await asyncio.sleep(_BUSY_SECONDS)


def find(number):
    """A listener on a port, None if there is no port of that name."""
    try:
        entries = os.listdir(_NAMES)
    except OSError:
        return None
    for entry in entries:
        with open(f"{_NAMES}/{entry}/name") as file:
            if file.readline().strip() == _NAME + str(number):
                return PortListener(f"/dev/{entry}")
    return None
