"""The split virtqueue's indices, interrupts and states, with a driver's half that writes whatever a test wants."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.devices.virtio.rings import AVAILABLE, BASE, DATA, END, SIZE, TABLE, USED, rings
from vmm.devices.virtio.queue import (
    WRITE,
    Chain,
    DeviceError,
    Queue,
    QueueError,
)
from vmm.memory import GuestMemory

# Indices.


@pytest.mark.parametrize("ahead", [9, 0x8000, 0xFFFF])
def test_available_index_that_runs_too_far_or_backwards_is_refused(ahead: int) -> None:
    with rings(size=8) as driver:
        driver.memory.write_int(AVAILABLE + 2, 2, ahead)

        with pytest.raises(QueueError, match=f"available index {ahead} is {ahead} ahead of the device's 0"):
            driver.queue.pop()
        with pytest.raises(QueueError, match=f"available index {ahead} is {ahead} ahead"):
            assert driver.queue.waiting


def test_buffers_taken_count_as_ahead() -> None:
    with rings(size=2) as driver:
        driver.describe(0, DATA, 1, 0)
        driver.describe(1, DATA, 1, 0)
        driver.offer(0, 1)
        taken = [driver.queue.pop(), driver.queue.pop()]
        driver.offer(0)

        with pytest.raises(QueueError, match="1 ahead of the device's 2 with 2 buffers taken"):
            driver.queue.pop()
        assert len(taken) == 2


def test_descriptor_that_the_device_still_has_is_refused() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 1, 0)
        chain = driver.take()
        driver.offer(0)

        with pytest.raises(QueueError, match="descriptor 0 was made available again"):
            driver.queue.pop()
        assert chain.head == 0


@pytest.mark.parametrize("size", [1, 2, 256, 1024])
def test_indices_wrap_at_65536(size: int) -> None:
    with rings(size=size, event_index=True, start=0xFFFE) as driver:
        driver.describe(0, DATA, 4, WRITE)
        for step in range(5):
            driver.want(driver.used_index)

            chain = driver.take()
            driver.queue.push(chain, step % 5)
            driver.queue.signal()
            assert not driver.queue.rearm()

            index = 0xFFFE + step & 0xFFFF
            assert driver.used(index) == (0, step % 5)
            assert driver.used_index == driver.avail_event == index + 1 & 0xFFFF
            assert driver.interrupts == step + 1


def test_used_element_holds_head_and_length() -> None:
    with rings() as driver:
        driver.describe(3, DATA, 100, WRITE)
        driver.offer(3)
        chain = driver.queue.pop()
        assert chain is not None

        driver.queue.push(chain, 77)

        assert driver.used_index == 1
        assert driver.used(0) == (3, 77)


def test_buffers_may_be_given_back_in_any_order() -> None:
    with rings() as driver:
        for index in range(3):
            driver.describe(index, DATA, 1, 0)
        driver.offer(0, 1, 2)
        first, second, third = (driver.queue.pop() for _ in range(3))
        assert first
        assert second
        assert third

        for chain in (third, first, second):
            driver.queue.push(chain, 0)

        assert [driver.used(number)[0] for number in range(3)] == [2, 0, 1]


def test_rewound_buffers_are_taken_again_in_order() -> None:
    with rings(start=0xFFFF) as driver:
        for index in range(3):
            driver.describe(index, DATA, 1, 0)
        driver.offer(0, 1, 2)
        first = driver.queue.pop()
        taken = [driver.queue.pop(), driver.queue.pop()]
        assert first

        driver.queue.rewind(2)

        assert driver.queue.waiting == 2
        assert list(driver.queue.held) == [0]
        heads = [chain.head for chain in (driver.queue.pop(), driver.queue.pop()) if chain]
        assert heads == [chain.head for chain in taken if chain] == [1, 2]


def test_rewinding_more_than_is_held_is_refused() -> None:
    with rings() as driver, pytest.raises(DeviceError, match="1 buffers cannot be put back"):
        driver.queue.rewind()


def test_chains_end_when_the_driver_has_been_asked_to_notify() -> None:
    with rings(event_index=True) as driver:
        for index in range(3):
            driver.describe(index, DATA, 1, 0)
        driver.offer(0, 1, 2)

        heads = []
        for chain in driver.queue.chains():
            heads.append(chain.head)
            driver.queue.push(chain, 0)

        assert heads == [0, 1, 2]
        assert driver.avail_event == 3


def test_driver_that_never_stops_is_interrupted_meanwhile() -> None:
    with rings(size=4) as driver:
        driver.describe(0, DATA, 1, 0)
        driver.offer(0)
        for served, chain in enumerate(driver.queue.chains()):
            driver.queue.push(chain, 0)
            if served == 20:
                break
            driver.offer(0)

        assert driver.interrupts == 5


# Interrupts.


def test_flag_of_the_available_ring_suppresses_interrupts() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 1, 0)
        driver.memory.write_int(AVAILABLE, 2, 1)
        driver.queue.push(driver.take(), 0)
        driver.queue.signal()
        assert driver.interrupts == 0

        driver.memory.write_int(AVAILABLE, 2, 0)
        driver.queue.push(driver.take(), 0)
        driver.queue.signal()
        assert driver.interrupts == 1


def test_signal_without_news_does_not_interrupt() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 1, 0)
        driver.queue.push(driver.take(), 0)
        driver.queue.signal()
        driver.queue.signal()

        assert driver.interrupts == 1


@given(
    start=st.integers(0, 0xFFFF),
    batches=st.lists(st.tuples(st.integers(0, 8), st.integers(-12, 12)), max_size=8),
)
def test_event_index_interrupts_exactly_when_the_wanted_element_is_used(
    start: int, batches: list[tuple[int, int]]
) -> None:
    with rings(size=8, event_index=True, start=start) as driver:
        driver.describe(0, DATA, 1, 0)
        used = start
        for count, distance in batches:
            wanted = used + distance
            driver.want(wanted & 0xFFFF)
            before = driver.interrupts
            for _ in range(count):
                driver.queue.push(driver.take(), 0)

            driver.queue.signal()

            # 2.7.7.2: the driver hears of the element number used_event, once it is there.
            expected = any(element & 0xFFFF == wanted & 0xFFFF for element in range(used, used + count))
            assert driver.interrupts - before == expected
            used += count


# Enabling, resetting, saving.


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("size", 0, "queue size 0 must be a power of two"),
        ("size", 3, "queue size 3 must be a power of two"),
        ("size", 2048, "queue size 2048 must be a power of two"),
        ("size", 0xFFFF_FFFF, "must be a power of two"),
        ("descriptors", TABLE + 8, "descriptor table at 0x80000008 must be aligned to 16"),
        ("available", AVAILABLE + 1, "available ring at 0x80008001 must be aligned to 2"),
        ("used", USED + 2, "used ring at 0x80010002 must be aligned to 4"),
        ("descriptors", 0, "outside memory"),
        ("available", END - 4, "outside memory"),
        ("used", END, "outside memory"),
        ("used", (1 << 64) - 4, "outside memory"),
    ],
)
def test_bad_area_is_refused(attribute: str, value: int, message: str) -> None:
    with GuestMemory(BASE, SIZE) as memory:
        queue = Queue(memory, 1024, lambda: None)
        queue.size, queue.descriptors, queue.available, queue.used = 16, TABLE, AVAILABLE, USED
        setattr(queue, attribute, value)

        with pytest.raises(QueueError, match=message):
            queue.enable(True, True)
        assert not queue.ready
        assert queue.pop() is None


@pytest.mark.parametrize("size", [0, 3, 2048, -4])
def test_maximum_that_is_no_power_of_two_is_refused(size: int) -> None:
    with GuestMemory(BASE, SIZE) as memory, pytest.raises(ValueError, match="power of two from 1 to 1024"):
        Queue(memory, size, lambda: None)


@pytest.mark.parametrize("again", ["reset", "release"])
def test_buffer_from_before_a_reset_is_not_given_back(again: str) -> None:
    with rings() as driver:
        driver.describe(0, DATA, 4, WRITE)
        chain = driver.take()

        getattr(driver.queue, again)()
        driver.queue.size, driver.queue.descriptors = 8, TABLE
        driver.queue.available, driver.queue.used = AVAILABLE, USED
        driver.memory.write(AVAILABLE, bytes(64))
        driver.queue.enable(False, True)
        driver.index = 0
        new = driver.take()
        driver.queue.push(chain, 4)

        assert driver.used_index == 0
        driver.queue.push(new, 3)
        assert driver.used(0) == (0, 3)


def test_queue_that_is_not_ready_has_nothing() -> None:
    with GuestMemory(BASE, SIZE) as memory:
        queue = Queue(memory, 8, lambda: None)

        assert queue.pop() is None
        assert list(queue.chains()) == []
        assert (queue.waiting, queue.rearm()) == (0, False)
        queue.signal()
        assert queue.view() == {"size": 8, "ready": False}


def test_saved_queue_goes_on_where_it_was() -> None:
    with rings(event_index=True, start=0xFFFF) as driver:
        driver.describe(0, DATA, 1, 0)
        driver.want(0xFFFF)
        driver.queue.push(driver.take(), 0)
        driver.queue.signal()
        state = driver.queue.save()
        before = driver.queue.view()

        driver.queue.restore(state, True, True)

        assert driver.queue.save() == state
        assert driver.queue.view() == before
        driver.want(0)
        driver.queue.push(driver.take(), 0)
        driver.queue.signal()
        assert (driver.used_index, driver.interrupts) == (1, 2)


def test_queue_whose_device_holds_buffers_is_not_saved() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 1, 0)
        chain = driver.take()

        with pytest.raises(DeviceError, match=r"cannot be saved while its device holds buffers, .* \[0\]"):
            driver.queue.save()
        driver.queue.push(chain, 0)


def test_saved_queue_that_does_not_fit_the_memory_is_refused() -> None:
    with rings() as driver:
        state = dataclasses.replace(driver.queue.save(), used=END)

        with pytest.raises(QueueError, match="outside memory"):
            driver.queue.restore(state, True, True)


# The device's own mistakes.


def test_giving_back_twice_is_refused() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 1, 0)
        chain = driver.take()
        driver.queue.push(chain, 0)

        with pytest.raises(DeviceError, match="descriptor 0 is not the device's any more: give it back once"):
            driver.queue.push(chain, 0)
        assert driver.used_index == 1


def test_giving_back_what_was_put_back_is_refused() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 1, 0)
        chain = driver.take()
        driver.queue.rewind()

        with pytest.raises(DeviceError, match="not the device's any more"):
            driver.queue.push(chain, 0)


@pytest.mark.parametrize("written", [-1, 5, 1 << 32])
def test_more_bytes_than_the_buffer_has_are_refused(written: int) -> None:
    with rings() as driver:
        driver.chain([(DATA, 8, 0), (DATA + 8, 4, WRITE)])
        chain = driver.take()

        with pytest.raises(DeviceError, match=f"with {written} bytes written, it has room for 4"):
            driver.queue.push(chain, written)
        driver.queue.push(chain, 4)


def test_dropped_buffer_is_noted_as_lost() -> None:
    with rings() as driver:
        driver.describe(3, DATA, 1, 0)
        driver.offer(3)

        driver.queue.pop()

        assert driver.queue.lost == [3]


def test_buffers_that_are_given_back_put_back_or_from_before_a_reset_are_not_lost() -> None:
    with rings() as driver:
        driver.describe(0, DATA, 1, 0)
        chain: Chain | None = driver.take()
        assert chain
        driver.queue.push(chain, 0)
        chain = driver.take()
        driver.queue.rewind()
        chain = driver.queue.pop()
        driver.queue.release()
        del chain

        assert driver.queue.lost == []


# What else sees a request.


def test_memory_hears_what_was_written_and_no_more() -> None:
    with rings() as driver:
        driver.chain([(DATA, 8, 0), (DATA + 0x100, 8, WRITE), (DATA + 0x200, 8, WRITE), (DATA + 0x300, 8, WRITE)])
        chain = driver.take()
        heard: list[tuple[int, int]] = []
        driver.memory.subscribe(lambda address, length: heard.append((address, length)))

        driver.queue.push(chain, 12)

        assert heard == [(DATA + 0x100, 8), (DATA + 0x200, 4)]


def test_recent_requests_are_kept_while_traced() -> None:
    with rings() as driver:
        driver.chain([(DATA, 8, 0), (DATA + 0x100, 16, WRITE)])
        driver.queue.push(driver.take(), 1)
        driver.queue.tracing = True
        chain = driver.take()
        chain.detail = "something"
        driver.queue.push(chain, 2)

        (request,) = driver.queue.recent
        assert (request.head, request.readable, request.writable, request.written) == (0, 8, 16, 2)
        assert request.detail == "something"
        assert request.seconds >= 0


def test_view_decodes_rings_and_table() -> None:
    with rings(size=2, event_index=True) as driver:
        driver.describe(0, DATA, 8, WRITE)
        driver.describe(1, DATA, 9, 0)
        driver.want(5)
        driver.queue.push(driver.take(), 3)
        driver.offer(1)
        chain = driver.queue.pop()

        view = driver.queue.view()

        assert view["table"] == [(DATA, 8, WRITE, 0), (DATA, 9, 0, 0)]
        assert (view["available"], view["available_index"], view["used_event"]) == ([0, 1], 2, 5)
        assert (view["used"], view["used_index"]) == ([(0, 3), (0, 0)], 1)
        assert (view["next_available"], view["next_used"], view["held"]) == (2, 1, [1])
        assert chain is not None
