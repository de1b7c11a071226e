"""The guest's side of a socket device, packet by packet, on the driver in Python."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.vmm.devices.virtio.driver import Driver
from vmm.config import VsockConfig
from vmm.devices.virtio.vsock.device import EVENT, RX, TX, VsockDevice
from vmm.devices.virtio.vsock.packet import HOST_CID, RST, STREAM, Header

CID = 3
GUEST_BUFFER = 1 << 18
BUFFER_BYTES = 1024


class Packet(NamedTuple):
    """What came from the device."""

    header: Header
    payload: bytes


class Guest:
    """Sends and receives packets; what it receives into is given back to the device at once."""

    def __init__(self, driver: Driver, device: VsockDevice, buffers: int, size: int = 64) -> None:
        self.driver = driver
        self.device = device
        driver.start(size=size)
        self._received: list[Packet] = []
        self.give_buffers(buffers)

    def give_buffers(self, count: int, size: int = BUFFER_BYTES) -> None:
        for _ in range(count):
            self.driver.add(RX, writable=[size])
        self.driver.notify(RX)

    def give_event_buffer(self) -> None:
        self.driver.add(EVENT, writable=[4])
        self.driver.notify(EVENT)

    def offer(self, op: int, guest_port: int, host_port: int, payload: bytes = b"", **fields: int) -> None:
        """Make a packet available, without telling the device."""
        header = Header(CID, HOST_CID, guest_port, host_port, len(payload), STREAM, op, 0, GUEST_BUFFER, 0)
        self.driver.add(TX, [header._replace(**fields).pack(), *([payload] if payload else [])])

    def send(self, op: int, guest_port: int, host_port: int, payload: bytes = b"", **fields: int) -> None:
        self.offer(op, guest_port, host_port, payload, **fields)
        self.driver.notify(TX)
        self.driver.collect(TX)

    def _collect(self) -> None:
        for buffer in self.driver.collect(RX):
            data = self.driver.contents(buffer)
            header = Header.unpack(data)
            assert len(data) == 44 + header.length
            assert (header.src_cid, header.dst_cid) == (HOST_CID, CID)
            self._received.append(Packet(header, data[44:]))
            self.driver.add_at(RX, *buffer.parts)
        self.driver.notify(RX)

    def receive(self, seconds: float = 5.0) -> Packet:
        """The next packet."""
        until = time.monotonic() + seconds
        while not self._received:
            self.driver.acknowledge()
            self._collect()
            if not self._received:
                assert self.driver.interrupted.wait(until - time.monotonic()), "no packet came"
        return self._received.pop(0)

    def expect(self, op: int) -> Header:
        """The next packet's header, which is of this operation."""
        header = self.receive().header
        assert header.op == op, header
        return header

    def expect_nothing(self) -> None:
        """Nothing has been sent but the RST that answers a packet sent now."""
        self.send(5, 999, 999, b"?")
        assert self.receive().header[2:7] == (999, 999, 0, STREAM, RST)

    def read(self, length: int) -> bytes:
        """So many bytes of payload, from packets of one connection that follow each other."""
        data = b""
        while len(data) < length:
            packet = self.receive()
            assert packet.payload, packet.header
            data += packet.payload
        return data


@contextmanager
def guest_of(config: VsockConfig, buffers: int = 32) -> Iterator[Guest]:
    """A device that is up, and its guest."""
    device = VsockDevice(config)
    with Driver(device) as driver:
        yield Guest(driver, device, buffers)
