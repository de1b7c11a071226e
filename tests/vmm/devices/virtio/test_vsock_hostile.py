"""A guest that means harm, against the socket device: odd packets, floods, and random ones with invariants."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vmm.devices.virtio.test_vsock import dialled
from tests.vmm.devices.virtio.vsock_guest import CID, Guest, guest_of
from vmm.config import VsockConfig
from vmm.devices.virtio.vsock.connection import CREDIT_MAX
from vmm.devices.virtio.vsock.device import MAX_REPLIES, RX, TX
from vmm.devices.virtio.vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    NEITHER,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
)

LARGEST = 0xFFFF_FFFF


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with guest_of(VsockConfig(socket=tmp_path / "vsock", cid=CID)) as guest:
        yield guest


@pytest.mark.parametrize("wrong", [{"src_cid": 4}, {"dst_cid": 1}, {"dst_cid": CID}, {"src_cid": CID | 1 << 32}])
def test_a_packet_between_others_is_dropped(guest: Guest, wrong: dict[str, int]) -> None:
    guest.send(REQUEST, 5000, 77, **wrong)

    guest.expect_nothing()


@pytest.mark.parametrize("packet_type", [0, 2, 0xFFFF])
def test_a_packet_of_another_type_is_refused(guest: Guest, packet_type: int) -> None:
    guest.send(REQUEST, 5000, 77, type=packet_type)

    assert guest.expect(RST).type == packet_type


@pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xFFFF])
def test_a_packet_of_no_connection_is_refused(guest: Guest, op: int) -> None:
    guest.send(op, LARGEST, LARGEST)

    refusal = guest.expect(RST)
    assert (refusal.src_port, refusal.dst_port) == (LARGEST, LARGEST)


def test_a_reset_of_no_connection_is_not_answered(guest: Guest) -> None:
    guest.send(RST, 5000, 77)

    guest.expect_nothing()


@pytest.mark.parametrize("op", [REQUEST, RESPONSE, 0, 8, 0xFFFF])
def test_an_operation_that_makes_no_sense_resets_its_connection(guest: Guest, op: int) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(op, *ports)

        assert guest.expect(RST).src_port == ports[1]
        assert host.recv(64) == b""


@pytest.mark.parametrize("op", [RW, SHUTDOWN, REQUEST])
def test_whoever_has_not_accepted_cannot_use_the_connection(guest: Guest, op: int) -> None:
    future = guest.device.dial(1024)
    guest.send(op, 1024, guest.expect(REQUEST).src_port)

    guest.expect(RST)
    assert future.exception(5) is not None


@pytest.mark.parametrize("length", [2, 4097, LARGEST])
def test_a_length_beyond_the_packet_resets_its_connection(guest: Guest, length: int) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(RW, *ports, b"x", length=length)

        guest.expect(RST)
        assert host.recv(64) == b""


def test_data_after_the_end_of_data_resets_the_connection(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(SHUTDOWN, *ports, flags=2)
        guest.send(RW, *ports, b"x")

        guest.expect(RST)


def test_flags_that_nobody_knows_are_ignored(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(SHUTDOWN, *ports, flags=0xFFFF_FFFC)
        host.sendall(b"still there")

        assert guest.receive().payload == b"still there"


@pytest.mark.parametrize("size", [1, 43])
def test_a_packet_shorter_than_a_header_needs_a_reset(guest: Guest, size: int) -> None:
    guest.driver.add(TX, [bytes(size)])
    guest.driver.notify(TX)

    assert guest.driver.needs_reset


def test_a_packet_with_parts_to_write_needs_a_reset(guest: Guest) -> None:
    guest.driver.add(TX, [bytes(44)], [64])
    guest.driver.notify(TX)

    assert guest.driver.needs_reset


@pytest.mark.parametrize("size", [1, 43, 44])
def test_a_buffer_without_room_for_data_needs_a_reset(size: int) -> None:
    with guest_of(VsockConfig(), buffers=0) as guest:
        guest.give_buffers(1, size)
        guest.send(RW, 5000, 77, b"x")

        assert guest.driver.needs_reset


def test_requests_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.MAX_CONNECTIONS", 5)
    accepted: list[socket.socket] = []
    with guest_of(VsockConfig()) as guest:
        guest.device.listen(77, accepted.append)
        for port in range(20):
            guest.send(REQUEST, port, 77)
        answers = [guest.receive().header.op for _ in range(20)]
        guest.driver.loop.run(lambda: None)

        assert answers.count(RESPONSE) == 5
        assert answers.count(RST) == 15
        assert guest.device.statistics.connections == len(accepted) == 5
    for each in accepted:
        each.close()


def test_packets_are_left_alone_while_too_many_answers_wait(tmp_path: Path) -> None:
    with guest_of(VsockConfig(), buffers=0) as guest:
        sent = taken = 0
        while sent < MAX_REPLIES + 60:
            for _ in range(32):
                guest.offer(RW, sent, 77, b"x")
                sent += 1
            guest.driver.notify(TX)
            taken += len(guest.driver.collect(TX))
            if taken < sent:
                break

        assert taken == MAX_REPLIES
        guest.give_buffers(40)
        answers = [guest.expect(RST).dst_port for _ in range(sent)]
        assert answers == list(range(sent))


def test_connections_opened_and_reset_while_nothing_can_be_sent_leave_nothing(tmp_path: Path) -> None:
    descriptors = psutil.Process().num_fds()
    with guest_of(VsockConfig(), buffers=0) as guest:
        accepted: list[socket.socket] = []
        guest.device.listen(77, accepted.append)
        inside = psutil.Process().num_fds()
        for _ in range(300):
            guest.send(REQUEST, 5000, 77)
            guest.send(RST, 5000, 77)
        guest.driver.loop.run(lambda: None)
        for each in accepted:
            each.close()

        assert psutil.Process().num_fds() == inside
        assert guest.device.statistics.connections == 0
        assert len(guest.device._board.ready) == 0
    assert psutil.Process().num_fds() == descriptors


def test_many_small_packets_are_kept_as_their_bytes(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        for _ in range(2000):
            guest.send(RW, *ports, b"x")

        assert host.recv(1 << 20) == b"x" * 2000


ports = st.sampled_from([0, 1, 77, 1024, LARGEST])
words = st.sampled_from([0, 1, 44, 1000, 65_536, 0x7FFF_FFFF, 0x8000_0000, LARGEST])
packets = st.fixed_dictionaries(
    {
        "op": st.sampled_from([*range(9), 0xFFFF]) | st.sampled_from([REQUEST, RW, RW, SHUTDOWN, CREDIT_UPDATE]),
        "guest_port": ports,
        "host_port": ports,
        "payload": st.binary(max_size=40) | st.just(bytes(20_000)),
        "flags": st.integers(0, NEITHER) | words,
        "buf_alloc": words,
        "fwd_cnt": words,
    },
    optional={"length": words, "src_cid": st.just(4), "dst_cid": st.just(CID), "type": words.map(lambda n: n & 0xFFFF)},
)
steps = st.lists(packets | st.sampled_from(["dial", "answer", "write", "read", "close"]), max_size=40)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_no_sequence_of_packets_does_harm(sequence: list[dict[str, int] | str]) -> None:
    descriptors = psutil.Process().num_fds()
    hosts: list[socket.socket] = []
    with guest_of(VsockConfig(cid=CID), buffers=8) as guest:
        device = guest.device
        device.listen(77, hosts.append)
        futures = []
        for step in sequence:
            if step == "dial":
                futures.append(device.dial(1024))
            elif isinstance(step, dict):
                guest.send(**step)
            for host in list(hosts):
                host.setblocking(False)
                try:
                    if step == "write":
                        host.send(bytes(3000))
                    elif step == "read":
                        host.recv(3000)
                    elif step == "close":
                        host.close()
                        hosts.remove(host)
                except OSError:
                    continue
            for buffer in guest.driver.collect(RX):
                header = guest.driver.contents(buffer)
                guest.driver.add_at(RX, *buffer.parts)
                if step == "answer" and header[30] == REQUEST:
                    guest.send(RESPONSE, 1024, int.from_bytes(header[16:20], "little"))
            guest.driver.notify(RX)

            board = device._board
            assert not guest.driver.crashes
            assert len(board) <= board.limit
            assert len(board.replies) <= MAX_REPLIES + len(board)
            for connection in [*board._connections.values(), *board._flushing]:
                assert len(connection.outgoing) <= connection.buf_alloc <= CREDIT_MAX
                assert connection.unread >= 0
            assert set(board.ready) <= set(board._connections.values())
        assert not guest.driver.needs_reset
        hosts += [each.result() for each in futures if each.done() and not each.exception()]
        guest.driver.loop.run(lambda: None)
    for host in hosts:
        host.close()
    assert psutil.Process().num_fds() == descriptors
