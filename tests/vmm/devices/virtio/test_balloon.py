"""The balloon, from its driver's side: pages given up, taken back and reported, statistics, and what a hostile driver
names."""

from __future__ import annotations

import array
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmm.devices.virtio.driver import BASE, PAGE, Buffer, Driver, driven
from vmm.config import BalloonConfig
from vmm.devices.virtio.balloon import (
    DEFLATE_ON_OOM,
    PAGE_POISON,
    REPORTING,
    STATISTICS,
    BalloonDevice,
    Statistics,
)
from vmm.errors import ConfigError, StateError

INFLATE, DEFLATE, STATS, REPORT = range(4)
ARENA = BASE + (8 << 20)  #: memory that the driver's own structures never reach
NUM_PAGES, ACTUAL, POISON = 0, 4, 12


def balloon(**settings: object) -> BalloonDevice:
    return BalloonDevice(BalloonConfig(**settings))


def numbers(*addresses: int) -> bytes:
    return array.array("I", [address // PAGE for address in addresses]).tobytes()


def statistic(**values: int) -> bytes:
    tags = {"free": 4, "total": 5, "available": 6}
    return b"".join(struct.pack("<HQ", tags.get(name, 99), value) for name, value in values.items())


def report(driver: Driver, *ranges: tuple[int, int], queue: int = REPORT) -> Buffer:
    """Report ranges of free memory in one buffer."""
    buffer = driver.add_at(queue, *ranges)
    driver.notify(queue)
    return buffer


def test_features_are_those_that_the_configuration_wants() -> None:
    assert balloon().features == STATISTICS | DEFLATE_ON_OOM | REPORTING | PAGE_POISON
    assert balloon(deflate_on_oom=False, free_page_reporting=False).features == STATISTICS


def test_inflated_pages_lose_their_content_and_others_keep_it() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.memory.write(ARENA, b"x" * 8 * PAGE)
        driver.request(INFLATE, [numbers(ARENA + 3 * PAGE, ARENA + PAGE, ARENA + 2 * PAGE, ARENA + 6 * PAGE)])

        kept = [driver.memory.read(ARENA + n * PAGE, PAGE) == b"x" * PAGE for n in range(8)]
        assert kept == [True, False, False, False, True, True, False, True]
        assert not any(driver.memory.read(ARENA + PAGE, 3 * PAGE))
        assert device.inflated_bytes == 4 * PAGE


def test_deflated_pages_can_be_written() -> None:
    with driven(balloon()) as driver:
        driver.request(INFLATE, [numbers(ARENA)])
        driver.request(DEFLATE, [numbers(ARENA)])
        driver.memory.write(ARENA, b"again")

        assert driver.memory.read(ARENA, 6) == b"again\0"


def test_a_page_number_outside_memory_is_ignored() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.memory.write(ARENA, b"x")
        below, above = BASE - PAGE, driver.memory.end
        driver.request(INFLATE, [numbers(0, below, ARENA, above) + b"\xff\xff\xff\xff"])

        assert not driver.needs_reset
        assert driver.memory.read(ARENA, 1) == b"\0"
        assert device.ignored_pages == 4
        assert device.inflated_bytes == PAGE


def test_a_page_named_a_thousand_times_counts_once() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.request(INFLATE, [numbers(ARENA, ARENA + PAGE) * 1_000])

        assert device.inflated_bytes == 2 * PAGE


@pytest.mark.parametrize(
    ("readable", "writable"), [([b"123"], []), ([b"1234"], [4]), ([], [64]), ([b"\0" * 17_000], [])]
)
@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
def test_a_buffer_that_is_no_list_of_pages_makes_the_device_ask_for_a_reset(
    queue: int, readable: list[bytes], writable: list[int]
) -> None:
    device = balloon()
    with driven(device) as driver:
        driver.add(queue, readable, writable)
        driver.notify(queue)

        assert driver.needs_reset
        assert "must hold page numbers of 4 bytes to read" in str(device.mistake)


def test_a_guest_that_gives_its_queues_away_harms_itself_only() -> None:
    with driven(balloon()) as driver:
        pages = range(BASE, BASE + (1 << 20), PAGE)
        driver.add(INFLATE, [numbers(*pages)])
        driver.notify(INFLATE)

        driver.start()
        driver.memory.write(ARENA, b"x")
        driver.request(INFLATE, [numbers(ARENA)])
        assert driver.memory.read(ARENA, 1) == b"\0"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=256).map(lambda data: data[: len(data) // 4 * 4]), st.integers(0, 4))
def test_any_page_numbers_leave_the_device_alive(data: bytes, queue: int) -> None:
    with driven(balloon()) as driver:
        if data:
            driver.add(queue, [data])
            driver.notify(queue)
        driver.start()
        driver.request(INFLATE, [numbers(ARENA)])


def test_the_target_is_told_to_the_driver() -> None:
    device = balloon(target_mib=2)
    with driven(device) as driver:
        assert driver.config(NUM_PAGES, 4) == 512
        generation = driver.get(0xFC)
        driver.acknowledge()

        device.set_target(5)

        assert driver.config(NUM_PAGES, 4) == 1280
        assert driver.get(0xFC) != generation
        assert driver.acknowledge() & 2
        assert device.target_mib == 5


def test_what_the_driver_says_it_gave_up_is_bounded_by_memory() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.slot.write(0x100 + ACTUAL, 4, 512)
        assert device.actual_mib == 2
        assert driver.config(ACTUAL, 4) == 512

        driver.slot.write(0x100 + ACTUAL, 4, 0xFFFF_FFFF)
        assert device.actual_mib == 16

        driver.slot.write(0x100 + NUM_PAGES, 4, 77)
        assert driver.config(NUM_PAGES, 4) == 0
        driver.slot.write(0x100 + 0xE00, 4, 1)
        assert not driver.needs_reset


@pytest.mark.parametrize("mib", [-1, 17, 1.5, True])
def test_an_impossible_target_is_refused(mib: object) -> None:
    device = balloon()
    with driven(device), pytest.raises(ConfigError, match=r"must be a whole number from 0 to 16"):
        device.set_target(mib)


def test_a_configured_target_beyond_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is 17 MiB, it must be at most the guest's memory, 16 MiB"):
        Driver(balloon(target_mib=17))


def test_reported_pages_are_given_back() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.memory.write(ARENA, b"x" * 8 * PAGE)
        buffer = report(driver, (ARENA, 2 * PAGE), (ARENA + 4 * PAGE, PAGE))

        assert driver.wait(REPORT) == [buffer]
        assert buffer.written == 0
        assert not any(driver.memory.read(ARENA, 2 * PAGE))
        assert driver.memory.read(ARENA + 2 * PAGE, 2 * PAGE) == b"x" * 2 * PAGE
        assert device.reported_bytes == 3 * PAGE


def test_only_whole_pages_of_a_report_are_given_back() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.memory.write(ARENA, b"x" * 3 * PAGE)
        report(driver, (ARENA + 1, 2 * PAGE))
        driver.wait(REPORT)

        assert driver.memory.read(ARENA, PAGE) == b"x" * PAGE
        assert not any(driver.memory.read(ARENA + PAGE, PAGE))
        assert driver.memory.read(ARENA + 2 * PAGE, PAGE) == b"x" * PAGE


def test_reported_pages_that_are_poisoned_keep_their_content() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.memory.write(ARENA, b"\xaa" * PAGE)
        driver.slot.write(0x100 + POISON, 4, 0xAAAA_AAAA)
        report(driver, (ARENA, PAGE))
        driver.wait(REPORT)

        assert driver.memory.read(ARENA, PAGE) == b"\xaa" * PAGE

        driver.slot.write(0x100 + POISON, 4, 0)
        report(driver, (ARENA, PAGE))
        driver.wait(REPORT)
        assert not any(driver.memory.read(ARENA, PAGE))


@pytest.mark.parametrize(("features", "queue"), [(REPORTING, 2), (REPORTING, 4), (REPORTING | STATISTICS, 4)])
def test_the_reporting_queue_is_found_however_the_driver_numbers(features: int, queue: int) -> None:
    with driven(balloon(), features) as driver:
        driver.memory.write(ARENA, b"x" * PAGE)
        report(driver, (ARENA, PAGE), queue=queue)
        driver.wait(queue)

        assert not any(driver.memory.read(ARENA, PAGE))


def test_pages_are_not_reported_without_the_feature() -> None:
    device = balloon()
    with driven(device, STATISTICS) as driver:
        driver.memory.write(ARENA, b"x" * PAGE)
        report(driver, (ARENA, PAGE))

        assert device.reported_bytes == 0
        assert driver.memory.read(ARENA, 1) == b"x"


def test_a_report_of_the_queues_themselves_harms_the_guest_only() -> None:
    with driven(balloon()) as driver:
        report(driver, (BASE, 1 << 20))

        driver.start()
        report(driver, (ARENA, PAGE))
        assert driver.wait(REPORT)


def answering(driver: Driver, data: bytes) -> None:
    """Give the statistics buffer again once the device has asked for it."""
    driver.wait(STATS)
    driver.add(STATS, [data])
    driver.notify(STATS)


def test_statistics_are_asked_for_and_answered() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.add(STATS, [statistic(free=1)])
        driver.notify(STATS)
        future = device.request_statistics()
        answering(driver, statistic(free=4096, total=8192, unknown=3) + b"odd")

        assert future.result(5).values == {"free": 4096, "total": 8192}
        assert device.statistics == future.result()


def test_questions_at_once_get_one_answer() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.add(STATS, [statistic(free=1)])
        driver.notify(STATS)
        futures = [device.request_statistics() for _ in range(3)]
        answering(driver, statistic(free=5))

        assert [future.result(5).values for future in futures] == [{"free": 5}] * 3


def test_a_question_before_the_driver_gave_its_buffer_is_asked_later() -> None:
    device = balloon()
    with driven(device) as driver:
        future = device.request_statistics()
        driver.add(STATS, [bytes(10)])
        driver.notify(STATS)
        answering(driver, statistic(total=7))

        assert future.result(5).values == {"total": 7}


def test_a_second_statistics_buffer_sends_the_first_one_back() -> None:
    with driven(balloon()) as driver:
        first = driver.add(STATS, [statistic(free=1)])
        driver.add(STATS, [statistic(free=2)])
        driver.notify(STATS)

        assert driver.wait(STATS) == [first]


def test_statistics_without_a_driver_that_sends_them_are_refused() -> None:
    device = balloon()
    with pytest.raises(StateError, match="no driver that sends them has started"):
        device.request_statistics()
    with driven(device, REPORTING), pytest.raises(StateError):
        device.request_statistics()


def test_a_reset_ends_the_wait_for_statistics() -> None:
    device = balloon()
    with driven(device) as driver:
        future = device.request_statistics()
        driver.set(0x70, 0)

        with pytest.raises(StateError, match="its driver was reset"):
            future.result(5)


def test_the_end_of_the_vm_ends_the_wait_for_statistics() -> None:
    device = balloon()
    with driven(device) as driver:
        future = device.request_statistics()
        driver.loop.run(device.close)

        with pytest.raises(StateError):
            future.result(5)


def test_statistics_come_by_themselves_in_the_interval() -> None:
    device = balloon(statistics_seconds=1)
    with driven(device) as driver:
        driver.add(STATS, [statistic(free=1)])
        driver.notify(STATS)
        answering(driver, statistic(free=2))

        assert device.statistics is not None
        assert device.statistics.values == {"free": 2}


def test_a_target_can_be_set_from_any_thread() -> None:
    device = balloon()
    with driven(device) as driver:
        threads = [threading.Thread(target=device.set_target, args=(mib,)) for mib in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert driver.config(NUM_PAGES, 4) == device.target_mib * 256


def test_a_paused_balloon_holds_no_buffer_and_asks_afterwards() -> None:
    device = balloon()
    with driven(device) as driver:
        driver.add(STATS, [statistic(free=1)])
        driver.notify(STATS)
        driver.loop.run(device.pause)
        state = driver.slot.save()
        future = device.request_statistics()
        assert not driver.collect(STATS)

        driver.loop.run(device.resume)
        answering(driver, statistic(free=3))

        assert future.result(5).values == {"free": 3}
        assert state.device.queues[STATS].next_available == 0


def test_state_goes_into_another_device() -> None:
    device = balloon(target_mib=1)
    with driven(device) as driver:
        driver.add(STATS, [statistic(free=1)])
        driver.notify(STATS)
        driver.request(INFLATE, [numbers(ARENA)])
        driver.slot.write(0x100 + ACTUAL, 4, 256)
        device.set_target(3)
        driver.loop.run(device.pause)
        state = driver.slot.save()
        memory = driver.memory.read(BASE, driver.memory.size)
        queues = driver.queues
    device = balloon(target_mib=1)
    with Driver(device) as driver:
        driver.memory.write(BASE, memory)
        driver.slot.restore(state)
        driver.queues, driver.accepted = queues, state.accepted

        assert (device.target_mib, device.actual_mib, device.inflated_bytes) == (3, 1, PAGE)
        future = device.request_statistics()
        driver._next = ARENA
        answering(driver, statistic(free=9))
        assert future.result(5).values == {"free": 9}


@given(st.binary(max_size=300))
def test_any_bytes_are_statistics_or_nothing(data: bytes) -> None:
    values = Statistics.parse(data).values

    assert len(values) <= len(data) // 10
    assert all(0 <= value < 1 << 64 for value in values.values())
