"""Chains of descriptors, as the device takes them from the split virtqueue: what they hold, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.devices.virtio.rings import BASE, DATA, END, INDIRECT_TABLE, SIZE, Part, rings
from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, MAX_CHAIN, NEXT, WRITE, QueueError

# Chains.


def test_direct_chain_has_parts_to_read_and_parts_to_write() -> None:
    with rings() as driver:
        driver.chain([(DATA, 16, 0), (DATA + 0x1000, 32, WRITE), (DATA + 0x3000, 1, WRITE)])
        driver.memory.write(DATA, b"0123456789abcdef")

        chain = driver.take()

        assert (chain.head, chain.readable, chain.readable_bytes) == (0, [(DATA, 16)], 16)
        assert (chain.writable, chain.writable_bytes) == ([(DATA + 0x1000, 32), (DATA + 0x3000, 1)], 33)
        assert chain.read() == b"0123456789abcdef"
        assert chain.write(b"x" * 40) == 33
        assert driver.memory.read(DATA + 0x1000, 33) == b"x" * 32 + b"\0"
        assert driver.memory.read(DATA + 0x3000, 2) == b"x\0"


def test_chain_follows_next_in_any_order() -> None:
    with rings() as driver:
        driver.describe(5, DATA, 1, NEXT, 2)
        driver.describe(2, DATA + 8, 2, NEXT, 7)
        driver.describe(7, DATA + 16, 3, 0)
        driver.offer(5)

        chain = driver.queue.pop()

        assert chain is not None
        assert (chain.head, chain.readable) == (5, [(DATA, 1), (DATA + 8, 2), (DATA + 16, 3)])


def test_indirect_table_stands_for_the_whole_chain() -> None:
    with rings() as driver:
        driver.indirect([(DATA, 4, 0), (DATA + 64, 8, WRITE)])

        chain = driver.take()

        assert (chain.head, chain.readable, chain.writable) == (0, [(DATA, 4)], [(DATA + 64, 8)])


def test_indirect_table_may_be_longer_than_the_queue_and_in_any_order() -> None:
    with rings(size=2) as driver:
        driver.memory.write(INDIRECT_TABLE, DESCRIPTOR.pack(DATA, 1, NEXT, 2))
        driver.memory.write(INDIRECT_TABLE + 16, DESCRIPTOR.pack(DATA + 20, 1, 0, 0))
        driver.memory.write(INDIRECT_TABLE + 32, DESCRIPTOR.pack(DATA + 10, 1, NEXT, 1))
        driver.describe(0, INDIRECT_TABLE, 48, INDIRECT)

        assert driver.take().readable == [(DATA, 1), (DATA + 10, 1), (DATA + 20, 1)]


def test_indirect_descriptor_may_end_a_direct_chain() -> None:
    # 2.7.5.3.2: zero or more normal descriptors followed by an indirect one.
    with rings() as driver:
        driver.describe(0, DATA, 4, NEXT, 1)
        driver.indirect([(DATA + 64, 4, 0), (DATA + 128, 8, WRITE)], index=1)

        assert driver.take().readable == [(DATA, 4), (DATA + 64, 4)]


def test_write_flag_of_an_indirect_descriptor_is_ignored() -> None:
    # 2.7.5.3.2
    with rings() as driver:
        driver.indirect([(DATA, 4, 0)], flags=INDIRECT | WRITE)

        assert driver.take().readable == [(DATA, 4)]


@pytest.mark.parametrize("indirect", [False, True])
def test_parts_that_touch_are_one_segment_but_reading_and_writing_are_two(indirect: bool) -> None:
    with rings() as driver:
        parts = [
            (DATA, 16, 0),
            (DATA + 16, 16, 0),
            (DATA + 32, 16, WRITE),
            (DATA + 48, 16, WRITE),
            (DATA + 65, 15, WRITE),
        ]
        (driver.indirect if indirect else driver.chain)(parts)

        chain = driver.take()

        assert chain.readable == [(DATA, 32)]
        assert chain.writable == [(DATA + 32, 32), (DATA + 65, 15)]
        assert (chain.readable_bytes, chain.writable_bytes) == (32, 47)


def test_descriptors_are_read_once() -> None:
    with rings() as driver:
        driver.indirect([(DATA, 4, 0)])
        chain = driver.take()

        driver.memory.write(INDIRECT_TABLE, DESCRIPTOR.pack(0, 0xFFFF_FFFF, 0, 0))
        driver.describe(0, 0, 0xFFFF_FFFF, 0)

        assert chain.readable == [(DATA, 4)]
        assert chain.read() == bytes(4)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    gaps=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    offset=st.integers(0, 130),
    length=st.none() | st.integers(0, 130),
)
def test_views_are_the_bytes_of_the_segments(
    lengths: list[int], gaps: list[int], offset: int, length: int | None
) -> None:
    with rings() as driver:
        parts, whole, address = [], bytearray(), DATA
        for number, (size, gap) in enumerate(zip(lengths, gaps, strict=False)):
            content = bytes([number + 1]) * size
            driver.memory.write(address, content)
            parts.append((address, size, 0))
            whole += content
            address += size + gap
        driver.chain(parts)

        chain = driver.take()

        assert chain.read(offset, length) == whole[offset : None if length is None else offset + length]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    offset=st.integers(0, 130),
    data=st.binary(max_size=130),
)
def test_what_is_written_to_a_chain_is_read_back_through_its_views(
    lengths: list[int], offset: int, data: bytes
) -> None:
    with rings() as driver:
        driver.chain([(DATA + 32 * number, size, WRITE) for number, size in enumerate(lengths)])
        chain = driver.take()

        done = chain.write(data, offset)

        room = max(sum(lengths) - offset, 0)
        assert done == min(len(data), room)
        assert b"".join(chain.writable_views(offset, done)) == data[:done]


LONG = 40  # descriptors: such an indirect table is read column by column


@given(gaps=st.lists(st.sampled_from([0, 8]), min_size=LONG, max_size=LONG), to_read=st.integers(0, LONG))
def test_long_indirect_table_is_the_same_chain_as_a_direct_one(gaps: list[int], to_read: int) -> None:
    with rings(size=64) as driver:
        address, parts = DATA, []
        for number, gap in enumerate(gaps):
            parts.append((address, number + 1, 0 if number < to_read else WRITE))
            address += number + 1 + gap
        driver.chain(parts)
        direct = driver.take()
        driver.queue.push(direct, 0)
        driver.indirect(parts)

        indirect = driver.take()

        assert (indirect.readable, indirect.writable) == (direct.readable, direct.writable)
        assert (indirect.readable_bytes, indirect.writable_bytes) == (direct.readable_bytes, direct.writable_bytes)


def test_long_indirect_table_may_be_in_any_order() -> None:
    order = [0, *reversed(range(1, LONG))]
    with rings() as driver:
        for number, follower in zip(order, [*order[1:], 0], strict=True):
            entry = DESCRIPTOR.pack(DATA + 8 * number, 4, NEXT if follower else 0, follower)
            driver.memory.write(INDIRECT_TABLE + 16 * number, entry)
        driver.describe(0, INDIRECT_TABLE, 16 * LONG, INDIRECT)

        assert driver.take().readable == [(DATA + 8 * number, 4) for number in order]


def test_chain_may_end_before_its_long_indirect_table() -> None:
    with rings() as driver:
        driver.indirect([(DATA + 8 * number, 4, WRITE) for number in range(LONG)])
        driver.memory.write(INDIRECT_TABLE + 16 * 20, DESCRIPTOR.pack(DATA + 8 * 20, 4, WRITE, 0))

        assert driver.take().writable == [(DATA + 8 * number, 4) for number in range(21)]


# What is refused.

BAD_PARTS = [
    ([(BASE - 1, 2, 0)], "outside memory"),
    ([(0, 4, 0)], "outside memory"),
    ([(END - 3, 4, WRITE)], "outside memory"),
    ([(END, 1, 0)], "outside memory"),
    ([((1 << 64) - 1, 2, 0)], "outside memory"),
    ([(BASE, 0xFFFF_FFFF, 0)], "outside memory"),
    ([(DATA, 0, 0)], "has no bytes"),
    ([(DATA, 4, WRITE), (DATA, 4, 0)], "is to be read, behind one to be written"),
    ([(BASE, SIZE, 0), (BASE, 1, 0)], f"has {SIZE + 1} bytes, more than {SIZE}"),
]


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(("parts", "message"), BAD_PARTS)
def test_bad_descriptor_is_refused(parts: list[Part], message: str, indirect: bool) -> None:
    with rings() as driver:
        (driver.indirect if indirect else driver.chain)(parts)
        if parts[0][0] == BASE and len(parts) == 2:  # the parts cover the rings: nothing was overwritten yet
            assert driver.used_index == 0
        driver.offer(0)

        with pytest.raises(QueueError, match=message):
            driver.queue.pop()
        assert not driver.queue.held


@pytest.mark.parametrize("place", [0, 25, LONG - 1])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((BASE - 1, 2, WRITE), "outside memory"),
        ((END - 3, 4, WRITE), "outside memory"),
        (((1 << 64) - 1, 2, WRITE), "outside memory"),
        ((DATA, 0, WRITE), "has no bytes"),
        ((INDIRECT_TABLE, 16, WRITE | INDIRECT), "indirect one where none may be"),
        ((BASE, SIZE, WRITE), f"bytes, more than {SIZE}"),
    ],
)
def test_bad_descriptor_of_a_long_indirect_table_is_refused(bad: Part, message: str, place: int) -> None:
    parts = [(DATA + 8 * number, 4, WRITE) for number in range(LONG)]
    parts[place] = bad
    with rings() as driver:
        driver.indirect(parts)
        driver.offer(0)

        with pytest.raises(QueueError, match=message):
            driver.queue.pop()
        assert not driver.queue.held


def test_descriptor_to_read_behind_others_to_write_in_a_long_indirect_table_is_refused() -> None:
    with rings() as driver:
        driver.indirect([(DATA + 8 * number, 4, 0 if number == 30 else WRITE) for number in range(LONG)])
        driver.offer(0)

        with pytest.raises(QueueError, match=r"descriptor 30 .* is to be read, behind one to be written"):
            driver.queue.pop()


def test_last_byte_of_memory_may_be_named() -> None:
    with rings() as driver:
        driver.chain([(END - 1, 1, WRITE)])

        assert driver.take().writable == [(END - 1, 1)]


def test_loop_in_the_table_is_refused() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 4, NEXT, 1)
        driver.describe(1, DATA, 4, NEXT, 0)
        driver.offer(0)

        with pytest.raises(QueueError, match="a loop"):
            driver.queue.pop()


def test_loop_in_an_indirect_table_is_refused() -> None:
    with rings() as driver:
        driver.memory.write(INDIRECT_TABLE, DESCRIPTOR.pack(DATA, 4, NEXT, 0))
        driver.describe(0, INDIRECT_TABLE, 16, INDIRECT)
        driver.offer(0)

        with pytest.raises(QueueError, match="a loop"):
            driver.queue.pop()


@pytest.mark.parametrize(("head", "follower"), [(8, 0), (0xFFFF, 0), (0, 8), (0, 0xFFFF)])
def test_descriptor_beyond_the_table_is_refused(head: int, follower: int) -> None:
    with rings(size=8) as driver:
        driver.describe(0, DATA, 4, NEXT, follower)
        driver.offer(head)

        with pytest.raises(QueueError, match="beyond a table of 8"):
            driver.queue.pop()


def test_descriptor_beyond_an_indirect_table_is_refused() -> None:
    with rings() as driver:
        driver.memory.write(INDIRECT_TABLE, DESCRIPTOR.pack(DATA, 4, NEXT, 1))
        driver.describe(0, INDIRECT_TABLE, 16, INDIRECT)
        driver.offer(0)

        with pytest.raises(QueueError, match=r"descriptor 1 .* beyond a table of 1"):
            driver.queue.pop()


@pytest.mark.parametrize(
    ("address", "length", "flags"),
    [
        (INDIRECT_TABLE, 15, INDIRECT),
        (INDIRECT_TABLE, 24, INDIRECT),
        (INDIRECT_TABLE, 16, INDIRECT | NEXT),
    ],
)
def test_bad_indirect_descriptor_is_refused(address: int, length: int, flags: int) -> None:
    with rings() as driver:
        driver.memory.write(INDIRECT_TABLE, DESCRIPTOR.pack(DATA, 4, 0, 0))
        driver.describe(0, address, length, flags, 1)
        driver.offer(0)

        with pytest.raises(QueueError, match="indirect one where none may be"):
            driver.queue.pop()


def test_nested_indirect_table_is_refused() -> None:
    with rings() as driver:
        driver.indirect([(INDIRECT_TABLE, 16, INDIRECT)])
        driver.offer(0)

        with pytest.raises(QueueError, match="indirect one where none may be"):
            driver.queue.pop()


def test_indirect_table_without_the_feature_is_refused() -> None:
    with rings(indirect=False) as driver:
        driver.indirect([(DATA, 4, 0)])
        driver.offer(0)

        with pytest.raises(QueueError, match="indirect one where none may be"):
            driver.queue.pop()


def test_only_the_longest_possible_chain_of_a_huge_indirect_table_is_looked_at() -> None:
    with rings() as driver:
        table = DATA
        for number in range(MAX_CHAIN):
            driver.memory.write(table + 16 * number, DESCRIPTOR.pack(END - 8, 1, NEXT, number + 1))
        driver.describe(0, table, (END - table) // 16 * 16, INDIRECT)
        driver.offer(0)

        with pytest.raises(QueueError, match=f"descriptor {MAX_CHAIN} of the chain at 0 is beyond a table"):
            driver.queue.pop()
