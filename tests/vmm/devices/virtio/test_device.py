"""What a device's author can get wrong, and what is said about it; and the example that device.py gives."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vmm.devices.virtio.driver import Driver, driven
from tests.vmm.devices.virtio.recording import RecordingDevice
from vmm.devices.virtio import device as device_module
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import Chain, DeviceError, Queue, QueueError


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driven(RecordingDevice()) as made:
        yield made


def crash(driver: Driver) -> str:
    """The one exception that ended the VM."""
    (error,) = driver.crashes
    driver.crashes.clear()
    assert not driver.device.active
    return f"{type(error).__name__}: {error}"


def serve(driver: Driver, notify: Any) -> None:
    """Let the device serve a notification in its own way, of two buffers."""
    driver.device.notify = notify
    driver.add(0, [b"abc"], [10])
    driver.add(0, [b"abc"], [10])
    driver.notify(0)


@pytest.mark.parametrize("missing", device_module.REQUIRED)
def test_device_without_what_every_one_must_have_cannot_be_made(missing: str) -> None:
    parts = {name: vars(RecordingDevice)[name] for name in device_module.REQUIRED if name != missing}
    incomplete = type("Incomplete", (VirtioDevice,), parts)

    with pytest.raises(DeviceError, match=f"the class Incomplete has no {missing}; a virtio device must have"):
        incomplete()


def test_device_of_the_docstring_tells_the_time() -> None:
    text = device_module.__doc__ or ""
    source = textwrap.dedent(
        "    class ClockDevice" + text.split("    class ClockDevice")[1].split("\n\nA device may")[0]
    )
    names: dict[str, Any] = {}
    exec(
        "import time\nfrom vmm.devices.virtio.device import *\nfrom vmm.devices.virtio.queue import *\n" + source, names
    )

    with driven(names["ClockDevice"]()) as driver:
        assert driver.device.name == "clock"
        assert len(driver.request(0, writable=[100]).split()) == 5
        assert len(driver.request(0, writable=[4])) == 4


def test_exception_in_notify_ends_the_vm(driver: Driver) -> None:
    def notify(queue: Queue, index: int) -> None:
        raise ZeroDivisionError("a bug")

    serve(driver, notify)

    assert crash(driver) == "ZeroDivisionError: a bug"


def test_more_written_than_there_is_room_for_ends_the_vm(driver: Driver) -> None:
    def notify(queue: Queue, index: int) -> None:
        for chain in queue.chains():
            queue.push(chain, 11)

    serve(driver, notify)

    assert "given back with 11 bytes written, it has room for 10" in crash(driver)


def test_pushing_twice_ends_the_vm(driver: Driver) -> None:
    def notify(queue: Queue, index: int) -> None:
        for chain in queue.chains():
            queue.push(chain, 0)
            queue.push(chain, 0)

    serve(driver, notify)

    assert "DeviceError: the buffer at descriptor 0 is not the device's any more" in crash(driver)


def test_never_pushing_ends_the_vm(driver: Driver) -> None:
    def notify(queue: Queue, index: int) -> None:
        for chain in queue.chains():
            chain.write(b"abc")

    serve(driver, notify)

    assert crash(driver) == "DeviceError: queue 0's buffers at descriptors [0, 2] were taken and never given back"


def test_losing_a_buffer_later_ends_the_vm(driver: Driver) -> None:
    kept: list[Chain] = []
    serve(driver, lambda queue, index: kept.extend(queue.chains()))
    assert not driver.crashes

    with driver.device.served():
        kept.clear()

    assert "descriptors [0, 2] were taken and never given back" in crash(driver)


def test_buffers_may_be_kept_and_given_back_later(driver: Driver) -> None:
    kept: list[Chain] = []
    serve(driver, lambda queue, index: kept.extend(queue.chains()))

    with driver.device.served():
        for chain in reversed(kept):
            driver.device.queues[0].push(chain, 1)
        driver.device.queues[0].signal()

    assert [buffer.written for buffer in driver.wait(0, 2)] == [1, 1]


def test_buffers_dropped_in_a_reset_are_no_mistake(driver: Driver) -> None:
    kept: list[Chain] = []
    serve(driver, lambda queue, index: kept.extend(queue.chains()))
    driver.device.hooks["deactivate"] = kept.clear

    driver.set(0x70, 0)
    with driver.device.served():
        pass

    assert not driver.crashes


@pytest.mark.parametrize("hook", ["activate", "write config", "read config"])
def test_exception_elsewhere_ends_the_vm_and_not_the_thread_of_the_vcpu(driver: Driver, hook: str) -> None:
    def fail() -> None:
        raise KeyError(hook)

    driver.device.hooks[hook] = fail
    match hook:
        case "activate":
            driver.start()
        case "write config":
            driver.slot.write(0x100, 4, 1)
        case "read config":
            assert driver.config(0, 4) == 0

    assert crash(driver) == f"KeyError: '{hook}'"


def test_mistake_of_the_driver_ends_nothing(driver: Driver) -> None:
    def notify(queue: Queue, index: int) -> None:
        for chain in queue.chains():
            raise QueueError(f"the buffer of {chain.readable_bytes} bytes is no request")

    serve(driver, notify)

    assert driver.needs_reset
    assert not driver.crashes
    driver.set(0x70, 0)
    assert not driver.needs_reset


def test_buffers_held_at_a_mistake_are_abandoned(driver: Driver) -> None:
    kept: list[Chain] = []
    serve(driver, lambda queue, index: kept.extend(queue.chains()))

    with driver.device.served():
        raise QueueError("a mistake")
    with driver.device.served():
        driver.device.queues[0].push(kept.pop(), 0)
        kept.clear()

    assert driver.collect(0) == []
    assert driver.device.save().active is False
    assert not driver.crashes


def test_mistake_keeps_no_view_of_guest_memory(driver: Driver) -> None:
    def notify(queue: Queue, index: int) -> None:
        for chain in queue.chains():
            views = chain.writable_views()
            try:
                raise ValueError
            except ValueError:
                raise QueueError(f"{len(views)} views") from None

    serve(driver, notify)

    # Driver closes the memory, which fails while somebody looks at it.
    assert driver.needs_reset


def test_first_mistake_is_the_one_that_is_kept(driver: Driver) -> None:
    with driver.device.served():
        raise QueueError("first")
    with driver.device.served():
        raise QueueError("second")

    assert str(driver.device.mistake) == "first"


def test_device_is_called_what_it_is_unless_it_has_a_name() -> None:
    class Named(RecordingDevice):
        def __init__(self) -> None:
            VirtioDevice.__init__(self, "mine")

    assert RecordingDevice().name == "recording"
    assert Named().name == "mine"


def test_device_that_is_saved_while_it_holds_buffers_is_refused(driver: Driver) -> None:
    kept: list[Chain] = []
    serve(driver, lambda queue, index: kept.extend(queue.chains()))

    with pytest.raises(DeviceError, match=r"while its device holds buffers, here those at descriptors \[0, 2\]"):
        driver.device.save()


def test_device_that_was_stopped_by_a_mistake_is_deactivated_when_it_leaves(driver: Driver) -> None:
    driver.device.fail(QueueError("a mistake"))
    driver.device.events.clear()

    driver.slot.unplug()

    assert driver.device.events == ["deactivate"]
