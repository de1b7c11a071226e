"""The driver's side of a split virtqueue (virtio 1.2, section 2.7) in memory that the VMM shares with a back end.

The guest's own queue stays with the VMM, which takes the guest's buffers from it, checked, and describes them here to
the back end; data never come here. Every buffer has a slot: one descriptor in the table, which refers to an indirect
table of the slot's own::

    descriptor table   size × 16 bytes       slot n: address and length of indirect table n
    available ring     6 + 2 × size          slots, written by us
    used ring          6 + 8 × size          slots and bytes written, written by the back end
    indirect tables    size × 16 KiB         of buffers that are in use; a page is touched with its first buffer

The back end is not trusted with more than it must be: what it gives back must be a buffer that it has, with no more
bytes than the buffer has. Words are written in the host's order, stores are taken to be seen in the order in which they
are made (see :mod:`vmm.devices.virtio.queue`). Event index is left out: every notification is sent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, MAX_CHAIN, NEXT, WRITE, Chain
from vmm.memory import PAGE_SIZE, GuestMemory
from vmm.vhost.messages import VhostError

TABLE_BYTES: Final = MAX_CHAIN * DESCRIPTOR.size  #: of an indirect table

_INDEX: Final = 0xFFFF
_HALF: Final = struct.Struct("=H")
_ELEMENT: Final = struct.Struct("=II")


class ForwardRing:
    """A ring in shared memory.

    Args:
        memory: where it is.
        start: its guest-physical address there, a multiple of the page size.
        size: slots, a power of two.
    """

    def __init__(self, memory: GuestMemory, start: int, size: int) -> None:
        self.size = size
        self.table = start
        self.available = start + DESCRIPTOR.size * size
        self.used = self.available + _aligned(6 + 2 * size, 4)
        self._tables = _aligned(self.used + 6 + 8 * size, PAGE_SIZE)
        self._view = memory.view(start, self.bytes_for(size))
        self._available_at, self._used_at = self.available - start, self.used - start
        self._tables_at = self._tables - start
        self.reset()

    @staticmethod
    def bytes_for(size: int) -> int:
        """Bytes of a ring, a multiple of the page size."""
        head = DESCRIPTOR.size * size + _aligned(6 + 2 * size, 4) + 6 + 8 * size
        return _aligned(head, PAGE_SIZE) + size * TABLE_BYTES

    def reset(self) -> None:
        """Begin anew; the back end must not use the ring meanwhile."""
        self._view[: self._tables_at] = bytes(self._tables_at)
        self._chains: dict[int, Chain] = {}
        self._free = list(range(self.size))
        self._next_available = self._next_used = 0

    @property
    def chains(self) -> list[Chain]:
        """The buffers that the back end has, in the order in which it got them."""
        return list(self._chains.values())

    @property
    def next_used(self) -> int:
        """The index up to which buffers have come back."""
        return self._next_used

    def put(self, chain: Chain) -> bool:
        """Let the back end have a buffer; False if there is no slot for it."""
        if not self._free:
            return False
        slot = self._free.pop()
        parts = [(*segment, 0) for segment in chain.readable] + [(*segment, WRITE) for segment in chain.writable]
        place = self._tables_at + slot * TABLE_BYTES
        last = len(parts) - 1
        for number, (address, length, flags) in enumerate(parts):
            flags |= NEXT if number < last else 0
            DESCRIPTOR.pack_into(self._view, place + DESCRIPTOR.size * number, address, length, flags, number + 1)
        length = DESCRIPTOR.size * len(parts)
        address = self._tables + slot * TABLE_BYTES
        DESCRIPTOR.pack_into(self._view, DESCRIPTOR.size * slot, address, length, INDIRECT, 0)
        index = self._next_available
        _HALF.pack_into(self._view, self._available_at + 4 + 2 * (index & self.size - 1), slot)
        self._chains[slot] = chain
        # The slot is stored before the index: x86 keeps the order of stores.
        self._next_available = index + 1 & _INDEX
        _HALF.pack_into(self._view, self._available_at + 2, self._next_available)
        return True

    def take(self) -> Iterator[tuple[Chain, int]]:
        """The buffers that the back end has given back, with the number of bytes that it wrote.

        Raises:
            VhostError: it gave back what it did not have, or wrote more than there is room for.
        """
        while (index := self._next_used) != _HALF.unpack_from(self._view, self._used_at + 2)[0]:
            place = self._used_at + 4 + _ELEMENT.size * (index & self.size - 1)
            slot, written = _ELEMENT.unpack_from(self._view, place)
            chain = self._chains.pop(slot, None)
            if chain is None:
                raise VhostError(f"the back end gave back buffer {slot}, which it does not have")
            self._free.append(slot)
            self._next_used = index + 1 & _INDEX
            if written > chain.writable_bytes:
                self._chains[slot] = chain
                raise VhostError(
                    f"the back end gave back a buffer with {written} bytes written, it has room for"
                    f" {chain.writable_bytes}"
                )
            yield chain, written

    def close(self) -> None:
        """Let go of the memory."""
        self._chains.clear()
        self._view.release()


def _aligned(length: int, to: int) -> int:
    return -(-length // to) * to
