"""Consoles and ports (virtio 1.2, section 5.3): byte streams between the guest and sockets of the host.

Port 0 is a console, ``/dev/hvc0``; the others are ``/dev/vport<n>p<m>``, whose names the guest finds in
``/sys/class/virtio-ports/*/name``. The queues are::

    0 receive of port 0    2 control to the driver      4 receive of port 1    6 receive of port 2 …
    1 transmit of port 0   3 control from the driver    5 transmit of port 1   7 transmit of port 2 …

How a port comes to be (5.3.5, 5.3.6.3)::

    driver                                     device
    DEVICE_READY ────────────────────────────►
                 ◄──────────────────────────── PORT_ADD, for each port
    PORT_READY, for each port ───────────────►
                 ◄──────────────────────────── CONSOLE_PORT and RESIZE (port 0), PORT_NAME, PORT_OPEN
    PORT_OPEN, when a program opens it ──────►

The host's end of a port is one stream socket at a time: a client of the port's unix socket, or one half of a pair that
:meth:`Port.connect` hands out. Each end is told when the other one comes and goes.

Nothing is lost on a port that has both ends open: a client that does not read stops the guest's writer, and a guest
that does not read stops the client. While no client is there, Linux lets no program write; what comes all the same is
dropped. What a client sends before a program has opened the port waits in the socket. A console is different, since
Linux spins with a lock held until its buffer is back: it never waits, and of what no client has taken the last 64 KiB
are kept for the one that comes.

RESIZE holds columns, then rows, as the specification and Debian 13 have it; older kernels read them the other way.

Left out: VIRTIO_CONSOLE_F_EMERG_WRITE, and adding and removing ports of a running device.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from vmm.config import PortsConfig
from vmm.devices.virtio.device import Host, VirtioDevice
from vmm.devices.virtio.queue import Chain, Queue, QueueError
from vmm.errors import ConfigError, StateError

SIZE: Final = 1 << 0  #: VIRTIO_CONSOLE_F_SIZE
MULTIPORT: Final = 1 << 1

# Events of control messages (5.3.6.2).
DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY = 0, 1, 2, 3
CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 4, 5, 6, 7

CONTROL: Final = struct.Struct("<IHH")  #: port, event, value
_WINDOW: Final = struct.Struct("<HH")  # columns, rows
_SPACE: Final = struct.Struct("<HHII")  # columns, rows, max_nr_ports, emerg_wr

CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
BACKLOG: Final = 1 << 16  #: bytes of console output that are kept for a client
_AT_ONCE: Final = 1 << 18  # bytes read from a client before the loop does something else
_RETRY_SECONDS: Final = 1.0  # when the host has no descriptor left for a client
_SEND: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Port:
    """One port, from the host's side. Made by :class:`PortsDevice`, whose lock guards it."""

    def __init__(self, device: PortsDevice, number: int, name: str, path: Path | None) -> None:
        self.number = number
        self.name = name
        self.path = path
        self.is_console = number == 0
        #: The driver knows the port.
        self.ready = False
        #: A program in the guest has it open; of a console, the driver has it.
        self.guest_open = False
        #: Bytes that came from the guest, whoever took them.
        self.bytes_from_guest = 0
        #: Bytes that the guest was given.
        self.bytes_to_guest = 0
        self._device = device
        self._changed = threading.Condition(device.lock)
        self._client: socket.socket | None = None
        self._leaving: list[socket.socket] = []  # no longer clients, closed on the loop's thread
        self._told = False  # the guest believes that there is a client
        self._sent = 0  # bytes of the guest's next buffer that the client has got already
        self._blocked = False  # the client takes no more at present
        self._starved = False  # the guest has no buffer to fill
        self._backlog = bytearray()
        self._reading = self._writing = self._arranging = False  # what the event loop does
        self._listener = _listen(path, name) if path is not None else None
        self._inode = os.stat(path).st_ino if path is not None else 0

    @property
    def host_open(self) -> bool:
        """Whether a client is there."""
        return self._client is not None

    def connect(self) -> socket.socket:
        """Become the port's client: a blocking stream socket, which its owner closes. From any thread.

        Raises:
            StateError: there is a client already, or the VM has ended.
        """
        ours, given = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._device.lock:
                if self._device.closed:
                    raise StateError(f"port {self.name!r} of {self._device.name} is closed, since its VM has ended")
                if not self._attach(ours):
                    raise StateError(f"port {self.name!r} of {self._device.name} has a client already, it takes one")
        except StateError:
            ours.close()
            given.close()
            raise
        return given

    def wait_for_guest(self, is_open: bool = True, timeout: float = 10.0) -> bool:
        """Wait until a program in the guest has the port open (or, not ``is_open``, has closed it); False if
        ``timeout`` seconds pass first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.guest_open == is_open, timeout)

    # For the device, which holds the lock.

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Accept clients; on the loop's thread."""
        if self._listener is not None:
            loop.add_reader(self._listener, self._accept, loop)

    def set_guest_open(self, is_open: bool) -> None:
        """The driver says whether a program has the port open."""
        self.guest_open = is_open
        self._changed.notify_all()
        self._watch()

    def forget_guest(self) -> None:
        """The driver has gone; a client stays."""
        self.ready = self._told = self._blocked = self._starved = False
        self._sent = 0
        self.set_guest_open(False)

    def settle(self) -> None:
        """Go on after whatever may have changed: tell the guest of the client, move what can be moved."""
        self._starved = self._blocked = False
        self.tell_open()
        self.transmit()
        self._watch()

    def tell_open(self, always: bool = False) -> None:
        """Tell the guest whether there is a client (a console always has one), if it does not know that yet."""
        is_open = self._client is not None or self.is_console
        if self.ready and (always or is_open != self._told):
            self._told = is_open
            self._device.tell(self.number, PORT_OPEN, int(is_open))

    def transmit(self) -> None:
        """Pass on what the guest wrote, as far as the client takes it."""
        if self._blocked or not self._device.running:
            return
        queue = self._device.queues[_first_queue(self.number) + 1]
        for chain in queue.chains():
            if chain.writable_bytes:
                raise QueueError(f"a buffer to send of {self._device.name} must have no parts to write")
            if self.is_console:
                self._print(chain)
            elif not self._send(chain):
                queue.rewind()
                break
            chain.detail = f"{chain.readable_bytes} bytes from port {self.number}"
            self.bytes_from_guest += chain.readable_bytes
            queue.push(chain, 0)
        queue.signal()

    def buffers_added(self) -> None:
        """The guest has buffers to fill again."""
        if self._starved:
            self._starved = False
            self._receive()

    def save(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "ready": self.ready,
            "guest_open": self.guest_open,
            "told": self._told,
            "sent": self._sent,
            "backlog": bytes(self._backlog),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`save` saw, but for the client: who is there now is the client."""
        self.ready, self.guest_open, self._told = (bool(state[name]) for name in ("ready", "guest_open", "told"))
        self._sent = int(state["sent"])
        self._backlog = bytearray(state["backlog"])

    def close(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Let the client go and remove the socket; on the loop's thread, if there is one."""
        self._detach()
        self._arrange(loop)
        if self._listener is not None and self.path is not None:
            if loop is not None:
                loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            # Whoever put something else there keeps it.
            with contextlib.suppress(OSError):
                if os.lstat(self.path).st_ino == self._inode:
                    self.path.unlink()

    # The client comes and goes.

    def _accept(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._device.served():
            if self._listener is None:
                return
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # Out of descriptors, say: the listener would be readable again at once.
                loop.remove_reader(self._listener)
                loop.call_later(_RETRY_SECONDS, self.listen, loop)
                return
            if not self._attach(client):
                client.close()

    def _attach(self, client: socket.socket) -> bool:
        if self._client is not None:
            if not _hung_up(self._client):
                return False
            self._detach()
            with self._device.served():
                self.transmit()
        client.setblocking(False)
        self._client = client
        self._send_backlog()
        with self._device.served():
            self.tell_open()
        self._watch()
        return True

    def _detach(self) -> None:
        """Let the client go, which sees the end of the stream. Whoever calls this goes on to :meth:`transmit`."""
        if self._client is None:
            return
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        self._leaving.append(self._client)
        self._client = None
        self._reading = self._writing = self._blocked = False
        self._sent = 0
        if self._device.running:
            self.tell_open()
        self._watch()

    # Guest to host.

    def _send(self, chain: Chain) -> bool:
        """Whether the client has the whole buffer, or has gone."""
        while self._client is not None and self._sent < chain.readable_bytes:
            try:
                self._sent += self._client.sendmsg(chain.readable_views(self._sent), (), _SEND)
            except BlockingIOError:
                self._blocked = True
                self._watch()
                return False
            except OSError:
                self._detach()
        self._sent = 0
        return True

    def _print(self, chain: Chain) -> None:
        """Console output: to the client what it takes at once, the rest behind the backlog."""
        sent, size = 0, chain.readable_bytes
        if self._client is not None and not self._backlog:
            try:
                sent = self._client.sendmsg(chain.readable_views(), (), _SEND)
            except BlockingIOError:
                pass
            except OSError:
                self._detach()
        if sent < size:
            self._backlog += chain.read(max(sent, size - BACKLOG))
            del self._backlog[:-BACKLOG]
            self._watch()

    def _send_backlog(self) -> None:
        if self._client is None or not self._backlog:
            return
        try:
            del self._backlog[: self._client.send(self._backlog, _SEND)]
        except BlockingIOError:
            pass
        except OSError:
            self._detach()

    def _on_writable(self) -> None:
        with self._device.served():
            self._blocked = False
            self._send_backlog()
            self.transmit()
            self._watch()

    # Host to guest.

    def _receive(self) -> None:
        """Fill the guest's buffers with what the client sent."""
        queue = self._device.queues[_first_queue(self.number)]
        received = 0
        while received < _AT_ONCE and self._wants_input():
            chain = queue.pop()
            if chain is None:
                self._starved = not queue.rearm()
                continue
            length = self._fill(queue, chain)
            if not length:
                break
            received += length
        self.bytes_to_guest += received
        queue.signal()
        self._watch()

    def _fill(self, queue: Queue, chain: Chain) -> int:
        """Fill one buffer and give it back; 0, and it is put back, if the client has sent nothing or has gone."""
        if chain.readable_bytes or self._client is None:
            raise QueueError(f"a buffer to fill of {self._device.name} must have no parts to read")
        try:
            length = self._client.recvmsg_into(chain.writable_views(), 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            queue.rewind()
            return 0
        except OSError:
            length = 0
        if length:
            chain.detail = f"{length} bytes to port {self.number}"
            queue.push(chain, length)
        else:
            queue.rewind()
            self._detach()
            self.transmit()
        return length

    def _on_readable(self) -> None:
        with self._device.served():
            if self._wants_input():
                self._receive()
            else:
                self._watch()

    # The event loop's part: it watches the client for what is of use just now.

    def _wants_input(self) -> bool:
        # Linux throws away what comes for a port that no program has open.
        return (
            self._client is not None
            and self._device.running
            and self.ready
            and not self._starved
            and (self.guest_open or self.is_console)
        )

    def _wants_output(self) -> bool:
        return self._client is not None and (bool(self._backlog) or (self._blocked and self._device.running))

    def _watch(self) -> None:
        loop = self._device.loop
        wanted = (self._wants_input(), self._wants_output())
        if loop is None or (wanted == (self._reading, self._writing) and not self._leaving):
            return
        if threading.get_ident() == self._device.loop_thread:
            self._arrange(loop)
        elif not self._arranging:
            self._arranging = True
            loop.call_soon_threadsafe(self._arrange, loop)

    def _arrange(self, loop: asyncio.AbstractEventLoop | None) -> None:
        with self._device.lock:
            self._arranging = False
            for each in self._leaving:
                if loop is not None:
                    loop.remove_reader(each)
                    loop.remove_writer(each)
                each.close()
            self._leaving.clear()
            if self._client is None or loop is None:
                return
            reading, writing = self._wants_input(), self._wants_output()
            if reading != self._reading:
                self._reading = reading
                if reading:
                    loop.add_reader(self._client, self._on_readable)
                else:
                    loop.remove_reader(self._client)
            if writing != self._writing:
                self._writing = writing
                if writing:
                    loop.add_writer(self._client, self._on_writable)
                else:
                    loop.remove_writer(self._client)


class PortsDevice(VirtioDevice):
    """A console and named ports.

    Raises:
        ConfigError: a socket cannot be made where the configuration wants it.
    """

    DEVICE_ID: ClassVar[int] = 3
    KIND: ClassVar[str] = "console"

    def __init__(self, config: PortsConfig) -> None:
        super().__init__(config.name)
        self._columns, self._rows = config.columns, config.rows
        #: The VM's event loop, and its thread; None before the device is part of a VM, and after.
        self.loop: asyncio.AbstractEventLoop | None = None
        self.loop_thread = 0
        self.closed = False
        self._paused = False
        # Messages that the driver has not taken, the last one of each kind: port and event → message.
        self._pending: dict[tuple[int, int], bytes] = {}
        self.ports: tuple[Port, ...] = ()
        with contextlib.ExitStack() as made:
            for number, (name, path) in enumerate(config.ports.items()):
                port = Port(self, number, name, path)
                made.callback(port.close, None)
                self.ports += (port,)
            made.pop_all()

    def port(self, name: str) -> Port:
        """The port of that name.

        Raises:
            ConfigError: there is none.
        """
        for port in self.ports:
            if port.name == name:
                return port
        known = ", ".join(repr(port.name) for port in self.ports)
        raise ConfigError(f"{self.name} has no port {name!r}; it has {known}")

    @property
    def running(self) -> bool:
        """Whether queues may be used."""
        return self.active and not self._paused

    def resize(self, columns: int, rows: int) -> None:
        """The console's window has so many characters now. From any thread.

        Raises:
            ConfigError: a number that is not from 1 to 65535.
        """
        if not (1 <= columns <= 0xFFFF and 1 <= rows <= 0xFFFF):
            raise ConfigError(f"a console of {columns} × {rows} characters cannot be, each must be from 1 to 65535")
        with self.served():
            self._columns, self._rows = columns, rows
            self.config_changed()
            self._tell_size()

    # A virtio device.

    @property
    def features(self) -> int:
        return SIZE | MULTIPORT

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (64,) * (2 * (len(self.ports) + 1))

    @property
    def config_space(self) -> bytes:
        return _SPACE.pack(self._columns, self._rows, len(self.ports), 0)

    def connect(self, host: Host) -> None:
        super().connect(host)
        self.loop, self.loop_thread = host.loop, threading.get_ident()
        for port in self.ports:
            port.listen(host.loop)

    def activate(self) -> None:
        if not self.has(MULTIPORT):
            # 5.3.5: one port, and nobody says when it is open.
            self.ports[0].ready = True
            self.ports[0].set_guest_open(True)
        for port in self.ports:
            port.settle()

    def notify(self, queue: Queue, index: int) -> None:
        if self._paused:
            return
        if index == CONTROL_RECEIVE:
            self._tell_pending()
        elif index == CONTROL_TRANSMIT:
            self._hear(queue)
        else:
            port = self.ports[index // 2 - 1 if index > CONTROL_TRANSMIT else 0]
            if index & 1:
                port.transmit()
            else:
                port.buffers_added()

    def deactivate(self) -> None:
        self._pending.clear()
        self.active = False
        for port in self.ports:
            port.forget_guest()

    def pause(self) -> None:
        self._paused = True
        for port in self.ports:
            port.settle()

    def resume(self) -> None:
        self._paused = False
        if self.active:
            with self.served():
                self._tell_pending()
                for port in self.ports:
                    port.settle()

    def close(self) -> None:
        with self.lock:
            loop, self.loop = self.loop, None
            if not self.closed:
                self.closed = True
                self.active = False
                for port in self.ports:
                    port.close(loop)

    def save_own(self) -> dict[str, Any]:
        return {
            "columns": self._columns,
            "rows": self._rows,
            "pending": [(port, event, message) for (port, event), message in self._pending.items()],
            "ports": [port.save() for port in self.ports],
        }

    def restore_own(self, own: Mapping[str, Any]) -> None:
        if len(own["ports"]) != len(self.ports):
            raise QueueError(f"a state of {len(own['ports'])} ports cannot be put into {self.name}, which has others")
        self._columns, self._rows = int(own["columns"]), int(own["rows"])
        self._pending = {(port, event): bytes(message) for port, event, message in own["pending"]}
        for port, state in zip(self.ports, own["ports"], strict=True):
            port.restore(state)

    # Control messages.

    def tell(self, port: int, event: int, value: int, data: bytes = b"") -> None:
        """Send the driver a control message, now or when it has a buffer for it. An older one of the same kind that the
        driver has not taken is dropped, so that a driver that takes none costs nothing."""
        if self.active and self.has(MULTIPORT):
            self._pending.pop((port, event), None)
            self._pending[port, event] = CONTROL.pack(port, event, value) + data
            self._tell_pending()

    def _tell_pending(self) -> None:
        if not self.running or not self._pending:
            return
        queue = self.queues[CONTROL_RECEIVE]
        while self._pending:
            chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                break
            kind, message = next(iter(self._pending.items()))
            if chain.writable_bytes < len(message) or chain.readable_bytes:
                raise QueueError(
                    f"a control buffer of {self.name} has {chain.writable_bytes} bytes to write, it must have room for"
                    f" a message of {len(message)}"
                )
            del self._pending[kind]
            queue.push(chain, chain.write(message))
        queue.signal()

    def _hear(self, queue: Queue) -> None:
        for chain in queue.chains():
            message = chain.read(0, CONTROL.size)
            if len(message) < CONTROL.size or chain.writable_bytes:
                raise QueueError(f"a control message to {self.name} has {len(message)} bytes, it must have 8")
            number, event, value = CONTROL.unpack(message)
            chain.detail = f"event {event} of port {number}: {value}"
            queue.push(chain, 0)
            if event == DEVICE_READY and value == 1:
                for port in self.ports:
                    self.tell(port.number, PORT_ADD, 1)
            elif number < len(self.ports):
                self._hear_of(self.ports[number], event, value)
        queue.signal()

    def _hear_of(self, port: Port, event: int, value: int) -> None:
        if event == PORT_READY:
            # Any other value than 1 says that the driver could not set the port up.
            port.ready = value == 1
            if port.ready:
                if port.is_console:
                    self.tell(port.number, CONSOLE_PORT, 1)
                    self._tell_size()
                self.tell(port.number, PORT_NAME, 1, port.name.encode())
                port.tell_open(always=True)
                port.settle()
        elif event == PORT_OPEN:
            port.set_guest_open(bool(value))

    def _tell_size(self) -> None:
        if self.ports[0].ready and self.has(SIZE):
            self.tell(0, RESIZE, 0, _WINDOW.pack(self._columns, self._rows))


def _first_queue(port: int) -> int:
    """A port's receive queue; its transmit queue is the next one (5.3.2)."""
    return 2 * port + 2 if port else 0


def _hung_up(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(0))


def _listen(path: Path, name: str) -> socket.socket:
    """A listening unix socket for this user only, in place of one that a process left behind."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A socket's own mode is the one that its file gets; there is no moment with another one.
        os.fchmod(listener.fileno(), 0o600)
        listener.setblocking(False)
        if path.is_socket():
            _remove_stale(path, name)
        listener.bind(os.fspath(path))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the socket {str(path)!r} of console port {name!r} cannot be made: {error.strerror or error};"
            " choose another path"
        ) from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        try:
            trial.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise ConfigError(
                f"the socket {str(path)!r} of console port {name!r} is in use by another process; choose another path"
            )
