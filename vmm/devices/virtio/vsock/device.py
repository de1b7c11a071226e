"""The socket device (virtio 1.2, section 5.10): its queues, and its face in Python.

Three queues: what goes to the guest (rx), what comes from it (tx), events. The driver keeps rx filled with buffers,
each of which takes one packet. Linux (6.12) makes them a page large with what it keeps of each itself, so that 3.6 KiB
of data fit, and nothing that the device does changes that. What the guest sends is taken on the vCPU's own thread and
written to the host's sockets without waiting; the same call then reads for the guest what it has given credit for. Data
of the host that come while the guest waits are read on the event loop's thread.

While too many answers wait for rx buffers, tx is not looked at, so that the guest cannot make the host keep any number
of them (5.10.6.5).

Left out: SEQPACKET (VIRTIO_VSOCK_F_SEQPACKET is not offered). A snapshot keeps no connections: whoever restores it
finds the guest told of a transport reset (5.10.6.7), upon which its sockets are closed.
"""

from __future__ import annotations

import array
import asyncio
import concurrent.futures
import fcntl
import socket
import termios
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vmm.config import VsockConfig
from vmm.devices.virtio.device import Host, VirtioDevice
from vmm.devices.virtio.queue import Chain, Queue, QueueError, Segment
from vmm.devices.virtio.vsock.connection import Connection
from vmm.devices.virtio.vsock.endpoint import VsockError, socket_pair
from vmm.devices.virtio.vsock.packet import F_STREAM, HEADER, RST, RW, TRANSPORT_RESET, Header
from vmm.devices.virtio.vsock.switchboard import Switchboard

RX: Final = 0
TX: Final = 1
EVENT: Final = 2

MAX_REPLIES: Final = 256  #: answers that wait for an rx buffer before tx is left alone

TICK_SECONDS: Final = 0.02

_PACKETS_AT_ONCE: Final = 256
_TURNS_AT_ONCE: Final = 64
_TURN_BYTES: Final = 128 << 10  #: to one connection before the next has its turn
_TURN_RANGES: Final = 512  #: pieces of memory in one read; the host's kernel takes twice as many
_WORD: Final = 8


@dataclass(frozen=True, slots=True)
class VsockStatistics:
    """Counts since the device was made, and how many connections there are now.

    Attributes:
        connections: open, or about to be opened or closed.
        opened: connections that were accepted.
        resets: RST that were sent.
        packets_to_guest: packets with data; their bytes in ``bytes_to_guest``.
        packets_from_guest: packets with data; their bytes in ``bytes_from_guest``.
    """

    connections: int
    opened: int
    resets: int
    packets_to_guest: int
    packets_from_guest: int
    bytes_to_guest: int
    bytes_from_guest: int


class VsockDevice(VirtioDevice):
    """Sockets between host and guest.

    Args:
        config: where the host's unix socket is and what the guest's CID is.

    Raises:
        VsockError: the unix socket cannot be made, or belongs to somebody else.
    """

    DEVICE_ID: ClassVar[int] = 19
    KIND: ClassVar[str] = "vsock"

    def __init__(self, config: VsockConfig) -> None:
        super().__init__(config.name)
        self._cid = config.cid
        self._paused = self._restored = self._reset_due = self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._ticking = self._continuing = False
        self._available = array.array("i", [0])
        self._resets = 0
        self._packets_to_guest = self._packets_from_guest = 0
        self._bytes_to_guest = self._bytes_from_guest = 0
        self._board = Switchboard(config, self._give_to_listener, self._wake)

    @property
    def features(self) -> int:
        return F_STREAM

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return 256, 256, 16

    @property
    def config_space(self) -> bytes:
        return self._cid.to_bytes(8, "little")

    @property
    def statistics(self) -> VsockStatistics:
        """What went through the device so far."""
        with self.lock:
            return VsockStatistics(
                len(self._board),
                self._board.opened,
                self._resets,
                self._packets_to_guest,
                self._packets_from_guest,
                self._bytes_to_guest,
                self._bytes_from_guest,
            )

    # For who shares the process with the VM.

    def dial(self, port: int) -> concurrent.futures.Future[socket.socket]:
        """Connect to a port of the guest, from any thread.

        Returns:
            A future of a blocking stream socket; in asyncio, await ``dialled`` (endpoint.py) of it. It fails with
            :class:`VsockError` when the guest refuses or does not answer; cancelling it gives the connection up.

        Raises:
            VsockError: the guest has no driver yet, or there are too many connections.
        """
        with self.lock:
            if not self.active:
                raise VsockError(f"the guest has no driver for {self.name} yet; try again a little later")
            if self._board.full:
                raise VsockError(
                    f"{self.name} has {len(self._board)} connections, as many as it can have; close some first"
                )
            try:
                own, other = socket_pair()
            except OSError as error:
                raise VsockError(f"the host gives no socket for port {port}: {error.strerror}") from error
            future: concurrent.futures.Future[socket.socket] = concurrent.futures.Future()
            self._board.open(port, own).dialled = future, other
            with self.served():
                self._work()
        return future

    def listen(self, port: int, accept: Callable[[socket.socket], object]) -> None:
        """Give ``accept``, on the event loop's thread, a blocking stream socket for every connection that the guest
        opens to this port of the host. This goes before a unix socket for that port.

        Raises:
            VsockError: somebody listens there already.
        """
        with self.lock:
            if port in self._board.accepters:
                raise VsockError(f"port {port} of {self.name} has a listener already; choose another port")
            self._board.accepters[port] = accept

    def unlisten(self, port: int) -> None:
        """Undo :meth:`listen`; connections that are open stay so."""
        with self.lock:
            self._board.accepters.pop(port, None)

    def _give_to_listener(self, accept: Callable[[socket.socket], object], other: socket.socket) -> None:
        self.host.loop.call_soon_threadsafe(accept, other)

    # The device's life.

    def connect(self, host: Host) -> None:
        super().connect(host)
        host.loop.add_reader(self._board.epoll.fileno(), self._on_sockets)
        self._board.accept()

    def activate(self) -> None:
        self._board.serving = True
        self._reset_due, self._restored = self._restored, False
        self._send_event()

    def deactivate(self) -> None:
        self._board.serving = False
        self._board.drop_all("the guest's driver reset the device")

    def pause(self) -> None:
        self._paused = True
        self._board.stop_clock()

    def resume(self) -> None:
        self._paused = False
        self._board.start_clock()
        if self.active:
            with self.served():
                self._send_event()
                self._work()

    def save_own(self) -> dict[str, Any]:
        return {"next_host_port": self._board.next_host_port}

    def restore_own(self, own: Mapping[str, Any]) -> None:
        self._restored = True
        self._board.next_host_port = own["next_host_port"]

    def close(self) -> None:
        with self.lock:
            if self._closed:
                return
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            if self._host is not None and not self._host.loop.is_closed():
                self._host.loop.remove_reader(self._board.epoll.fileno())
            self._board.close()

    # What the event loop calls.

    def _on_sockets(self) -> None:
        with self.served():
            if not self._closed:
                self._board.poll()
                self._work()

    def _wake(self) -> None:
        if not self._ticking and self._host is not None:
            self._ticking = True
            self._host.loop.call_soon_threadsafe(self._set_timer)

    def _set_timer(self) -> None:
        with self.served():
            if not self._closed:
                self._timer = self.host.loop.call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        with self.served():
            if not self._closed:
                self._ticking = False
                if self._board.tick():
                    self._wake()
                self._work()

    def _continue_later(self) -> None:
        if not self._continuing:
            self._continuing = True
            self.host.loop.call_soon_threadsafe(self._continue)

    def _continue(self) -> None:
        with self.served():
            self._continuing = False
            self._work()

    # Work: from the guest, to the guest.

    def notify(self, queue: Queue, index: int) -> None:
        if index == EVENT:
            self._send_event()
        else:
            self._work()

    def _send_event(self) -> None:
        """Tell the guest of the transport reset, once it has a buffer for that (5.10.6.7)."""
        events = self.queues[EVENT]
        if not self._reset_due or self._paused:
            return
        chain = events.pop()
        if chain is None and events.rearm():
            chain = events.pop()
        if chain is not None:
            self._reset_due = False
            events.push(chain, chain.write(TRANSPORT_RESET))
            events.signal()

    def _work(self) -> None:
        """Take what the guest has sent, send what waits for it; what is too much for one call goes on later."""
        if self.active and not self._paused:
            more = self._take_packets()
            if self._fill() or (more and len(self._board.replies) < MAX_REPLIES):
                self._continue_later()

    def _take_packets(self) -> bool:
        """Take packets of the guest; True if some may be left."""
        tx, board = self.queues[TX], self._board
        try:
            for _ in range(_PACKETS_AT_ONCE):
                if len(board.replies) >= MAX_REPLIES:
                    break
                chain = tx.pop()
                if chain is None:
                    if not tx.rearm():
                        return False
                    continue
                self._take(chain)
                tx.push(chain, 0)
            return True
        finally:
            tx.signal()

    def _take(self, chain: Chain) -> None:
        if chain.readable_bytes < HEADER.size or chain.writable_bytes:
            raise QueueError(
                f"a packet to {self.name} has {chain.readable_bytes} bytes to read and {chain.writable_bytes} to write,"
                f" it needs a header of {HEADER.size} and none to write"
            )
        address, first = chain.readable[0]
        whole = first >= HEADER.size
        header = Header.unpack(self.host.memory.view(address, HEADER.size) if whole else chain.read(0, HEADER.size))
        if self.queues[TX].tracing:
            chain.detail = header.describe()
        if header.op == RW:
            self._packets_from_guest += 1
            self._bytes_from_guest += header.length

        def payload(length: int) -> Sequence[memoryview]:
            return chain.readable_views(HEADER.size, length)

        self._board.receive(header, payload)

    def _fill(self) -> bool:
        """Send to the guest what waits for it, as far as it has buffers; True if this was too much for one call."""
        replies, ready = self._board.replies, self._board.ready
        try:
            for _ in range(_TURNS_AT_ONCE):
                while replies:
                    if not self._send(replies[0]):
                        return False
                    replies.popleft()
                if not ready:
                    return False
                connection = next(iter(ready))
                if not self._serve(connection):
                    return False
                if connection.wanted or connection.has_data:
                    ready.move_to_end(connection)
                else:
                    ready.pop(connection, None)
                    self._board.arm(connection)
            return True
        finally:
            self.queues[RX].signal()

    def _take_buffer(self) -> Chain | None:
        rx = self.queues[RX]
        chain = rx.pop()
        if chain is None and rx.rearm():
            chain = rx.pop()
        if chain is not None and (chain.readable_bytes or chain.writable_bytes <= HEADER.size):
            raise QueueError(
                f"a buffer for packets of {self.name} has {chain.writable_bytes} bytes to write and"
                f" {chain.readable_bytes} to read, it needs more than a header's {HEADER.size} and none to read"
            )
        return chain

    def _send(self, header: Header) -> bool:
        """Send a packet without data; False if the guest has no buffer for it."""
        chain = self._take_buffer()
        if chain is None:
            return False
        if header.op == RST:
            self._resets += 1
        rx = self.queues[RX]
        if rx.tracing:
            chain.detail = header.describe()
        rx.push(chain, chain.write(header.pack()))
        return True

    def _serve(self, connection: Connection) -> bool:
        """A connection's turn; False if the guest has no buffer left."""
        while connection.wanted:
            bit = connection.wanted & -connection.wanted
            if not self._send(connection.packet(bit.bit_length() - 1)):
                return False
            connection.wanted ^= bit
        return not connection.has_data or self._deliver(connection)

    def _deliver(self, connection: Connection) -> bool:
        """Read the host's socket straight into buffers of the guest; False if there are none."""
        rx = self.queues[RX]
        fcntl.ioctl(connection.host, termios.FIONREAD, self._available)
        available = self._available[0]
        # Where there seems to be nothing, a read tells whether that is the end.
        wanted = min(available or 1, connection.credit, _TURN_BYTES)
        parts, ranges = self._collect(wanted, connection.sent)
        if not parts:
            return False
        try:
            length = connection.host.recvmsg_into(self.host.memory.views(ranges))[0]
        except BlockingIOError:
            rx.rewind(len(parts))
            connection.readable = False
        except OSError:
            rx.rewind(len(parts))
            self._board.reset(connection)
        else:
            if length:
                self._push(connection, parts, length)
                # What was there has been read: the epoll set tells of more.
                connection.readable = length < available
            else:
                rx.rewind(len(parts))
                self._board.host_ended(connection)
        return True

    def _collect(self, wanted: int, position: int) -> tuple[list[tuple[Chain, int]], list[Segment]]:
        """Take buffers for ``wanted`` bytes, which begin at ``position`` in their stream.

        Returns:
            Each buffer with the bytes that shall go into it, and where in guest memory those are.
        """
        parts: list[tuple[Chain, int]] = []
        ranges: list[Segment] = []
        room = 0
        while room < wanted and len(ranges) < _TURN_RANGES:
            chain = self._take_buffer()
            if chain is None:
                break
            segments = chain.writable
            if len(segments) == 1:
                address, size = segments[0][0] + HEADER.size, segments[0][1] - HEADER.size
                # A program that reads into aligned memory is served by a copy of aligned words, twice as fast as the
                # other one, if what lies behind a header of 44 bytes has a place in the stream that is as odd.
                if size > _WORD:
                    size -= position + room + size - HEADER.size & _WORD - 1
                size = size if size < wanted - room else wanted - room
                ranges.append((address, size))
            else:
                behind = _behind_header(segments, wanted - room)
                size = sum(length for _, length in behind)
                ranges += behind
            parts.append((chain, size))
            room += size
        return parts, ranges

    def _push(self, connection: Connection, parts: Sequence[tuple[Chain, int]], length: int) -> None:
        """Give the guest the buffers that were filled, each with its header, and keep the others."""
        rx, view = self.queues[RX], self.host.memory.view
        self._bytes_to_guest += length
        connection.sent_payload(length)
        packed, packed_size = b"", 0
        number = 0
        for chain, room in parts:
            size = room if room < length else length
            if size != packed_size:
                packed, packed_size = connection.packet(RW, size).pack(), size
            address, first = chain.writable[0]
            if first >= HEADER.size:
                view(address, HEADER.size)[:] = packed
            else:
                chain.write(packed)
            if rx.tracing:
                chain.detail = Header.unpack(packed).describe()
            rx.push(chain, HEADER.size + size)
            number += 1
            length -= size
            if not length:
                break
        if number < len(parts):
            rx.rewind(len(parts) - number)
        self._packets_to_guest += number


def _behind_header(segments: Sequence[Segment], wanted: int) -> list[Segment]:
    """What follows a header in a buffer of several segments, as far as it is wanted and one read of the host goes."""
    behind: list[Segment] = []
    header = HEADER.size
    for address, length in segments:
        skipped = min(header, length)
        header -= skipped
        taken = min(length - skipped, wanted)
        if taken and len(behind) < _TURN_RANGES:
            behind.append((address + skipped, taken))
            wanted -= taken
    return behind
