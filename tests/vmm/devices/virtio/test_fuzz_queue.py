"""Descriptor tables of all kinds through the queue, against a slow model that reads like the specification (2.7)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, NEXT, WRITE, Chain, Queue, QueueError
from vmm.memory import GuestMemory

BASE = 0x8000_0000
SIZE = 64 << 10
QUEUE = 8
TABLE, AVAILABLE, USED, INDIRECT_TABLE = BASE, BASE + 0x1000, BASE + 0x2000, BASE + 0x3000

EXAMPLES = 400  #: raise it to look for longer

Descriptor = tuple[int, int, int, int]

ADDRESSES = st.one_of(
    st.integers(BASE + 0x4000, BASE + 0x4010),
    st.sampled_from([0, BASE - 1, BASE, BASE + SIZE - 1, BASE + SIZE, (1 << 64) - 1, INDIRECT_TABLE]),
)
LENGTHS = st.one_of(st.integers(0, 5), st.sampled_from([16, 32, 48, SIZE - 1, SIZE, SIZE + 1, 0xFFFF_FFFF]))
FLAGS = st.sampled_from([0, NEXT, NEXT, NEXT, WRITE, WRITE | NEXT, WRITE | NEXT, 8, INDIRECT, INDIRECT | NEXT, 7])
FOLLOWERS = st.one_of(st.integers(0, QUEUE), st.just(0xFFFF))
ANYTHING = st.tuples(ADDRESSES, LENGTHS, FLAGS, FOLLOWERS)
GOOD = st.builds(
    lambda offset, length, flags, follower: (BASE + 0x4000 + offset, length, flags, follower),
    st.integers(0, 64),
    st.integers(1, 32),
    st.sampled_from([NEXT, NEXT, NEXT, WRITE | NEXT, WRITE, 0]),
    st.integers(0, QUEUE - 1),
)
TO_INDIRECT = st.builds(
    lambda count, flags: (INDIRECT_TABLE, 16 * count, INDIRECT | flags, 0),
    st.integers(1, 10),
    st.sampled_from([0, 0, 0, WRITE, NEXT]),
)
TABLES = st.lists(st.one_of(GOOD, GOOD, TO_INDIRECT, ANYTHING), min_size=QUEUE, max_size=QUEUE)


class Refused(Exception):
    """What the model says instead of a buffer."""


@dataclass
class Model:
    """A chain, one descriptor after another."""

    table: list[Descriptor]
    indirect_table: list[Descriptor]
    indirect_offered: bool

    def buffer(self, head: int) -> tuple[list[range], list[range]]:
        """Addresses to read, and those to write."""
        to_read: list[range] = []
        to_write: list[range] = []
        total = 0
        for address, length, flags in self._walk(self.table, head, nested=False):
            total += length
            if not flags & WRITE and to_write:
                raise Refused("to be read, behind one to be written")
            if total > SIZE:
                raise Refused("more bytes than memory")
            (to_write if flags & WRITE else to_read).append(range(address, address + length))
        return merged(to_read), merged(to_write)

    def _walk(self, table: list[Descriptor], index: int, nested: bool) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for _ in range(len(table)):
            if index >= len(table):
                raise Refused("beyond the table")
            address, length, flags, follower = table[index]
            if length == 0 or address < BASE or address + length > BASE + SIZE:
                raise Refused("outside memory, or empty")
            if flags & INDIRECT:
                if nested or not self.indirect_offered or flags & NEXT or length % 16:
                    raise Refused("indirect where none may be")
                return found + self._walk(self._table_at(address, length), 0, nested=True)
            found.append((address, length, flags))
            if not flags & NEXT:
                return found
            index = follower
        raise Refused("a loop")

    def _table_at(self, address: int, length: int) -> list[Descriptor]:
        if address == INDIRECT_TABLE:
            zeros = [(0, 0, 0, 0)] * max(length // 16 - len(self.indirect_table), 0)
            return (self.indirect_table + zeros)[: length // 16]
        if address == TABLE:
            zeros = [(0, 0, 0, 0)] * max(length // 16 - len(self.table), 0)
            return (self.table + zeros)[: length // 16]
        return [(0, 0, 0, 0)]  # what lies elsewhere is zeros, hence a descriptor that is refused


def merged(ranges: list[range]) -> list[range]:
    """Neighbours that touch as one."""
    if len(ranges) < 2:
        return ranges
    first, second, *others = ranges
    if first.stop == second.start:
        return merged([range(first.start, second.stop), *others])
    return [first, *merged([second, *others])]


def ranges(segments: list[tuple[int, int]]) -> list[range]:
    return [range(address, address + length) for address, length in segments]


def pack(table: list[Descriptor]) -> bytes:
    return b"".join(DESCRIPTOR.pack(*each) for each in table)


@settings(max_examples=EXAMPLES, deadline=None)
@given(table=TABLES, indirect_table=TABLES, head=st.integers(0, QUEUE), indirect=st.booleans())
def test_every_chain_is_taken_or_refused_as_the_model_says(
    table: list[Descriptor], indirect_table: list[Descriptor], head: int, indirect: bool
) -> None:
    with GuestMemory(BASE, SIZE) as memory:
        memory.write(TABLE, pack(table))
        memory.write(INDIRECT_TABLE, pack(indirect_table))
        memory.write(AVAILABLE + 2, b"\1\0" + head.to_bytes(2, "little"))
        queue = Queue(memory, QUEUE, lambda: None)
        queue.descriptors, queue.available, queue.used = TABLE, AVAILABLE, USED
        queue.enable(False, indirect)
        chain: Chain | None = None
        try:
            expected = Model(table, indirect_table, indirect).buffer(head)
        except Refused:
            with pytest.raises(QueueError):
                queue.pop()
        else:
            chain = queue.pop()
            assert chain is not None
            assert (ranges(chain.readable), ranges(chain.writable)) == expected
            assert chain.readable_bytes == sum(map(len, expected[0]))
            assert chain.writable_bytes == sum(map(len, expected[1]))
        finally:
            queue.release()
