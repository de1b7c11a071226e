"""passt itself, started, spoken to, killed; and what is said when it does not start."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vmm.config import NetworkConfig
from vmm.network.offload import HEADER, complete_checksum
from vmm.network.passt import PasstPort, forward_arguments, start_passt
from vmm.network.port import Frame, NetworkError

MAC = bytes.fromhex("020000000001")
GUEST = bytes([10, 0, 2, 15])


def arp_request(address: bytes) -> bytes:
    return b"\xff" * 6 + MAC + bytes.fromhex("08060001080006040001") + MAC + bytes(10) + address


def answer(port: PasstPort, frame: bytes) -> bytes:
    """Send a frame and return the next one that comes."""
    port.send(0, [Frame(bytes(HEADER.size), [frame], len(frame))])
    (inbox,) = port.inboxes
    while not inbox.frames:
        assert select.select([inbox.descriptor], [], [], 10)[0], "passt does not answer"
        assert port.receive(inbox), "passt has left"
    begin, end = inbox.frames.pop()
    return bytes(inbox.buffer[begin + HEADER.size : end])


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_passt_serves_and_leaves_with_its_port() -> None:
    port = start_passt(NetworkConfig())
    reply = answer(port, arp_request(bytes([10, 1, 2, 3])))
    assert reply[:6] == MAC
    assert reply[12:14] == b"\x08\x06"
    port.close()
    assert port.process.returncode is not None
    port.close()


def ipv4(protocol: int, destination: str, payload: bytes) -> bytes:
    """A frame of the guest; its IP header is right."""
    header = bytearray(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0, GUEST, b""))
    header[16:] = socket.inet_aton(destination)
    complete_checksum(header, 0, 10)
    return b"\xff" * 6 + MAC + b"\x08\0" + bytes(header) + payload


def test_passt_looks_at_no_checksum_of_the_guest() -> None:
    # If this fails, PasstPort has to complete checksums.
    wrong = 0xDEAD
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        trial.connect(("192.0.2.99", 9))  # sends nothing; tells the host's own address
        host = trial.getsockname()[0]
    with (
        contextlib.closing(start_passt(NetworkConfig())) as port,
        socket.create_server((host, 0)) as stream,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        syn = struct.pack(">HHIIBBHHH", 4000, stream.getsockname()[1], 1, 0, 5 << 4, 0x02, 8192, wrong, 0)
        reply = answer(port, ipv4(socket.IPPROTO_TCP, host, syn))
        while reply[12:14] != b"\x08\0" or reply[23] != socket.IPPROTO_TCP:
            reply = answer(port, arp_request(bytes([10, 1, 2, 3])))
        assert reply[14 + 20 + 13] & 0x12 == 0x12  # SYN and ACK

        datagrams.bind((host, 0))
        datagrams.settimeout(10)
        datagram = struct.pack(">HHHH", 4000, datagrams.getsockname()[1], 12, wrong) + b"data"
        port.send(0, [Frame(bytes(HEADER.size), [ipv4(socket.IPPROTO_UDP, host, datagram)], 14 + 20 + 12)])
        assert datagrams.recv(100) == b"data"


def test_killed_passt_ends_the_link() -> None:
    port = start_passt(NetworkConfig())
    port.process.kill()
    port.process.wait()
    assert not port.receive(port.inboxes[0])
    assert not port.up
    port.close()


def test_passt_does_not_outlive_a_killed_vmm() -> None:
    program = (
        "from vmm.config import NetworkConfig; from vmm.network.passt import start_passt\n"
        "port = start_passt(NetworkConfig()); print(port.process.pid, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as vmm:
        assert vmm.stdout is not None
        passt = int(vmm.stdout.readline())
        assert psutil.pid_exists(passt)
        os.kill(vmm.pid, signal.SIGKILL)
    wait_until_gone(passt)


def test_missing_program_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NetworkError, match=r"the program passt is not installed.*install the package 'passt'"):
        start_passt(NetworkConfig())


def test_what_passt_said_when_it_did_not_start_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "passt").write_text(
        "#!/bin/sh\necho Failed to send 1 bytes to syslog >&2\necho No namespaces >&2\nexit 1"
    )
    (tmp_path / "passt").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NetworkError, match=r"did not start; it said: No namespaces$"):
        start_passt(NetworkConfig())


def test_host_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("", 0)) as taken:
        forward = f"tcp {taken.getsockname()[1]}:80"
        with pytest.raises(NetworkError, match=f"the forward '{forward}' cannot be used: Address already in use"):
            start_passt(NetworkConfig(forwards=(forward,)))


def test_forwards_become_options() -> None:
    assert forward_arguments(["tcp 8080:80", "udp 53"]) == ["--tcp-ports", "8080:80", "--udp-ports", "53"]
