"""Queues as the lab shows them: chains are followed as the device would, and what is broken is shown, not refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kata_lab.lab.device_views import (
    access_table,
    exits_per,
    feature_table,
    latency_chart,
    request_table,
    status_text,
)
from kata_lab.lab.hand_driver import BASE, BUFFERS, MEMORY_BYTES, HandDriver
from kata_lab.lab.machines import LabError
from kata_lab.lab.slot_probe import Access, traced
from kata_lab.lab.virtqueue_view import draw_queue, hex_table, walk_table
from vmm.config import EntropyConfig
from vmm.devices.virtio.device import EVENT_IDX
from vmm.devices.virtio.queue import DESCRIPTOR, INDIRECT, NEXT, WRITE, Queue
from vmm.devices.virtio.rng import EntropyDevice


@pytest.fixture
def driver() -> Iterator[HandDriver]:
    with HandDriver(EntropyDevice(EntropyConfig())) as driver:
        driver.start()
        yield driver


def test_a_direct_chain_is_followed_part_by_part(driver: HandDriver) -> None:
    driver.memory.write(BUFFERS, b"question")
    driver.describe(5, BUFFERS, 8, NEXT, 2)
    driver.describe(2, BUFFERS + 8, 100, WRITE)
    driver.offer(5)

    (walk,) = driver.frame().waiting

    assert (walk.head, walk.problem) == (5, "")
    assert [(part.index, part.inside, part.length) for part in walk.parts] == [(5, False, 8), (2, False, 100)]
    assert [part.data for part in walk.readable] == [b"question"]
    assert [part.length for part in walk.writable] == [100]


def test_an_indirect_table_is_followed_and_is_neither_read_nor_written(driver: HandDriver) -> None:
    table = DESCRIPTOR.pack(BUFFERS, 16, NEXT, 1) + DESCRIPTOR.pack(BUFFERS + 4096, 512, WRITE, 0)
    driver.memory.write(BUFFERS + 64, table)
    driver.describe(0, BUFFERS + 64, len(table), INDIRECT)
    driver.offer(0)

    (walk,) = driver.frame().waiting

    assert [(part.index, part.inside) for part in walk.parts] == [(0, False), (0, True), (1, True)]
    assert [part.length for part in (*walk.readable, *walk.writable)] == [16, 512]
    assert "indirect[1]" in repr(walk_table(walk))


def looped(driver: HandDriver) -> None:
    driver.describe(0, BUFFERS, 16, WRITE | NEXT, 1)
    driver.describe(1, BUFFERS, 16, WRITE | NEXT, 0)


def nested(driver: HandDriver) -> None:
    driver.memory.write(BUFFERS, DESCRIPTOR.pack(BUFFERS, 16, INDIRECT, 0))
    driver.describe(0, BUFFERS, 16, INDIRECT)


@pytest.mark.parametrize(
    ("describe", "problem"),
    [
        (looped, "descriptor 0 comes a second time: a loop"),
        (nested, "an indirect one where none may be"),
        (lambda driver: driver.describe(0, 0x1000, 16, WRITE), "descriptor 0 names 0x1000+0x10, outside memory"),
        (lambda driver: driver.describe(0, 2**64 - 8, 16, WRITE), "outside memory"),
        (lambda driver: driver.describe(0, BASE + MEMORY_BYTES - 8, 16), "outside memory"),
        (lambda driver: driver.describe(0, BUFFERS, 16, NEXT, 500), "descriptor 500 is beyond a table of 8"),
        (lambda driver: driver.describe(0, BUFFERS, 24, INDIRECT), "an indirect one where none may be"),
    ],
)
def test_a_broken_chain_is_shown_with_what_is_wrong(
    driver: HandDriver, describe: Callable[[HandDriver], None], problem: str
) -> None:
    describe(driver)
    driver.offer(0)

    frame = driver.frame()

    assert problem in frame.waiting[0].problem
    assert problem in repr(walk_table(frame.waiting[0]))
    assert "Queue 0" in draw_queue(frame).alternative


def test_an_index_that_ran_ahead_shows_no_more_chains_than_the_queue_is_long(driver: HandDriver) -> None:
    driver.offer(0, ahead=5000)

    frame = driver.frame()

    assert len(frame.waiting) == driver.size
    assert "<svg" in draw_queue(frame).markup


def test_a_picture_says_who_has_the_buffer_before_and_after(driver: HandDriver) -> None:
    driver.describe(3, BUFFERS, 100, WRITE)
    driver.offer(3)
    before = driver.frame()

    driver.notify()
    after = driver.frame()

    assert "idx 1, the device has taken 0; new heads: 3." in draw_queue(before).alternative
    assert "100 bytes at 0x80010000, the device writes" in draw_queue(before).alternative
    assert "new heads: none." in draw_queue(after).alternative
    assert "the newest element is descriptor 3 with 100 bytes written" in draw_queue(after).alternative
    assert (before.interrupt_status, after.interrupt_status) == (0, 1)


def test_pictures_go_around_the_ring(driver: HandDriver) -> None:
    for _ in range(3 * driver.size + 2):
        assert driver.ask([10]) != [None]
    driver.describe(6, BUFFERS, 10, WRITE)
    driver.offer(6)

    picture = draw_queue(driver.frame())

    assert "idx 27, the device has taken 26; new heads: 6." in picture.alternative
    assert "ring[2] = 6  new" in picture.markup


def test_a_queue_that_is_not_ready_is_said_to_be() -> None:
    with HandDriver(EntropyDevice(EntropyConfig())) as driver:
        frame = driver.frame()

    assert frame.waiting == ()
    assert "is not ready" in draw_queue(frame).alternative


def test_bytes_are_shown_by_sixteens() -> None:
    table = hex_table(b"virtio\0and the rest", 0x1000)

    assert [row[0] for row in table.rows] == ["0x1000", "0x1010"]
    assert table.rows[0][2] == "virtio·and the r"


def test_an_introduction_is_told_step_by_step() -> None:
    accesses = [
        Access(False, 0x000, 4, 0x74726976),
        Access(True, 0x070, 4, 0),
        Access(True, 0x070, 4, 1),
        Access(True, 0x070, 4, 3),
        Access(True, 0x014, 4, 1),
        Access(False, 0x010, 4, 1),
        Access(True, 0x050, 4, 2),
        Access(False, 0x060, 4, 3),
        Access(False, 0x104, 2, 7),
    ]

    table = access_table(accesses)

    assert [row[3] for row in table.rows] == [
        "the bytes 'virt'",
        "reset",
        "ACKNOWLEDGE: a device was noticed",
        "DRIVER: there is a driver for it",
        "",
        "offered bits 32 to 63",
        "buffers wait in queue 2",
        "a used buffer and the configuration changed",
        "",
    ]
    assert table.rows[-1][1] == "104 configuration + 0x4"
    assert table.marked == {1, 2, 3}
    assert status_text(64 | 15) == "ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK DEVICE_NEEDS_RESET"


def test_features_are_told_as_offered_and_accepted(driver: HandDriver) -> None:
    rows = {row[1]: row[3:] for row in feature_table(driver.slot.device).rows}

    assert rows["INDIRECT_DESC"] == ("yes", "yes")
    assert rows["EVENT_IDX"] == ("yes", "-")
    assert not driver.slot.device.has(EVENT_IDX)


def queue_of(driver: HandDriver) -> Queue:
    return driver.slot.device.queues[0]


def test_requests_are_traced_only_when_asked_for(driver: HandDriver) -> None:
    driver.ask([8])
    with pytest.raises(LabError, match="no request was traced"):
        latency_chart(list(queue_of(driver).recent))

    with traced(driver.slot):
        driver.ask([8], [16])
    driver.ask([8])
    recent = list(queue_of(driver).recent)

    assert [row[4] for row in request_table(recent).rows] == ["8", "16"]
    assert "Histogram of 2 requests" in latency_chart(recent).alternative


def test_exits_are_told_per_request() -> None:
    table = exits_per({("mmio write", "disk"): 5}, {("mmio write", "disk"): 25, ("halted", ""): 1}, 10)

    assert list(table.rows) == [("mmio write disk", "20", "2.00"), ("halted", "1", "0.10")]
