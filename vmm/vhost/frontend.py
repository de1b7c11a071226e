"""The file system device in the VMM whose requests another process serves (virtio 1.2, 5.11; vhost-user).

The guest's queues stay with the VMM: it takes the guest's buffers, checks them, describes them to the back end in a
ring of its own (:mod:`vmm.vhost.ring`), and gives them back to the guest when the back end is done. Data go straight
between the back end and guest memory. A front end that let the back end use the guest's queues would do less, but

- what the back end writes may be code. The engine keeps what it decoded, and must drop it before the guest can see that
  the buffer is filled, also if the guest looks by itself instead of waiting for its interrupt: here every buffer's
  writable ranges are told as written, whole, before it is given back;
- when the back end dies, the VMM knows which requests wait, and fails them with EIO, as all later ones; the guest goes
  on without its shared directory.

Left out: a saved state, since what the guest has open is known to the back end only; a back end that comes back.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from vmm.actions import ManipulateFsBackend
from vmm.config import VhostFsConfig
from vmm.devices.virtio.device import INDIRECT_DESC, VERSION_1, Host
from vmm.devices.virtio.fs.directory import SharedDirectory
from vmm.devices.virtio.fs.protocol import IN_HEADER, OUT_HEADER, UNANSWERED
from vmm.devices.virtio.queue import Chain, DeviceError, Queue, QueueError
from vmm.errors import ConfigError
from vmm.memory import GuestMemory
from vmm.rpc.connection import Connection
from vmm.rpc.endpoint import connect
from vmm.rpc.wire import RpcError
from vmm.vhost.channel import Channel, close_all
from vmm.vhost.control import control_path
from vmm.vhost.messages import (
    KNOWN_PROTOCOL_FEATURES,
    NEED_REPLY,
    NUMBER,
    PROTOCOL_FEATURES,
    REPLY,
    RING_ADDRESSES,
    RING_STATE,
    ProtocolFeature,
    Region,
    RequestKind,
    VhostError,
    pack_table,
)
from vmm.vhost.ring import ForwardRing

REPLY_SECONDS: Final = 10.0  #: for the back end to answer, which finishes what is under way first

_CONFIG: Final = struct.Struct("<36sI")  # tag, num_request_queues
_PRIORITY_QUEUE: Final = 128
_REQUEST_QUEUE: Final = 512
_NEEDED: Final = VERSION_1 | INDIRECT_DESC | PROTOCOL_FEATURES


class BackEndLink:
    """The connection to a back end: requests and their replies, one at a time.

    Args:
        path: of its socket.

    Raises:
        VhostError: nobody is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            connection = connect(path, REPLY_SECONDS)
        except RpcError as error:
            raise VhostError(f"{error}; start a back end there first") from error
        connection.settimeout(REPLY_SECONDS)
        self.channel = Channel(connection)

    @property
    def socket(self) -> socket.socket:
        """The connection."""
        return self.channel.socket

    def tell(self, kind: RequestKind, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send a request and wait until it has been carried out; VhostError if it was not."""
        if self._exchange(kind, NEED_REPLY, payload, descriptors, NUMBER)[0]:
            raise VhostError(f"the back end at {str(self._path)!r} refused {kind.name}")

    def send(self, kind: RequestKind, payload: bytes = b"") -> None:
        """Send a request of the time before acknowledgements are agreed on."""
        try:
            self.channel.send(kind, 0, payload)
        except OSError as error:
            raise self._gone(kind, error) from error

    def ask(self, kind: RequestKind, payload: bytes = b"", layout: struct.Struct = NUMBER) -> tuple[int, ...]:
        """Send a request that has a reply of its own."""
        return self._exchange(kind, 0, payload, (), layout)

    def _exchange(
        self, kind: RequestKind, flags: int, payload: bytes, descriptors: Sequence[int], layout: struct.Struct
    ) -> tuple[int, ...]:
        try:
            self.channel.send(kind, flags, payload, descriptors)
            reply = self.channel.receive()
        except (OSError, EOFError) as error:
            raise self._gone(kind, error) from error
        assert reply is not None, "the socket is blocking"
        close_all(reply.descriptors)
        if reply.request != kind or not reply.flags & REPLY:
            raise VhostError(f"the back end at {str(self._path)!r} answered {kind.name} with {reply.name}")
        return reply.unpack(layout)

    def _gone(self, kind: RequestKind, error: Exception) -> VhostError:
        why = f": {error}" if str(error) else ""
        return VhostError(f"the back end at {str(self._path)!r} has gone, it did not answer {kind.name}{why}")

    def hung_up(self) -> bool:
        """Whether the back end has gone, or speaks without being asked."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))


@dataclass(slots=True)
class _Forwarded:
    """A queue of the guest and its ring."""

    ring: ForwardRing
    kick: int
    call: int
    error: int
    running: bool = False


def _drained(descriptor: int) -> bool:
    """Whether there was something in an eventfd, which is empty now."""
    try:
        os.eventfd_read(descriptor)
    except BlockingIOError:
        return False
    return True


class VhostFsDevice(SharedDirectory):
    """Shared directories that a process at a socket serves.

    Args:
        config: the socket, and what the guest calls it.

    Raises:
        ConfigError: nobody serves there, or not what is needed.
    """

    DEVICE_ID: ClassVar[int] = 26
    KIND: ClassVar[str] = "vhost-fs"

    def __init__(self, config: VhostFsConfig) -> None:
        super().__init__(config.name)
        assert config.socket is not None
        self._tag = config.tag.encode()
        self._path = config.socket
        self._request_queues = config.queues
        #: What became of the back end; empty while it serves.
        self.failure = ""
        self._forwarded: list[_Forwarded] = []
        self._shadow: GuestMemory | None = None
        self._watched: list[int] = []
        self._resets = False
        self._halted: dict[int, int] = {}
        try:
            self._link: BackEndLink | None = BackEndLink(self._path)
        except VhostError as error:
            raise ConfigError(f"{self.name} cannot be made: {error}") from error
        try:
            self._negotiate(self._link)
        except VhostError as error:
            self._link.channel.close()
            raise ConfigError(f"{self.name} cannot be made: {error}") from error

    def _negotiate(self, link: BackEndLink) -> None:
        (features,) = link.ask(RequestKind.GET_FEATURES)
        if features & _NEEDED != _NEEDED:
            raise VhostError(f"the back end offers features {features:#x}, it must offer {_NEEDED:#x}")
        link.send(RequestKind.SET_OWNER)
        (found,) = link.ask(RequestKind.GET_PROTOCOL_FEATURES)
        offered = ProtocolFeature(found & int(KNOWN_PROTOCOL_FEATURES))
        if not offered & ProtocolFeature.REPLY_ACK:
            raise VhostError(f"the back end offers protocol features {found:#x}, it must acknowledge requests")
        link.send(RequestKind.SET_PROTOCOL_FEATURES, NUMBER.pack(offered))
        self._resets = bool(offered & ProtocolFeature.RESET_DEVICE)
        if offered & ProtocolFeature.MQ:
            (queues,) = link.ask(RequestKind.GET_QUEUE_NUM)
            if queues < len(self.queue_sizes):
                raise VhostError(f"the back end serves {queues} queues, {len(self.queue_sizes)} are configured")
        link.tell(RequestKind.SET_FEATURES, NUMBER.pack(_NEEDED))

    # What the back end shares.

    def add(self, name: str, path: os.PathLike[str], *, read_only: bool = False, override_stat: bool = False) -> None:
        """As :meth:`vmm.devices.virtio.fs.device.FsDevice.add`, in the back end; waits for it.

        Raises:
            ConfigError: as there, or the back end has no control channel.
        """
        action = ManipulateFsBackend(self.name, "add", name, os.path.abspath(path), read_only, override_stat)
        self._manipulate(action)

    def remove(self, name: str) -> None:
        """As :meth:`vmm.devices.virtio.fs.device.FsDevice.remove`, in the back end; waits for it."""
        self._manipulate(ManipulateFsBackend(self.name, "remove", name))

    def _manipulate(self, action: ManipulateFsBackend) -> None:
        if self.failure:
            raise ConfigError(f"{self.name} can share nothing any more: {self.failure}")
        try:
            with Connection(control_path(self._path), "the file system process", REPLY_SECONDS) as control:
                control.ask(action, REPLY_SECONDS)
        except RpcError as error:
            raise ConfigError(f"{self.name} cannot change what it shares: {error}") from error

    # What the guest sees.

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (_PRIORITY_QUEUE,) + (_REQUEST_QUEUE,) * self._request_queues

    @property
    def config_space(self) -> bytes:
        return _CONFIG.pack(self._tag, self._request_queues)

    def notify(self, queue: Queue, index: int) -> None:
        if self.failure:
            for chain in queue.chains():
                self._refuse(queue, chain)
            queue.signal()
            return
        forwarded = self._forwarded[index]
        sent = False
        for chain in queue.chains():
            if not forwarded.ring.put(chain):
                # Buffers of a queue that the driver took away are still with the back end; go on when one is back.
                queue.rewind()
                break
            sent = True
        if sent:
            os.eventfd_write(forwarded.kick, 1)

    def _refuse(self, queue: Queue, chain: Chain) -> None:
        """Answer a request with EIO."""
        written = 0
        if chain.readable_bytes >= IN_HEADER.size and chain.writable_bytes >= OUT_HEADER.size:
            _, opcode, unique, *_ = IN_HEADER.unpack(chain.read(0, IN_HEADER.size))
            if opcode not in UNANSWERED:
                written = chain.write(OUT_HEADER.pack(OUT_HEADER.size, -errno.EIO, unique))
        queue.push(chain, written)

    def _on_call(self, index: int) -> None:
        with self.served():
            _drained(self._forwarded[index].call)
            self._collect(index)

    def _collect(self, index: int) -> None:
        """Give back to the guest what the back end is done with."""
        queue = self.queues[index]
        try:
            for chain, written in self._forwarded[index].ring.take():
                # More than was reported may have been written, as by a read that failed half way.
                for address, length in chain.writable:
                    self.host.memory.notify(address, length)
                queue.push(chain, written)
        except VhostError as error:
            self._lose(str(error))
        queue.signal()
        if self.active and queue.waiting and not self.failure:
            self.notify(queue, index)

    def _on_error(self, index: int) -> None:
        with self.served():
            if not _drained(self._forwarded[index].error):
                return  # it was about what came before a reset
            raise QueueError(f"the back end of {self.name} refuses what the driver put into a queue")

    # The back end's life.

    def _on_socket(self) -> None:
        with self.served():
            if self._link is not None and self._link.hung_up():
                self._lose(f"the back end at {str(self._path)!r} has gone")

    def _lose(self, why: str) -> None:
        """There is no back end any more: every request fails."""
        if self.failure:
            return
        self.failure = why
        link, self._link = self._link, None
        try:
            # On any thread, but a loop's readers are changed on its own.
            self.host.loop.call_soon_threadsafe(self._hang_up, link)
        except RuntimeError:  # the loop has ended, and watches nothing any more
            if link is not None:
                link.channel.close()
        for queue, forwarded in zip(self.queues, self._forwarded, strict=True):
            forwarded.running = False
            for chain in forwarded.ring.chains:
                self._refuse(queue, chain)
            forwarded.ring.reset()
            queue.signal()

    def _try(self, kind: RequestKind, payload: bytes = b"", descriptors: Sequence[int] = ()) -> bool:
        """Have the back end do something; False if there is none any more."""
        if self._link is not None:
            try:
                self._link.tell(kind, payload, descriptors)
                return True
            except VhostError as error:
                self._lose(str(error))
        return False

    def connect(self, host: Host) -> None:
        if host.memory.descriptor is None:
            raise ConfigError(
                f"{self.name} is served by another process, which cannot reach this VM's memory: a VM that has such a"
                " device when it starts shares its memory"
            )
        super().connect(host)
        self._build(host)
        memory, shadow = host.memory, self._shadow
        assert shadow is not None
        assert shadow.descriptor is not None
        regions = tuple(Region(each.base, each.size, each.host_address, 0) for each in (memory, shadow))
        if not self._try(RequestKind.SET_MEM_TABLE, pack_table(regions), (host.memory.descriptor, shadow.descriptor)):
            raise ConfigError(f"{self.name} cannot be connected: {self.failure}")
        self._watch(host.loop)

    def _build(self, host: Host) -> None:
        sizes = [ForwardRing.bytes_for(size) for size in self.queue_sizes]
        # Behind guest memory, where the guest has nothing.
        self._shadow = GuestMemory(host.memory.end, sum(sizes), shared=True)
        start = self._shadow.base
        for length, size in zip(sizes, self.queue_sizes, strict=True):
            flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
            ring = ForwardRing(self._shadow, start, size)
            self._forwarded.append(_Forwarded(ring, -1, -1, -1))
            each = self._forwarded[-1]
            each.kick, each.call, each.error = (os.eventfd(0, flags) for _ in range(3))
            start += length

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._link is not None
        self._watched = [descriptor for each in self._forwarded for descriptor in (each.call, each.error)]
        self._watched.append(self._link.socket.fileno())
        for index, each in enumerate(self._forwarded):
            loop.add_reader(each.call, self._on_call, index)
            loop.add_reader(each.error, self._on_error, index)
        loop.add_reader(self._link.socket, self._on_socket)

    def _hang_up(self, link: BackEndLink | None) -> None:
        """On the loop's thread: end the connection, which nobody uses any more."""
        watched, self._watched = self._watched, []
        for descriptor in watched:
            self.host.loop.remove_reader(descriptor)
        if link is not None:
            link.channel.close()

    # The device's life.

    def activate(self) -> None:
        for index, queue in enumerate(self.queues):
            if queue.ready:
                self._forwarded[index].ring.reset()
                self._run(index, 0)

    def _run(self, index: int, base: int) -> None:
        """Start a ring."""
        each = self._forwarded[index]
        ring, shadow = each.ring, self._shadow
        assert shadow is not None
        table, used, available = (
            shadow.host_address + part - shadow.base for part in (ring.table, ring.used, ring.available)
        )
        each.running = (
            self._try(RequestKind.SET_VRING_NUM, RING_STATE.pack(index, ring.size))
            and self._try(RequestKind.SET_VRING_BASE, RING_STATE.pack(index, base))
            and self._try(RequestKind.SET_VRING_ADDR, RING_ADDRESSES.pack(index, 0, table, used, available, 0))
            and self._try(RequestKind.SET_VRING_CALL, NUMBER.pack(index), [each.call])
            and self._try(RequestKind.SET_VRING_ERR, NUMBER.pack(index), [each.error])
            and self._try(RequestKind.SET_VRING_KICK, NUMBER.pack(index), [each.kick])
            and self._try(RequestKind.SET_VRING_ENABLE, RING_STATE.pack(index, 1))
        )

    def _halt(self, index: int) -> int:
        """Stop a ring: when this returns, the back end holds no buffer of it. Where it stopped."""
        self._forwarded[index].running = False
        if self._link is not None:
            try:
                _, base = self._link.ask(RequestKind.GET_VRING_BASE, RING_STATE.pack(index, 0), RING_STATE)
                return base
            except VhostError as error:
                self._lose(str(error))
        return 0

    def deactivate(self) -> None:
        for index, each in enumerate(self._forwarded):
            if each.running:
                self._halt(index)
            each.ring.reset()
        if self._resets and self._forwarded:
            self._try(RequestKind.RESET_DEVICE)
        # From here on the back end says nothing about the rings. It told of a mistake through the error descriptor of
        # each of them, which must not stop the device that the driver brings up next.
        for each in self._forwarded:
            _drained(each.call)
            _drained(each.error)

    def pause(self) -> None:
        self._halted = {index: self._halt(index) for index, each in enumerate(self._forwarded) if each.running}
        for index in self._halted:
            self._collect(index)

    def resume(self) -> None:
        for index, base in self._halted.items():
            if not self.failure:
                self._run(index, base)
        self._halted = {}

    def save_own(self) -> dict[str, Any]:
        raise DeviceError(f"{self.name} cannot be saved: what its guest has open is known to another process only")

    def close(self) -> None:
        link, self._link = self._link, None
        self._hang_up(link)
        self.failure = self.failure or "the device was closed"
        forwarded, self._forwarded = self._forwarded, []
        for each in forwarded:
            close_all(descriptor for descriptor in (each.kick, each.call, each.error) if descriptor >= 0)
            each.ring.close()
        if self._shadow is not None:
            self._shadow.close()
            self._shadow = None
