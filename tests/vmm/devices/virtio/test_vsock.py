"""The socket device between a driver in Python and unix sockets: connections, credit, closing."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.devices.virtio.vsock_guest import BUFFER_BYTES, CID, GUEST_BUFFER, Guest, guest_of
from vmm.config import VsockConfig
from vmm.devices.virtio.vsock.endpoint import VsockError
from vmm.devices.virtio.vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    NEITHER,
    NO_RECEIVE,
    NO_SEND,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vsock"


@pytest.fixture
def guest(path: Path) -> Iterator[Guest]:
    with guest_of(VsockConfig(socket=path, cid=CID)) as guest:
        yield guest


def client(path: Path, line: bytes) -> socket.socket:
    """Connects to the unix socket and says ``line``."""
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(5)
    connected.connect(str(path))
    connected.sendall(line)
    return connected


def listener(path: Path, port: int, backlog: int = 8) -> socket.socket:
    """Listens for connections that the guest opens to ``port``."""
    listening = socket.socket(socket.AF_UNIX)
    listening.settimeout(5)
    listening.bind(f"{path}_{port}")
    listening.listen(backlog)
    return listening


def dialled(guest: Guest, **fields: int) -> tuple[socket.socket, tuple[int, int]]:
    """A connection that the host opened, and its guest's and host's port."""
    future = guest.device.dial(1024)
    request = guest.expect(REQUEST)
    guest.send(RESPONSE, 1024, request.src_port, **fields)
    host = future.result(5)
    host.settimeout(5)
    return host, (1024, request.src_port)


def read_exactly(host: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = host.recv(length - len(data))
        assert part, f"the end after {len(data)} bytes"
        data += part
    return data


# Opening.


def test_a_client_that_names_a_port_reaches_the_guest(guest: Guest, path: Path) -> None:
    with client(path, b"CONNECT 1024\n") as host:
        request = guest.expect(REQUEST)
        guest.send(RESPONSE, 1024, request.src_port)

        assert (request.dst_port, request.type) == (1024, 1)
        assert host.recv(64) == b"OK %d\n" % request.src_port
        host.sendall(b"to the guest")
        assert guest.receive().payload == b"to the guest"
        guest.send(RW, 1024, request.src_port, b"to the host")
        assert host.recv(64) == b"to the host"


def test_what_a_client_sends_behind_its_line_is_not_lost(guest: Guest, path: Path) -> None:
    with client(path, b"CONNECT 7\nearly") as host:
        request = guest.expect(REQUEST)
        guest.send(RESPONSE, 7, request.src_port)

        assert host.recv(64).startswith(b"OK ")
        assert guest.receive().payload == b"early"


def test_a_line_may_come_in_pieces(guest: Guest, path: Path) -> None:
    with client(path, b"CONN") as host:
        guest.expect_nothing()
        host.sendall(b"ECT 9\r")
        guest.expect_nothing()
        host.sendall(b"\n")

        assert guest.expect(REQUEST).dst_port == 9


def test_a_refusal_of_the_guest_closes_the_client(guest: Guest, path: Path) -> None:
    with client(path, b"CONNECT 1024\n") as host:
        request = guest.expect(REQUEST)
        guest.send(RST, 1024, request.src_port)

        assert host.recv(64) == b""
        assert guest.device.statistics.connections == 0


def test_a_client_that_leaves_before_the_answer_is_taken_back(guest: Guest, path: Path) -> None:
    client(path, b"CONNECT 1024\n").close()
    request = guest.expect(REQUEST)

    assert guest.expect(RST).src_port == request.src_port


def test_the_guest_reaches_a_listener_of_the_host(guest: Guest, path: Path) -> None:
    with listener(path, 77) as listening:
        guest.send(REQUEST, 5000, 77)
        response = guest.expect(RESPONSE)
        host, _ = listening.accept()

        with host:
            guest.send(RW, 5000, 77, b"from the guest")
            assert host.recv(64) == b"from the guest"
            host.sendall(b"from the host")
            assert guest.receive().payload == b"from the host"
            assert (response.src_port, response.dst_port) == (77, 5000)


def test_the_guest_is_refused_where_nobody_listens(guest: Guest) -> None:
    for port in (78, 0xFFFF_FFFF):
        guest.send(REQUEST, 5000, port)
        assert guest.expect(RST).src_port == port


def test_requests_wait_for_room_in_the_backlog(guest: Guest, path: Path) -> None:
    with listener(path, 77, backlog=0) as listening:
        for port in range(5000, 5006):
            guest.send(REQUEST, port, 77)
        hosts = []
        for _ in range(6):
            hosts.append(listening.accept()[0])

        assert {guest.expect(RESPONSE).dst_port for _ in hosts} == set(range(5000, 5006))
        for host in hosts:
            host.close()


def test_a_listener_that_never_accepts_refuses_in_the_end(
    guest: Guest, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.DIAL_SECONDS", 0.05)
    with listener(path, 77, backlog=0):
        guest.send(REQUEST, 5000, 77)
        guest.expect(RESPONSE)
        guest.send(REQUEST, 5001, 77)

        assert guest.expect(RST).dst_port == 5001


def test_dialling_a_port_where_nobody_listens_fails_with_its_number(guest: Guest) -> None:
    future = guest.device.dial(1025)
    guest.send(RST, 1025, guest.expect(REQUEST).src_port)

    with pytest.raises(VsockError, match="nobody in the guest listens on vsock port 1025"):
        future.result(5)


def test_dialling_a_guest_that_does_not_answer_fails(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.CONNECT_SECONDS", 0.05)
    future = guest.device.dial(1024)
    request = guest.expect(REQUEST)

    with pytest.raises(VsockError, match="did not answer"):
        future.result(5)
    assert guest.expect(RST).src_port == request.src_port


def test_a_cancelled_dial_is_reset_when_the_guest_answers(guest: Guest) -> None:
    future = guest.device.dial(1024)
    request = guest.expect(REQUEST)
    assert future.cancel()
    guest.send(RESPONSE, 1024, request.src_port)

    assert guest.expect(SHUTDOWN).flags == NEITHER


def test_dialling_before_the_driver_is_up_is_refused() -> None:
    from vmm.devices.virtio.vsock.device import VsockDevice

    device = VsockDevice(VsockConfig())
    with pytest.raises(VsockError, match="no driver"):
        device.dial(1024)
    device.close()


def test_a_listener_in_python_gets_a_socket(guest: Guest) -> None:
    accepted: list[socket.socket] = []
    guest.device.listen(1025, accepted.append)
    with pytest.raises(VsockError, match="has a listener already"):
        guest.device.listen(1025, accepted.append)
    guest.send(REQUEST, 5000, 1025)
    guest.expect(RESPONSE)
    guest.send(RW, 5000, 1025, b"log line")

    guest.driver.loop.run(lambda: None)
    with accepted[0] as host:
        assert host.recv(64) == b"log line"
    guest.device.unlisten(1025)
    guest.expect(SHUTDOWN)
    guest.send(REQUEST, 5001, 1025)
    guest.expect(RST)


# Credit.


def test_the_host_sends_no_more_than_the_guest_has_room_for(guest: Guest) -> None:
    host, (guest_port, host_port) = dialled(guest, buf_alloc=10_000)
    data = bytes(range(256)) * 100
    with host:
        host.sendall(data)
        first = guest.read(10_000)
        guest.expect_nothing()
        guest.send(CREDIT_UPDATE, guest_port, host_port, buf_alloc=10_000, fwd_cnt=4_000)
        second = guest.read(4_000)
        guest.expect_nothing()
        guest.send(CREDIT_UPDATE, guest_port, host_port, buf_alloc=20_000, fwd_cnt=14_000)

        assert first + second + guest.read(len(data) - 14_000) == data


def test_no_room_at_all_means_no_data(guest: Guest) -> None:
    host, (guest_port, host_port) = dialled(guest, buf_alloc=0)
    with host:
        host.sendall(b"wait")
        guest.expect_nothing()
        guest.send(CREDIT_UPDATE, guest_port, host_port, buf_alloc=2)
        assert guest.receive().payload == b"wa"
        guest.expect_nothing()


@pytest.mark.parametrize("count", [0, 999, 2001, 0x8000_0000, 0xFFFF_FFFF])
def test_a_count_that_goes_back_or_too_far_gives_no_credit(guest: Guest, count: int) -> None:
    host, (guest_port, host_port) = dialled(guest, buf_alloc=1000)
    with host:
        host.sendall(bytes(3000))
        guest.read(1000)
        guest.send(CREDIT_UPDATE, guest_port, host_port, buf_alloc=1000, fwd_cnt=1000)
        guest.read(1000)
        guest.send(CREDIT_UPDATE, guest_port, host_port, buf_alloc=1000, fwd_cnt=count)

        guest.expect_nothing()


def test_a_buffer_that_shrinks_below_what_is_in_it_stops_the_host(guest: Guest) -> None:
    host, (guest_port, host_port) = dialled(guest, buf_alloc=2000)
    with host:
        host.sendall(bytes(5000))
        guest.read(2000)
        guest.send(CREDIT_UPDATE, guest_port, host_port, buf_alloc=100, fwd_cnt=1000)
        guest.expect_nothing()
        guest.send(CREDIT_UPDATE, guest_port, host_port, buf_alloc=100, fwd_cnt=2000)
        guest.read(100)
        guest.expect_nothing()


def test_the_guest_is_told_when_its_bytes_have_left(guest: Guest) -> None:
    host, ports = dialled(guest)
    granted = guest.device.statistics  # nothing was received yet
    assert granted.bytes_from_guest == 0
    with host:
        for _ in range(5):
            guest.send(RW, *ports, bytes(32_768))
            read_exactly(host, 32_768)
        update = guest.expect(CREDIT_UPDATE)

        assert update.fwd_cnt == 4 * 32_768
        assert update.buf_alloc == 8 * 32_768


def test_a_guest_with_a_small_buffer_is_told_in_time_for_it(guest: Guest) -> None:
    host, ports = dialled(guest, buf_alloc=4096)
    with host:
        guest.send(RW, *ports, bytes(2048), buf_alloc=4096)

        assert guest.expect(CREDIT_UPDATE).fwd_cnt == 2048


def test_a_question_for_credit_is_answered(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(CREDIT_REQUEST, *ports)

        assert guest.expect(CREDIT_UPDATE).buf_alloc > 0


def test_what_the_host_does_not_read_is_kept_up_to_the_credit(guest: Guest) -> None:
    host, ports = dialled(guest)
    data = bytes(range(256)) * 128
    sent = b""
    with host:
        told, allowed = 0, 8 * len(data)
        while len(sent) - told + len(data) <= allowed:  # what the sockets take, and then what the device keeps
            guest.send(RW, *ports, data)
            sent += data
            guest.send(CREDIT_REQUEST, *ports)
            while (update := guest.expect(CREDIT_UPDATE)).fwd_cnt < told:
                pass
            told = update.fwd_cnt

        assert len(sent) - told > 0
        assert read_exactly(host, len(sent)) == sent
        while guest.expect(CREDIT_UPDATE).fwd_cnt < len(sent):
            guest.send(CREDIT_REQUEST, *ports)


def test_a_guest_that_ignores_its_credit_is_reset(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        for _ in range(9):  # 8 fit, and the device tells of room only with its own packets, which are not taken
            guest.offer(RW, *ports, bytes(32_768))
        guest.driver.notify(1)

        assert guest.expect(RST).src_port == ports[1]
        assert guest.device.statistics.connections == 0


def test_many_bytes_arrive_whole_and_in_order_both_ways(guest: Guest) -> None:
    host, ports = dialled(guest)
    data = bytes(value * 7 % 251 for value in range(200_000))
    with host:
        host.sendall(data)
        assert guest.read(len(data)) == data
        for start in range(0, len(data), 50_000):
            guest.send(RW, *ports, data[start : start + 50_000])
            assert read_exactly(host, 50_000) == data[start : start + 50_000]


def test_buffers_of_several_segments_are_filled(path: Path) -> None:
    with guest_of(VsockConfig(), buffers=0) as guest:
        for _ in range(12):
            guest.driver.add(0, writable=[20, 20, 30, 500])
        guest.driver.notify(0)
        host, _ = dialled(guest)
        data = bytes(range(256)) * 4
        with host:
            host.sendall(data)

            assert guest.read(len(data)) == data


def test_long_streams_are_cut_where_words_are_aligned(guest: Guest) -> None:
    host, _ = dialled(guest)
    with host:
        host.sendall(bytes(5 * BUFFER_BYTES))
        ends, position = [], 0
        for _ in range(4):
            position += len(guest.receive().payload)
            ends.append(position % 8)

        assert ends == [4, 4, 4, 4]  # as the 44 bytes of a header


# Closing.


def test_the_end_of_the_hosts_data_is_a_half_close(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        host.sendall(b"last words")
        host.shutdown(socket.SHUT_WR)
        assert guest.receive().payload == b"last words"
        assert guest.expect(SHUTDOWN).flags == NO_SEND
        guest.send(RW, *ports, b"an answer")
        assert host.recv(64) == b"an answer"
        guest.send(SHUTDOWN, *ports, flags=NEITHER)

        assert guest.expect(RST).dst_port == ports[0]
        assert host.recv(64) == b""


def test_the_end_of_the_guests_data_is_a_half_close(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(RW, *ports, b"last words")
        guest.send(SHUTDOWN, *ports, flags=NO_SEND)
        assert read_exactly(host, 10) == b"last words"
        assert host.recv(64) == b""
        host.sendall(b"an answer")
        assert guest.receive().payload == b"an answer"
        host.close()

        assert guest.expect(SHUTDOWN).flags == NEITHER


def test_a_guest_that_does_not_listen_any_more_breaks_the_hosts_pipe(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(SHUTDOWN, *ports, flags=NO_RECEIVE)

        with pytest.raises(BrokenPipeError):
            host.sendall(b"x")
        guest.send(RW, *ports, b"still talking")
        assert host.recv(64) == b"still talking"


def test_a_host_that_does_not_listen_any_more_is_told_to_the_guest(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        host.shutdown(socket.SHUT_RD)
        guest.send(RW, *ports, b"x")
        assert guest.expect(SHUTDOWN).flags == NO_RECEIVE
        host.sendall(b"still talking")

        assert guest.receive().payload == b"still talking"


def test_a_host_that_closes_ends_the_connection(guest: Guest) -> None:
    host, ports = dialled(guest)
    host.sendall(b"bye")
    host.close()

    assert guest.receive().payload == b"bye"
    assert guest.expect(SHUTDOWN).flags == NEITHER
    guest.send(RST, *ports)
    assert guest.device.statistics.connections == 0


def test_a_host_that_dies_with_unread_data_is_a_reset(guest: Guest) -> None:
    host, ports = dialled(guest)
    guest.send(RW, *ports, b"nobody will read this")
    host.close()

    assert guest.expect(RST).src_port == ports[1]


def test_a_guest_that_never_confirms_the_end_is_reset(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.CLOSE_SECONDS", 0.05)
    host, ports = dialled(guest)
    host.close()
    guest.expect(SHUTDOWN)

    assert guest.expect(RST).src_port == ports[1]


def fill(guest: Guest, ports: tuple[int, int]) -> int:
    """Send until the device keeps something for the host; how many bytes were sent."""
    sent = 0
    while True:
        guest.send(RW, *ports, bytes(32_768))
        sent += 32_768
        guest.send(CREDIT_REQUEST, *ports)
        told = guest.expect(CREDIT_UPDATE).fwd_cnt
        if guest.device.statistics.connections == 0 or told < sent:
            return sent


def test_bytes_of_a_guest_that_has_closed_still_arrive(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        sent = fill(guest, ports)
        guest.send(SHUTDOWN, *ports, flags=NEITHER)
        guest.expect(RST)

        read_exactly(host, sent)
        assert host.recv(64) == b""


def test_a_host_that_does_not_read_the_last_bytes_is_left_in_the_end(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.FLUSH_SECONDS", 0.05)
    host, ports = dialled(guest)
    with host:
        sent = fill(guest, ports)
        guest.send(SHUTDOWN, *ports, flags=NEITHER)
        guest.expect(RST)
        until = time.monotonic() + 5
        while guest.device.statistics.connections and time.monotonic() < until:
            time.sleep(0.01)

        received = 0
        while part := host.recv(1 << 20):
            received += len(part)
        assert received < sent


def test_a_reset_of_the_guest_closes_the_hosts_end(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        guest.send(RST, *ports)

        assert host.recv(64) == b""


def test_a_reset_of_the_device_closes_every_socket(guest: Guest, path: Path) -> None:
    host, _ = dialled(guest)
    waiting = guest.device.dial(1025)
    guest.driver.set(0x70, 0)

    with host:
        assert host.recv(64) == b""
    with pytest.raises(VsockError, match="reset the device"):
        waiting.result(5)
    with client(path, b"CONNECT 1024\n") as late:
        assert late.recv(64) == b""


# Pausing and restoring.


def test_nothing_is_sent_while_the_vm_is_paused(guest: Guest) -> None:
    host, _ = dialled(guest)
    with host:
        guest.device.pause()
        host.sendall(b"later")
        for _ in range(3):
            guest.driver.loop.run(lambda: None)
        guest.driver.acknowledge()
        assert guest.driver.collect(0) == []
        guest.device.resume()

        assert guest.receive().payload == b"later"


def test_the_guest_may_take_its_time_while_it_is_paused(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.devices.virtio.vsock.switchboard.CONNECT_SECONDS", 0.1)
    future = guest.device.dial(1024)
    request = guest.expect(REQUEST)
    guest.device.pause()
    time.sleep(0.3)
    guest.device.resume()
    guest.send(RESPONSE, 1024, request.src_port)

    future.result(5).close()


def test_a_restored_guest_is_told_that_its_connections_are_gone(guest: Guest) -> None:
    host, ports = dialled(guest)
    guest.give_event_buffer()
    with host:
        guest.device.pause()
        state = guest.driver.slot.save()
        guest.driver.slot.restore(state)
        guest.device.resume()

        (event,) = guest.driver.wait(2)
        assert guest.driver.contents(event) == bytes(4)
        assert host.recv(64) == b""
        guest.send(RW, *ports, b"x")
        guest.expect(RST)


def test_a_restored_device_opens_connections_from_ports_that_the_guest_has_not_seen(guest: Guest) -> None:
    host, (_, before) = dialled(guest)
    host.close()
    saved = guest.device.save_own()

    with guest_of(VsockConfig(cid=CID)) as other:
        other.device.restore_own(saved)
        host, (_, after) = dialled(other)
        host.close()

    assert after == before + 1


def test_the_configuration_space_has_the_cid(guest: Guest) -> None:
    assert guest.driver.config(0, 4) == CID
    assert guest.driver.config(4, 4) == 0
    assert guest.driver.offered & 1


def test_statistics_count_packets_and_bytes(guest: Guest) -> None:
    host, ports = dialled(guest)
    with host:
        host.sendall(b"12345")
        guest.receive()
        guest.send(RW, *ports, b"123", buf_alloc=GUEST_BUFFER)
        found = guest.device.statistics

    assert (found.connections, found.opened) == (1, 1)
    assert (found.packets_to_guest, found.bytes_to_guest) == (1, 5)
    assert (found.packets_from_guest, found.bytes_from_guest) == (1, 3)
