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
raises :class:`QueueError`, upon which the transport asks for a reset.

Words of the rings are read and written in host order through casts of memory, hence on little-endian hosts only.
Whoever calls a queue holds its device's lock.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from vmm.errors import GuestAddressError, VmmError
from vmm.memory import GuestMemory

DESCRIPTOR: Final = struct.Struct("<QIHH")  #: address, length, flags, next
NEXT: Final = 1  #: the chain goes on at ``next``
WRITE: Final = 2  #: the device writes this part; otherwise it reads it
INDIRECT: Final = 4  #: the part holds a table of descriptors

MAX_QUEUE_SIZE: Final = 1024
MAX_CHAIN: Final = 1024  #: descriptors in one chain; Linux makes indirect ones longer than the queue
RECENT_REQUESTS: Final = 64

_NO_INTERRUPT: Final = 1  # available ring, flags
_NO_NOTIFY: Final = 1  # used ring, flags
_INDEX: Final = 0xFFFF  # indices run freely over 16 bits

Segment = tuple[int, int]  #: guest-physical address, bytes


class QueueError(VmmError):
    """The driver broke a rule of the specification; the device needs a reset."""


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
        readable: guest-physical segments to read; neighbours that touch are one segment.
        writable: guest-physical segments to write.
        readable_bytes: their total.
        writable_bytes: their total.
        detail: what the device may say of the request, for the trace.
    """

    __slots__ = (
        "_memory",
        "began",
        "detail",
        "generation",
        "head",
        "readable",
        "readable_bytes",
        "writable",
        "writable_bytes",
    )

    def __init__(self, memory: GuestMemory, head: int, generation: int) -> None:
        self._memory = memory
        self.head = head
        self.generation = generation
        self.readable: list[Segment] = []
        self.writable: list[Segment] = []
        self.readable_bytes = 0
        self.writable_bytes = 0
        self.detail = ""
        self.began = 0.0

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
        view = self._memory.view
        if offset == 0 and len(segments) == 1 and length >= segments[0][1]:
            return [view(*segments[0])]
        views = []
        for address, size in segments:
            if offset >= size:
                offset -= size
                continue
            if length <= 0:
                break
            taken = min(size - offset, length)
            views.append(view(address + offset, taken))
            length -= taken
            offset = 0
        return views


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
        self._fence = threading.Lock()
        self.generation = 0
        self._forget()

    def _forget(self) -> None:
        self.size = self.max_size
        self.descriptors = self.available = self.used = 0
        self.ready = False
        self._event_index = self._indirect = False
        self._next_available = self._next_used = self._signalled = 0
        self._outstanding = 0

    def reset(self) -> None:
        """Back to the beginning; buffers that the device still holds are not given back any more."""
        self.release()
        self.generation += 1
        self._forget()

    def release(self) -> None:
        """Let go of guest memory."""
        if self.ready:
            self.ready = False
            for view in (self._table, self._available_words, self._used_words, self._used_halves):
                view.release()

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
        for name, address, alignment in (
            ("descriptor table", self.descriptors, 16),
            ("available ring", self.available, 2),
            ("used ring", self.used, 4),
        ):
            if address % alignment:
                raise QueueError(f"the {name} at {address:#x} must be aligned to {alignment} bytes")
        try:
            self._table = self.memory.view(self.descriptors, 16 * size)
            available = self.memory.view(self.available, 6 + 2 * size)
            used = self.memory.view(self.used, 6 + 8 * size)
        except GuestAddressError as error:
            raise QueueError(f"an area of the queue is outside memory: {error}") from error
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
        """Take the next buffer; None when there is none.

        Raises:
            QueueError: the available ring or the chain breaks the rules.
        """
        if not self.ready:
            return None
        words = self._available_words
        taken = self._next_available
        waiting = (words[1] - taken) & _INDEX
        if not waiting:
            return None
        # 2.7.13: the driver cannot have more buffers available than the queue has entries.
        if waiting + self._outstanding > self.size:
            raise QueueError(
                f"the available index {words[1]} is {waiting} ahead of the device's {taken} with {self._outstanding}"
                f" buffers taken, more than the queue size {self.size}"
            )
        chain = self._chain(words[2 + (taken & self._mask)])
        self._next_available = (taken + 1) & _INDEX
        self._outstanding += 1
        if self.tracing:
            chain.began = time.monotonic()
        return chain

    def rewind(self, count: int = 1) -> None:
        """Put back the last ``count`` buffers taken, none of which was pushed; the next :meth:`pop` finds them."""
        self._next_available = (self._next_available - count) & _INDEX
        self._outstanding -= count

    def chains(self) -> Iterator[Chain]:
        """Take buffers until none is left and the driver has been asked to notify of more.

        Raises:
            QueueError: as :meth:`pop`.
        """
        while True:
            chain = self.pop()
            while chain is not None:
                yield chain
                chain = self.pop()
            if not self.rearm():
                return

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
        """Give a buffer back, ``written`` bytes of its writable part being filled.

        A buffer from before a reset is dropped. The driver is not interrupted before :meth:`signal`.
        """
        if chain.generation != self.generation or not self.ready:
            return
        left = written
        for address, length in chain.writable:
            if left <= 0:
                break
            self.memory.notify(address, min(left, length))
            left -= length
        element = 1 + 2 * (self._next_used & self._mask)
        self._used_words[element] = chain.head
        self._used_words[element + 1] = written
        self._next_used = (self._next_used + 1) & _INDEX
        self._outstanding -= 1
        # The element is stored before the index: x86 keeps the order of stores.
        self._used_halves[1] = self._next_used
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
        """The queue as a plain value; no buffer may be outstanding."""
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
        }

    def _chain(self, head: int) -> Chain:
        chain = Chain(self.memory, head, self.generation)
        table, count, index, indirect = self._table, self.size, head, False
        base, end = self.memory.base, self.memory.end
        readable, writable = chain.readable, chain.writable
        steps = 0
        while True:
            if index >= count:
                raise QueueError(f"descriptor {index} of the chain at {head} is beyond a table of {count}")
            steps += 1
            if steps > MAX_CHAIN or (not indirect and steps > count):
                raise QueueError(f"the chain at descriptor {head} is longer than its table, a loop")
            address, length, flags, follower = DESCRIPTOR.unpack_from(table, 16 * index)
            if not base <= address or address + length > end:
                raise QueueError(
                    f"descriptor {index} of the chain at {head} names {address:#x}+{length:#x}, outside memory"
                    f" {base:#x}..{end:#x}"
                )
            if not length:
                raise QueueError(f"descriptor {index} of the chain at {head} has no bytes")
            if flags & INDIRECT:
                # 2.7.5.3.1: offered, not nested, and the last of its chain.
                if not self._indirect or indirect or flags & NEXT or length % 16:
                    raise QueueError(
                        f"descriptor {index} of the chain at {head} is an indirect one where none may be,"
                        f" or its table of {length} bytes is not made of 16-byte descriptors"
                    )
                table, count, index, indirect = self.memory.view(address, length), length // 16, 0, True
                continue
            if chain.readable_bytes + chain.writable_bytes + length > self.memory.size:
                raise QueueError(f"the chain at descriptor {head} has more bytes than memory, {self.memory.size}")
            if flags & WRITE:
                chain.writable_bytes += length
                segments = writable
            else:
                if writable:
                    raise QueueError(
                        f"descriptor {index} of the chain at {head} is to be read, behind one to be written"
                    )
                chain.readable_bytes += length
                segments = readable
            if segments and segments[-1][0] + segments[-1][1] == address:
                segments[-1] = (segments[-1][0], segments[-1][1] + length)
            else:
                segments.append((address, length))
            if not flags & NEXT:
                return chain
            index = follower
