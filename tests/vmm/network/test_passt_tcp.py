"""What is done about passt's TCP: the test is passt, at the other end of the port's stream."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.network.offload import HEADER, complete_checksum, ones_complement_sum
from vmm.network.passt import PasstPort
from vmm.network.passt_tcp import MAX_ANSWERS, MAX_CONNECTIONS, TcpAttendant
from vmm.network.port import Frame

GUEST_MAC, PASST_MAC = bytes.fromhex("020000000001"), bytes.fromhex("525400000002")
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
ADDRESSES = {4: (bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])), 6: (b"\xfd" + bytes(14) + b"\1", b"\xfd" + bytes(15))}


def segment(flags: int, sequence: int = 1000, data: bytes = b"", version: int = 4, port: int = 40_000) -> bytes:
    """A frame of the guest, from its ``port`` to passt's 80."""
    guest, host = ADDRESSES[version]
    tcp = struct.pack(">HHIIBBHHH", port, 80, sequence, 77, 5 << 4, flags, 500, 0, 0) + data
    if version == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + guest + host
        return PASST_MAC + GUEST_MAC + b"\x08\0" + header + tcp
    return PASST_MAC + GUEST_MAC + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(tcp), 6, 64) + guest + host + tcp


def of_guest(*parts: bytes) -> Frame:
    return Frame(bytes(HEADER.size), list(parts), sum(map(len, parts)))


class Passt:
    """A port, and passt's end of its stream."""

    def __init__(self, port: PasstPort, end: socket.socket) -> None:
        self.port = port
        self.end = end

    def sends(self, *frames: bytes) -> list[bytes]:
        """What passt gets when the guest sends ``frames``."""
        self.port.send(0, [of_guest(frame) for frame in frames])
        got = []
        with contextlib.suppress(BlockingIOError):
            while length := self.end.recv(4, socket.MSG_DONTWAIT):
                got.append(self.end.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
        return got

    def receives(self, *frames: bytes) -> list[bytes]:
        """What the guest gets when passt sends ``frames``."""
        self.end.sendall(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames))
        (inbox,) = self.port.inboxes
        assert self.port.receive(inbox)
        found = [bytes(inbox.buffer[begin + HEADER.size : end]) for begin, end in reversed(inbox.frames)]
        inbox.frames = []
        return found


@pytest.fixture
def passt() -> Iterator[Passt]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(["true"])
    port = PasstPort(ours, process, os.memfd_create("said"), 65_520)
    with theirs, contextlib.closing(port):
        yield Passt(port, theirs)


def reply(request: bytes) -> bytes:
    """passt's answer to an ARP request."""
    assert request[12:22] == bytes.fromhex("08060001080006040001")
    return GUEST_MAC + PASST_MAC + request[12:20] + b"\0\2" + PASST_MAC + request[38:42] + request[22:32]


@pytest.mark.parametrize("version", [4, 6])
def test_handshake_is_completed_when_passt_has_seen_the_answer(passt: Passt, version: int) -> None:
    guest, host = ADDRESSES[version]

    frame, request = passt.sends(segment(SYN | ACK, 1000, version=version))
    assert frame == segment(SYN | ACK, 1000, version=version)
    other = segment(ACK)
    before, given_to_guest, after = passt.receives(other, reply(request), other)

    assert before == after == other
    assert given_to_guest[:12] == GUEST_MAC + PASST_MAC
    width = len(guest)
    tcp = given_to_guest[-20:]
    assert given_to_guest[-20 - 2 * width : -20] == host + guest
    assert struct.unpack(">HHIIBB", tcp[:14]) == (80, 40_000, 77, 1001, 5 << 4, ACK)
    pseudo = host + guest + struct.pack(">II", 20, 6)
    assert ones_complement_sum(bytearray(pseudo + tcp)) == 0xFFFF
    if version == 4:
        assert ones_complement_sum(bytearray(given_to_guest[14:34])) == 0xFFFF


def test_an_answer_is_given_once_and_others_reach_the_guest(passt: Passt) -> None:
    _, request = passt.sends(segment(SYN | ACK))
    foreign = reply(request[:22] + GUEST_MAC + request[28:])

    assert passt.receives(foreign) == [foreign]
    assert len(passt.receives(reply(request))[0]) == 54
    assert passt.receives(reply(request)) == [reply(request)]


def test_answers_that_wait_are_so_many_at_most(passt: Passt) -> None:
    requests = [passt.sends(segment(SYN | ACK, port=port))[1] for port in range(1, MAX_ANSWERS + 2)]
    replies = [reply(request) for request in requests]

    assert passt.receives(replies[0]) == replies[:1]
    assert all(len(frame) == 54 for frame in passt.receives(*replies[1:]))


@pytest.mark.parametrize("version", [4, 6])
def test_first_end_of_a_connection_of_the_guest_is_lost(passt: Passt, version: int) -> None:
    start, end = segment(SYN, version=version), segment(FIN | ACK, 1010, version=version)

    assert passt.sends(start, end) == [start]
    assert passt.sends(end) == [end]


def test_data_that_comes_with_the_first_end_goes_on(passt: Passt) -> None:
    start, end = segment(SYN), segment(FIN | PSH | ACK, 1010, b"data")

    assert passt.sends(start, end) == [start, segment(PSH | ACK, 1010, b"data")]
    alone = segment(FIN | ACK, 1014)
    assert passt.sends(alone) == [alone]


def test_an_end_that_is_not_the_one_of_before_is_lost_too(passt: Passt) -> None:
    passt.sends(segment(SYN), segment(FIN | ACK, 1010))
    passt.sends(segment(SYN))

    assert passt.sends(segment(FIN | ACK, 2010)) == []


def test_end_of_a_connection_of_the_host_or_one_that_was_reset_goes_on(passt: Passt) -> None:
    end = segment(FIN | ACK, 1010)
    assert passt.sends(end) == [end]

    passt.sends(segment(SYN), segment(RST))
    assert passt.sends(end) == [end]


def test_only_the_latest_connections_are_watched(passt: Passt) -> None:
    for port in range(1, MAX_CONNECTIONS + 2):
        passt.sends(segment(SYN, port=port))

    first, second = segment(FIN | ACK, port=1), segment(FIN | ACK, port=2)
    assert passt.sends(first, second) == [first]


def test_headers_in_several_parts_are_understood(passt: Passt) -> None:
    end = segment(FIN | ACK, 1010)
    passt.sends(segment(SYN))
    passt.port.send(0, [of_guest(end[:14], end[14:40], end[40:])])

    assert passt.sends(end) == [end]


def test_a_later_fragment_has_no_flags(passt: Passt) -> None:
    passt.sends(segment(SYN))
    fragment = bytearray(segment(FIN | ACK))
    fragment[20:22] = b"\x20\x10"
    complete_checksum(fragment, 14, 10)

    assert passt.sends(bytes(fragment)) == [bytes(fragment)]


@given(st.binary(max_size=120), st.sampled_from([4, 6]), st.integers(0, 120))
def test_whatever_the_guest_sends_nothing_is_raised(noise: bytes, version: int, place: int) -> None:
    attendant = TcpAttendant()
    for flags in (SYN, SYN | ACK, FIN):
        frame = segment(flags, version=version)
        frame = (frame[:place] + noise + frame[place + len(noise) :])[: max(14, len(frame))]
        for each in attendant.passed_on(of_guest(frame)):
            assert attendant.replaced(memoryview(each.parts[0])) is None or each.length == 42
