"""Ethernet frames on a stream socket: what arrives in pieces, does not fit, or makes no sense."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from vmm.network.offload import HEADER, NEEDS_CSUM
from vmm.network.port import Frame
from vmm.network.stream import LENGTH, StreamPort

NO_HEADER = bytes(HEADER.size)


@pytest.fixture
def pair() -> Iterator[tuple[StreamPort, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    port = StreamPort(ours, 1500)
    with theirs:
        yield port, theirs
    port.close()


def framed(*frames: bytes) -> bytes:
    return b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)


def received(port: StreamPort) -> list[bytes]:
    """What one read brought; frames are taken, as a device takes them."""
    inbox = port.inboxes[0]
    port.receive(inbox)
    found = [bytes(inbox.buffer[begin + HEADER.size : end]) for begin, end in reversed(inbox.frames)]
    inbox.frames = []
    return found


def read(peer: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += peer.recv(length - len(data))
    return data


def test_frames_that_come_together_are_found(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    peer.sendall(framed(b"a" * 60, b"b" * 1514))
    assert received(port) == [b"a" * 60, b"b" * 1514]


def test_frame_that_comes_byte_by_byte_is_found_once_it_is_whole(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    whole = framed(b"a" * 20)
    for number in range(len(whole) - 1):
        peer.sendall(whole[number : number + 1])
        assert received(port) == []
    peer.sendall(whole[-1:])
    assert received(port) == [b"a" * 20]


def test_many_large_frames_pass_through_the_buffer_in_order(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    for number in range(100):
        frame = bytes([number]) * 65_535
        sent, found = framed(frame), []
        while not found:
            if sent:
                sent = sent[peer.send(sent[:30_000]) :]
            found = received(port)
        assert found == [frame]


def test_writing_headers_before_frames_harms_none_of_them(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    peer.sendall(framed(b"a" * 14, b"b" * 14, b"c" * 14))
    inbox = port.inboxes[0]
    port.receive(inbox)
    found = []
    while inbox.frames:
        begin, end = inbox.frames.pop()
        inbox.buffer[begin : begin + HEADER.size] = b"h" * HEADER.size
        found.append(bytes(inbox.buffer[begin:end]))
    assert found == [b"h" * 12 + each * 14 for each in (b"a", b"b", b"c")]


def test_frame_shorter_than_an_ethernet_header_is_dropped(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    peer.sendall(framed(b"", b"x" * 13, b"a" * 14))
    assert received(port) == [b"a" * 14]
    assert port.dropped == 2


def test_length_that_nobody_would_send_ends_the_link(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    peer.sendall(framed(b"a" * 14) + b"\xff\xff\xff\xff")
    assert received(port) == [b"a" * 14]
    assert not port.up
    assert port.inboxes[0].descriptor == -1


def test_peer_that_leaves_ends_the_link(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    peer.close()
    assert received(port) == []
    assert not port.up
    port.send(0, [Frame(NO_HEADER, [b"a" * 60], 60)])
    assert port.pending == b""


def test_what_the_socket_does_not_take_is_sent_later_to_the_byte(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    sent = b""
    while not port.pending:
        frames = [bytes([len(sent) >> 16 & 0xFF]) * 65_000] * 4
        port.send(0, [Frame(NO_HEADER, [each[:100], each[100:]], len(each)) for each in frames])
        sent += framed(*frames)
    got = b""
    while port.pending:
        got += peer.recv(1 << 20)
        port.flush()
    assert got + read(peer, len(sent) - len(got)) == sent


def test_checksum_is_completed_in_a_copy(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    guest = bytearray(b"\0" * 14 + b"\x12\x34" * 30)
    before = bytes(guest)
    header = HEADER.pack(NEEDS_CSUM, 0, 0, 0, 14, 16, 0)

    port.send(0, [Frame(header, [memoryview(guest)[:33], memoryview(guest)[33:]], len(guest))])

    frame = read(peer, 4 + len(guest))[4:]
    assert frame[:30] == before[:30]
    assert frame[30:32] != before[30:32]
    assert bytes(guest) == before


def test_frame_too_long_for_the_stream_is_dropped(pair: tuple[StreamPort, socket.socket]) -> None:
    port, peer = pair
    port.send(0, [Frame(NO_HEADER, [bytes(65_536)], 65_536), Frame(NO_HEADER, [b"a" * 14], 14)])
    assert read(peer, 18) == framed(b"a" * 14)
    assert port.dropped == 1
