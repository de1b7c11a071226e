"""The virtio-mmio registers, one after another, and the order in which a driver has to use them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.vmm.devices.virtio.driver import BASE, Driver
from tests.vmm.devices.virtio.recording import RecordingDevice
from vmm.devices.virtio.device import COMMON_FEATURES, EVENT_IDX, VERSION_1
from vmm.devices.virtio.mmio import SLOT_SIZE
from vmm.devices.virtio.queue import QueueError

DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x10, 0x14, 0x20, 0x24
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS, CONFIG_GENERATION = 0x60, 0x64, 0x70, 0xFC
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x80, 0x90, 0xA0
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
READABLE = {0x00, 0x04, 0x08, 0x0C, 0x10, 0x34, 0x44, 0x60, 0x70, 0xB0, 0xB4, 0xB8, 0xBC, 0xFC}


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A slot whose device nobody has touched."""
    with Driver(RecordingDevice()) as made:
        yield made


def accept(driver: Driver, features: int) -> None:
    for word in range(2):
        driver.set(DRIVER_FEATURES_SEL, word)
        driver.set(DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)


# Registers.


def test_identification(driver: Driver) -> None:
    assert driver.get(0).to_bytes(4, "little") == b"virt"
    assert driver.get(4) == 2
    assert driver.get(8) == RecordingDevice.DEVICE_ID
    assert driver.get(0xC).to_bytes(4, "little") == b"KATA"


def test_features_are_offered_in_words(driver: Driver) -> None:
    words = []
    for word in (0, 1, 2, 0xFFFF_FFFF):
        driver.set(DEVICE_FEATURES_SEL, word)
        words.append(driver.get(DEVICE_FEATURES))

    features = RecordingDevice.FEATURES | COMMON_FEATURES
    assert words == [features & 0xFFFF_FFFF, features >> 32, 0, 0]


def test_registers_that_are_not_there_and_those_to_write_read_zero(driver: Driver) -> None:
    others = [offset for offset in range(0, 0x100, 4) if offset not in READABLE]

    assert {driver.get(offset) for offset in others} == {0}


def test_shared_memory_that_is_not_there_has_length_and_base_of_all_ones(driver: Driver) -> None:
    # 4.2.2: "reading from a non-existent region results in a length of -1", 64 bits wide.
    driver.set(0xAC, 0)

    assert {driver.get(offset) for offset in (0xB0, 0xB4, 0xB8, 0xBC)} == {0xFFFF_FFFF}


@pytest.mark.parametrize("width", [1, 2, 8])
def test_registers_are_words(driver: Driver, width: int) -> None:
    assert {driver.slot.read(offset, width) for offset in range(0x100)} == {0}
    assert {driver.slot.read(offset, 4) for offset in range(1, 0x100) if offset % 4} == {0}

    driver.slot.write(STATUS, width, 1)
    driver.slot.write(STATUS + 1, 4, 1)

    assert driver.get(STATUS) == 0


def test_writing_registers_that_are_to_be_read_does_nothing(driver: Driver) -> None:
    before = {offset: driver.get(offset) for offset in sorted(READABLE)}
    for offset in sorted(READABLE - {QUEUE_READY, STATUS}):
        driver.set(offset, 0xFFFF_FFFF)

    assert {offset: driver.get(offset) for offset in sorted(READABLE)} == before


def test_only_the_low_half_of_a_wider_value_counts(driver: Driver) -> None:
    driver.set(STATUS, 0xFFFF_FFFF_0000_0001)

    assert driver.get(STATUS) == ACKNOWLEDGE


def test_queues_are_selected_and_those_that_are_not_there_have_no_size(driver: Driver) -> None:
    sizes = []
    for number in (0, 1, 2, 0xFFFF_FFFF):
        driver.set(QUEUE_SEL, number)
        sizes.append((driver.get(QUEUE_NUM_MAX), driver.get(QUEUE_READY)))
        driver.set(QUEUE_NUM, 8)
        driver.set(QUEUE_DESC, BASE)

    assert sizes == [(64, 0), (64, 0), (0, 0), (0, 0)]


def test_writing_to_queues_that_are_not_there_does_nothing(driver: Driver) -> None:
    driver.negotiate()
    driver.set(QUEUE_SEL, 2)
    driver.set(QUEUE_READY, 1)

    assert driver.get(QUEUE_READY) == 0
    assert not driver.needs_reset


@pytest.mark.parametrize(
    ("offset", "width", "value"),
    [
        (0, 1, 0x01),
        (0, 2, 0x0201),
        (0, 4, 0x04030201),
        (0, 8, 0x0807060504030201),
        (3, 2, 0x0504),
        (12, 2, 0x0E0D),
        (13, 1, 0x0E),
        (12, 4, 0x0E0D),
        (10, 8, 0x0E0D0C0B),
        (14, 4, 0),
        (0xE00, 8, 0),
    ],
)
def test_configuration_space_is_read_in_any_width_and_zero_behind_its_end(
    driver: Driver, offset: int, width: int, value: int
) -> None:
    # 4.2.2.2: also before the driver has said that it knows the device.
    assert driver.config(offset, width) == value


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_configuration_space_is_written_in_any_width(driver: Driver, width: int) -> None:
    driver.slot.write(0x100 + 6, width, 0x1122_3344_5566_7788 & (1 << 8 * width) - 1)

    expected = (0x1122_3344_5566_7788).to_bytes(8, "little")[:width]
    assert driver.device.events == [("write config", 6, expected)]


def test_configuration_change_changes_the_generation_and_interrupts_once_driven(driver: Driver) -> None:
    with driver.device.lock:
        driver.device.config_changed()
    assert (driver.get(CONFIG_GENERATION), driver.get(INTERRUPT_STATUS)) == (1, 0)

    driver.start()
    with driver.device.lock:
        driver.device.config_changed()

    assert (driver.get(CONFIG_GENERATION), driver.get(INTERRUPT_STATUS)) == (2, 2)
    assert driver.line.level


# Initialisation, 3.1.1.


def test_initialisation_in_order_ends_with_a_device_that_serves(driver: Driver) -> None:
    driver.set(STATUS, 0)
    driver.set(STATUS, ACKNOWLEDGE)
    driver.set(STATUS, ACKNOWLEDGE | DRIVER)
    accept(driver, VERSION_1 | EVENT_IDX | 1 << 40)
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert driver.get(STATUS) == ACKNOWLEDGE | DRIVER | FEATURES_OK
    driver.accepted = VERSION_1 | EVENT_IDX | 1 << 40
    driver.add_queue(0, 8)
    driver.add_queue(1, 64)
    assert not driver.device.active
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    assert driver.device.active
    assert driver.device.events == ["deactivate", ("activate", VERSION_1 | EVENT_IDX | 1 << 40)]
    assert driver.request(0, [b"x"], [3]) == b"\xa5" * 3
    assert driver.request(1, [b"x"], [3]) == b"\xa5" * 3


@pytest.mark.parametrize(
    "features",
    [0, EVENT_IDX, 1 << 5, VERSION_1 | 1 << 6, VERSION_1 | 1 << 41, VERSION_1 | 1 << 63],
    ids=hex,
)
def test_features_without_version_1_or_never_offered_are_refused(driver: Driver, features: int) -> None:
    driver.set(STATUS, ACKNOWLEDGE | DRIVER)
    accept(driver, features)

    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)

    assert driver.get(STATUS) == ACKNOWLEDGE | DRIVER


def test_feature_beyond_64_bits_is_refused(driver: Driver) -> None:
    driver.set(STATUS, ACKNOWLEDGE | DRIVER)
    accept(driver, VERSION_1)
    driver.set(DRIVER_FEATURES_SEL, 2)
    driver.set(DRIVER_FEATURES, 1)

    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)

    assert not driver.get(STATUS) & FEATURES_OK


def test_driver_may_try_other_features_after_a_refusal(driver: Driver) -> None:
    driver.set(STATUS, ACKNOWLEDGE | DRIVER)
    accept(driver, VERSION_1 | 1 << 6)
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    accept(driver, VERSION_1)
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)

    assert driver.get(STATUS) & FEATURES_OK


def test_features_are_final_after_features_ok(driver: Driver) -> None:
    assert driver.negotiate(VERSION_1)

    accept(driver, VERSION_1 | EVENT_IDX)
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    assert driver.device.accepted == VERSION_1


def test_queue_made_ready_before_the_features_is_a_mistake(driver: Driver) -> None:
    driver.set(STATUS, ACKNOWLEDGE | DRIVER)
    driver.set(QUEUE_NUM, 8)
    driver.set(QUEUE_DESC, BASE)
    driver.set(QUEUE_READY, 1)

    assert driver.get(QUEUE_READY) == 0
    assert driver.needs_reset
    assert "queue 0 was made ready in status 0x3, before FEATURES_OK" in str(driver.device.mistake)


def test_driver_ok_without_features_ok_is_a_mistake(driver: Driver) -> None:
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK)

    assert driver.get(STATUS) == ACKNOWLEDGE | DRIVER | DRIVER_OK | NEEDS_RESET
    assert driver.get(INTERRUPT_STATUS) == 2
    assert not driver.device.active


def test_second_driver_ok_does_nothing(driver: Driver) -> None:
    driver.start()
    driver.set(STATUS, 15)

    assert [event for event in driver.device.events if event[0] == "activate"] == [("activate", driver.accepted)]


def test_status_bits_go_away_by_a_reset_only(driver: Driver) -> None:
    driver.start()
    driver.set(STATUS, ACKNOWLEDGE)
    assert driver.get(STATUS) == 15
    driver.set(STATUS, FAILED)
    assert driver.get(STATUS) == 15 | FAILED

    driver.set(STATUS, 0)

    assert driver.get(STATUS) == 0


def test_driver_cannot_set_needs_reset(driver: Driver) -> None:
    driver.set(STATUS, NEEDS_RESET | ACKNOWLEDGE)

    assert driver.get(STATUS) == ACKNOWLEDGE


# Queues.


def test_notification_before_driver_ok_is_ignored(driver: Driver) -> None:
    driver.negotiate()
    driver.add_queue(0, 8)
    driver.add(0, [b"x"])
    driver.notify(0)
    assert driver.collect(0) == []

    driver.set(STATUS, 15)
    driver.notify(0)

    assert len(driver.collect(0)) == 1


@pytest.mark.parametrize("number", [2, 0xFFFF, 0x1_0000, 0xFFFF_FFFF])
def test_notification_of_a_queue_that_is_not_there_is_ignored(driver: Driver, number: int) -> None:
    driver.start()
    driver.notify(number)

    assert not driver.needs_reset
    assert "notify" not in {event[0] for event in driver.device.events}


def test_notification_of_a_queue_that_is_not_ready_is_ignored(driver: Driver) -> None:
    driver.negotiate()
    driver.add_queue(0, 8)
    driver.set(STATUS, 15)
    driver.notify(1)

    assert ("notify", 1) not in driver.device.events
    assert driver.request(0, [b"x"], [1]) == b"\xa5"


def test_size_and_addresses_of_a_ready_queue_do_not_change(driver: Driver) -> None:
    driver.start()
    driver.set(QUEUE_SEL, 0)
    driver.set(QUEUE_NUM, 1)
    for register in (QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE):
        driver.set(register, 0)
        driver.set(register + 4, 0xFFFF_FFFF)

    assert driver.request(0, [b"x"], [1]) == b"\xa5"
    assert driver.device.queues[0].size == 64


def test_making_a_ready_queue_ready_does_nothing(driver: Driver) -> None:
    driver.start()
    driver.request(0, [b"x"], [1])
    driver.set(QUEUE_SEL, 0)
    driver.set(QUEUE_READY, 1)

    assert driver.request(0, [b"x"], [1]) == b"\xa5"


def test_queue_that_is_made_unready_is_left_alone_and_begins_anew(driver: Driver) -> None:
    driver.start()
    driver.request(0, [b"x"], [1])
    driver.set(QUEUE_SEL, 0)
    driver.set(QUEUE_READY, 0)
    assert driver.get(QUEUE_READY) == 0
    driver.add(0, [b"x"])
    driver.notify(0)
    assert driver.collect(0) == []

    driver.queues[0] = driver.add_queue(0, 4)
    driver.queues.pop()

    assert driver.request(0, [b"x"], [1]) == b"\xa5"
    assert driver.device.active


@pytest.mark.parametrize(
    ("register", "value", "message"),
    [
        (QUEUE_NUM, 0, "queue size 0"),
        (QUEUE_NUM, 48, "queue size 48"),
        (QUEUE_NUM, 128, "queue size 128 must be a power of two up to 64"),
        (QUEUE_DESC, 8, "aligned to 16"),
        (QUEUE_DRIVER, 0x1000, "outside memory"),
        (QUEUE_DEVICE + 4, 0xFFFF_FFFF, "outside memory"),
    ],
)
def test_queue_that_cannot_be_is_a_mistake(driver: Driver, register: int, value: int, message: str) -> None:
    driver.negotiate()
    driver.set(QUEUE_NUM, 8)
    for area in (QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE):
        driver.set(area, BASE)
    driver.set(register, value)
    driver.set(QUEUE_READY, 1)

    assert driver.get(QUEUE_READY) == 0
    assert driver.needs_reset
    assert message in str(driver.device.mistake)


# Mistakes and resets.


def test_mistake_stops_the_device_and_interrupts_until_a_reset(driver: Driver) -> None:
    driver.start()
    driver.acknowledge()
    driver.offer(0, 64)
    driver.notify(0)
    assert driver.get(STATUS) == 15 | NEEDS_RESET
    assert driver.get(INTERRUPT_STATUS) == 2
    assert isinstance(driver.device.mistake, QueueError)

    driver.add(1, [b"x"])
    driver.notify(1)
    assert driver.collect(1) == []

    driver.start()
    assert driver.device.mistake is None
    assert driver.request(1, [b"x"], [1]) == b"\xa5"


def test_mistake_before_driver_ok_is_told_when_it_is_set(driver: Driver) -> None:
    # 2.1.2: a notification is sent only after DRIVER_OK.
    driver.negotiate()
    driver.set(QUEUE_NUM, 3)
    driver.set(QUEUE_READY, 1)
    assert (driver.get(INTERRUPT_STATUS), driver.needs_reset) == (0, True)

    driver.set(STATUS, 15)

    assert driver.get(INTERRUPT_STATUS) == 2
    assert not driver.device.active


def test_mistake_of_a_driver_found_in_activation_asks_for_a_reset(driver: Driver) -> None:
    def refuse() -> None:
        raise QueueError("the driver left out queue 1")

    driver.device.hooks["activate"] = refuse
    driver.start()

    assert driver.get(STATUS) == 15 | NEEDS_RESET
    assert not driver.crashes


def test_reset_forgets_everything(driver: Driver) -> None:
    driver.start()
    driver.request(0, [b"x"], [1])
    driver.device.host.interrupt_config()
    assert driver.line.level

    driver.set(STATUS, 0)

    assert not driver.line.level
    assert [driver.get(offset) for offset in (STATUS, INTERRUPT_STATUS, QUEUE_READY)] == [0, 0, 0]
    assert driver.device.events[-1] == "deactivate"
    assert driver.device.accepted == 0
    assert {queue.ready for queue in driver.device.queues} == {False}


# Interrupts.


def test_line_is_high_until_every_bit_is_acknowledged(driver: Driver) -> None:
    driver.start()
    driver.device.host.interrupt_queue()
    driver.device.host.interrupt_config()
    assert (driver.get(INTERRUPT_STATUS), driver.line.level) == (3, True)

    driver.set(INTERRUPT_ACK, 1)
    assert (driver.get(INTERRUPT_STATUS), driver.line.level) == (2, True)

    driver.set(INTERRUPT_ACK, 0xFFFF_FFFF)
    assert (driver.get(INTERRUPT_STATUS), driver.line.level) == (0, False)


def test_no_interrupt_is_lost_between_threads(driver: Driver) -> None:
    driver.start()
    count = 3000

    def interrupt() -> None:
        for _ in range(count):
            driver.device.host.interrupt_queue()
            driver.device.host.interrupt_config()

    thread = threading.Thread(target=interrupt)
    thread.start()
    seen = 0
    while thread.is_alive():
        status = driver.get(INTERRUPT_STATUS)
        driver.set(INTERRUPT_ACK, status)
        seen |= status
    thread.join()

    assert driver.line.level == (driver.get(INTERRUPT_STATUS) != 0)
    assert seen | driver.get(INTERRUPT_STATUS) == 3
    driver.acknowledge()
    assert not driver.line.level


# Unplugging, saving.


def test_unplugged_slot_does_nothing_any_more(driver: Driver) -> None:
    driver.start()
    driver.device.host.interrupt_queue()
    host = driver.device.host

    driver.slot.unplug()

    assert not driver.line.level
    assert driver.device.events[-1] == "deactivate"
    seen = len(driver.device.events)
    for offset in range(0, SLOT_SIZE, 4):
        driver.set(offset, 0xFFFF_FFFF)
    driver.set(STATUS, 0)
    driver.notify(0)
    host.interrupt_queue()
    driver.line.set(True)
    driver.set(INTERRUPT_ACK, 3)
    assert driver.line.level, "another device's interrupt"
    assert len(driver.device.events) == seen
    assert {queue.ready for queue in driver.device.queues} == {False}


def test_saved_slot_goes_on_in_another_device(driver: Driver) -> None:
    driver.start(VERSION_1 | EVENT_IDX | 1 << 5, size=16)
    driver.request(0, [b"x"], [5])
    with driver.device.lock:
        driver.device.config_changed()
    driver.device.space[0] = 0x77
    driver.add(0, [b"x"], [7])
    driver.set(QUEUE_SEL, 1)
    state = driver.slot.save()

    driver.slot.unplug()
    old, device = driver.device, RecordingDevice()
    driver.loop.run(old.close)
    driver.device = device
    driver.slot = type(driver.slot)(device, driver.memory, driver.line, driver.loop.loop, driver.crashes.append)
    driver.slot.restore(state)

    assert driver.slot.save() == state
    assert driver.line.level
    assert (driver.get(STATUS), driver.get(INTERRUPT_STATUS), driver.get(CONFIG_GENERATION)) == (15, 2, 1)
    assert driver.config(0, 1) == 0x77
    assert device.accepted == VERSION_1 | EVENT_IDX | 1 << 5
    driver.notify(0)
    (buffer,) = driver.wait(0)
    assert driver.contents(buffer) == b"\xa5" * 7
    assert driver.request(0, [b"x"], [2]) == b"\xa5" * 2


def test_state_of_another_kind_of_device_is_refused(driver: Driver) -> None:
    driver.start()
    state = driver.slot.save()

    with (
        Driver(RecordingDevice(queues=3)) as other,
        pytest.raises(QueueError, match="with 2 queues cannot be put into"),
    ):
        other.slot.restore(state)


def test_resets_while_another_vcpu_notifies_harm_nothing(driver: Driver) -> None:
    driver.start()
    stop = threading.Event()

    def notify() -> None:
        while not stop.is_set():
            driver.notify(0)
            driver.config(0, 4)
            driver.acknowledge()

    thread = threading.Thread(target=notify)
    thread.start()
    try:
        for _ in range(100):
            driver.start(size=8)
            for _ in range(3):
                driver.add(0, [b"x"], [4])
    finally:
        stop.set()
        thread.join()

    driver.notify(0)
    assert len(driver.collect(0)) == 3
    assert not driver.needs_reset
