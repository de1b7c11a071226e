"""A stream socket that carries Ethernet frames, as passt and QEMU's ``-netdev stream`` do it.

Each frame follows its length, a 32-bit number in network order. Who is at the other end finishes what it began: a frame
is never cut off, or the stream would be lost; so the rest of a frame that the socket did not take is kept.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Final

from vmm.network.offload import CSUM, HEADER, NEEDS_CSUM, complete_checksum
from vmm.network.port import ETHERNET_HEADER, Buffer, Frame, Inbox, Port

LENGTH: Final = struct.Struct(">I")
MAX_FRAME: Final = 65_535  #: bytes, as passt has it
LIKED_MTU: Final = 65_520  #: the largest whose frames fit; large ones are what makes a stream of frames fast

READ_BYTES: Final = 256 << 10  #: at once; more keeps the guest waiting for the first of them
_BUFFER: Final = READ_BYTES + (128 << 10)  # with room for the frame that has not come wholly
_FIRST: Final = HEADER.size - LENGTH.size  # so that the first frame has room for its header, too
SEND_BUFFER: Final = 4 << 20


class StreamPort(Port):
    """Frames over a connected stream socket, which belongs to the port from now on.

    Args:
        connection: the socket, or None for one that :meth:`attach` brings.
        mtu: bytes of the largest packet.
        features: what the other side can do, see :attr:`Port.features`.
        completes_checksums: False if nobody verifies the checksums of what is sent.
        header: see :attr:`Port.header`.
    """

    def __init__(
        self,
        connection: socket.socket | None,
        mtu: int,
        features: int = CSUM,
        completes_checksums: bool = True,
        header: bytes = bytes(10),
    ) -> None:
        self._socket: socket.socket | None = None
        self.up = False
        self.mtu = mtu
        self.features = features
        self.header = header
        self._completes_checksums = completes_checksums
        self._inbox = Inbox(-1, memoryview(bytearray(_BUFFER)))
        self.inboxes = (self._inbox,)
        self._begin = self._end = _FIRST  # of what was read and is not a whole frame yet
        if connection is not None:
            self.attach(connection)

    def attach(self, connection: socket.socket) -> None:
        """The other side is there: speak through ``connection`` from now on."""
        if self._socket is not None:
            self._socket.close()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._socket = connection
        self._inbox.descriptor = connection.fileno()
        self._begin = self._end = _FIRST
        self.up = True

    def lose(self) -> None:
        """The other side is gone. Its socket stays open until the loop does not watch it any more."""
        self.up = False
        self.pending = b""
        self._inbox.descriptor = -1

    def receive(self, inbox: Inbox) -> bool:
        if self._socket is None or not self.up:
            return False
        buffer = inbox.buffer
        if self._begin != _FIRST:
            left = self._end - self._begin
            buffer[_FIRST : _FIRST + left] = buffer[self._begin : self._end]
            self._begin, self._end = _FIRST, _FIRST + left
        try:
            count = self._socket.recv_into(buffer[self._end : self._end + READ_BYTES])
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self.lose()
            return False
        self._end += count
        self._split(inbox)
        return True

    def _split(self, inbox: Inbox) -> None:
        """Find the whole frames in what was read."""
        buffer, begin, end = inbox.buffer, self._begin, self._end
        frames = []
        while end - begin >= 4:
            (length,) = LENGTH.unpack_from(buffer, begin)
            if length > MAX_FRAME:
                # Not what passt or we would send; where the next frame begins is anybody's guess.
                self.lose()
                break
            following = begin + 4 + length
            if following > end:
                break
            if length >= ETHERNET_HEADER:
                # virtio-net's header takes the place of the length, and of the end of the frame before.
                frames.append((begin - _FIRST, following))
            else:
                self.dropped += 1
            begin = following
        self._begin = begin
        frames.reverse()
        inbox.frames = frames

    def send(self, pair: int, frames: Sequence[Frame]) -> None:
        parts: list[Buffer] = []
        total = 0
        for frame in frames:
            if frame.length > MAX_FRAME:
                self.dropped += 1
                continue
            parts.append(LENGTH.pack(frame.length))
            parts += self._checked(frame)
            total += frame.length + 4
        sent = self._send(parts)
        if sent < total and self.up:
            self.pending = b"".join(parts)[sent:]

    def _checked(self, frame: Frame) -> Sequence[Buffer]:
        if not self._completes_checksums or not frame.header[0] & NEEDS_CSUM:
            return frame.parts
        # A copy, which the guest cannot change any more.
        data = bytearray().join(frame.parts)
        _, _, _, _, start, offset, _ = HEADER.unpack(frame.header)
        complete_checksum(data, start, offset)
        return [data]

    def _send(self, parts: Sequence[Buffer]) -> int:
        if not parts or self._socket is None or not self.up:
            return 0
        try:
            return self._socket.sendmsg(parts, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self.lose()
            return 0

    def flush(self) -> None:
        sent = self._send([self.pending])
        self.pending = self.pending[sent:]

    def accept(self, features: int) -> None:
        """Nothing changes: frames have no header on a stream, and go through it whole."""

    def use_pairs(self, count: int) -> None:
        """Nothing changes: a stream serves one pair."""

    def close(self) -> None:
        self.lose()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
