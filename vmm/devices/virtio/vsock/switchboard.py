"""The connections of a socket device: how they are opened, used from the host's side, and closed.

Nothing here touches queues or guest memory but for the payload of a packet that is being taken. What shall go to the
guest is left in :attr:`Switchboard.replies` (answers that belong to no connection) and :attr:`Switchboard.ready`
(connections that have packets or data for it); the device sends both when the guest has buffers.

The host's sockets are in one epoll set. Each is armed for one event at a time, and only while there is a use for it:
not for reading while the guest has no credit, so that a fast sender wakes nobody.

What a guest can make the host keep is bounded: connections are counted, each has its credit (:mod:`.connection`), and a
connection that is dropped takes everything with it. Peers that never answer are bounded in time: clients that do not
say to which port they want, guests that do not answer a request or a shutdown, listeners of the host with a full
backlog, and readers of the host that leave the last bytes of a guest unread.
"""

from __future__ import annotations

import resource
import select
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

from vmm.config import VsockConfig
from vmm.devices.virtio.vsock.connection import DISARMED, Connection, Key, State, next_credit
from vmm.devices.virtio.vsock.endpoint import (
    GreetingError,
    Listener,
    VsockError,
    dial_host,
    enlarge,
    read_greeting,
    socket_pair,
)
from vmm.devices.virtio.vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HOST_CID,
    NEITHER,
    NO_RECEIVE,
    NO_SEND,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    STREAM,
    Header,
)

MAX_CONNECTIONS: Final = 4096  #: but not more than half of the files that the process may open
MAX_GREETINGS: Final = 128  #: clients that have not said yet to which port they want

GREETING_SECONDS: Final = 5.0
CONNECT_SECONDS: Final = 10.0  #: for the guest to answer
DIAL_SECONDS: Final = 2.0  #: for a host's listener with a full backlog; Linux guests give up after as long
CLOSE_SECONDS: Final = 10.0  #: for the guest's RST after the host has closed; Linux gives 8
FLUSH_SECONDS: Final = 30.0  #: for the host to read the last bytes of a guest that has closed

FIRST_HOST_PORT: Final = 1 << 30  #: of connections that the host opens
LAST_HOST_PORT: Final = (1 << 31) - 1

_EVENTS_AT_ONCE: Final = 256
_GONE: Final = select.EPOLLHUP | select.EPOLLERR

Accept = Callable[[socket.socket], object]
Payload = Callable[[int], Sequence[memoryview]]


class Switchboard:
    """The connections of one device. Whoever calls holds the device's lock.

    Args:
        config: where the unix socket is and what the guest's CID is.
        deliver: called with what a Python listener accepts and a socket for it; it calls the listener elsewhere.
        wake: called when :meth:`tick` shall be called soon, and again until it says that it needs not.

    Raises:
        VsockError: the unix socket cannot be made, or belongs to somebody else.
    """

    def __init__(
        self, config: VsockConfig, deliver: Callable[[Accept, socket.socket], None], wake: Callable[[], None]
    ) -> None:
        self._cid = config.cid
        self._path = config.socket
        self._deliver = deliver
        self._wake = wake
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)
        self.accepters: dict[int, Accept] = {}
        #: Answers without a connection, for the guest.
        self.replies: deque[Header] = deque()
        #: Connections that have something for the guest, in the order of their turns.
        self.ready: OrderedDict[Connection, None] = OrderedDict()
        self.opened = 0
        #: Connections that packets can name, and those that their guest has closed.
        self._connections: dict[Key, Connection] = {}
        self._flushing: set[Connection] = set()
        #: Requests of the guest that wait for room in a listener's backlog, and until when.
        self._dialling: dict[Key, tuple[Header, float]] = {}
        self._greetings: dict[int, tuple[socket.socket, float]] = {}
        self._watched: dict[int, Connection] = {}
        self._timed: set[Connection] = set()
        self._granted = 0
        #: That of the next connection that the host opens. It goes on from where a saved device was: the guest's
        #: programs may keep a dead socket, whose two ports the guest's kernel then refuses.
        self.next_host_port = FIRST_HOST_PORT
        self._stood_still = 0.0
        self._stopped_at: float | None = None
        self._accepting = False
        #: Whether the guest has a driver: clients are turned away while it has none.
        self.serving = False
        self.epoll = select.epoll()
        try:
            self._listener = Listener(config.socket) if config.socket is not None else None
        except BaseException:
            self.epoll.close()
            raise
        if self._listener is not None:
            self.epoll.register(self._listener.socket, 0)

    def __len__(self) -> int:
        """Connections, open or about to be opened or closed."""
        return len(self._connections) + len(self._flushing) + len(self._dialling)

    @property
    def full(self) -> bool:
        """There are as many connections as there may be."""
        return len(self) >= self.limit

    def close(self) -> None:
        """Close every socket and remove the unix socket; a second time nothing happens."""
        self.drop_all("the VM has ended")
        for client, _ in self._greetings.values():
            client.close()
        self._greetings.clear()
        if self._listener is not None:
            self._listener.close()
        self.epoll.close()

    # Time, which stands still while the VM is paused.

    def stop_clock(self) -> None:
        """The guest cannot answer from now on."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()

    def start_clock(self) -> None:
        """Undo :meth:`stop_clock`."""
        if self._stopped_at is not None:
            self._stood_still += time.monotonic() - self._stopped_at
            self._stopped_at = None

    def _now(self) -> float:
        now = time.monotonic() if self._stopped_at is None else self._stopped_at
        return now - self._stood_still

    def _limit_time(self, connection: Connection, seconds: float) -> None:
        connection.deadline = self._now() + seconds
        self._timed.add(connection)
        self._wake()

    def tick(self) -> bool:
        """Give up on those whose time is over, dial again; True if there is more to wait for."""
        now = self._now()
        for connection in [each for each in self._timed if each.deadline <= now]:
            if connection.state is State.FLUSHING:
                self._drop(connection)
            else:
                self.reset(connection, f"the guest did not answer within {CONNECT_SECONDS:g} seconds")
        for descriptor in [number for number, (_, until) in self._greetings.items() if until <= now]:
            self._dismiss(descriptor)
        full: set[int] = set()
        for key, (request, until) in list(self._dialling.items()):
            if request.dst_port not in full or until <= now:
                if self._dial_host(request, patient=now < until):
                    del self._dialling[key]
                else:
                    full.add(request.dst_port)
        self.accept()
        return bool(self._timed or self._greetings or self._dialling or not self._accepting)

    # Packets of the guest.

    def receive(self, header: Header, payload: Payload) -> None:
        """A packet came; ``payload(length)`` is what follows its header, fewer bytes where there are fewer."""
        if header.src_cid != self._cid or header.dst_cid != HOST_CID:
            return
        op = header.op
        if header.type != STREAM:
            if op != RST:
                self.replies.append(header.reset())
            return
        connection = self._connections.get((header.src_port, header.dst_port))
        if connection is None:
            self._receive_unknown(header)
            return
        connection.hear(header)
        if op == RW:
            self._receive_data(connection, header, payload)
        elif op == CREDIT_UPDATE:
            pass
        elif op == CREDIT_REQUEST:
            self.want(connection, CREDIT_UPDATE)
        elif op == SHUTDOWN and connection.state is not State.REQUESTED:
            self._receive_shutdown(connection, header)
        elif op == RESPONSE and connection.state is State.REQUESTED:
            self._establish(connection)
        elif op == RST:
            self._drop(connection, f"nobody in the guest listens on vsock port {connection.guest_port}")
        else:
            self.reset(connection, f"the guest sent operation {op} where it makes no sense")
        if connection.has_data:
            self.ready[connection] = None

    def _receive_unknown(self, header: Header) -> None:
        waited = self._dialling.pop((header.src_port, header.dst_port), None)
        if header.op == REQUEST and waited is None and not self.full:
            if not self._dial_host(header, patient=True):
                self._dialling[header.src_port, header.dst_port] = header, self._now() + DIAL_SECONDS
                self._wake()
        elif header.op != RST:
            self.replies.append(header.reset())

    def _receive_data(self, connection: Connection, header: Header, payload: Payload) -> None:
        state = connection.state
        if state is State.CLOSING:
            return
        views = payload(header.length)
        whole = sum(map(len, views)) == header.length
        # 5.10.6.3.1: the driver sends no more than we have room for; 5.10.6.6: nothing after it said so.
        if state is not State.ESTABLISHED or connection.guest_shutdown & NO_SEND or not whole:
            self.reset(connection, "the guest broke the rules of vsock")
        elif not connection.admits(header.length):
            self.reset(connection, "the guest sent more than it had credit for")
        elif not connection.shutdown_flags & NO_RECEIVE:
            try:
                connection.write(views)
            except OSError:
                self._stop_writing(connection)
            self._written(connection)

    def _receive_shutdown(self, connection: Connection, header: Header) -> None:
        connection.guest_shutdown |= header.flags & NEITHER
        if connection.guest_shutdown != NEITHER:
            if connection.state is State.ESTABLISHED:
                connection.obey_shutdown()
                self.arm(connection)
            return
        # 5.10.6.6: RST tells the guest that its ports are free; the host may take its time to read what was sent.
        self.replies.append(header.reset())
        if connection.state is State.ESTABLISHED and connection.outgoing:
            self._forget(connection)
            connection.state = State.FLUSHING
            self._flushing.add(connection)
            self._limit_time(connection, FLUSH_SECONDS)
            self.arm(connection)
        else:
            self._drop(connection)

    def _establish(self, connection: Connection) -> None:
        """The guest has accepted what the host opened."""
        connection.state = State.ESTABLISHED
        self._timed.discard(connection)
        self.opened += 1
        if connection.greeting:
            try:
                connection.host.send(b"OK %d\n" % connection.host_port, socket.MSG_NOSIGNAL)
            except OSError:
                self.reset(connection)
                return
        if connection.dialled is not None:
            (future, other), connection.dialled = connection.dialled, None
            if future.set_running_or_notify_cancel():
                future.set_result(other)
            else:
                other.close()
        connection.readable = True
        self.ready[connection] = None

    # What goes to the guest.

    def want(self, connection: Connection, op: int) -> None:
        """A packet of that operation shall go to the guest."""
        connection.wanted |= 1 << op
        self.ready[connection] = None

    def reset(self, connection: Connection, reason: str = "") -> None:
        """Drop the connection and tell the guest, if it knows of it."""
        if not connection.wanted & 1 << REQUEST:
            self.replies.append(connection.packet(RST))
        self._drop(connection, reason)

    def host_ended(self, connection: Connection) -> None:
        """Everything that the host has sent was read; nothing more will come."""
        connection.readable = False
        self._tell_shutdown(connection, NEITHER if connection.hung_up else NO_SEND)

    def _tell_shutdown(self, connection: Connection, flags: int) -> None:
        connection.shutdown_flags |= flags
        self.want(connection, SHUTDOWN)
        if connection.shutdown_flags == NEITHER:
            connection.state = State.CLOSING
            self._unwatch(connection)
            connection.outgoing.clear()
            connection.host.close()
            self._limit_time(connection, CLOSE_SECONDS)
        else:
            self.arm(connection)

    def _stop_writing(self, connection: Connection) -> None:
        """The host's end does not read any more: what was kept for it has nowhere to go."""
        connection.outgoing.clear()
        if connection.state is State.ESTABLISHED:
            self._tell_shutdown(connection, NO_RECEIVE)

    def _written(self, connection: Connection) -> None:
        """After bytes of the guest were written to the host's socket."""
        if connection.state is State.FLUSHING:
            if not connection.outgoing:
                self._drop(connection)
                return
        elif connection.state is State.ESTABLISHED:
            if connection.guest_shutdown:
                connection.obey_shutdown()
            if connection.owes_credit:
                self.want(connection, CREDIT_UPDATE)
        self.arm(connection)

    # The host's sockets.

    def arm(self, connection: Connection) -> None:
        """Have the epoll set report what the connection waits for."""
        events = connection.events
        if events is None or (connection.armed != DISARMED and not events & ~connection.armed):
            return
        connection.armed = events
        self.epoll.modify(connection.host, events | select.EPOLLONESHOT)

    def poll(self) -> None:
        """Look after the host's sockets that the epoll set reports."""
        for descriptor, events in self.epoll.poll(0, _EVENTS_AT_ONCE):
            connection = self._watched.get(descriptor)
            if connection is not None:
                connection.armed = DISARMED
                self._serve(connection, events)
            elif descriptor in self._greetings:
                self._greet(descriptor)
            else:
                self._accepting = False
                self.accept()

    def _serve(self, connection: Connection, events: int) -> None:
        # An event may be one of a descriptor's former owner: what it says is only a reason to look.
        if connection.outgoing:
            try:
                connection.flush()
            except OSError:
                self._stop_writing(connection)
            self._written(connection)
        if connection.reads:
            connection.readable = True
            if connection.has_data:
                self.ready[connection] = None
        elif events & _GONE and connection.host.fileno() >= 0 and connection.hung_up:
            if connection.state is State.REQUESTED:
                self.reset(connection)
            elif connection.state is State.ESTABLISHED:
                self._tell_shutdown(connection, NEITHER)
        self.arm(connection)

    def accept(self) -> None:
        """Accept those who connect to the unix socket, until too many of them have not said what they want."""
        if self._listener is None:
            self._accepting = True
            return
        if self._accepting:
            return
        while len(self._greetings) < MAX_GREETINGS:
            try:
                client = self._listener.accept()
            except OSError:
                break
            if client is None:
                self._accepting = True
                self.epoll.modify(self._listener.socket, select.EPOLLIN | select.EPOLLONESHOT)
                return
            self._greetings[client.fileno()] = client, self._now() + GREETING_SECONDS
            # Edge-triggered: half a line must not be reported again and again.
            self.epoll.register(client, select.EPOLLIN | select.EPOLLET)
            self._greet(client.fileno())
        self._wake()

    def _greet(self, descriptor: int) -> None:
        client, _ = self._greetings[descriptor]
        try:
            port = read_greeting(client)
        except GreetingError:
            self._dismiss(descriptor)
            return
        if port is None:
            self._wake()
            return
        if self.full or not self.serving:
            self._dismiss(descriptor)
            return
        del self._greetings[descriptor]
        self.epoll.unregister(client)
        enlarge(client)
        self.open(port, client).greeting = True

    def _dismiss(self, descriptor: int) -> None:
        client, _ = self._greetings.pop(descriptor)
        self.epoll.unregister(client)
        client.close()

    # Opening and closing.

    def open(self, port: int, host: socket.socket) -> Connection:
        """Ask the guest to connect ``host`` to one of its ports; the socket belongs to the connection from now on."""
        while (port, self.next_host_port) in self._connections:
            self.next_host_port += 1
        host_port = self.next_host_port
        self.next_host_port = host_port + 1 if host_port < LAST_HOST_PORT else FIRST_HOST_PORT
        connection = self._add(State.REQUESTED, host, port, host_port)
        self.want(connection, REQUEST)
        self._limit_time(connection, CONNECT_SECONDS)
        self.arm(connection)
        return connection

    def _dial_host(self, request: Header, *, patient: bool) -> bool:
        """The guest wants to reach a port of the host; False if there is somebody, and a patient caller may wait."""
        port = request.dst_port
        accepter, other = self.accepters.get(port), None
        try:
            if accepter is not None:
                host, other = socket_pair()
            elif self._path is not None:
                host = dial_host(self._path, port)
            else:
                raise ConnectionRefusedError
        except BlockingIOError:
            if not patient:
                self.replies.append(request.reset())
            return not patient
        except OSError:
            self.replies.append(request.reset())
            return True
        connection = self._add(State.ESTABLISHED, host, request.src_port, port)
        connection.hear(request)
        self.opened += 1
        self.want(connection, RESPONSE)
        self.arm(connection)
        if accepter is not None and other is not None:
            self._deliver(accepter, other)
        return True

    def _add(self, state: State, host: socket.socket, guest_port: int, host_port: int) -> Connection:
        connection = Connection(state, host, self._cid, guest_port, host_port, next_credit(self._granted))
        self._granted += connection.buf_alloc
        self._connections[connection.key] = connection
        self._watched[host.fileno()] = connection
        self.epoll.register(host, select.EPOLLONESHOT)
        connection.armed = 0
        return connection

    def _forget(self, connection: Connection) -> None:
        """Packets do not name the connection any more, and none is sent for it."""
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
        self.ready.pop(connection, None)
        self._timed.discard(connection)

    def _unwatch(self, connection: Connection) -> None:
        if self._watched.pop(connection.host.fileno(), None) is not None:
            self.epoll.unregister(connection.host)

    def _drop(self, connection: Connection, reason: str = "") -> None:
        if connection.state is State.CLOSED:
            return
        connection.state = State.CLOSED
        self._forget(connection)
        self._flushing.discard(connection)
        self._granted -= connection.buf_alloc
        self._unwatch(connection)
        connection.outgoing.clear()
        connection.host.close()
        if connection.dialled is not None:
            (future, other), connection.dialled = connection.dialled, None
            other.close()
            if future.set_running_or_notify_cancel():
                future.set_exception(VsockError(f"port {connection.guest_port} was not reached: {reason}"))

    def drop_all(self, reason: str) -> None:
        """Drop all connections without telling the guest."""
        for connection in [*self._connections.values(), *self._flushing]:
            self._drop(connection, reason)
        self._dialling.clear()
        self.replies.clear()
