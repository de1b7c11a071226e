"""The entropy device, from its driver's side."""

from __future__ import annotations

import time

import pytest

from tests.vmm.devices.virtio.driver import Driver, driven
from vmm.config import EntropyConfig
from vmm.devices.virtio.queue import WRITE
from vmm.devices.virtio.rng import MAX_REQUEST, EntropyDevice


def limited(rate: int) -> EntropyDevice:
    return EntropyDevice(EntropyConfig(bytes_per_second=rate))


def test_a_buffer_is_filled_with_random_bytes() -> None:
    with driven(EntropyDevice(EntropyConfig())) as driver:
        first, second = driver.request(0, writable=[64]), driver.request(0, writable=[64])

    assert len(first) == len(second) == 64
    assert first != second
    assert len(set(first)) > 16


def test_every_part_of_a_buffer_is_filled() -> None:
    with driven(EntropyDevice(EntropyConfig())) as driver:
        data = driver.request(0, writable=[32, 1, 31], indirect=True)

    assert len(data) == 64
    assert any(data[:32])
    assert any(data[33:])


def test_a_buffer_of_more_than_64_kib_is_filled_in_part() -> None:
    with driven(EntropyDevice(EntropyConfig())) as driver:
        assert len(driver.request(0, writable=[3 * MAX_REQUEST])) == MAX_REQUEST


def test_a_buffer_with_a_part_to_read_makes_the_device_ask_for_a_reset() -> None:
    device = EntropyDevice(EntropyConfig(name="dice"))
    with driven(device) as driver:
        driver.add(0, readable=[b"seed"], writable=[8])
        driver.notify(0)

        assert driver.needs_reset
        assert "a buffer of dice must be one to write" in str(device.mistake)
        driver.start()
        assert len(driver.request(0, writable=[8])) == 8


def test_a_limit_is_kept_over_time() -> None:
    device = limited(20_000)
    with driven(device) as driver:
        began = time.monotonic()
        got = 0
        while got < 26_000:
            got += len(driver.request(0, writable=[2_000]))
        seconds = time.monotonic() - began

    # A second's worth was saved up before; a slow host only gives less.
    assert device.bytes_given == got
    assert got <= 20_000 * (seconds + 1.1) + 2_000


def test_a_buffer_that_waits_for_the_limit_is_given_back_later() -> None:
    with driven(limited(1_000)) as driver:
        assert len(driver.request(0, writable=[1_000])) == 1_000
        buffer = driver.add(0, writable=[100])
        driver.notify(0)

        assert driver.wait(0) == [buffer]
        assert 1 <= buffer.written <= 100


def test_nothing_is_given_while_paused() -> None:
    device = limited(2_000)
    with driven(device) as driver:
        driver.request(0, writable=[2_000])
        driver.loop.run(device.pause)
        driver.add(0, writable=[50])
        driver.notify(0)
        time.sleep(0.05)
        given = device.bytes_given

        driver.loop.run(device.resume)

        assert given == 2_000
        assert driver.wait(0)


def test_a_reset_while_a_buffer_waits_forgets_it() -> None:
    device = limited(1_000)
    with driven(device) as driver:
        driver.request(0, writable=[1_000])
        driver.add(0, writable=[100])
        driver.notify(0)
        driver.start()

        assert driver.request(0, writable=[10])


def test_state_goes_into_another_device() -> None:
    with driven(EntropyDevice(EntropyConfig())) as driver:
        driver.request(0, writable=[100])
        state = driver.slot.save()
        memory = driver.memory.read(driver.memory.base, driver.memory.size)
    device = EntropyDevice(EntropyConfig())
    with Driver(device) as driver:
        driver.memory.write(driver.memory.base, memory)
        driver.slot.restore(state)

        assert device.bytes_given == 100
        assert device.active


@pytest.mark.parametrize("length", [1, 4096])
def test_a_flood_of_buffers_is_served_in_one_go(length: int) -> None:
    with driven(EntropyDevice(EntropyConfig())) as driver:
        address = driver.allocate(length)
        for index in range(64):
            driver.describe(0, index, address, length, WRITE)
            driver.offer(0, index)
        driver.notify(0)

        assert driver.memory.read_int(driver.queues[0].used + 2, 2) == 64
