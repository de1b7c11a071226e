"""The back end of a vhost-user connection: a virtio device that works on the memory of a VMM in another process.

The device is the same as inside a VMM, and so is its queue code; what is different is where memory, queue addresses and
notifications come from. Per ring (docs/interop/vhost-user.rst, "Ring states")::

    stopped ──SET_VRING_KICK──► started ──GET_VRING_BASE──► stopped        and enabled or not by SET_VRING_ENABLE

A ring is served while it is started and enabled. Before it stops, the device gives back the buffers that it holds, so
that afterwards nothing here touches guest memory through it.

A request that cannot be carried out is answered with 1 if an acknowledgement is wanted; else the connection ends, as it
does with what is no request. The guest is as hostile as in the VMM: a mistake in its queue stops the device and is told
through the rings' error descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vmm.devices.virtio.device import COMMON_FEATURES, EVENT_IDX, INDIRECT_DESC, Host, VirtioDevice
from vmm.devices.virtio.queue import MAX_QUEUE_SIZE, Queue, QueueError, QueueState
from vmm.errors import VmmError
from vmm.vhost.channel import Channel, close_all
from vmm.vhost.memory import SharedMemory
from vmm.vhost.messages import (
    KNOWN_PROTOCOL_FEATURES,
    NEED_REPLY,
    NO_DESCRIPTOR,
    NUMBER,
    PROTOCOL_FEATURES,
    REPLY,
    RING_ADDRESSES,
    RING_MASK,
    RING_STATE,
    Message,
    ProtocolFeature,
    RequestKind,
    VhostError,
    unpack_table,
)


@dataclass(slots=True)
class Ring:
    """What the front end said of a ring; descriptors are ours, -1 for none."""

    size: int
    base: int = 0
    table: int = 0
    used: int = 0
    available: int = 0
    kick: int = -1
    call: int = -1
    error: int = -1
    enabled: bool = False
    started: bool = False
    served: bool = False


class BackEnd:
    """Serves one front end.

    Args:
        device: what is served; it is closed by its owner, after :meth:`close`.
        connection: of the front end.
        ended: called with "" when the front end has gone, or with what was wrong.

    It is made on the thread of a running event loop, which the device uses.
    """

    def __init__(self, device: VirtioDevice, connection: socket.socket, ended: Callable[[str], object]) -> None:
        self._device = device
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        connection.setblocking(False)
        self._channel = Channel(connection)
        self._rings = [Ring(size) for size in device.queue_sizes]
        self._memory: SharedMemory | None = None
        self._features = 0
        self._agreed = ProtocolFeature(0)
        self._handlers: dict[int, Callable[[Message], bytes | None]] = {
            RequestKind.GET_FEATURES: lambda _: NUMBER.pack(self._offered),
            RequestKind.SET_FEATURES: self._set_features,
            RequestKind.SET_OWNER: lambda _: None,
            RequestKind.RESET_OWNER: lambda _: None,
            RequestKind.SET_MEM_TABLE: self._set_memory,
            RequestKind.SET_VRING_NUM: self._set_size,
            RequestKind.SET_VRING_ADDR: self._set_addresses,
            RequestKind.SET_VRING_BASE: self._set_base,
            RequestKind.GET_VRING_BASE: self._get_base,
            RequestKind.SET_VRING_KICK: self._set_kick,
            RequestKind.SET_VRING_CALL: self._set_call,
            RequestKind.SET_VRING_ERR: self._set_error,
            RequestKind.GET_PROTOCOL_FEATURES: lambda _: NUMBER.pack(KNOWN_PROTOCOL_FEATURES),
            RequestKind.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            RequestKind.GET_QUEUE_NUM: lambda _: NUMBER.pack(len(self._rings)),
            RequestKind.SET_VRING_ENABLE: self._set_enabled,
            RequestKind.RESET_DEVICE: self._reset,
        }
        self._loop.add_reader(connection, self._on_message)

    @property
    def _offered(self) -> int:
        return self._device.features | COMMON_FEATURES | PROTOCOL_FEATURES

    # Messages.

    def _on_message(self) -> None:
        try:
            message = self._channel.receive()
            if message is not None:
                self._serve(message)
        except (EOFError, OSError):
            self._ended("")
        except VmmError as error:
            self._ended(str(error))
        except Exception as error:
            self._ended(f"a mistake in its code: {type(error).__name__}: {error}")

    def _serve(self, message: Message) -> None:
        wanted = bool(message.flags & NEED_REPLY and self._agreed & ProtocolFeature.REPLY_ACK)
        try:
            handler = self._handlers.get(message.request)
            if handler is None:
                raise VhostError(f"the front end sent {message.name}, which this back end does not know")
            reply = handler(message)
        except VmmError:
            if not wanted:
                raise
            reply = NUMBER.pack(1)
        finally:
            close_all(message.descriptors)
        if reply is None and wanted:
            reply = NUMBER.pack(0)
        if reply is not None:
            self._channel.send(message.request, REPLY, reply)

    def _set_features(self, message: Message) -> None:
        if message.number & ~self._offered:
            raise VhostError(f"the front end accepted features {message.number:#x}, offered were {self._offered:#x}")
        self._features = message.number & ~PROTOCOL_FEATURES
        if not message.number & PROTOCOL_FEATURES:
            for ring in self._rings:  # without them there is no SET_VRING_ENABLE
                ring.enabled = True

    def _set_protocol_features(self, message: Message) -> None:
        offered = int(KNOWN_PROTOCOL_FEATURES)
        if message.number & ~offered:
            raise VhostError(f"the front end accepted protocol features {message.number:#x}, offered were {offered:#x}")
        self._agreed = ProtocolFeature(message.number)

    def _set_memory(self, message: Message) -> None:
        memory = SharedMemory(unpack_table(message), message.descriptors)
        for number in range(len(self._rings)):
            self._stop(number)
        self._connect(memory)
        for number in range(len(self._rings)):
            self._start_if_due(number)

    def _connect(self, memory: SharedMemory) -> None:
        """Let the device have guest memory, in place of what it had."""
        old, self._memory = self._memory, memory
        device = self._device
        device.connect(
            Host(
                memory=memory,
                loop=self._loop,
                interrupt_queue=lambda: None,  # each queue has its own, below
                interrupt_config=lambda: None,  # there is no way to tell
                failed=self._failed,
                crashed=self._crashed,
            )
        )
        # How large they may be is for the front end to say to its guest.
        device.queues = tuple(
            Queue(memory, MAX_QUEUE_SIZE, partial(self._call, number)) for number in range(len(self._rings))
        )
        if old is not None:
            old.close()

    # Rings.

    def _ring(self, number: int) -> Ring:
        if number >= len(self._rings):
            raise VhostError(f"the front end named ring {number}, there are {len(self._rings)}")
        return self._rings[number]

    def _stopped(self, number: int) -> Ring:
        ring = self._ring(number)
        if ring.started:
            raise VhostError(f"the front end changed ring {number}, which is started; stop it first")
        return ring

    def _set_size(self, message: Message) -> None:
        number, size = message.unpack(RING_STATE)
        self._stopped(number).size = size

    def _set_base(self, message: Message) -> None:
        number, base = message.unpack(RING_STATE)
        self._stopped(number).base = base & 0xFFFF

    def _set_addresses(self, message: Message) -> None:
        number, _, table, used, available, _ = message.unpack(RING_ADDRESSES)
        ring = self._stopped(number)
        ring.table, ring.used, ring.available = table, used, available

    def _set_descriptor(self, message: Message, which: str) -> int:
        """Take the descriptor that came with the message in place of the one before; which ring it is for."""
        value = message.number
        ring = self._ring(value & RING_MASK)
        if bool(value & NO_DESCRIPTOR) == bool(message.descriptors) or len(message.descriptors) > 1:
            raise VhostError(f"{message.name} came with {len(message.descriptors)} descriptors")
        taken = os.dup(message.descriptors[0]) if message.descriptors else -1
        if taken >= 0:
            os.set_blocking(taken, False)
        with self._device.lock:  # workers of the device call, too
            before = getattr(ring, which)
            setattr(ring, which, taken)
            if before >= 0:
                os.close(before)
        return value & RING_MASK

    def _set_call(self, message: Message) -> None:
        self._set_descriptor(message, "call")

    def _set_error(self, message: Message) -> None:
        self._set_descriptor(message, "error")

    def _set_kick(self, message: Message) -> None:
        number = message.number & RING_MASK
        ring = self._ring(number)
        self._stop(number)
        self._set_descriptor(message, "kick")
        if ring.kick < 0:
            raise VhostError(f"ring {number} came without a descriptor for its notifications, it must have one")
        ring.started = True
        self._start_if_due(number)

    def _set_enabled(self, message: Message) -> None:
        number, enabled = message.unpack(RING_STATE)
        ring = self._ring(number)
        ring.enabled = bool(enabled)
        if ring.enabled:
            self._start_if_due(number)
        else:
            self._stop(number)

    def _get_base(self, message: Message) -> bytes:
        number, _ = message.unpack(RING_STATE)
        ring = self._ring(number)
        self._stop(number)
        ring.started = False
        return RING_STATE.pack(number, ring.base)

    def _start_if_due(self, number: int) -> None:
        ring = self._rings[number]
        if ring.started and ring.enabled and not ring.served:
            try:
                self._start(number)
            except VmmError:
                ring.started = False
                raise

    def _start(self, number: int) -> None:
        ring, memory = self._rings[number], self._memory
        if memory is None:
            raise VhostError(f"ring {number} was started before there was any memory")
        device = self._device
        queue = device.queues[number]
        table, used, available = (memory.from_user(each) for each in (ring.table, ring.used, ring.available))
        with device.lock:
            next_used = memory.read_int(used + 2, 2)
            state = QueueState(ring.size, True, table, available, used, ring.base, next_used, next_used)
            queue.restore(state, bool(self._features & EVENT_IDX), bool(self._features & INDIRECT_DESC))
            if not device.active and device.mistake is None:
                device.start(self._features)
        ring.served = True
        self._loop.add_reader(ring.kick, self._kicked, number)
        device.notified(number)

    def _stop(self, number: int) -> None:
        ring, device = self._rings[number], self._device
        if not ring.served:
            return
        ring.served = False
        self._loop.remove_reader(ring.kick)
        queue = device.queues[number]
        with device.lock:
            device.pause()
            if queue.ready:
                ring.base = queue.save().next_available
            queue.release()
            device.resume()

    def _reset(self, message: Message) -> None:
        for number, ring in enumerate(self._rings):
            self._stop(number)
            ring.started = ring.enabled = False
            ring.base = 0
        self._device.reset()

    # What the device and the front end tell each other.

    def _kicked(self, number: int) -> None:
        try:
            os.eventfd_read(self._rings[number].kick)
        except BlockingIOError:
            pass
        except OSError as error:
            self._ended(f"the descriptor of ring {number}'s notifications is no eventfd: {error.strerror}")
            return
        self._device.notified(number)

    def _call(self, number: int) -> None:
        """From any thread, with the device's lock held."""
        call = self._rings[number].call
        if call >= 0:
            with contextlib.suppress(BlockingIOError):  # so many that it has not read that one more says nothing
                os.eventfd_write(call, 1)

    def _failed(self, error: QueueError) -> None:
        for ring in self._rings:
            if ring.error >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(ring.error, 1)

    def _crashed(self, error: BaseException) -> None:
        sentence = f"the device raised {type(error).__name__}: {error}"
        self._loop.call_soon_threadsafe(self._ended, sentence)

    def close(self) -> None:
        """Let go of the front end and its memory."""
        if self._channel.socket.fileno() < 0:
            return
        self._loop.remove_reader(self._channel.socket)
        for ring in self._rings:
            for descriptor in (ring.kick, ring.call, ring.error):
                if descriptor >= 0:
                    self._loop.remove_reader(descriptor)
                    os.close(descriptor)
            ring.kick = ring.call = ring.error = -1
        self._channel.close()
        if self._memory is not None:
            self._device.disconnect()
            self._memory.close()
