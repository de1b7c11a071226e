"""Consoles and ports, from the side of their driver and of their clients."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmm.devices.virtio.driver import BASE, PAGE, Driver, driven
from vmm.config import PortsConfig
from vmm.devices.virtio.console import (
    BACKLOG,
    CONSOLE_PORT,
    CONTROL,
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    DEVICE_READY,
    MULTIPORT,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    SIZE,
    PortsDevice,
)
from vmm.errors import ConfigError, StateError

RECEIVE_CONSOLE, TRANSMIT_CONSOLE, RECEIVE, TRANSMIT = 0, 1, 4, 5


def ports(*names: str, **settings: object) -> PortsDevice:
    return PortsDevice(PortsConfig(ports=dict.fromkeys(names or ("console", "data")), **settings))


def say(driver: Driver, port: int, event: int, value: int) -> None:
    driver.request(CONTROL_TRANSMIT, [CONTROL.pack(port, event, value)])


def offer_control_buffers(driver: Driver, count: int = 16) -> None:
    for _ in range(count):
        driver.add(CONTROL_RECEIVE, writable=[128])
    driver.notify(CONTROL_RECEIVE)


def heard(driver: Driver) -> list[tuple[int, int, int, bytes]]:
    """Control messages that came since the last time; their buffers are offered again."""
    found = [driver.contents(buffer) for buffer in driver.collect(CONTROL_RECEIVE)]
    offer_control_buffers(driver, len(found))
    return [(*CONTROL.unpack(message[:8]), message[8:]) for message in found]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)


@contextmanager
def up(device: PortsDevice, guest_open: bool = True) -> Iterator[Driver]:
    """All ports are set up; a program in the guest has port 1 open."""
    with driven(device) as driver:
        offer_control_buffers(driver)
        say(driver, 0, DEVICE_READY, 1)
        for number in range(len(device.ports)):
            say(driver, number, PORT_READY, 1)
        if guest_open:
            say(driver, 1, PORT_OPEN, 1)
        heard(driver)
        yield driver


def receive(client: socket.socket, length: int) -> bytes:
    client.settimeout(10)
    data = b""
    while len(data) < length:
        part = client.recv(length - len(data))
        if not part:
            break
        data += part
    return data


# The control queues.


def test_ports_are_added_named_and_opened() -> None:
    device = ports("console", "data", "log", columns=132, rows=43)
    with driven(device) as driver:
        offer_control_buffers(driver)
        assert driver.config(0, 2) == 132
        assert driver.config(2, 2) == 43
        assert driver.config(4, 4) == 3

        say(driver, 0, DEVICE_READY, 1)
        assert heard(driver) == [(number, PORT_ADD, 1, b"") for number in range(3)]
        say(driver, 0, PORT_READY, 1)
        assert heard(driver) == [
            (0, CONSOLE_PORT, 1, b""),
            (0, RESIZE, 0, struct.pack("<HH", 132, 43)),
            (0, PORT_NAME, 1, b"console"),
            (0, PORT_OPEN, 1, b""),
        ]
        say(driver, 2, PORT_READY, 1)
        assert heard(driver) == [(2, PORT_NAME, 1, b"log"), (2, PORT_OPEN, 0, b"")]


def test_messages_wait_for_buffers() -> None:
    with driven(ports()) as driver:
        say(driver, 0, DEVICE_READY, 1)
        say(driver, 0, DEVICE_READY, 1)
        offer_control_buffers(driver, 1)
        assert heard(driver) == [(0, PORT_ADD, 1, b"")]
        assert heard(driver) == [(1, PORT_ADD, 1, b"")]
        assert heard(driver) == []


def test_a_driver_that_takes_no_messages_costs_nothing() -> None:
    device = ports()
    with driven(device) as driver:
        for _ in range(500):
            say(driver, 0, DEVICE_READY, 1)
            say(driver, 1, PORT_READY, 1)
            driver._next = BASE + (1 << 20)

        assert len(device.save_own()["pending"]) <= 8


@pytest.mark.parametrize("message", [(7, PORT_READY, 1), (0xFFFF_FFFF, PORT_OPEN, 1), (1, 99, 1), (1, PORT_ADD, 1)])
def test_messages_that_mean_nothing_are_ignored(message: tuple[int, int, int]) -> None:
    with up(ports()) as driver:
        say(driver, *message)

        assert heard(driver) == []
        assert not driver.needs_reset


def test_a_port_that_the_driver_could_not_set_up_is_left_alone() -> None:
    device = ports()
    with driven(device) as driver:
        offer_control_buffers(driver)
        say(driver, 1, PORT_READY, 0)

        assert not device.port("data").ready
        assert heard(driver) == []


def test_a_short_control_message_makes_the_device_ask_for_a_reset() -> None:
    device = ports()
    with driven(device) as driver:
        driver.add(CONTROL_TRANSMIT, [b"1234567"])
        driver.notify(CONTROL_TRANSMIT)

        assert driver.needs_reset
        assert "has 7 bytes, it must have 8" in str(device.mistake)


def test_a_control_buffer_without_room_makes_the_device_ask_for_a_reset() -> None:
    with driven(ports()) as driver:
        driver.add(CONTROL_RECEIVE, writable=[4])
        driver.add(CONTROL_TRANSMIT, [CONTROL.pack(0, DEVICE_READY, 1)])
        driver.notify(CONTROL_TRANSMIT)

        assert driver.needs_reset


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.binary(min_size=1, max_size=24)), max_size=8))
def test_any_buffers_leave_the_device_alive(buffers: list[tuple[int, bool, bytes]]) -> None:
    device = ports()
    with driven(device) as driver, device.port("data").connect() as client:
        client.send(b"something")
        for number, writable, data in buffers:
            driver.add(number, [] if writable else [data], [len(data)] if writable else [])
            driver.notify(number)
        driver.start()
        say(driver, 1, PORT_READY, 1)
        assert device.port("data").ready


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), max_size=20))
def test_any_order_of_messages_leaves_the_device_alive(messages: list[tuple[int, int, int]]) -> None:
    device = ports()
    with driven(device) as driver:
        offer_control_buffers(driver, 8)
        for message in messages:
            say(driver, *message)
        assert not driver.needs_reset


# Data.


def test_bytes_go_both_ways() -> None:
    device = ports()
    with up(device) as driver, device.port("data").connect() as client:
        driver.request(TRANSMIT, [b"to the ", b"host"])
        assert receive(client, 11) == b"to the host"

        buffer = driver.add(RECEIVE, writable=[4, 100])
        driver.notify(RECEIVE)
        client.sendall(b"to the guest")
        assert driver.wait(RECEIVE) == [buffer]
        assert driver.contents(buffer) == b"to the guest"
        assert (device.port("data").bytes_from_guest, device.port("data").bytes_to_guest) == (11, 12)


def test_the_guest_is_told_when_a_client_comes_and_goes() -> None:
    device = ports()
    with up(device) as driver:
        driver.add(RECEIVE, writable=[PAGE])
        driver.notify(RECEIVE)
        client = device.port("data").connect()
        assert heard(driver) == [(1, PORT_OPEN, 1, b"")]
        assert device.port("data").host_open

        client.close()
        eventually(lambda: not device.port("data").host_open)
        assert heard(driver) == [(1, PORT_OPEN, 0, b"")]


def test_the_host_is_told_when_a_program_opens_and_closes_the_port() -> None:
    device = ports()
    with up(device, guest_open=False) as driver:
        port = device.port("data")
        assert not port.wait_for_guest(timeout=0)
        say(driver, 1, PORT_OPEN, 1)
        assert port.wait_for_guest()
        say(driver, 1, PORT_OPEN, 0)
        assert port.wait_for_guest(False)


def test_bytes_wait_until_a_program_has_the_port_open() -> None:
    device = ports()
    with up(device, guest_open=False) as driver, device.port("data").connect() as client:
        buffer = driver.add(RECEIVE, writable=[PAGE])
        driver.notify(RECEIVE)
        client.sendall(b"early")
        driver.loop.run(lambda: None)
        assert buffer.written is None
        assert not driver.collect(RECEIVE)

        say(driver, 1, PORT_OPEN, 1)

        assert driver.wait(RECEIVE) == [buffer]
        assert driver.contents(buffer) == b"early"


def test_what_was_sent_before_the_client_left_arrives() -> None:
    device = ports()
    with up(device, guest_open=False) as driver:
        with device.port("data").connect() as client:
            client.sendall(b"bye")
        buffer = driver.add(RECEIVE, writable=[PAGE])
        driver.notify(RECEIVE)
        say(driver, 1, PORT_OPEN, 1)

        assert driver.wait(RECEIVE) == [buffer]
        assert driver.contents(buffer) == b"bye"
        driver.add(RECEIVE, writable=[PAGE])
        driver.notify(RECEIVE)
        eventually(lambda: not device.port("data").host_open)


def test_what_the_guest_writes_without_a_client_is_dropped() -> None:
    device = ports()
    with up(device) as driver:
        driver.request(TRANSMIT, [b"nobody hears this"])
        with device.port("data").connect() as client:
            driver.request(TRANSMIT, [b"heard"])
            assert receive(client, 5) == b"heard"


def test_a_client_that_does_not_read_stops_the_guest() -> None:
    device = ports()
    data = random.Random(1).randbytes(1 << 20)
    with up(device) as driver, device.port("data").connect() as client:
        for start in range(0, len(data), 32 << 10):
            driver.add(TRANSMIT, [data[start : start + (32 << 10)]])
        driver.notify(TRANSMIT)
        taken = len(driver.collect(TRANSMIT))
        assert taken < 32

        assert receive(client, len(data)) == data
        driver.wait(TRANSMIT, 32 - taken)


def test_a_guest_that_does_not_read_stops_the_client() -> None:
    device = ports()
    data = random.Random(2).randbytes(3 << 20)
    with up(device) as driver, device.port("data").connect() as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        for _ in range(4):
            driver.add(RECEIVE, writable=[PAGE])
        driver.notify(RECEIVE)
        got = bytearray()
        first = driver.wait(RECEIVE, 4)
        assert sender.is_alive()

        address = driver.allocate(PAGE)
        got += b"".join(driver.contents(buffer) for buffer in first)
        while len(got) < len(data):
            buffer = driver.add_at(RECEIVE, (address, PAGE))
            driver.notify(RECEIVE)
            driver.wait(RECEIVE)
            got += driver.contents(buffer)
        sender.join()

    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


def test_a_client_that_leaves_in_the_middle_frees_the_guest() -> None:
    device = ports()
    with up(device) as driver:
        client = device.port("data").connect()
        for _ in range(16):
            driver.add(TRANSMIT, [bytes(64 << 10)])
        driver.notify(TRANSMIT)
        done = len(driver.collect(TRANSMIT))
        assert done < 16
        client.close()

        driver.wait(TRANSMIT, 16 - done)
        with device.port("data").connect() as client:
            driver.request(TRANSMIT, [b"fresh"])
            assert receive(client, 5) == b"fresh"


@pytest.mark.parametrize("queue", [RECEIVE_CONSOLE, RECEIVE])
def test_a_buffer_to_fill_with_parts_to_read_makes_the_device_ask_for_a_reset(queue: int) -> None:
    device = ports()
    with up(device) as driver, device.ports[queue // 4].connect() as client:
        driver.add(queue, [b"x"], [8])
        driver.notify(queue)
        client.sendall(b"x")

        eventually(lambda: driver.needs_reset)


def test_a_buffer_to_send_with_parts_to_write_makes_the_device_ask_for_a_reset() -> None:
    with up(ports()) as driver:
        driver.add(TRANSMIT, [b"x"], [8])
        driver.notify(TRANSMIT)

        assert driver.needs_reset


# The console.


def test_console_output_is_kept_for_the_client_that_comes() -> None:
    device = ports()
    with up(device) as driver:
        driver.request(TRANSMIT_CONSOLE, [b"booting\r\n"])
        with device.port("console").connect() as client:
            driver.request(TRANSMIT_CONSOLE, [b"login: "])
            assert receive(client, 16) == b"booting\r\nlogin: "


def test_a_console_without_a_reader_never_stops_the_guest() -> None:
    device = ports()
    with up(device) as driver, device.port("console").connect() as client:
        for number in range(40):
            driver.request(TRANSMIT_CONSOLE, [bytes([number]) * (32 << 10)])

        assert len(device.save_own()["ports"][0]["backlog"]) == BACKLOG
        data = b""
        while not data.endswith(bytes([39]) * (32 << 10)):
            data += receive(client, 1)
            data += client.recv(1 << 20)
        assert data.startswith(bytes(32 << 10))


def test_a_driver_without_multiport_has_a_console() -> None:
    device = ports()
    with driven(device, SIZE) as driver, device.port("console").connect() as client:
        driver.request(TRANSMIT_CONSOLE, [b"plain"])
        buffer = driver.add(RECEIVE_CONSOLE, writable=[8])
        driver.notify(RECEIVE_CONSOLE)
        client.sendall(b"typed")

        assert receive(client, 5) == b"plain"
        driver.wait(RECEIVE_CONSOLE)
        assert driver.contents(buffer) == b"typed"


def test_a_resized_window_is_told() -> None:
    device = ports()
    with up(device) as driver:
        driver.acknowledge()
        device.resize(100, 50)

        assert driver.acknowledge() & 2
        assert (driver.config(0, 2), driver.config(2, 2)) == (100, 50)
        assert heard(driver) == [(0, RESIZE, 0, struct.pack("<HH", 100, 50))]


def test_an_impossible_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a console of 0 × 24 characters cannot be"):
        ports().resize(0, 24)
    with pytest.raises(ConfigError, match=r"console columns is 65536"):
        ports(columns=65536)


# Clients.


def test_a_port_takes_one_client_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "data"
    device = PortsDevice(PortsConfig(ports={"console": None, "data": path}))
    with up(device) as driver, socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(str(path))
        eventually(lambda: device.port("data").host_open)
        second.connect(str(path))
        second.settimeout(10)
        assert second.recv(1) == b""
        with pytest.raises(StateError, match="has a client already"):
            device.port("data").connect()

        driver.request(TRANSMIT, [b"first"])
        assert receive(first, 5) == b"first"


def test_a_client_that_hung_up_unseen_makes_room(tmp_path: Path) -> None:
    device = ports()
    with up(device, guest_open=False):
        device.port("data").connect().close()
        with device.port("data").connect():
            assert device.port("data").host_open


def test_a_socket_is_for_this_user_only_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "console"
    device = PortsDevice(PortsConfig(ports={"console": path}))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    device.close()
    device.close()

    assert not path.exists()


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "console"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    device = PortsDevice(PortsConfig(ports={"console": path}))
    with up_console(device) as driver, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        driver.request(TRANSMIT_CONSOLE, [b"hello"])
        assert receive(client, 5) == b"hello"


@contextmanager
def up_console(device: PortsDevice) -> Iterator[Driver]:
    with driven(device, 0) as driver:
        yield driver


def test_a_socket_in_use_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    used, free = tmp_path / "used", tmp_path / "free"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(used))
        other.listen()
        with pytest.raises(ConfigError, match="is in use by another process"):
            PortsDevice(PortsConfig(ports={"console": free, "data": used}))

        assert not free.exists()
        assert used.exists()


@pytest.mark.parametrize("name", ["file", "missing/socket", "x" * 200])
def test_a_place_where_no_socket_can_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")

    with pytest.raises(ConfigError, match="cannot be made"):
        PortsDevice(PortsConfig(ports={"console": tmp_path / name}))

    assert (tmp_path / "file").read_text() == "precious"


def test_what_somebody_else_put_in_the_place_of_the_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "console"
    device = PortsDevice(PortsConfig(ports={"console": path}))
    path.rename(tmp_path / "away")
    path.write_text("precious")

    device.close()

    assert path.read_text() == "precious"


def test_a_client_of_a_closed_device_is_refused() -> None:
    device = ports()
    with up(device) as driver:
        client = device.port("data").connect()
        driver.loop.run(device.close)

        client.settimeout(10)
        assert client.recv(1) == b""
        client.close()
        with pytest.raises(StateError, match="its VM has ended"):
            device.port("data").connect()


def test_no_descriptor_is_left() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    device = ports()
    with up(device), device.port("data").connect(), device.port("console").connect():
        pass
    assert descriptors() == before


def test_an_unknown_port_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no port 'dta'; it has 'console', 'data'"):
        ports().port("dta")


# Reset, pause, state.


def test_a_client_stays_when_the_driver_starts_again() -> None:
    device = ports()
    with up(device) as driver, device.port("data").connect() as client:
        driver.start()
        assert not device.port("data").guest_open
        offer_control_buffers(driver)
        say(driver, 1, PORT_READY, 1)
        assert heard(driver) == [(1, PORT_NAME, 1, b"data"), (1, PORT_OPEN, 1, b"")]
        say(driver, 1, PORT_OPEN, 1)
        driver.request(TRANSMIT, [b"again"])

        assert receive(client, 5) == b"again"


def test_nothing_moves_while_paused() -> None:
    device = ports()
    with up(device) as driver:
        client = device.port("data").connect()
        heard(driver)
        buffer = driver.add(RECEIVE, writable=[PAGE])
        driver.notify(RECEIVE)
        driver.loop.run(device.pause)
        client.sendall(b"later")
        driver.loop.run(lambda: None)
        assert not driver.collect(RECEIVE)
        client.close()
        driver.loop.run(device.resume)

        assert driver.wait(RECEIVE) == [buffer]
        assert driver.contents(buffer) == b"later"
        driver.add(RECEIVE, writable=[PAGE])
        driver.notify(RECEIVE)
        eventually(lambda: not device.port("data").host_open)
        assert heard(driver) == [(1, PORT_OPEN, 0, b"")]


def test_state_goes_into_another_device_in_the_middle_of_a_buffer() -> None:
    data = random.Random(3).randbytes(1 << 20)
    device = ports("console", "data")
    with up(device) as driver, device.port("data").connect() as client:
        driver.request(TRANSMIT_CONSOLE, [b"kept"])
        device.resize(90, 30)
        heard(driver)
        driver.add(TRANSMIT, [data])
        driver.notify(TRANSMIT)
        driver.loop.run(device.pause)
        state = driver.slot.save()
        memory = driver.memory.read(BASE, driver.memory.size)
        sent = state.device.own["ports"][1]["sent"]
        assert 0 < sent < len(data)
        got = receive(client, sent)
        queues = driver.queues

    device = ports("console", "data")
    client = device.port("data").connect()
    with client, Driver(device) as driver:
        driver.memory.write(BASE, memory)
        driver.queues, driver.accepted = queues, state.accepted
        driver.loop.run(driver.slot.restore, state)

        assert device.accepted & MULTIPORT
        assert driver.config(0, 2) == 90
        assert device.port("data").guest_open
        assert got + receive(client, len(data) - sent) == data
        driver.wait(TRANSMIT)
        with device.port("console").connect() as console:
            assert receive(console, 4) == b"kept"


def test_a_state_of_other_ports_is_refused() -> None:
    with up(ports("console", "data")) as driver:
        state = driver.slot.save().device.own
    with pytest.raises(Exception, match="cannot be put into console"):
        ports("console").restore_own(state)
