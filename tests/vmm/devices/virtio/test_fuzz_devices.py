"""Hostile drivers against every device; each must be as good as new after a reset.

``python -m tests.vmm.devices.virtio.test_fuzz_devices blk 1000 [first seed]`` goes on for longer.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.vmm.devices.virtio.driver import Driver
from tests.vmm.devices.virtio.hostile import HostileDriver, Request
from tests.vmm.devices.virtio.recording import RecordingDevice
from vmm.config import (
    BalloonConfig,
    BlockConfig,
    EntropyConfig,
    FsConfig,
    NetworkConfig,
    PortsConfig,
    VsockConfig,
)
from vmm.devices.virtio import build_device
from vmm.devices.virtio.device import VirtioDevice

STREAMS = 12  #: for each device, in an ordinary run of the tests
STEPS = 400
MAX_GROWTH = 128 << 20  #: bytes of this process


@dataclass
class Target:
    """A device to attack: how it is made in an empty directory, what it takes for requests, and how it works."""

    build: Callable[[Path], VirtioDevice]
    works: Callable[[Driver], bool]
    requests: Sequence[Request] = ()
    shapes: Sequence[str] = ("rw",)
    guard: bool = True
    resources: Callable[[Path, ExitStack], Callable[[random.Random], None] | None] = field(
        default=lambda where, stack: None
    )


def header(layout: str, *choices: Sequence[int]) -> Request:
    """A header whose fields are chosen from a few values each, with some bytes behind it."""
    packer = struct.Struct("<" + layout)
    return lambda rand: packer.pack(*(rand.choice(each) for each in choices)) + rand.randbytes(rand.choice((0, 0, 16)))


# What the host's side of each device is, and does meanwhile.


def disk(where: Path, stack: ExitStack) -> None:
    (where / "disk").write_bytes(b"D" * (256 << 10))


def share(where: Path, stack: ExitStack) -> None:
    (where / "share" / "inner").mkdir(parents=True)
    (where / "share" / "file").write_bytes(b"content")


def peer(where: Path, stack: ExitStack) -> Callable[[random.Random], None]:
    """The other end of a network interface: a stream of frames, each behind its length."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(where / "net"))
    listener.listen(1)
    clients: list[socket.socket] = []

    def speak(rand: random.Random) -> None:
        if not clients:
            clients.append(stack.enter_context(listener.accept()[0]))
            clients[0].setblocking(False)
        frame = rand.randbytes(rand.choice((14, 60, 1514)))
        with suppress(OSError):
            clients[0].send(len(frame).to_bytes(4, "big") + frame)
        if rand.random() < 0.5:
            with suppress(OSError):
                clients[0].recv(1 << 20)

    return speak


def caller(path: str) -> Callable[[Path, ExitStack], Callable[[random.Random], None]]:
    """Clients of a unix socket of the device, who come, write and go."""

    def prepare(where: Path, stack: ExitStack) -> Callable[[random.Random], None]:
        clients: list[socket.socket] = []

        def call(rand: random.Random) -> None:
            if clients and rand.random() < 0.4:
                clients.pop(rand.randrange(len(clients))).close()
            if len(clients) < 4:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                with suppress(OSError):
                    client.connect(str(where / path))
                    client.send(b"CONNECT 1024\n")
                    clients.append(client)
            for client in clients:
                with suppress(OSError):
                    client.send(rand.randbytes(rand.choice((1, 100))))

        return call

    return prepare


# How each device works for a driver that means well.


def gives_buffers_back(number: int, *parts: bytes, room: int = 0) -> Callable[[Driver], bool]:
    """The buffer comes back from queue ``number``."""

    def works(driver: Driver) -> bool:
        driver.add(number, parts, [room] if room else [])
        driver.notify(number)
        return len(driver.wait(number)) == 1

    return works


def reads_a_sector(driver: Driver) -> bool:
    return driver.request(0, [struct.pack("<IIQ", 0, 0, 0)], [512, 1])[512:] == b"\0"


def refuses_a_connection(driver: Driver) -> bool:
    """To a port where nobody listens: the answer is RST (5.10.6.6.1)."""
    driver.add(0, (), [4096])
    driver.notify(0)
    driver.add(1, [struct.pack("<QQIIIHHIII", 3, 2, 1000, 99, 0, 1, 1, 0, 65536, 0)])
    driver.notify(1)
    return struct.unpack_from("<H", driver.contents(driver.wait(0)[0]), 30) == (3,)


def starts_a_session(driver: Driver) -> bool:
    """FUSE_INIT 7.38."""
    request = struct.pack("<IIQQIIIHHIIII", 56, 26, 1, 0, 0, 0, 0, 0, 0, 7, 38, 65536, 0)
    return struct.unpack_from("<Ii", driver.request(1, [request], [16, 64]))[1] == 0


FUSE_NODES = (0, 1, 2, 3, 99, (1 << 64) - 1)
TARGETS = {
    "recording": Target(
        lambda where: RecordingDevice(), lambda driver: driver.request(0, [b"x"], [3]) == b"\xa5\xa5\xa5"
    ),
    "rng": Target(
        lambda where: build_device(EntropyConfig()), lambda driver: len(driver.request(0, (), [8])) == 8, shapes=("w",)
    ),
    "rng with a limit": Target(
        lambda where: build_device(EntropyConfig(bytes_per_second=100_000)),
        lambda driver: len(driver.request(0, (), [1])) == 1,
        shapes=("w",),
    ),
    "blk": Target(
        lambda where: build_device(BlockConfig(path=where / "disk", queues=2)),
        reads_a_sector,
        [
            header("IIQ", (0, 1, 4, 8, 11, 13, 99), (0,), (0, 1, 511, 512, (1 << 64) - 1, 1 << 55)),
            header("IIQQII", (11, 13), (0,), (0,), (0, 8, 600, (1 << 64) - 1), (0, 8, 0xFFFF_FFFF), (0, 1, 3)),
        ],
        resources=disk,
    ),
    "vsock": Target(
        lambda where: build_device(VsockConfig(socket=where / "vsock")),
        refuses_a_connection,
        [
            header(
                "QQIIIHHIII",
                *(
                    (3, 3, 3, 2),
                    (2, 2, 2, 5),
                    (1000, 1024),
                    (99, 1024, 0xFFFF_FFFF),
                    (0, 0, 16, 0xFFFF_FFFF),
                    (1, 1, 2),
                ),
                *((1, 2, 3, 4, 5, 6, 7, 99), (0, 1, 2, 3), (0, 4096, 0xFFFF_FFFF), (0, 1, 0xFFFF_FFFF)),
            )
        ],
        shapes=("w", "r", "w"),
        resources=caller("vsock"),
    ),
    "fs": Target(
        lambda where: build_device(FsConfig(path=where / "share", tag="share")),
        starts_a_session,
        [
            header(
                "IIQQIIIHHIIII", (56,), (26,), (1,), (0,), (0,), (0,), (0,), (0,), (0,), (7,), (31, 38), (4096,), (0,)
            ),
            lambda rand: (
                struct.pack(
                    "<IIQQIIIHH", 40 + 14, rand.choice((1, 9, 10, 11)), 1, rand.choice(FUSE_NODES), 0, 0, 1, 0, 0
                )
                + rand.choice((b"file\0", b"..\0", b"/etc/passwd\0", b"inner\0", b"x"))
            ),
            header("IIQQIIIHHQQII", (40, 64, 80), range(1, 53), (1,), FUSE_NODES, (0,), (0,), *([(0, 1, 4096)] * 7)),
        ],
        resources=share,
    ),
    "net": Target(
        lambda where: build_device(NetworkConfig(backend="socket", socket=where / "net")),
        gives_buffers_back(1, bytes(12) + b"\xff" * 60),
        [
            header("BBHHHHH", (0, 1, 2), (0, 1, 4, 5), (0, 54), (0, 1, 1460), (0, 14, 34), (0, 6, 16), (0,)),
            header("BBBBI", (0, 1, 2, 3, 4, 5), (0, 1), (0, 1), (0,), (0, 1, 0xFFFF_FFFF)),
        ],
        shapes=("w", "r", "rw"),
        resources=peer,
    ),
    "balloon": Target(
        lambda where: build_device(BalloonConfig(statistics_seconds=1)),
        gives_buffers_back(0, struct.pack("<I", 0x80200)),
        [
            header("IIII", *([(0, 0x80000, 0x80001, 0x80100, 0x802FF, 0xFFFF_FFFF)] * 4)),
            header("HQHQ", *([(0, 4, 6), (0, 1, (1 << 64) - 1)] * 2)),
        ],
        shapes=("r", "r", "r", "w"),
        guard=False,
    ),
    "console": Target(
        lambda where: build_device(PortsConfig(ports={"hvc": where / "console", "other": None})),
        gives_buffers_back(1, b"hello"),
        [
            header("IHH", (0, 1, 2, 0xFFFF_FFFF), range(9), (0, 1, 0xFFFF)),
            lambda rand: b"text\n" * rand.randrange(1, 99),
        ],
        shapes=("w", "r", "w", "r", "w", "r"),
        resources=caller("console"),
    ),
}


@contextmanager
def attacked(target: Target, seed: int, where: Path) -> Iterator[HostileDriver]:
    with ExitStack() as stack:
        host = target.resources(where, stack)
        hostile = HostileDriver(target.build(where), seed, target.requests, target.shapes, target.guard, host)
        stack.enter_context(hostile.driver)
        yield hostile


def attack(name: str, seed: int) -> None:
    """One stream, and then a driver that means well."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made, attacked(target, seed, Path(made)) as hostile:
        hostile.run(STEPS)
        driver = hostile.repent()
        assert target.works(driver), "the device does not work after a reset"
        assert not driver.needs_reset


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_driver_harms_nothing_and_the_device_works_after_a_reset(name: str) -> None:
    process = psutil.Process()
    attack(name, 0)
    before = process.memory_info().rss

    for seed in range(1, STREAMS):
        try:
            attack(name, seed)
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}")
            raise

    assert process.memory_info().rss - before < MAX_GROWTH


def main() -> None:
    name, count, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    for seed in range(first, first + count):
        print(f"\r{name} {seed} ", end="", flush=True)
        attack(name, seed)
    print()


if __name__ == "__main__":
    main()
