"""A tap interface of the host (Documentation/networking/tuntap.rst of Linux).

The host's kernel reads and writes virtio-net's header itself (IFF_VNET_HDR), so checksums and segmentation go through
unfinished and may never have to be done at all. Several pairs of queues are several descriptors of one interface
(IFF_MULTI_QUEUE). The interface's addresses, bridge and state are the business of whoever owns the host's network.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from vmm.config import NetworkConfig
from vmm.network.offload import (
    CSUM,
    GUEST_CSUM,
    GUEST_ECN,
    GUEST_TSO4,
    GUEST_TSO6,
    HEADER,
    HOST_ECN,
    HOST_TSO4,
    HOST_TSO6,
)
from vmm.network.port import ETHERNET_HEADER, MAX_IP_PACKET, Frame, Inbox, NetworkError, Port

DEVICE: Final = "/dev/net/tun"
FEATURES: Final = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN

# linux/if_tun.h and linux/sockios.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETQUEUE: Final = 0x400454D9
_SIOCGIFMTU: Final = 0x8921
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x0200, 0x0400
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_TSO_ECN = 1, 2, 4, 8
_IFREQ: Final = struct.Struct("16sH22x")
_IFREQ_INT: Final = struct.Struct("16si20x")

_SLOT: Final = HEADER.size + ETHERNET_HEADER + 4 + MAX_IP_PACKET  #: header, Ethernet with a VLAN tag, packet
_SLOTS: Final = 16  #: frames read at once


class TapPort(Port):
    """A tap interface.

    Args:
        config: with its name, or none, and the number of pairs.

    Raises:
        NetworkError: there is no /dev/net/tun, or it is not allowed.
    """

    def __init__(self, config: NetworkConfig) -> None:
        self._attached = config.queues
        with contextlib.ExitStack() as opened:
            files: list[int] = []
            self.name = config.tap
            for _ in range(config.queues):
                file, self.name = _open(self.name, config.queues > 1)
                opened.callback(os.close, file)
                files.append(file)
            self.mtu = config.mtu or _mtu(self.name)
            opened.pop_all()
        self._take(files)

    def _take(self, files: Sequence[int]) -> None:
        self.features = FEATURES
        self._files = list(files)
        self.inboxes = tuple(Inbox(file, memoryview(bytearray(_SLOT * _SLOTS))) for file in files)

    def receive(self, inbox: Inbox) -> bool:
        frames = []
        for number in range(_SLOTS):
            begin = number * _SLOT
            try:
                length = os.readv(inbox.descriptor, [inbox.buffer[begin : begin + _SLOT]])
            except BlockingIOError:
                break
            except OSError:  # the interface was removed
                self._lose()
                break
            if length >= HEADER.size + ETHERNET_HEADER:
                frames.append((begin, begin + length))
            else:
                self.dropped += 1
        frames.reverse()
        inbox.frames = frames
        return bool(frames)

    def send(self, pair: int, frames: Sequence[Frame]) -> None:
        for frame in frames:
            try:
                os.writev(self._files[pair], [frame.header, *frame.parts])
            except OSError as error:
                # A full queue; an interface that is down (EIO); a header that the kernel does not believe (EINVAL).
                self.dropped += 1
                if error.errno == errno.EBADFD:
                    self._lose()

    def _lose(self) -> None:
        self.up = False
        for inbox in self.inboxes:
            inbox.descriptor = -1

    def flush(self) -> None:
        """Nothing is ever pending: what the interface does not take is dropped."""

    def accept(self, features: int) -> None:
        flags = 0
        for feature, flag in (
            (GUEST_CSUM, _TUN_F_CSUM),
            (GUEST_TSO4, _TUN_F_TSO4),
            (GUEST_TSO6, _TUN_F_TSO6),
            (GUEST_ECN, _TUN_F_TSO_ECN),
        ):
            flags |= flag if features & feature else 0
        for file in self._files:
            # Without GUEST_CSUM the kernel refuses segments, and the driver may not have asked for them (5.1.3.1).
            with contextlib.suppress(OSError):
                fcntl.ioctl(file, _TUNSETOFFLOAD, flags if flags & _TUN_F_CSUM else 0)

    def use_pairs(self, count: int) -> None:
        for number, file in enumerate(self._files):
            if (number < count) != (number < self._attached):
                flag = _IFF_ATTACH_QUEUE if number < count else _IFF_DETACH_QUEUE
                with contextlib.suppress(OSError):
                    fcntl.ioctl(file, _TUNSETQUEUE, _IFREQ.pack(b"", flag))
        self._attached = count

    def close(self) -> None:
        self._lose()
        while self._files:
            os.close(self._files.pop())


def _open(name: str, several: bool) -> tuple[int, str]:
    """A descriptor of the tap interface ``name``, which is made if need be, and its name."""
    with contextlib.ExitStack() as opened:
        try:
            file = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            opened.callback(os.close, file)
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if several else 0)
            answer = fcntl.ioctl(file, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
            fcntl.ioctl(file, _TUNSETVNETHDRSZ, struct.pack("i", HEADER.size))
        except OSError as error:
            raise NetworkError(
                f"the tap interface {name or 'that the kernel would name'} cannot be opened: {error.strerror};"
                " it needs /dev/net/tun and CAP_NET_ADMIN, or an interface made for this user and not in use,"
                " else choose the backend 'passt'"
            ) from error
        opened.pop_all()
        return file, _IFREQ.unpack(answer)[0].rstrip(b"\0").decode()


def _mtu(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFMTU, _IFREQ_INT.pack(name.encode(), 0))
    return int(_IFREQ_INT.unpack(answer)[1])
