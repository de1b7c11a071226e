"""The network device (virtio 1.2, section 5.1): an Ethernet interface whose other end is a port of the host.

Queues: receive and transmit of pair 0, of pair 1, …, and the control queue behind them. The driver fills a receive
queue with empty buffers and the device puts frames in, several buffers for a large one (MRG_RXBUF); what it finds in a
transmit queue it sends at once, on the vCPU's thread. Frames from the host are read on the VM's loop, many at a time,
and not at all while the guest has no buffers: then they wait where they are, and go on with the driver's notification.

Large frames make throughput: the device offers an MTU of up to 65,520 bytes (what passt and peers take), and lets the
guest leave out checksums and segmentation where the port can do without them (see :mod:`vmm.network`).

With several pairs, a connection's frames come in by the pair on which it sends (5.1.6.5.6); a tap's are steered by the
host's kernel. A frame of the guest that makes no sense is dropped and counted, as a wire would.
Left out: UFO and USO, RSS and hash reports, VLAN filtering, notification coalescing, changing offloads at run time.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vmm.config import NetworkConfig
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.net_control import (
    CTRL_MAC_ADDR,
    CTRL_RX,
    CTRL_RX_EXTRA,
    CTRL_VQ,
    GUEST_ANNOUNCE,
    MAX_REQUEST,
    MQ,
    Control,
    Filter,
)
from vmm.devices.virtio.queue import Chain, Queue, QueueError
from vmm.network import open_port
from vmm.network.offload import (
    CSUM,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    HEADER,
    HOST_TSO4,
    HOST_TSO6,
    NEEDS_CSUM,
)
from vmm.network.port import ETHERNET_HEADER, MAX_IP_PACKET, Frame, Inbox, Port

# Feature bits (5.1.3); those of offloads are in vmm.network.offload, those of the control queue in net_control.
MTU: Final = 1 << 3
MAC: Final = 1 << 5
MRG_RXBUF: Final = 1 << 15
STATUS: Final = 1 << 16

LINK_UP: Final = 1
ANNOUNCE: Final = 2
CONFIG: Final = struct.Struct("<6sHHH")  #: mac, status, max_virtqueue_pairs, mtu (5.1.4)

QUEUE_SIZE: Final = 256
MAX_FRAME: Final = ETHERNET_HEADER + 4 + MAX_IP_PACKET
MAX_PARTS: Final = 64  #: pieces of a frame that are sent as they are; of more, a copy
BATCH_FRAMES: Final = 15  #: sent with one system call, which takes 1,024 parts
BATCH_BYTES: Final = 256 << 10
BATCHES: Final = 16  #: sent during one notification; the loop goes on with the rest
COMPLETION_SECONDS: Final = 0.001  #: until the guest hears of frames that were sent, at the latest
COMPLETIONS: Final = 64  #: frames sent, of which the guest hears at once

_GSO_FEATURES: Final = {GSO_TCPV4: HOST_TSO4, GSO_TCPV6: HOST_TSO6}
_FLOWS: Final = 256
_COUNT: Final = struct.Struct("<H")  #: num_buffers, at the header's end


@dataclass(slots=True)
class NetworkStatistics:
    """What went through an interface, seen from the guest: received frames are those that it was given.

    Dropped ones did not fit, were malformed, were not for the guest's address, or had no host to go to; what the port
    itself could not pass on is in :attr:`~vmm.network.port.Port.dropped`.
    """

    received_frames: int = 0
    received_bytes: int = 0
    received_dropped: int = 0
    sent_frames: int = 0
    sent_bytes: int = 0
    sent_dropped: int = 0


class NetworkDevice(VirtioDevice):
    """A network interface.

    Args:
        config: which port it has, and what the guest is told.
        port: the host's side, for tests and other callers with one of their own; it belongs to the device.

    Raises:
        NetworkError: the host does not have what the port needs.
    """

    DEVICE_ID: ClassVar[int] = 1
    KIND: ClassVar[str] = "net"

    def __init__(self, config: NetworkConfig, port: Port | None = None) -> None:
        super().__init__(config.name)
        self.port = port if port is not None else open_port(config)
        self.mac = bytes.fromhex(config.mac.replace(":", "")) if config.mac else random_mac()
        self.statistics = NetworkStatistics()
        self._pairs = config.queues
        self._used_pairs = 1
        self._flows = [0] * _FLOWS
        self._announce = False
        self._restored: Mapping[str, Any] | None = None
        self._control = self._new_control()
        self._control_index = 2
        self._merges = False
        self._plugged_in = True
        self._link_seen = self.port.up
        self._paused = self._closed = False
        self._starved = False  # frames wait for buffers of the guest
        self._completed = 0  # frames sent of which the guest has not heard
        self._timing = False  # whether the timer runs, or will
        self._timer: asyncio.TimerHandle | None = None
        self._watched: dict[int, Inbox] = {}  # file descriptors that the loop reads, changed on its thread only
        self._written = -1  # the one that it waits to write to

    @property
    def link_up(self) -> bool:
        """Whether the cable is plugged in, with somebody at its other end."""
        return self._plugged_in and self.port.up

    def set_link(self, plugged_in: bool) -> None:
        """Plug the cable in or out, from any thread: while it is out, frames of either side are dropped."""
        with self.lock:
            self._plugged_in = plugged_in
            self._look_at_link()

    # What the driver reads.

    @property
    def features(self) -> int:
        offered = self.port.features | MAC | STATUS | MRG_RXBUF
        offered |= CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_MAC_ADDR | GUEST_ANNOUNCE
        if self.port.mtu:
            offered |= MTU
        if self._pairs > 1:
            offered |= MQ
        return offered

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (QUEUE_SIZE,) * (2 * self._pairs) + (64,)

    @property
    def config_space(self) -> bytes:
        status = (LINK_UP if self.link_up else 0) | (ANNOUNCE if self._announce else 0)
        return CONFIG.pack(self.mac, status, self._pairs, self.port.mtu)

    # The device's life.

    def activate(self) -> None:
        # 5.1.2: the control queue comes behind the pairs that may be used, which without MQ is one.
        self._control_index = 2 * self._pairs if self.has(MQ) else 2
        self._merges = self.has(MRG_RXBUF)
        self._starved = False
        self._control = self._new_control()
        self.port.accept(self.accepted & self.port.features)
        pairs, restored, self._restored = 1, self._restored, None
        if restored is not None:
            self._control = self._new_control(Filter.restored(restored["filter"]))
            pairs = restored["pairs"]
            # Switches on the way learn where the guest is now.
            self._announce = self.has(GUEST_ANNOUNCE)
            if self._announce:
                self.config_changed()
        self._use_pairs(pairs)
        self._call(self._continue)

    def deactivate(self) -> None:
        self._announce = False
        self._completed = 0
        for inbox in self.port.inboxes:
            inbox.frames = []
        self._call(self._watch)

    def pause(self) -> None:
        self._paused = True
        self._call(self._watch)

    def resume(self) -> None:
        self._paused = False
        self._call(self._continue)

    def save_own(self) -> dict[str, Any]:
        return {"mac": self.mac, "pairs": self._used_pairs, "filter": self._control.filter.save()}

    def restore_own(self, own: Mapping[str, Any]) -> None:
        self.mac = own["mac"]
        self._restored = own

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._watch()
            if self._timer is not None:
                self._timer.cancel()
            self.port.close()

    def notified(self, index: int) -> None:
        # While the loop is busy with frames for the guest, a vCPU does not wait for it: the loop goes on with this.
        if not self.active or index == self._control_index:
            super().notified(index)
        elif self.lock.acquire(blocking=False):
            try:
                super().notified(index)
            finally:
                self.lock.release()
        else:
            self._call(self._continue)

    def notify(self, queue: Queue, index: int) -> None:
        if index == self._control_index:
            self._obey(queue)
        elif index & 1:
            self._transmit(queue, index >> 1)
        elif self._starved:
            self._deliver_rest()
            if not self._starved:
                self._call(self._watch)

    # The guest hears of sent frames together with received ones, which TCP brings soon, or a little later: an interrupt
    # costs it more than a frame.

    def _signal_sent(self) -> None:
        self._completed = 0
        for queue in self.queues[1 : self._control_index : 2]:
            queue.signal()

    def _set_timer(self) -> None:
        if not self._closed:
            self._timer = self.host.loop.call_later(COMPLETION_SECONDS, self._timed)

    def _timed(self) -> None:
        """On the loop."""
        with self.served():
            self._timer = None
            if self.active and not self._paused and self._completed:
                self._signal_sent()
                self._set_timer()
            else:
                self._timing = False

    # Control (5.1.6.5).

    def _new_control(self, wanted: Filter | None = None) -> Control:
        return Control(wanted or Filter(self.mac), self._use_pairs, self._announced)

    def _use_pairs(self, count: int) -> bool:
        if not 1 <= count <= self._pairs:
            return False
        self._used_pairs = count
        self._flows = [0] * _FLOWS
        self.port.use_pairs(count)
        self._call(self._watch)
        return True

    def _announced(self) -> None:
        self._announce = False

    def _obey(self, queue: Queue) -> None:
        for chain in queue.chains():
            if not chain.writable_bytes:
                raise QueueError(f"a control request to {self.name} has no room for the answer")
            chain.write(bytes([self._control.carry_out(chain.read(0, MAX_REQUEST))]))
            queue.push(chain, 1)
        queue.signal()

    # Frames of the guest (5.1.6.2).

    def _transmit(self, queue: Queue, pair: int) -> None:
        port, statistics = self.port, self.statistics
        for _ in range(BATCHES):
            if port.pending:
                break
            chains: list[Chain] = []
            frames: list[Frame] = []
            total = 0
            while len(chains) < BATCH_FRAMES and total < BATCH_BYTES:
                chain = queue.pop()
                if chain is None:
                    break
                chains.append(chain)
                frame = self._outgoing(chain)
                if queue.tracing:
                    chain.detail = f"a frame of {frame.length} bytes sent" if frame is not None else "a frame dropped"
                if frame is None or not self.link_up:
                    statistics.sent_dropped += 1
                else:
                    frames.append(frame)
                    total += frame.length
            if frames:
                if self._used_pairs > 1:
                    self._learn(frames, pair)
                port.send(pair if pair < self._used_pairs else 0, frames)
                statistics.sent_frames += len(frames)
                statistics.sent_bytes += total
            for chain in chains:
                queue.push(chain, 0)
            self._completed += len(chains)
            if not chains and not queue.rearm():
                break
        else:
            self._call(self._continue)
        if self._completed >= COMPLETIONS:
            self._signal_sent()
        elif self._completed and not self._timing:
            self._timing = True
            self._call(self._set_timer)
        if port.pending:
            self._call(self._watch)
        self._look_at_link()

    def _outgoing(self, chain: Chain) -> Frame | None:
        """The frame in a chain, or None if it makes no sense."""
        length = chain.readable_bytes - HEADER.size
        if chain.writable_bytes or not ETHERNET_HEADER <= length <= MAX_FRAME:
            return None
        parts = chain.readable_views()
        if len(parts[0]) > HEADER.size:
            header = bytes(parts[0][: HEADER.size])
            parts[0] = parts[0][HEADER.size :]
        else:
            header = chain.read(0, HEADER.size)
            parts = chain.readable_views(HEADER.size)
        if header[0] | header[1] and not self._sensible(header, length):
            return None
        return Frame(header, parts if len(parts) <= MAX_PARTS else [b"".join(parts)], length)

    def _sensible(self, header: bytes, length: int) -> bool:
        """Whether what a header asks for was negotiated and lies inside the frame (5.1.6.2.1)."""
        flags, kind, _, size, start, offset, _ = HEADER.unpack(header)
        if flags & NEEDS_CSUM and (not self.has(CSUM) or start + offset + 2 > length):
            return False
        if kind == GSO_NONE:
            return True
        feature = _GSO_FEATURES.get(kind & ~GSO_ECN, 0)
        return self.has(feature) and size > 0 and bool(flags & NEEDS_CSUM)

    # Frames for the guest (5.1.6.4).

    def _inboxes(self) -> tuple[Inbox, ...]:
        return self.port.inboxes[: self._used_pairs]

    def _readable(self, inbox: Inbox) -> None:
        """On the loop: there are frames, or a change of the link."""
        with self.served():
            if self.active and not self._paused:
                # Once per turn: the loop comes back if there is more, and in between the guest's threads have the lock.
                if inbox.frames or self.port.receive(inbox):
                    self._deliver(inbox)
                self._look_at_link()
            if self._starved or self._paused or not self.active:
                self._watch()

    def _deliver(self, inbox: Inbox) -> None:
        """Give the guest the frames of an inbox, as far as it has buffers."""
        frames, buffer, prefix = inbox.frames, inbox.buffer, self.port.header
        wanted, statistics = self._control.filter, self.statistics
        pair = self.port.inboxes.index(inbox)
        queue = self.queues[2 * pair]
        steers = self._used_pairs > len(self.port.inboxes)
        view = queue.memory.view
        while frames:
            begin, end = frames[-1]
            destination = begin + HEADER.size
            if not (self._plugged_in and wanted.passes(bytes(buffer[destination : destination + 6]))):
                statistics.received_dropped += 1
                frames.pop()
                continue
            if steers:
                queue.signal()
                queue = self.queues[2 * self._flows[_flow(bytes(buffer[destination : destination + 58]))]]
            chains = self._take(queue, end - begin)
            if chains is None:
                self._starved = True
                break
            frames.pop()
            if not chains:
                statistics.received_dropped += 1
                continue
            if prefix is not None:
                buffer[begin : begin + 10] = prefix
            _COUNT.pack_into(buffer, begin + 10, len(chains))
            position = begin
            for chain in chains:
                chain_begin = position
                for address, room in chain.writable:
                    stop = min(position + room, end)
                    view(address, stop - position)[:] = buffer[position:stop]
                    position = stop
                    if stop == end:
                        break
                if queue.tracing:
                    chain.detail = (
                        f"bytes {chain_begin - begin} to {position - begin} of a frame received, with its header"
                    )
                queue.push(chain, position - chain_begin)
            statistics.received_frames += 1
            statistics.received_bytes += end - destination
        queue.signal()
        if self._completed:
            self._signal_sent()

    def _deliver_rest(self) -> None:
        """The guest has buffers again."""
        self._starved = False
        for inbox in self._inboxes():
            self._deliver(inbox)

    def _take(self, queue: Queue, size: int) -> list[Chain] | None:
        """Buffers for ``size`` bytes; none if they would not fit into any; None if the guest has to make some."""
        chains: list[Chain] = []
        room = 0
        while room < size:
            chain = queue.pop()
            if chain is None:
                if len(chains) == queue.size:
                    queue.rewind(len(chains))
                    return []
                if queue.rearm():
                    continue
                queue.rewind(len(chains))
                return None
            chains.append(chain)
            # 5.1.6.3.1: writable, with room for the header at least.
            if chain.readable_bytes or chain.writable_bytes < HEADER.size:
                raise QueueError(
                    f"a receive buffer of {self.name} has {chain.readable_bytes} bytes to read and"
                    f" {chain.writable_bytes} to write, it must have none to read and {HEADER.size} or more to write"
                )
            room += chain.writable_bytes
            if not self._merges and room < size:
                queue.rewind()
                return []
        return chains

    def _learn(self, frames: list[Frame], pair: int) -> None:
        """Remember by which pair connections send."""
        for frame in frames:
            self._flows[_flow(bytes(frame.parts[0][:58]))] = pair if pair < self._used_pairs else 0

    # The loop.

    def _call(self, callback: Callable[[], None]) -> None:
        if not self._closed:
            self.host.loop.call_soon_threadsafe(callback)

    def _continue(self) -> None:
        """On the loop: whatever could not go on before."""
        with self.served():
            if self.active and not self._paused:
                for pair in range(self._pairs):
                    if self.queues[2 * pair + 1].ready and 2 * pair + 1 < self._control_index:
                        self._transmit(self.queues[2 * pair + 1], pair)
                self._signal_sent()
                if self._starved:
                    self._deliver_rest()
        self._watch()

    def _writable(self) -> None:
        """On the loop: the host takes more."""
        with self.served():
            self.port.flush()
            self._look_at_link()
        if not self.port.pending:
            self._continue()

    def _look_at_link(self) -> None:
        if self.link_up is not self._link_seen:
            self._link_seen = self.link_up
            self.config_changed()
            # What waited to be sent is dropped, or can be sent now.
            self._call(self._continue)

    def _watch(self) -> None:
        """On the loop: wait for what can be gone on with, and for nothing else."""
        with self.lock:
            port = self.port
            reads = self.active and not (self._paused or self._starved or self._closed)
            wanted = {each.descriptor: each for each in self._inboxes() if each.descriptor >= 0} if reads else {}
            for descriptor in [each for each in self._watched if each not in wanted]:
                del self._watched[descriptor]
                self.host.loop.remove_reader(descriptor)
            for descriptor, inbox in wanted.items():
                if descriptor not in self._watched:
                    self._watched[descriptor] = inbox
                    self.host.loop.add_reader(descriptor, self._readable, inbox)
            writes = port.inboxes[0].descriptor if port.pending and not self._closed else -1
            if writes != self._written:
                if self._written >= 0:
                    self.host.loop.remove_writer(self._written)
                self._written = writes
                if writes >= 0:
                    self.host.loop.add_writer(writes, self._writable)


def random_mac() -> bytes:
    """An address that nobody else has: locally administered, of one interface (IEEE 802, clause 8.2)."""
    first, *rest = os.urandom(6)
    return bytes([first & 0xFC | 2, *rest])


def _flow(head: bytes) -> int:
    """A number from 0 to 255 that is the same for both directions of a TCP or UDP connection."""
    match head[12:14]:
        case b"\x08\x00":
            mixed = _xor(head[26:30], head[30:34]) ^ _xor(head[34:36], head[36:38])
        case b"\x86\xdd":
            mixed = _xor(head[22:38], head[38:54]) ^ _xor(head[54:56], head[56:58])
        case _:
            return 0
    return mixed % 251


def _xor(one: bytes, other: bytes) -> int:
    return int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
