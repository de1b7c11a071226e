"""The network device, asked by a driver in Python; the test is the peer at the other end of the wire."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vmm.devices.virtio.driver import Driver, driven
from vmm.config import NetworkConfig
from vmm.devices.virtio import net
from vmm.devices.virtio.device import VERSION_1
from vmm.devices.virtio.net import NetworkDevice
from vmm.devices.virtio.net_control import CTRL_RX, CTRL_VQ, GUEST_ANNOUNCE, MQ
from vmm.network import stream
from vmm.network.offload import (
    CSUM,
    DATA_VALID,
    GSO_TCPV4,
    GUEST_CSUM,
    HEADER,
    HOST_TSO4,
    NEEDS_CSUM,
    ones_complement_sum,
)
from vmm.network.stream import LENGTH, StreamPort

MAC = bytes.fromhex("020000000001")
PEER = bytes.fromhex("020000000002")
RECEIVE, TRANSMIT, CONTROL = 0, 1, 2
PLAIN = bytes(HEADER.size)


@dataclass
class Wire:
    """A device with its driver, and the socket at the other end."""

    driver: Driver
    device: NetworkDevice
    peer: socket.socket

    def send(self, *frames: bytes) -> None:
        self.peer.sendall(b"".join(LENGTH.pack(len(frame)) + frame for frame in frames))

    def receive(self) -> bytes:
        (length,) = LENGTH.unpack(self.read(4))
        return self.read(length)

    def read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.peer.recv(length - len(data))
            assert piece, "the device closed the wire"
            data += piece
        return data

    def transmit(self, *parts: bytes) -> None:
        self.driver.request(TRANSMIT, parts)

    def control(self, *parts: bytes) -> int:
        return self.driver.request(CONTROL, parts, [1])[0]


class OffloadingPort(StreamPort):
    """What passt can do, with the test at the other end."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, 65_520, CSUM | GUEST_CSUM | HOST_TSO4, completes_checksums=False)

    def accept(self, features: int) -> None:
        self.header = HEADER.pack(DATA_VALID if features & GUEST_CSUM else 0, 0, 0, 0, 0, 0, 0)[:10]


def small_port(connection: socket.socket) -> StreamPort:
    """One that takes little at a time."""
    port = StreamPort(connection, 1500)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    return port


@contextlib.contextmanager
def wire(
    features: int | None = None, make: Callable[[socket.socket], StreamPort] | None = None, queues: int = 1
) -> Iterator[Wire]:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(10)
        port = make(ours) if make is not None else StreamPort(ours, 1500)
        device = NetworkDevice(NetworkConfig(mac="02:00:00:00:00:01", queues=queues), port)
        with driven(device, features) as driver:
            yield Wire(driver, device, theirs)


def frame(text: bytes, source: bytes = MAC, destination: bytes = PEER, length: int = 60) -> bytes:
    return (destination + source + b"\x88\xb5" + text).ljust(length, b".")


def incoming(text: bytes, destination: bytes = MAC, length: int = 60) -> bytes:
    return frame(text, PEER, destination, length)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.001)


# What the driver is told.


def test_configuration_space_tells_address_link_and_mtu() -> None:
    with wire() as each:
        assert bytes(each.driver.config(n, 1) for n in range(6)) == MAC
        assert each.driver.config(6, 2) == net.LINK_UP
        assert each.driver.config(8, 2) == 1
        assert each.driver.config(10, 2) == 1500


def test_offloads_that_the_wire_cannot_carry_are_not_offered() -> None:
    with wire() as each:
        assert each.driver.offered & CSUM
        assert not each.driver.offered & (GUEST_CSUM | HOST_TSO4 | MQ)
    with wire(make=OffloadingPort, queues=2) as each:
        assert each.driver.offered & (GUEST_CSUM | HOST_TSO4 | MQ) == GUEST_CSUM | HOST_TSO4 | MQ


def test_random_addresses_are_local_and_of_one_interface() -> None:
    for _ in range(20):
        address = net.random_mac()
        assert address[0] & 3 == 2
        assert len(address) == 6


# Frames of the guest.


def test_frame_of_the_guest_reaches_the_peer() -> None:
    with wire() as each:
        each.transmit(PLAIN + frame(b"whole"))
        assert each.receive() == frame(b"whole")
        each.transmit(PLAIN, frame(b"in two parts"))
        assert each.receive() == frame(b"in two parts")
        assert each.device.statistics.sent_frames == 2
        assert each.device.statistics.sent_bytes == 120


def test_header_that_is_split_is_put_together() -> None:
    with wire() as each:
        each.transmit(PLAIN[:5], PLAIN[5:] + frame(b"split")[:3], frame(b"split")[3:])
        assert each.receive() == frame(b"split")


def test_frame_of_very_many_parts_reaches_the_peer_whole() -> None:
    with wire() as each:
        whole = frame(bytes(range(200)), length=1400)
        pieces = [whole[n : n + 7] for n in range(0, 1400, 7)]
        each.driver.request(TRANSMIT, [PLAIN, *pieces], indirect=True)
        assert each.receive() == whole


def test_many_frames_with_one_notification_keep_their_order() -> None:
    with wire() as each:
        frames = [frame(b"%d" % n) for n in range(40)]
        for data in frames:
            each.driver.add(TRANSMIT, [PLAIN + data])
        each.driver.notify(TRANSMIT)
        assert [each.receive() for _ in frames] == frames
        each.driver.wait(TRANSMIT, 40)


def test_checksum_that_the_guest_left_is_completed() -> None:
    with wire() as each:
        data = frame(b"\0" * 40, length=80)
        each.transmit(HEADER.pack(NEEDS_CSUM, 0, 0, 0, 14, 30, 0) + data)
        arrived = each.receive()
        assert arrived[:44] == data[:44]
        assert ones_complement_sum(bytearray(arrived[14:])) == 0xFFFF


def test_segment_larger_than_the_mtu_goes_through_whole_where_the_port_takes_it() -> None:
    with wire(make=OffloadingPort) as each:
        data = frame(b"large", length=40_000)
        each.transmit(HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0), data)
        assert each.receive() == data


@pytest.mark.parametrize(
    ("header", "length"),
    [
        pytest.param(PLAIN, 13, id="shorter than an Ethernet header"),
        pytest.param(PLAIN, net.MAX_FRAME + 1, id="longer than any frame"),
        pytest.param(HEADER.pack(NEEDS_CSUM, 0, 0, 0, 40, 19, 0), 60, id="checksum behind the end"),
        pytest.param(HEADER.pack(NEEDS_CSUM, 0, 0, 0, 65_535, 65_535, 0), 60, id="checksum far away"),
        pytest.param(HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 0, 34, 16, 0), 60, id="segments of no bytes"),
        pytest.param(HEADER.pack(0, GSO_TCPV4, 54, 1448, 34, 16, 0), 60, id="segments without a checksum"),
        pytest.param(HEADER.pack(NEEDS_CSUM, 3, 54, 1448, 34, 16, 0), 60, id="segmentation of UDP"),
        pytest.param(HEADER.pack(NEEDS_CSUM, 4, 54, 1448, 34, 16, 0), 60, id="segmentation not offered"),
        pytest.param(HEADER.pack(NEEDS_CSUM, 0xFF, 54, 1448, 34, 16, 0), 60, id="segmentation unknown"),
    ],
)
def test_frame_that_makes_no_sense_is_dropped_and_the_next_one_sent(header: bytes, length: int) -> None:
    with wire(make=OffloadingPort) as each:
        each.transmit(header, b"x" * length)
        each.transmit(PLAIN, frame(b"good"))
        assert each.receive() == frame(b"good")
        assert each.device.statistics.sent_dropped == 1
        assert not each.driver.needs_reset


def test_buffer_shorter_than_a_header_is_dropped() -> None:
    with wire() as each:
        each.transmit(b"x" * 11)
        each.transmit(b"x" * 12)
        each.transmit(PLAIN, frame(b"good"))
        assert each.receive() == frame(b"good")
        assert each.device.statistics.sent_dropped == 2


def test_peer_that_does_not_read_holds_frames_back_and_loses_none() -> None:
    with wire(make=small_port) as each:
        frames = [frame(b"%d" % n, length=60_000) for n in range(60)]
        for data in frames:
            each.driver.add(TRANSMIT, [PLAIN + data])
        each.driver.notify(TRANSMIT)
        until(lambda: each.device.port.pending)  # for a moment it is not, between two pieces that the socket takes
        assert len(each.driver.collect(TRANSMIT)) < 60
        assert [each.receive() for _ in frames] == frames
        until(lambda: not each.device.queues[TRANSMIT].waiting)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.binary(min_size=1, max_size=80), min_size=1, max_size=4), min_size=1, max_size=8))
def test_whatever_the_guest_sends_the_device_lives(chains: list[list[bytes]]) -> None:
    with wire(make=OffloadingPort) as each:
        for parts in chains:
            each.transmit(*parts)
            each.control(*parts)
        each.transmit(PLAIN, frame(b"the end"))
        while each.receive() != frame(b"the end"):
            pass
        assert not each.driver.needs_reset


# Frames for the guest.


def test_frame_of_the_peer_reaches_the_guest() -> None:
    with wire() as each:
        each.driver.add(RECEIVE, writable=[2000])
        each.send(incoming(b"hello"))
        (buffer,) = each.driver.wait(RECEIVE)
        contents = each.driver.contents(buffer)
        assert contents[: HEADER.size] == HEADER.pack(0, 0, 0, 0, 0, 0, 1)
        assert contents[HEADER.size :] == incoming(b"hello")
        assert each.device.statistics.received_bytes == 60


def test_large_frame_fills_several_buffers() -> None:
    with wire() as each:
        for _ in range(4):
            each.driver.add(RECEIVE, writable=[100, 412])
        data = incoming(bytes(range(256)) * 4, length=1400)
        each.send(data)
        buffers = each.driver.wait(RECEIVE, 3)
        contents = b"".join(each.driver.contents(buffer) for buffer in buffers)
        assert contents[10:12] == struct.pack("<H", 3)
        assert contents[12:] == data
        assert [buffer.written for buffer in buffers] == [512, 512, 1412 - 1024]


def test_without_merging_a_frame_that_does_not_fit_is_dropped() -> None:
    with wire(VERSION_1) as each:
        each.driver.add(RECEIVE, writable=[500])
        each.send(incoming(b"too large", length=600), incoming(b"fits"))
        (buffer,) = each.driver.wait(RECEIVE)
        assert each.driver.contents(buffer)[12:] == incoming(b"fits")
        assert each.device.statistics.received_dropped == 1


def test_frames_wait_until_the_guest_has_buffers() -> None:
    with wire() as each:
        frames = [incoming(b"%d" % n, length=1000) for n in range(100)]
        each.send(*frames)
        got = []
        while len(got) < 100:
            for _ in range(7):
                each.driver.add(RECEIVE, writable=[1500])
            each.driver.notify(RECEIVE)
            got += [each.driver.contents(buffer)[12:] for buffer in each.driver.wait(RECEIVE, min(7, 100 - len(got)))]
        assert got == frames


def test_frame_larger_than_all_buffers_together_is_dropped() -> None:
    with wire() as each:
        for _ in range(64):
            each.driver.add(RECEIVE, writable=[20])
        each.send(incoming(b"huge", length=1400), incoming(b"small"))
        each.driver.wait(RECEIVE, 4)
        assert each.device.statistics.received_dropped == 1


def test_receive_buffer_that_is_to_be_read_makes_the_device_ask_for_a_reset() -> None:
    with wire() as each:
        each.driver.add(RECEIVE, readable=[b"x" * 100])
        each.send(incoming(b"hello"))
        until(lambda: each.driver.needs_reset)
        assert "must have none to read" in str(each.device.mistake)


def test_receive_buffer_too_small_for_a_header_makes_the_device_ask_for_a_reset() -> None:
    with wire() as each:
        each.driver.add(RECEIVE, writable=[11])
        each.send(incoming(b"hello"))
        until(lambda: each.driver.needs_reset)
        each.driver.start()
        each.driver.add(RECEIVE, writable=[2000])
        each.send(incoming(b"again"))
        (buffer,) = each.driver.wait(RECEIVE)
        assert each.driver.contents(buffer)[12:] == incoming(b"again")


def test_verified_data_is_marked_only_for_a_driver_that_knows_the_mark() -> None:
    for features, flags in ((None, DATA_VALID), (VERSION_1, 0)):
        with wire(features, OffloadingPort) as each:
            each.driver.add(RECEIVE, writable=[2000])
            each.send(incoming(b"hello"))
            (buffer,) = each.driver.wait(RECEIVE)
            assert each.driver.contents(buffer)[0] == flags


# Control.


def delivered(each: Wire, *frames: bytes, own: bytes = MAC) -> list[bytes]:
    """Which of these frames reach the guest, whose own address lets the last one pass."""
    for _ in range(len(frames) + 1):
        each.driver.add(RECEIVE, writable=[2000])
    each.driver.notify(RECEIVE)
    last = incoming(b"last", own)
    each.send(*frames, last)
    found: list[bytes] = []
    while last not in found:
        found += [each.driver.contents(buffer)[12:] for buffer in each.driver.wait(RECEIVE)]
    return found[:-1]


def test_frames_for_others_are_received_only_if_wanted() -> None:
    other, group = incoming(b"other", PEER), incoming(b"group", b"\x01\0\x5e\0\0\1")
    everybody = incoming(b"all", b"\xff" * 6)
    with wire(CTRL_VQ | CTRL_RX) as each:
        assert delivered(each, other, everybody) == [everybody]
        assert each.control(b"\0\0", b"\1") == 0  # promiscuous
        assert delivered(each, other) == [other]
        assert each.control(b"\0\0", b"\0") == 0
        assert each.control(b"\0\1", b"\0") == 0  # not all multicast
        assert delivered(each, group, other) == []
        tables = struct.pack("<I6sI6s", 1, PEER, 1, group[:6])
        assert each.control(b"\1\0", tables) == 0
        assert delivered(each, group, other) == [group, other]
        assert each.control(b"\0\5", b"\1") == 0  # no broadcast
        assert delivered(each, everybody) == []


def test_interface_address_can_be_changed_and_is_forgotten_by_a_reset() -> None:
    with wire() as each:
        assert each.control(b"\1\1", PEER) == 0
        assert delivered(each, incoming(b"old"), own=PEER) == []
        each.driver.start()
        assert delivered(each, incoming(b"other", PEER)) == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"\0", id="half a request"),
        pytest.param(b"\0\0", id="no data"),
        pytest.param(b"\0\0\2", id="neither on nor off"),
        pytest.param(b"\0\x09\1", id="unknown command"),
        pytest.param(b"\x77\0\1", id="unknown class"),
        pytest.param(b"\1\0\xff\xff\xff\xff", id="table of 4 billion addresses"),
        pytest.param(b"\1\0\0\0\0\0\1\0\0\0abc", id="table cut off"),
        pytest.param(b"\1\1abc", id="address cut off"),
        pytest.param(b"\1\1\xff\xff\xff\xff\xff\xff", id="group address"),
        pytest.param(b"\4\0\0\0", id="no pairs"),
        pytest.param(b"\4\0\2\0", id="more pairs than there are"),
    ],
)
def test_request_that_is_not_understood_is_answered_with_an_error(request_bytes: bytes) -> None:
    with wire() as each:
        assert each.control(request_bytes) == 1
        assert not each.driver.needs_reset


def test_request_without_room_for_the_answer_makes_the_device_ask_for_a_reset() -> None:
    with wire() as each:
        each.driver.add(CONTROL, [b"\0\0\1"])
        each.driver.notify(CONTROL)
        assert each.driver.needs_reset


def test_connection_comes_in_by_the_pair_on_which_it_sends() -> None:
    def packet(source: bytes, destination: bytes, ports: bytes, macs: bytes) -> bytes:
        return (macs + b"\x08\0" + b"\x45" + bytes(8) + b"\6\0\0" + source + destination + ports).ljust(80, b".")

    one, two = b"\x0a\0\0\1", b"\x0a\0\0\2"
    with wire(queues=2) as each:
        assert each.driver.request(4, [b"\4\0\2\0"], [1]) == b"\0"
        for queue in (0, 2):
            each.driver.add(queue, writable=[2000])
        each.driver.request(3, [PLAIN, packet(one, two, b"\0\1\0\2", PEER + MAC)])
        each.send(packet(two, one, b"\0\2\0\1", MAC + PEER))
        each.driver.wait(2)
        each.driver.request(1, [PLAIN, packet(one, two, b"\0\1\0\2", PEER + MAC)])
        each.send(packet(two, one, b"\0\2\0\1", MAC + PEER))
        each.driver.wait(0)


# The link, and the device's life.


def test_peer_that_leaves_takes_the_link_down_and_the_device_lives() -> None:
    with wire() as each:
        generation = each.driver.get(0xFC)
        each.driver.acknowledge()
        each.peer.close()
        assert each.driver.interrupted.wait(10)
        assert each.driver.acknowledge() & 2
        assert each.driver.config(6, 2) == 0
        assert each.driver.get(0xFC) != generation
        each.transmit(PLAIN, frame(b"lost"))
        assert each.device.statistics.sent_dropped == 1


def test_peer_that_leaves_in_the_middle_of_a_flood_takes_the_link_down() -> None:
    with wire() as each:
        for _ in range(60):
            each.driver.add(TRANSMIT, [PLAIN + frame(b"flood", length=60_000)])
        each.driver.notify(TRANSMIT)
        each.peer.recv(1000)
        each.peer.close()
        each.driver.wait(TRANSMIT, 60)
        until(lambda: each.driver.config(6, 2) == 0)


def test_link_that_comes_back_sends_again_what_the_guest_has_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stream, "SEND_BUFFER", 0)
    config = NetworkConfig(backend="socket", socket=tmp_path / "wire")
    with driven(NetworkDevice(config)) as driver:
        for attempt in (b"first", b"second"):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(tmp_path / "wire"))
                until(lambda: driver.config(6, 2) == net.LINK_UP)
                driver.request(TRANSMIT, [PLAIN, frame(attempt)])
                assert peer.recv(100)[4:] == frame(attempt)
                # More than the socket takes, and nobody reads it.
                for _ in range(40):
                    driver.add(TRANSMIT, [PLAIN + frame(b"flood", length=60_000)])
                driver.notify(TRANSMIT)
                assert driver.device.queues[TRANSMIT].waiting
            until(lambda: driver.config(6, 2) == 0)
            driver.wait(TRANSMIT, 40)


def test_device_that_needs_a_reset_does_not_listen() -> None:
    with wire() as each:
        each.driver.add(RECEIVE, writable=[11])
        each.send(incoming(b"hello"))
        until(lambda: each.driver.needs_reset)
        each.send(incoming(b"again"))
        until(lambda: not each.device._watched)


def test_reset_while_a_frame_is_half_sent_does_not_break_the_stream() -> None:
    with wire(make=small_port) as each:
        for _ in range(4):
            each.driver.add(TRANSMIT, [PLAIN + frame(b"before", length=60_000)])
        each.driver.notify(TRANSMIT)
        assert each.device.port.pending
        each.driver.start()
        for _ in range(4):
            assert each.receive() == frame(b"before", length=60_000)
        each.transmit(PLAIN, frame(b"after"))
        assert each.receive() == frame(b"after")


def test_nothing_reaches_a_paused_guest() -> None:
    with wire() as each:
        each.driver.add(RECEIVE, writable=[2000])
        each.driver.loop.run(each.device.pause)
        each.send(incoming(b"patience"))
        time.sleep(0.05)
        assert each.driver.collect(RECEIVE) == []
        each.driver.loop.run(each.device.resume)
        (buffer,) = each.driver.wait(RECEIVE)
        assert each.driver.contents(buffer)[12:] == incoming(b"patience")


def test_restored_device_goes_on_and_lets_the_guest_announce_itself() -> None:
    with wire() as each:
        assert each.control(b"\0\0", b"\1") == 0
        each.driver.add(RECEIVE, writable=[2000])
        each.driver.loop.run(each.device.pause)
        state = each.driver.slot.save()
        each.driver.slot.restore(state)
        each.driver.loop.run(each.device.resume)
        assert each.driver.accepted & GUEST_ANNOUNCE
        assert each.driver.config(6, 2) & net.ANNOUNCE
        assert each.control(b"\3\0") == 0
        assert not each.driver.config(6, 2) & net.ANNOUNCE
        each.send(incoming(b"for another", PEER))
        (buffer,) = each.driver.wait(RECEIVE)
        assert each.driver.contents(buffer)[12:] == incoming(b"for another", PEER)


def test_passt_answers_a_driver() -> None:
    with driven(NetworkDevice(NetworkConfig(mac="02:00:00:00:00:01"))) as driver:
        driver.add(RECEIVE, writable=[2000])
        request = b"\xff" * 6 + MAC + bytes.fromhex("08060001080006040001") + MAC + bytes(10) + bytes([10, 1, 2, 3])
        driver.request(TRANSMIT, [PLAIN, request])
        (buffer,) = driver.wait(RECEIVE)
        assert driver.contents(buffer)[HEADER.size :].startswith(MAC)
