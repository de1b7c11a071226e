"""A tap interface, where the host allows one; else what is said."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
from pathlib import Path

import pytest

from vmm.config import NetworkConfig
from vmm.network import tap
from vmm.network.offload import GUEST_CSUM, GUEST_TSO4, HEADER
from vmm.network.port import Frame, NetworkError
from vmm.network.tap import TapPort

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def tap_allowed() -> bool:
    with contextlib.suppress(NetworkError):
        TapPort(NetworkConfig(backend="tap")).close()
        return True
    return False


def set_up(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH22x", name.encode(), 0)
        flags = struct.unpack("16sH22x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | _IFF_UP))


def exchange(queues: int) -> None:
    """A frame in each direction through a tap, with a packet socket as the host's user of the interface."""
    port = TapPort(NetworkConfig(backend="tap", queues=queues))
    try:
        port.accept(GUEST_CSUM | GUEST_TSO4)
        port.use_pairs(1)
        assert port.mtu == 1500
        set_up(port.name)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as host:
            host.bind((port.name, 0x88B5))
            host.settimeout(5)
            frame = b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + b"from the guest".ljust(50)
            port.send(0, [Frame(bytes(HEADER.size), [frame[:20], frame[20:]], len(frame))])
            assert host.recv(2000) == frame
            reply = b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + b"\x88\xb5" + b"from the host".ljust(50)
            host.send(reply)
            inbox = port.inboxes[0]
            found: list[bytes] = []
            while reply not in found:
                assert select.select([inbox.descriptor], [], [], 5)[0]
                port.receive(inbox)
                found += [bytes(inbox.buffer[begin + HEADER.size : end]) for begin, end in inbox.frames]
    finally:
        port.close()


@pytest.mark.parametrize("queues", [1, 2])
def test_frames_pass_where_taps_are_allowed_and_the_need_is_told_elsewhere(queues: int) -> None:
    if tap_allowed():
        exchange(queues)
    else:
        with pytest.raises(NetworkError, match="it needs /dev/net/tun and CAP_NET_ADMIN"):
            TapPort(NetworkConfig(backend="tap", queues=queues))


def test_missing_tun_device_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tap, "DEVICE", str(tmp_path / "tun"))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NetworkError, match="cannot be opened: No such file or directory; it needs /dev/net/tun"):
        TapPort(NetworkConfig(backend="tap"))
    assert len(os.listdir("/proc/self/fd")) == before
