"""vhost-user messages over a unix socket, with the descriptors that travel beside them (unix(7), SCM_RIGHTS)."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Final

from vmm.vhost.messages import (
    HEADER,
    MAX_DESCRIPTORS,
    MAX_PAYLOAD,
    VERSION,
    VERSION_MASK,
    Message,
    VhostError,
)

_INT: Final = array.array("i").itemsize
_ANCILLARY: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for each in descriptors:
        os.close(each)


class Channel:
    """One side of a connection.

    Args:
        connection: blocking, with a time limit or not, or non-blocking; it belongs to the channel from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._data = bytearray()
        self._descriptors: list[int] = []

    def send(self, request: int, flags: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send a message.

        Raises:
            OSError: the other side has gone, or does not read.
        """
        data = HEADER.pack(request, flags | VERSION, len(payload)) + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        sent = self.socket.sendmsg([data], ancillary)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def receive(self) -> Message | None:
        """The next message; None if it has not come as a whole yet, on a non-blocking socket.

        Raises:
            VhostError: it is none; the connection is of no use any more.
            EOFError: the other side has gone.
            OSError: likewise, or the time is over.
        """
        while True:
            wanted = HEADER.size
            if len(self._data) >= HEADER.size:
                request, flags, size = HEADER.unpack_from(self._data)
                if flags & VERSION_MASK != VERSION or size > MAX_PAYLOAD:
                    raise VhostError(
                        f"a message with flags {flags:#x} and {size} bytes came, it must be of version {VERSION} and"
                        f" have at most {MAX_PAYLOAD}"
                    )
                wanted += size
                if len(self._data) == wanted:
                    payload, descriptors = bytes(self._data[HEADER.size :]), tuple(self._descriptors)
                    self._data.clear()
                    self._descriptors.clear()
                    return Message(request, flags, payload, descriptors)
            # Never beyond the message: descriptors come with the first byte of the one that they belong to.
            try:
                self._take(wanted - len(self._data))
            except BlockingIOError:
                return None

    def _take(self, length: int) -> None:
        data, ancillary, flags, _ = self.socket.recvmsg(length, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._descriptors += array.array("i", content[: len(content) // _INT * _INT])
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MAX_DESCRIPTORS:
            raise VhostError(f"a message came with more than {MAX_DESCRIPTORS} descriptors")
        if not data:
            raise EOFError
        self._data += data

    def close(self) -> None:
        """Close the connection and the descriptors of a message that came in part."""
        close_all(self._descriptors)
        self._descriptors.clear()
        self.socket.close()
