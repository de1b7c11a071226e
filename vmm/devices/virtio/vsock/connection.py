"""One stream between a port of the guest and a socket of the host, and its credit (virtio 1.2, section 5.10.6.3).

Each side tells in every packet how large its buffer for the stream is (``buf_alloc``) and how many bytes have left that
buffer so far (``fwd_cnt``). The other side never sends more than fits::

    credit = buf_alloc - (bytes sent - fwd_cnt)

Towards the guest the host's own socket is the buffer: it is read only as far as the guest has credit. What the guest
sends is written to the socket at once, and what does not fit waits in :attr:`Connection.outgoing`, which the credit
granted to the guest bounds.

::

    opened by the host ► REQUESTED ──RESPONSE──► ESTABLISHED ──the host closed──► CLOSING ──RST──► CLOSED
    opened by the guest ───────────────────────► ESTABLISHED ──the guest closed─► FLUSHING ─all written─► CLOSED
"""

from __future__ import annotations

import concurrent.futures
import enum
import select
import socket
from collections.abc import Sequence
from typing import Final

from vmm.devices.virtio.vsock.packet import COUNTER, HOST_CID, NO_RECEIVE, NO_SEND, SHUTDOWN, STREAM, Header

CREDIT_MAX: Final = 256 << 10  #: bytes granted to the guest for one connection, while few are open
CREDIT_MIN: Final = 32 << 10  #: bytes granted when many are
CREDIT_BUDGET: Final = 64 << 20  #: bytes granted to all connections, before every further one gets the least
SOCKET_BUFFER: Final = 1 << 20  #: bytes asked of the host's kernel for a socket; it may give less
WRITE_AT_ONCE: Final = 256 << 10
DISARMED: Final = -1

Key = tuple[int, int]  #: guest port, host port


def next_credit(granted: int) -> int:
    """What a new connection is granted when the others have ``granted`` bytes together."""
    return max(CREDIT_MIN, min(CREDIT_MAX, (CREDIT_BUDGET - granted) // 8))


class State(enum.Enum):
    """Where a connection is in its life; see the module."""

    REQUESTED = enum.auto()
    ESTABLISHED = enum.auto()
    CLOSING = enum.auto()
    FLUSHING = enum.auto()
    CLOSED = enum.auto()


class Connection:
    """One stream.

    Attributes:
        host: the host's socket, non-blocking; the connection owns it.
        wanted: operations of which a packet shall go to the guest, as a mask of ``1 << op``.
        shutdown_flags: what the guest is, or shall be, told with SHUTDOWN.
        guest_shutdown: what the guest has told with SHUTDOWN.
        readable: the host's socket may have something to read.
        armed: the events for which the epoll set reports the socket once, DISARMED if it does not.
        deadline: when the other side's patience ends, in the device's seconds; 0 for never.
        greeting: the host's end is told ``OK`` once the guest has answered.
        dialled: who waits for the guest's answer in Python, and the socket that it will get.
    """

    __slots__ = (
        "armed",
        "buf_alloc",
        "deadline",
        "dialled",
        "greeting",
        "guest_cid",
        "guest_port",
        "guest_shutdown",
        "host",
        "host_port",
        "outgoing",
        "peer_buf_alloc",
        "readable",
        "received",
        "sent",
        "shutdown_flags",
        "state",
        "told",
        "unread",
        "wanted",
    )

    def __init__(
        self, state: State, host: socket.socket, cid: int, guest_port: int, host_port: int, buf_alloc: int
    ) -> None:
        self.state = state
        self.host = host
        self.guest_cid = cid
        self.guest_port = guest_port
        self.host_port = host_port
        self.wanted = 0
        self.shutdown_flags = self.guest_shutdown = 0
        self.readable = self.greeting = False
        self.armed = DISARMED
        self.deadline = 0.0
        self.dialled: tuple[concurrent.futures.Future[socket.socket], socket.socket] | None = None
        # Towards the guest: bytes sent so far, those of them that it has not reported to have read, its buffer.
        self.sent = self.unread = self.peer_buf_alloc = 0
        # From the guest: bytes received so far, those that it was told to have left the buffer, the buffer.
        self.received = self.told = 0
        self.buf_alloc = buf_alloc
        self.outgoing = bytearray()

    @property
    def key(self) -> Key:
        """What tells the connection from all others of the guest."""
        return self.guest_port, self.host_port

    # Towards the guest.

    @property
    def credit(self) -> int:
        """Bytes that the guest has room for; not positive if it has shrunk its buffer."""
        return self.peer_buf_alloc - self.unread

    def hear(self, header: Header) -> None:
        """Take note of the guest's buffer.

        The count of bytes that left it only grows, up to what was sent; packets that Linux built at the same time may
        come in the wrong order, and a count that goes back or too far gives no credit.
        """
        self.peer_buf_alloc = header.buf_alloc
        unread = (self.sent - header.fwd_cnt) & COUNTER
        if unread < self.unread:
            self.unread = unread

    def sent_payload(self, length: int) -> None:
        """So many bytes went to the guest."""
        self.sent = (self.sent + length) & COUNTER
        self.unread += length

    def packet(self, op: int, length: int = 0) -> Header:
        """The header of a packet to the guest, which learns from it what left our buffer."""
        self.told = (self.received - len(self.outgoing)) & COUNTER
        flags = self.shutdown_flags if op == SHUTDOWN else 0
        ports = self.host_port, self.guest_port
        return Header(HOST_CID, self.guest_cid, *ports, length, STREAM, op, flags, self.buf_alloc, self.told)

    @property
    def reads(self) -> bool:
        """The host's socket is read: neither has its end been seen, nor has the guest stopped listening."""
        return (
            self.state is State.ESTABLISHED
            and not self.shutdown_flags & NO_SEND
            and not self.guest_shutdown & NO_RECEIVE
        )

    @property
    def has_data(self) -> bool:
        """Something can be read for the guest, which has room for it."""
        return self.readable and self.peer_buf_alloc > self.unread and self.reads

    # From the guest.

    def admits(self, length: int) -> bool:
        """Whether the guest may send ``length`` bytes; if so, they are counted as received."""
        if ((self.received - self.told) & COUNTER) + length > self.buf_alloc:
            return False
        self.received = (self.received + length) & COUNTER
        return True

    @property
    def owes_credit(self) -> bool:
        """The guest should be told that half of the buffer is free again.

        Linux does not send ahead more than fits into its own buffer either, so that the smaller one counts.
        """
        free = (self.received - len(self.outgoing) - self.told) & COUNTER
        return free > 0 and 2 * free >= min(self.buf_alloc, self.peer_buf_alloc)

    def write(self, views: Sequence[memoryview]) -> None:
        """Write what the guest sent, and keep what the socket does not take.

        Raises:
            OSError: the host's end is gone, or does not read any more.
        """
        done = 0
        if not self.outgoing:
            try:
                done = self.host.sendmsg(views, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                done = 0
        for view in views:
            if done < len(view):
                self.outgoing += view[done:]
            done = max(done - len(view), 0)

    def flush(self) -> None:
        """Write what was kept, as far as the socket takes it.

        Raises:
            OSError: as :meth:`write`.
        """
        while self.outgoing:
            try:
                with memoryview(self.outgoing) as kept, kept[:WRITE_AT_ONCE] as part:
                    done = self.host.send(part, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            del self.outgoing[:done]

    # The host's socket.

    @property
    def hung_up(self) -> bool:
        """The host's end has closed both directions."""
        poll = select.poll()
        poll.register(self.host, 0)
        return bool(poll.poll(0))

    @property
    def events(self) -> int | None:
        """What the epoll set shall report, at the next occasion; None for nothing at all."""
        if self.state is State.ESTABLISHED:
            waits = self.reads and self.readable
            events = (select.EPOLLIN if self.reads and not waits else 0) | (select.EPOLLOUT if self.outgoing else 0)
            # With no event at all the set still reports that the other end hung up, which is of no interest while data
            # wait for the guest's credit.
            return events if events or not waits else None
        if self.state is State.FLUSHING:
            return select.EPOLLOUT
        return 0 if self.state is State.REQUESTED else None

    def obey_shutdown(self) -> None:
        """Close the direction that the guest has closed; the one to the host only once all has been written."""
        if self.guest_shutdown & NO_RECEIVE:
            self._shut(socket.SHUT_RD)
        elif self.guest_shutdown & NO_SEND and not self.outgoing:
            self._shut(socket.SHUT_WR)

    def _shut(self, how: int) -> None:
        try:
            self.host.shutdown(how)
        except OSError:  # the host's end was quicker
            return
