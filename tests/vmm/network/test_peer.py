"""Two ports joined by a unix socket."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from vmm.config import NetworkConfig
from vmm.network.offload import HEADER
from vmm.network.peer import PeerPort
from vmm.network.port import Frame, NetworkError, Port


def config(path: Path) -> NetworkConfig:
    return NetworkConfig(backend="socket", socket=path)


def send(port: Port, data: bytes) -> None:
    port.send(0, [Frame(bytes(HEADER.size), [data], len(data))])


def receive(port: Port) -> bytes:
    (inbox,) = port.inboxes
    deadline = time.monotonic() + 5
    while not inbox.frames and time.monotonic() < deadline:
        port.receive(inbox)
    begin, end = inbox.frames.pop()
    return bytes(inbox.buffer[begin + HEADER.size : end])


def test_the_first_one_waits_for_the_second(tmp_path: Path) -> None:
    first = PeerPort(config(tmp_path / "wire"))
    assert not first.up
    second = PeerPort(config(tmp_path / "wire"))
    assert second.up
    first.receive(first.inboxes[0])
    assert first.up

    send(first, b"a" * 60)
    send(second, b"b" * 60)
    assert receive(second) == b"a" * 60
    assert receive(first) == b"b" * 60

    second.close()
    first.close()
    assert not (tmp_path / "wire").exists()


def test_the_one_that_waits_takes_another_peer_after_the_first_has_left(tmp_path: Path) -> None:
    first = PeerPort(config(tmp_path / "wire"))
    inbox = first.inboxes[0]
    for _ in range(2):
        second = PeerPort(config(tmp_path / "wire"))
        first.receive(inbox)
        assert first.up
        second.close()
        first.receive(inbox)
        assert not first.up
    first.close()


def test_socket_that_a_process_left_behind_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "wire"))
    port = PeerPort(config(tmp_path / "wire"))
    port.close()


def test_path_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="missing/wire cannot be made: No such file or directory; choose a path"):
        PeerPort(config(tmp_path / "missing" / "wire"))


def test_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "wire").write_text("precious")
    with pytest.raises(NetworkError, match="cannot be made: Address already in use"):
        PeerPort(config(tmp_path / "wire"))
    assert (tmp_path / "wire").read_text() == "precious"
