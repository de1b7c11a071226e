"""The split virtqueue, seen from the device (virtio 1.2, section 2.7).

A queue is three areas of guest memory that the driver names before it sets DRIVER_OK::

    descriptor table   size × 16 bytes   u64 address │ u32 length │ u16 flags │ u16 next       written by the driver
    available ring     6 + 2 × size      u16 flags │ u16 idx │ u16 ring[size] │ u16 used_event written by the driver
    used ring          6 + 8 × size      u16 flags │ u16 idx │ {u32 id, u32 len}[size] │ u16 avail_event       by us

The driver puts a buffer, which is a chain of descriptors, into the available ring; the device takes it
(:meth:`Queue.pop`), reads its first part, writes its second part, and gives it back with the number of bytes that it
wrote (:meth:`Queue.push`). Indirect tables (2.7.5.3) and event index (2.7.7.2, 2.7.9) are covered; packed queues and
VIRTIO_F_IN_ORDER are not.

The guest is hostile: what it writes is read once, checked, and only then used. What breaks the specification's rules
raises :class:`QueueError`, upon which the transport asks for a reset. A device that breaks the rules of this module
(a buffer given back twice, or with more bytes than it has) gets a :class:`DeviceError`, which ends the VM.

Words of the rings are read and written in host order through casts of memory, and stores are taken to be seen in the
order in which they are made: little-endian hosts whose stores keep their order, as x86 does. Whoever calls a queue
holds its device's lock.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from operator import add, ne, sub
from typing import Any, Final

from vmm.errors import VmmError
from vmm.memory import GuestMemory

DESCRIPTOR: Final = struct.Struct("<QIHH")  #: address, length, flags, next
NEXT: Final = 1  #: the chain goes on at ``next``
WRITE: Final = 2  #: the device writes this part; otherwise it reads it
INDIRECT: Final = 4  #: the part holds a table of descriptors

MAX_QUEUE_SIZE: Final = 1024
MAX_CHAIN: Final = 1024  #: descriptors in one chain; Linux makes indirect ones longer than the queue
MAX_CHAIN_BYTES: Final = 0xFFFF_FFFF  #: bytes in one chain, whose number is 32 bits wide in the used ring
RECENT_REQUESTS: Final = 64

_MANY: Final = 16  # descriptors from which on columns are quicker than rows
# The second half of descriptors 0, 1, 2 … that follow each other: flags, and next above them.
_READ_ON: Final = [NEXT | index + 1 << 16 for index in range(MAX_CHAIN)]
_WRITE_ON: Final = [NEXT | WRITE | index + 1 << 16 for index in range(MAX_CHAIN)]

_NO_INTERRUPT: Final = 1  # available ring, flags
_NO_NOTIFY: Final = 1  # used ring, flags
_INDEX: Final = 0xFFFF  # indices run freely over 16 bits

Segment = tuple[int, int]  #: guest-physical address, bytes


class QueueError(VmmError):
    """The driver broke a rule of the specification; the device needs a reset."""


class DeviceError(VmmError):
    """The device broke a rule of the queue: a mistake in its code, which ends the VM."""


@dataclass(frozen=True, slots=True)
class Request:
    """A buffer that went through a queue, as the trace keeps it.

    Attributes:
        began: host seconds (``time.monotonic``) when the device took it.
        seconds: until it was given back.
        head: its first descriptor.
        readable: bytes that the device could read.
        writable: bytes that the device could write.
        written: bytes that it wrote.
        detail: what the device says it was, such as ``read 8 sectors at 2048``.
    """

    began: float
    seconds: float
    head: int
    readable: int
    writable: int
    written: int
    detail: str


class Chain:
    """A buffer that the driver made available: parts to read, then parts to write. All lie inside guest memory.

    Attributes:
        head: the index of its first descriptor, by which it is given back.
        serial: counts the buffers that were taken from the queue, so that no two are the same.
        readable: guest-physical segments to read; neighbours that touch are one segment.
        writable: guest-physical segments to write.
        readable_bytes: their total.
        writable_bytes: their total.
        began: host seconds (``time.monotonic``) when the device took it, while requests are traced.
        detail: what the device may say of the request, for the trace.
    """

    __slots__ = (
        "_queue",
        "began",
        "detail",
        "head",
        "readable",
        "readable_bytes",
        "serial",
        "writable",
        "writable_bytes",
    )

    def __init__(
        self, queue: Queue, head: int, readable: list[Segment], readable_bytes: int, writable: list[Segment], total: int
    ) -> None:
        self._queue = queue
        self.head = head
        self.serial = queue.serial + 1
        self.readable = readable
        self.readable_bytes = readable_bytes
        self.writable = writable
        self.writable_bytes = total - readable_bytes
        self.began = 0.0
        self.detail = ""

    def __del__(self) -> None:
        # Nobody can give it back any more; VirtioDevice looks at the list once the device's code has returned.
        if self._queue.held.get(self.head) == self.serial:
            self._queue.lost.append(self.head)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """A copy of ``length`` readable bytes from ``offset``, fewer where the chain has fewer."""
        views = self.readable_views(offset, length)
        return bytes(views[0]) if len(views) == 1 else b"".join(views)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copy ``data`` to the writable part at ``offset``; returns how many bytes fitted."""
        done = 0
        for view in self.writable_views(offset, len(data)):
            view[:] = data[done : done + len(view)]
            done += len(view)
        return done

    def readable_views(self, offset: int = 0, length: int | None = None) -> list[memoryview]:
        """The readable bytes themselves, from ``offset``, at most ``length``."""
        return self._views(self.readable, offset, self.readable_bytes if length is None else length)

    def writable_views(self, offset: int = 0, length: int | None = None) -> list[memoryview]:
        """The writable bytes themselves, from ``offset``, at most ``length``."""
        return self._views(self.writable, offset, self.writable_bytes if length is None else length)

    def _views(self, segments: list[Segment], offset: int, length: int) -> list[memoryview]:
        memory = self._queue.memory
        if len(segments) == 1 and offset == 0 and length >= segments[0][1]:
            return [memory.view(*segments[0])]
        if length <= 0:
            return []
        behind = (self.readable_bytes if segments is self.readable else self.writable_bytes) - offset - length
        first, last = 0, len(segments)
        while first < last and offset >= segments[first][1]:
            offset -= segments[first][1]
            first += 1
        while first < last and behind >= segments[last - 1][1]:
            last -= 1
            behind -= segments[last][1]
        taken = segments[first:last]
        if taken and offset > 0:
            address, size = taken[0]
            taken[0] = address + offset, size - offset
        if taken and behind > 0:
            address, size = taken[-1]
            taken[-1] = address, size - behind
        return memory.views(taken)


@dataclass(frozen=True, slots=True)
class QueueState:
    """Everything that a queue is, as a plain value; addresses are guest-physical."""

    size: int
    ready: bool
    descriptors: int
    available: int
    used: int
    next_available: int
    next_used: int
    signalled: int


class Queue:
    """One virtqueue of a device.

    Args:
        memory: guest memory.
        max_size: the largest size that the driver may choose, a power of two up to 1024.
        interrupt: called when the driver wants to know of used buffers.
    """

    def __init__(self, memory: GuestMemory, max_size: int, interrupt: Callable[[], None]) -> None:
        if not 1 <= max_size <= MAX_QUEUE_SIZE or max_size & (max_size - 1):
            raise ValueError(f"a queue of {max_size} entries must have a power of two from 1 to {MAX_QUEUE_SIZE}")
        self.memory = memory
        self.max_size = max_size
        self._interrupt = interrupt
        #: Set while requests are kept in :attr:`recent`.
        self.tracing = False
        self.recent: deque[Request] = deque(maxlen=RECENT_REQUESTS)
        #: Buffers that the device took and did not give back yet: head → serial, in the order of taking.
        self.held: dict[int, int] = {}
        #: Heads of buffers that the device's code dropped without giving them back.
        self.lost: list[int] = []
        self._fence = threading.Lock()
        self._base, self._end = memory.base, memory.end
        self._limit = min(memory.size, MAX_CHAIN_BYTES)
        #: How many buffers were taken, and how many of them when the device's were abandoned last.
        self.serial = self._abandoned = 0
        self.ready = False
        self._forget()

    def _forget(self) -> None:
        self.size = self.max_size
        self.descriptors = self.available = self.used = 0
        self._event_index = self._indirect = False
        self._next_available = self._next_used = self._signalled = 0

    def reset(self) -> None:
        """Back to the beginning; buffers that the device still holds are abandoned."""
        self.release()
        self._forget()

    def release(self) -> None:
        """Let go of guest memory (the driver clears QueueReady, or resets): it may put another queue there, which
        begins at index 0 (4.2.3.2). Buffers that the device still holds are abandoned."""
        if self.ready:
            self.ready = False
            for view in (self._table, self._available_words, self._used_words, self._used_halves):
                view.release()
        self.abandon()
        self._next_available = self._next_used = self._signalled = 0

    def abandon(self) -> None:
        """Buffers that the device still holds are not given back any more: pushing one does nothing."""
        self._abandoned = self.serial
        self.held.clear()
        self.lost.clear()

    def enable(self, event_index: bool, indirect: bool) -> None:
        """Use the areas that :attr:`descriptors`, :attr:`available` and :attr:`used` name (the driver sets QueueReady).

        Raises:
            QueueError: a size that is no power of two up to the maximum; areas that are misaligned or outside memory.
        """
        self.release()
        size = self.size
        if not 1 <= size <= self.max_size or size & (size - 1):
            raise QueueError(f"queue size {size} must be a power of two up to {self.max_size}")
        # 2.7: alignment of the descriptor table 16, of the available ring 2, of the used ring 4.
        areas = (
            ("descriptor table", self.descriptors, 16 * size, 16),
            ("available ring", self.available, 6 + 2 * size, 2),
            ("used ring", self.used, 6 + 8 * size, 4),
        )
        base, end = self.memory.base, self.memory.end
        for name, address, length, alignment in areas:
            if address % alignment:
                raise QueueError(f"the {name} at {address:#x} must be aligned to {alignment} bytes")
            if not base <= address <= end - length:
                raise QueueError(f"the {name} at {address:#x}+{length:#x} is outside memory {base:#x}..{end:#x}")
        self._table, available, used = self.memory.views([area[1:3] for area in areas])
        self._available_words = available.cast("H")
        self._used_words = used[: 4 + 8 * size].cast("I")
        self._used_halves = used.cast("H")
        self._mask = size - 1
        self._event_index = event_index
        self._indirect = indirect
        self.ready = True

    @property
    def waiting(self) -> int:
        """Buffers that the driver made available and the device did not take yet.

        Raises:
            QueueError: the driver's index is further ahead than the queue is long.
        """
        if not self.ready:
            return 0
        waiting = (self._available_words[1] - self._next_available) & _INDEX
        if waiting > self.size:
            raise QueueError(
                f"the available index {self._available_words[1]} is {waiting} ahead of the device's"
                f" {self._next_available}, more than the queue size {self.size}"
            )
        return waiting

    def pop(self) -> Chain | None:
        """Take the next buffer; None when there is none. The driver notifies of later ones only after
        :meth:`rearm`, which :meth:`chains` calls.

        Raises:
            QueueError: the available ring or the chain breaks the rules.
        """
        if not self.ready:
            return None
        words, held = self._available_words, self.held
        taken = self._next_available
        offered = words[1]
        if offered == taken:
            return None
        # 2.7.13: the driver cannot have more buffers available than the queue has entries.
        if (offered - taken & _INDEX) + len(held) > self.size:
            raise QueueError(
                f"the available index {offered} is {offered - taken & _INDEX} ahead of the device's {taken} with"
                f" {len(held)} buffers taken, more than the queue size {self.size}"
            )
        head = words[2 + (taken & self._mask)]
        if head in held:
            raise QueueError(f"descriptor {head} was made available again while the device still has its buffer")
        chain = self._chain(head)
        self.serial = held[head] = chain.serial
        self._next_available = taken + 1 & _INDEX
        if self.tracing:
            chain.began = time.monotonic()
        return chain

    def rewind(self, count: int = 1) -> None:
        """Put back the last ``count`` buffers taken, none of which was pushed; the next :meth:`pop` finds them.

        Raises:
            DeviceError: the device does not hold so many.
        """
        if count > len(self.held):
            raise DeviceError(f"{count} buffers cannot be put back, since the device holds {len(self.held)}")
        for _ in range(count):
            self.held.popitem()
        self._next_available = self._next_available - count & _INDEX

    def chains(self) -> Iterator[Chain]:
        """Take buffers until none is left and the driver has been asked to notify of more.

        Raises:
            QueueError: as :meth:`pop`.
        """
        while True:
            for _ in range(self.size):
                chain = self.pop()
                if chain is None:
                    if not self.rearm():
                        return
                else:
                    yield chain
            # A driver on another hart that never stops adding buffers hears of the used ones meanwhile.
            self.signal()

    def rearm(self) -> bool:
        """Ask the driver to notify of the next buffer; True if one has come meanwhile and shall be taken at once."""
        if not self.ready:
            return False
        if self._event_index:
            # 2.7.10: avail_event, behind the used elements.
            self._used_halves[2 + 4 * self.size] = self._next_available
        with self._fence:  # the store above is seen before the load below: a lock is a full barrier
            pass
        return self._available_words[1] != self._next_available

    def push(self, chain: Chain, written: int) -> None:
        """Give a buffer back, the first ``written`` bytes of its writable part being filled.

        A buffer that was abandoned, as by a reset, is dropped. The driver is not interrupted before :meth:`signal`. A
        device that wrote behind the first ``written`` bytes tells guest memory of that by itself.

        Raises:
            DeviceError: the buffer was given back before, or has fewer bytes to write.
        """
        head = chain.head
        if self.held.get(head) != chain.serial:
            if chain.serial > self._abandoned:
                raise DeviceError(f"the buffer at descriptor {head} is not the device's any more: give it back once")
            return
        if not 0 <= written <= chain.writable_bytes:
            raise DeviceError(
                f"the buffer at descriptor {head} was given back with {written} bytes written, it has room for"
                f" {chain.writable_bytes}"
            )
        del self.held[head]
        self.memory.notify_parts(chain.writable, written)
        next_used = self._next_used
        element = 1 + 2 * (next_used & self._mask)
        words = self._used_words
        words[element] = head
        words[element + 1] = written
        # The element is stored before the index: x86 keeps the order of stores.
        self._next_used = self._used_halves[1] = next_used + 1 & _INDEX
        if self.tracing:
            self._keep(chain, written)

    def _keep(self, chain: Chain, written: int) -> None:
        seconds = time.monotonic() - chain.began
        self.recent.append(
            Request(chain.began, seconds, chain.head, chain.readable_bytes, chain.writable_bytes, written, chain.detail)
        )

    def signal(self) -> None:
        """Interrupt the driver, if it wants to know of what was pushed since the last time."""
        new, old = self._next_used, self._signalled
        if new == old or not self.ready:
            return
        self._signalled = new
        with self._fence:  # what was pushed is seen before the driver's wish is read
            pass
        if self._event_index:
            # 2.7.7.2: used_event, behind the available ring.
            wanted = self._available_words[2 + self.size]
            if (new - wanted - 1) & _INDEX >= (new - old) & _INDEX:
                return
        elif self._available_words[0] & _NO_INTERRUPT:
            return
        self._interrupt()

    def save(self) -> QueueState:
        """The queue as a plain value.

        Raises:
            DeviceError: the device holds buffers; it gives them back, or puts them back, before.
        """
        if self.held:
            raise DeviceError(
                f"a queue cannot be saved while its device holds buffers, here those at descriptors {list(self.held)}"
            )
        return QueueState(
            self.size,
            self.ready,
            self.descriptors,
            self.available,
            self.used,
            self._next_available,
            self._next_used,
            self._signalled,
        )

    def restore(self, state: QueueState, event_index: bool, indirect: bool) -> None:
        """Become what :meth:`save` saw.

        Raises:
            QueueError: as :meth:`enable`.
        """
        self.reset()
        self.size = state.size
        self.descriptors, self.available, self.used = state.descriptors, state.available, state.used
        if state.ready:
            self.enable(event_index, indirect)
        self._next_available, self._next_used = state.next_available, state.next_used
        self._signalled = state.signalled

    def view(self) -> dict[str, Any]:
        """What the driver and the device have written, decoded, for whoever wants to look; see the lab."""
        if not self.ready:
            return {"size": self.size, "ready": False}
        size = self.size
        return {
            "size": size,
            "ready": True,
            "event_index": self._event_index,
            "table": [DESCRIPTOR.unpack_from(self._table, 16 * index) for index in range(size)],
            "available_flags": self._available_words[0],
            "available_index": self._available_words[1],
            "available": self._available_words[2 : 2 + size].tolist(),
            "used_event": self._available_words[2 + size],
            "used_flags": self._used_halves[0],
            "used_index": self._used_halves[1],
            "used": [(self._used_words[1 + 2 * n], self._used_words[2 + 2 * n]) for n in range(size)],
            "avail_event": self._used_halves[2 + 4 * size],
            "next_available": self._next_available,
            "next_used": self._next_used,
            "held": list(self.held),
        }

    def _chain(self, head: int) -> Chain:
        base, end = self._base, self._end
        table, unpack = self._table, DESCRIPTOR.unpack_from
        index, count = head, self.size
        left = count
        entries: list[tuple[int, int, int, int]] | None = None  # an indirect table, read at once
        readable: list[Segment] = []
        writable: list[Segment] = []
        segments = readable
        start = edge = -1  # the segment that still grows
        total = readable_bytes = 0
        while True:
            if index >= count:
                raise QueueError(f"descriptor {index} of the chain at {head} is beyond a table of {count}")
            if not left:
                raise QueueError(f"the chain at descriptor {head} is longer than its table, a loop")
            left -= 1
            address, length, flags, follower = unpack(table, 16 * index) if entries is None else entries[index]
            if address < base or address + length > end:
                raise QueueError(
                    f"descriptor {index} of the chain at {head} names {address:#x}+{length:#x}, outside memory"
                    f" {base:#x}..{end:#x}"
                )
            if not length:
                raise QueueError(f"descriptor {index} of the chain at {head} has no bytes")
            if flags & INDIRECT:
                # 2.7.5.3.1: offered, not nested, and the last of its chain.
                if not self._indirect or entries is not None or flags & NEXT or length % 16:
                    raise QueueError(
                        f"descriptor {index} of the chain at {head} is an indirect one where none may be,"
                        f" or its table of {length} bytes is not made of 16-byte descriptors"
                    )
                copied = self.memory.read(address, min(length, 16 * MAX_CHAIN))
                if edge < 0 and length >= 16 * _MANY and (chain := self._in_order(head, copied)):
                    return chain
                entries = list(DESCRIPTOR.iter_unpack(copied))
                index, count = 0, len(entries)
                left = count
                continue
            total += length
            if flags & WRITE:
                if segments is readable:
                    if edge >= 0:
                        readable.append((start, edge - start))
                    segments, start, readable_bytes = writable, address, total - length
                elif address != edge:
                    writable.append((start, edge - start))
                    start = address
            else:
                # 2.7.4.2: what the device reads comes before what it writes.
                if segments is writable:
                    raise QueueError(
                        f"descriptor {index} of the chain at {head} is to be read, behind one to be written"
                    )
                if address != edge:
                    if edge >= 0:
                        readable.append((start, edge - start))
                    start = address
            edge = address + length
            if not flags & NEXT:
                break
            index = follower
        segments.append((start, edge - start))
        if segments is readable:
            readable_bytes = total
        if total > self._limit:
            raise QueueError(f"the chain at descriptor {head} has {total} bytes, more than {self._limit}")
        return Chain(self, head, readable, readable_bytes, writable, total)

    def _in_order(self, head: int, table: bytes) -> Chain | None:
        """The chain of a long indirect table whose descriptors follow each other, as Linux writes them: taken column by
        column, in a third of the time. None if they do not, or break a rule; :meth:`_chain` says which."""
        cells = memoryview(table).cast("I")
        addresses = memoryview(table).cast("Q")[::2].tolist()
        lengths, links = cells[2::4].tolist(), cells[3::4].tolist()
        count = len(links)
        # How many are to be read: those whose flags are NEXT alone.
        first = count - len(table[12::16].lstrip(bytes([NEXT])))
        if links[:-1] != _READ_ON[:first] + _WRITE_ON[first : count - 1] or links[-1] & 0xFFFF != WRITE:
            return None
        ends = list(map(add, addresses, lengths))
        total = sum(lengths)
        if min(addresses) < self._base or max(ends) > self._end or not all(lengths) or total > self._limit:
            return None
        readable = _joined(addresses[:first], ends[:first])
        writable = _joined(addresses[first:], ends[first:])
        return Chain(self, head, readable, sum(lengths[:first]), writable, total)


def _joined(starts: list[int], ends: list[int]) -> list[Segment]:
    """Parts of a chain, from start to end, as segments; neighbours that touch are one."""
    apart = list(map(ne, ends, starts[1:]))
    if not all(apart):
        starts = [starts[0], *compress(starts[1:], apart)]
        ends = [*compress(ends, apart), ends[-1]]
    return list(zip(starts, map(sub, ends, starts), strict=True))
