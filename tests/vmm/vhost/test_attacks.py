"""Front ends and back ends that break the rules: each side ends or refuses, in one sentence, and does no harm."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.vmm.devices.virtio.driver import Driver
from tests.vmm.devices.virtio.fs.client import Client, refused
from vmm.config import VhostFsConfig
from vmm.devices.virtio.device import COMMON_FEATURES
from vmm.errors import ConfigError
from vmm.memory import PAGE_SIZE, GuestMemory
from vmm.rpc.endpoint import connect
from vmm.vhost.channel import Channel
from vmm.vhost.frontend import VhostFsDevice
from vmm.vhost.memory import SharedMemory
from vmm.vhost.messages import (
    HEADER,
    KNOWN_PROTOCOL_FEATURES,
    NEED_REPLY,
    NUMBER,
    PROTOCOL_FEATURES,
    REPLY,
    RING_ADDRESSES,
    RING_STATE,
    Message,
    Region,
    RequestKind,
    VhostError,
    pack_table,
)
from vmm.vhost.process import FsProcess

SECONDS = 60
BASE = 0x8000_0000
SIZE = 1 << 20


class FrontEnd:
    """A front end that sends what it likes."""

    def __init__(self, path: Path) -> None:
        connection = connect(path, SECONDS)
        connection.settimeout(SECONDS)
        self.channel = Channel(connection)
        self.memory = GuestMemory(BASE, SIZE, shared=True)
        self.channel.send(RequestKind.SET_PROTOCOL_FEATURES, 0, NUMBER.pack(KNOWN_PROTOCOL_FEATURES))

    def close(self) -> None:
        self.channel.close()
        self.memory.close()

    def tell(self, kind: int, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> int:
        """What the request is acknowledged with, 0 for done."""
        self.channel.send(kind, NEED_REPLY, payload, descriptors)
        reply = self.channel.receive()
        assert reply is not None
        assert (reply.request, reply.flags & REPLY) == (kind, REPLY)
        return reply.number

    def share(self) -> int:
        region = Region(BASE, SIZE, self.memory.host_address, 0)
        assert self.memory.descriptor is not None
        return self.tell(RequestKind.SET_MEM_TABLE, pack_table((region,)), (self.memory.descriptor,))

    def start(self, ring: int = 1, size: int = 64, table: int = 0, available: int = 0x4000, used: int = 0x8000) -> int:
        """Start a ring at these offsets into memory; what starting it is acknowledged with."""
        at = self.memory.host_address
        addresses = RING_ADDRESSES.pack(ring, 0, at + table, at + used, at + available, 0)
        self.tell(RequestKind.SET_VRING_NUM, RING_STATE.pack(ring, size))
        self.tell(RequestKind.SET_VRING_ADDR, addresses)
        kick = os.eventfd(0)
        try:
            self.tell(RequestKind.SET_VRING_KICK, NUMBER.pack(ring), (kick,))
        finally:
            os.close(kick)
        return self.tell(RequestKind.SET_VRING_ENABLE, RING_STATE.pack(ring, 1))


@pytest.fixture
def front_end(process: FsProcess) -> Iterator[FrontEnd]:
    made = FrontEnd(process.socket)
    yield made
    made.close()


def number(value: int) -> bytes:
    return NUMBER.pack(value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (HEADER.pack(RequestKind.GET_FEATURES, 0, 0), "must be of version 1"),
        (HEADER.pack(RequestKind.GET_FEATURES, 2, 0), "must be of version 1"),
        (HEADER.pack(RequestKind.SET_FEATURES, 1, 1 << 30), "have at most 264"),
        (HEADER.pack(99, 1, 0), "request 99, which this back end does not know"),
        (HEADER.pack(RequestKind.SET_FEATURES, 1, 4) + b"\0" * 4, "SET_FEATURES came with 4 bytes, it must have 8"),
        (HEADER.pack(RequestKind.SET_FEATURES, 1, 8) + number(1 << 63), "accepted features 0x8000000000000000"),
        (HEADER.pack(RequestKind.SET_PROTOCOL_FEATURES, 1, 8) + number(1 << 9), "accepted protocol features 0x200"),
        (HEADER.pack(RequestKind.SET_MEM_TABLE, 1, 8) + b"\0" * 8, "names 0 regions"),
        (HEADER.pack(RequestKind.SET_VRING_KICK, 1, 8) + number(1), "SET_VRING_KICK came with 0 descriptors"),
        (HEADER.pack(RequestKind.SET_VRING_KICK, 1, 8) + number(1 << 8 | 1), "must have one"),
        (HEADER.pack(RequestKind.SET_VRING_NUM, 1, 8) + RING_STATE.pack(7, 1), "named ring 7, there are 2"),
        (os.urandom(64), "must be of version 1"),
    ],
)
def test_a_front_end_that_breaks_the_rules_ends_the_back_end_with_a_sentence(
    process: FsProcess, front_end: FrontEnd, data: bytes, sentence: str
) -> None:
    if "version" in sentence and len(data) == 64:
        data = HEADER.pack(1, 0, 3) + data
    front_end.channel.socket.sendall(data)

    end = process.ended.result(SECONDS)
    assert end.startswith(
        f"the file system process (process {process.pid}) ended with status 1: the file system process gave up: "
    )
    assert sentence in end


def test_half_a_message_is_waited_for_and_forgotten_with_its_sender(process: FsProcess, front_end: FrontEnd) -> None:
    front_end.channel.socket.sendall(b"\1\0")
    front_end.channel.socket.shutdown(socket.SHUT_RDWR)

    assert process.ended.result(SECONDS).endswith("ended with status 0")


@pytest.mark.parametrize(
    ("regions", "why"),
    [
        ([Region(BASE, SIZE + PAGE_SIZE, 0, 0)], "larger than the file"),
        ([Region(BASE, SIZE, 0, PAGE_SIZE)], "larger than the file"),
        ([Region(BASE + 8, SIZE, 0, 0)], "made of pages"),
        ([Region(BASE, 0, 0, 0)], "made of pages"),
        ([Region(BASE, SIZE, 0, 0), Region(BASE + PAGE_SIZE, SIZE, SIZE, 0)], "overlap"),
        ([Region(0, PAGE_SIZE, 0, 0), Region(1 << 50, PAGE_SIZE, SIZE, 0)], "more than 4 TiB"),
    ],
)
def test_a_memory_table_that_cannot_be_is_refused(front_end: FrontEnd, regions: list[Region], why: str) -> None:
    assert front_end.memory.descriptor is not None
    descriptors = (front_end.memory.descriptor,) * len(regions)

    with pytest.raises(VhostError, match=why):
        SharedMemory(regions, descriptors)
    assert front_end.tell(RequestKind.SET_MEM_TABLE, pack_table(tuple(regions)), descriptors) == 1
    assert front_end.share() == 0


def test_a_region_without_its_descriptor_is_refused(front_end: FrontEnd) -> None:
    assert front_end.tell(RequestKind.SET_MEM_TABLE, pack_table((Region(BASE, SIZE, 0, 0),))) == 1


def test_regions_are_seen_where_they_are_and_nothing_is_between_them() -> None:
    with GuestMemory(BASE, SIZE, shared=True) as one, GuestMemory(BASE, SIZE, shared=True) as other:
        assert one.descriptor is not None
        assert other.descriptor is not None
        one.write(BASE + 8, b"one")
        other.write(BASE + PAGE_SIZE, b"other")
        regions = [Region(BASE + 4 * SIZE, SIZE - PAGE_SIZE, 1 << 40, PAGE_SIZE), Region(BASE, SIZE, 1 << 41, 0)]

        with SharedMemory(regions, (other.descriptor, one.descriptor)) as memory:
            assert (memory.base, memory.end) == (BASE, BASE + 5 * SIZE - PAGE_SIZE)
            assert memory.read(BASE + 8, 3) == b"one"
            assert memory.read(BASE + 4 * SIZE, 5) == b"other"
            assert memory.read(BASE + 2 * SIZE, 4) == bytes(4)
            memory.write(BASE + 4 * SIZE, b"later")
            assert memory.from_user((1 << 40) + 5) == BASE + 4 * SIZE + 5
            with pytest.raises(VhostError, match="in none of the regions"):
                memory.from_user((1 << 40) + SIZE)
        assert other.read(BASE + PAGE_SIZE, 5) == b"later"


@pytest.mark.parametrize(
    "where", [{"size": 3}, {"size": 2048}, {"table": 8}, {"table": SIZE - 64}, {"used": SIZE}, {"available": 1 << 40}]
)
def test_a_ring_that_cannot_be_is_refused(process: FsProcess, front_end: FrontEnd, where: dict[str, int]) -> None:
    assert front_end.share() == 0

    assert front_end.start(**where) == 1
    assert not process.ended.done()


def test_a_ring_without_memory_and_one_that_is_changed_while_it_runs_are_refused(front_end: FrontEnd) -> None:
    assert front_end.start() == 1
    assert front_end.share() == 0
    assert front_end.start() == 0
    assert front_end.tell(RequestKind.SET_VRING_BASE, RING_STATE.pack(1, 8)) == 1


class FakeBackEnd:
    """A back end that answers rightly, except where it is told otherwise.

    Args:
        path: its socket.
        answers: request → what to do in place of the right thing; the result is the reply's payload, None for none.
    """

    def __init__(self, path: Path, answers: dict[int, Callable[[Message], bytes | None]]) -> None:
        self._answers = answers
        self.calls: dict[int, int] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.addresses: dict[int, tuple[int, ...]] = {}
        self._thread = threading.Thread(target=self._serve, name="fake-back-end")
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError, EOFError, VhostError):
            connection, _ = self._listener.accept()
            self.channel = Channel(connection)
            while (message := self.channel.receive()) is not None:
                reply = self._reply(message)
                for each in message.descriptors:
                    os.close(each)
                if reply is not None:
                    self.channel.send(message.request, REPLY, reply)

    def _reply(self, message: Message) -> bytes | None:
        own = self._answers.get(message.request)
        if own is not None:
            return own(message)
        match message.request:
            case RequestKind.GET_FEATURES:
                return number(COMMON_FEATURES | PROTOCOL_FEATURES)
            case RequestKind.GET_PROTOCOL_FEATURES:
                return number(KNOWN_PROTOCOL_FEATURES)
            case RequestKind.GET_QUEUE_NUM:
                return number(2)
            case RequestKind.GET_VRING_BASE:
                return message.payload
            case RequestKind.SET_VRING_CALL:
                self.calls[message.number] = os.dup(message.descriptors[0])
            case RequestKind.SET_MEM_TABLE:
                self.memory = SharedMemory(
                    [Region(*struct.unpack_from("=QQQQ", message.payload, 8 + 32 * n)) for n in range(2)],
                    message.descriptors,
                )
            case RequestKind.SET_VRING_ADDR:
                ring, _, *rest = RING_ADDRESSES.unpack(message.payload)
                self.addresses[ring] = tuple(self.memory.from_user(each) for each in rest[:3])
        return number(0) if message.flags & NEED_REPLY else None

    def give_back(self, ring: int, slot: int, written: int) -> None:
        """Put an element into the used ring and call."""
        _, used, _ = self.addresses[ring]
        index = self.memory.read_int(used + 2, 2)
        self.memory.write(used + 4 + 8 * (index % 512), struct.pack("=II", slot, written))
        self.memory.write_int(used + 2, 2, index + 1)
        os.eventfd_write(self.calls[ring], 1)

    def offered(self, ring: int) -> int:
        """The slot that was offered last."""
        available = self.addresses[ring][2]
        index = self.memory.read_int(available + 2, 2)
        return self.memory.read_int(available + 4 + 2 * ((index - 1) % 512), 2)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if hasattr(self, "channel"):
            with suppress(OSError):
                self.channel.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        if hasattr(self, "channel"):
            self.channel.close()
        if hasattr(self, "memory"):
            self.memory.close()
        for each in self.calls.values():
            os.close(each)


@contextmanager
def fake(path: Path, **answers: Callable[[Message], bytes | None]) -> Iterator[FakeBackEnd]:
    made = FakeBackEnd(path, {RequestKind[name]: answer for name, answer in answers.items()})
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("request_name", "answer", "sentence"),
    [
        ("GET_FEATURES", lambda _: number(0), "the back end offers features 0x0, it must offer"),
        ("GET_FEATURES", lambda _: b"", "GET_FEATURES came with 0 bytes"),
        ("GET_FEATURES", lambda _: b"\0" * 256, "GET_FEATURES came with 256 bytes"),
        ("GET_PROTOCOL_FEATURES", lambda _: number(0), "it must acknowledge requests"),
        ("GET_QUEUE_NUM", lambda _: number(1), "serves 1 queues, 2 are configured"),
        ("SET_FEATURES", lambda _: number(1), "refused SET_FEATURES"),
    ],
)
def test_a_back_end_that_cannot_be_used_is_refused(
    private: Path, request_name: str, answer: Callable[[Message], bytes], sentence: str
) -> None:
    config = VhostFsConfig(tag="share", socket=private / "fs.sock")
    with fake(private / "fs.sock", **{request_name: answer}), pytest.raises(ConfigError, match=sentence):
        VhostFsDevice(config)


@pytest.mark.parametrize("what", ["a slot that it does not have", "more bytes than there is room for", "it twice"])
def test_a_back_end_that_gives_back_what_it_may_not_is_given_up(private: Path, what: str) -> None:
    with fake(private / "fs.sock") as back_end:
        device = VhostFsDevice(VhostFsConfig(tag="share", socket=private / "fs.sock"))
        with Driver(device, shared=True) as driver:
            driver.start(size=512)
            client = Client(driver, init=False)
            buffers = [client.post(3, 1) for _ in range(2)]
            slot = back_end.offered(1)
            match what:
                case "a slot that it does not have":
                    back_end.give_back(1, 1 << 20, 16)
                case "more bytes than there is room for":
                    back_end.give_back(1, slot, 1 << 30)
                case _:
                    back_end.give_back(1, slot, 0)
                    back_end.give_back(1, slot, 0)

            done = driver.wait(1, 2, SECONDS)

            assert {id(each) for each in done} == {id(each) for each in buffers}
            for each in (one for one in done if one.written):
                with refused(errno.EIO):
                    client.results(each)
            assert "the back end gave back" in device.failure


def test_a_back_end_that_speaks_without_being_asked_is_given_up(private: Path) -> None:
    with fake(private / "fs.sock") as back_end:
        device = VhostFsDevice(VhostFsConfig(tag="share", socket=private / "fs.sock"))
        with Driver(device, shared=True) as driver:
            driver.start(size=512)
            client = Client(driver, init=False)
            buffer = client.post(3, 1)
            back_end.channel.send(RequestKind.GET_FEATURES, REPLY, number(1))

            assert driver.wait(1, 1, SECONDS) == [buffer]
            with refused(errno.EIO):
                client.results(buffer)


def test_a_back_end_that_refuses_a_ring_is_given_up_and_the_guest_is_answered(private: Path) -> None:
    with fake(private / "fs.sock", SET_VRING_ADDR=lambda _: number(1)):
        device = VhostFsDevice(VhostFsConfig(tag="share", socket=private / "fs.sock"))
        with Driver(device, shared=True) as driver:
            driver.start(size=512)

            with refused(errno.EIO):
                Client(driver)
            assert "refused SET_VRING_ADDR" in device.failure
