"""Entropy, balloon and ports with the drivers of a stock kernel: bytes arrive, and memory comes back to the host."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import mmap
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kata_lab.shell import GuestShell
from tests.guest.conftest import Boot
from vmm.config import MIB, BalloonConfig, EntropyConfig, PortsConfig
from vmm.devices.virtio.balloon import BalloonDevice
from vmm.devices.virtio.console import PortsDevice
from vmm.memory import GuestMemory
from vmm.metrics import ProcessMemory
from vmm.microvm import MicroVm

DATA = random.Random(5).randbytes(4 * MIB)
PORT = "port=/dev/$(basename $(dirname $(grep -lx data /sys/class/virtio-ports/*/name)))\n"
COMPLAINTS = re.compile(r"rcu.*stall|soft lockup|hung task|BUG:|Oops|Unable to handle", re.IGNORECASE)
FILLED = 200  #: MiB that the guest writes and lets go of
SLACK = 40  #: MiB that guest and host may use for something else meanwhile


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def pss() -> float:
    """MiB of the process that holds the VM."""
    return ProcessMemory.now().pss / MIB


def resident(memory: GuestMemory) -> bytes:
    """For each page of the guest's memory, lowest bit: whether the host has given it (mincore(2))."""
    found = ctypes.create_string_buffer(memory.size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(memory.host_address), ctypes.c_size_t(memory.size), found) == 0
    return found.raw


def free(shell: GuestShell) -> float:
    """MiB that the guest's kernel calls free."""
    return int(shell.run("grep MemFree: /proc/meminfo", check=True).output.split()[1]) / 1024


def fill(shell: GuestShell) -> None:
    """Write to much of the guest's memory, and let go of it."""
    shell.run(
        f"mount -t tmpfs -o size=90% none /mnt && dd if=/dev/zero of=/mnt/filled bs=1M count={FILLED}", check=True
    )


def let_go(shell: GuestShell) -> None:
    shell.run("umount /mnt && echo 3 > /proc/sys/vm/drop_caches", check=True)


Guest = tuple[MicroVm, GuestShell]


@pytest.fixture(scope="module")
def guest(toolbox: Boot) -> Iterator[Guest]:
    devices = [EntropyConfig(), PortsConfig(ports={"console": None, "data": None}, columns=100, rows=30)]
    with toolbox(devices=devices, memory_mib=320, vcpus=2) as (vm, shell):
        yield vm, shell
        assert not COMPLAINTS.search(vm.console.text)


def ports_of(guest: Guest) -> PortsDevice:
    device = guest[0].machine.device("console0")
    assert isinstance(device, PortsDevice)
    return device


def test_the_guest_draws_random_bytes(guest: Guest) -> None:
    _, shell = guest

    assert shell.run("cat /sys/class/misc/hw_random/rng_current").output.startswith("virtio_rng")
    first, second = (
        shell.run("dd if=/dev/hwrng bs=4096 count=1 2> /dev/null | base64", check=True).output for _ in range(2)
    )
    assert first != second
    assert len(set(base64.b64decode(first))) == len(set(base64.b64decode(second))) == 256


def test_megabytes_go_to_the_host(guest: Guest) -> None:
    _, shell = guest
    received = bytearray()
    with ports_of(guest).port("data").connect() as client:
        reader = threading.Thread(target=_read_all, args=(client, received, 4 * MIB))
        reader.start()
        said = shell.run(
            PORT + "dd if=/dev/urandom of=/d bs=1M count=4 2> /dev/null && cat /d > $port && sha256sum /d", check=True
        ).output
        reader.join(60)

    assert hashlib.sha256(received).hexdigest() == said.split()[0]


def _read_all(client: socket.socket, received: bytearray, length: int) -> None:
    client.settimeout(60)
    while len(received) < length and (part := client.recv(1 << 16)):
        received += part


def test_megabytes_go_to_the_guest_which_sees_the_end(guest: Guest) -> None:
    _, shell = guest
    port = ports_of(guest).port("data")

    def send() -> None:
        with port.connect() as client:
            client.sendall(DATA)

    sender = threading.Thread(target=send)
    sender.start()
    said = shell.run(PORT + "cat $port | sha256sum", check=True).output
    sender.join(60)

    assert said.split()[0] == hashlib.sha256(DATA).hexdigest()
    assert port.wait_for_guest(False)


def test_a_program_is_told_that_the_client_hung_up(guest: Guest) -> None:
    _, shell = guest
    port = ports_of(guest).port("data")
    with port.connect():
        shell.run(PORT + "micropython -c '\n" + HANGUP + "' $port > /hangup 2>&1 &", check=True)
        assert port.wait_for_guest()
    eventually(lambda: "hung up" in shell.run("cat /hangup").output)


HANGUP = """
import select, sys
port = open(sys.argv[1], "rb")
poll = select.poll()
poll.register(port, select.POLLHUP)
while not poll.poll(10000)[0][1] & select.POLLHUP:
    pass
print("hung up")
"""


def test_a_shell_runs_at_the_console(guest: Guest) -> None:
    _, shell = guest
    with ports_of(guest).port("console").connect() as client:
        shell.run("setsid sh -c 'exec sh -i </dev/hvc0 >/dev/hvc0 2>&1' &", check=True)
        client.settimeout(60)
        client.sendall(b"echo $((6 * 7))-at-$(tty); exit\n")
        seen = b""
        while b"42-at-/dev/hvc0" not in seen:
            seen += client.recv(4096)


def test_the_console_knows_its_window(guest: Guest) -> None:
    _, shell = guest
    # Older kernels read the two in the other order.
    assert sorted(shell.run("stty size < /dev/hvc0").output.split()) == ["100", "30"]

    ports_of(guest).resize(120, 40)

    eventually(lambda: sorted(shell.run("stty size < /dev/hvc0").output.split()) == ["120", "40"])


def test_a_port_works_with_one_hart_that_waits_for_a_reader(toolbox: Boot) -> None:
    with toolbox(devices=[PortsConfig(ports={"console": None, "data": None})], memory_mib=320) as (vm, shell):
        device = vm.machine.device("console0")
        assert isinstance(device, PortsDevice)
        # Nobody reads the console: its writer goes on all the same.
        shell.run("dd if=/dev/zero of=/dev/hvc0 bs=1000 count=100", check=True)
        with device.port("data").connect() as client:
            shell.run(PORT + "dd if=/dev/zero of=$port bs=1M count=2 2> /dev/null &", check=True)
            assert device.port("data").wait_for_guest()
            assert shell.run("echo alive").output == "alive\n"
            received = bytearray()
            _read_all(client, received, 2 * MIB)
        assert not any(received)


def test_an_inflated_balloon_lowers_memory_of_host_and_guest(toolbox: Boot) -> None:
    config = BalloonConfig(free_page_reporting=False)
    with toolbox(devices=[config], memory_mib=320) as (vm, shell):
        device = vm.machine.device("balloon0")
        assert isinstance(device, BalloonDevice)
        fill(shell)
        let_go(shell)
        memory, held = vm.machine.memory, set[int]()
        memory.subscribe(
            ignored := lambda address, length: None,
            lambda address, length: held.update(range(address - memory.base, address - memory.base + length, 4096)),
        )
        pss_before, free_before, resident_before = pss(), free(shell), resident(memory)

        device.set_target(160)
        eventually(lambda: device.actual_mib == 160)
        pss_inflated, free_inflated, resident_inflated = pss(), free(shell), resident(memory)
        memory.unsubscribe(ignored)
        statistics = device.request_statistics().result(30).values

        device.set_target(0)
        eventually(lambda: device.actual_mib == 0)
        free_after = free(shell)
        fill(shell)
        total = int(shell.run("grep MemTotal: /proc/meminfo").output.split()[1]) * 1024

        assert len(held) * 4096 == 160 * MIB
        assert not any(resident_inflated[page // mmap.PAGESIZE] & 1 for page in held)
        # Pages that the guest never touched may be among them: those the host never gave, and does not get back.
        given = sum(resident_before[page // mmap.PAGESIZE] & 1 for page in held) * 4096 / MIB
        assert given - SLACK < pss_before - pss_inflated < given + SLACK
        assert 160 - SLACK < free_before - free_inflated < 160 + SLACK
        assert abs(free_after - free_before) < SLACK
        assert device.inflated_bytes == 160 * MIB
        assert statistics["free"] / MIB == pytest.approx(free_inflated, abs=SLACK)
        # What the balloon holds is no part of the guest's total.
        assert statistics["total"] in (total, total - 160 * MIB)
        assert statistics["major_faults"] <= statistics["minor_faults"]
        assert not COMPLAINTS.search(vm.console.text)


def test_free_pages_that_the_guest_reports_lower_memory_of_the_host(toolbox: Boot) -> None:
    with toolbox(devices=[BalloonConfig()], memory_mib=448) as (vm, shell):
        device = vm.machine.device("balloon0")
        assert isinstance(device, BalloonDevice)
        fill(shell)
        pss_filled = pss()
        let_go(shell)
        free_before = free(shell)

        eventually(lambda: pss_filled - pss() > FILLED - SLACK)

        assert device.reported_bytes > (FILLED - SLACK) * MIB
        assert abs(free(shell) - free_before) < SLACK
        fill(shell)
        assert shell.run("cmp -n 4000000 /mnt/filled /dev/zero").status == 0
        assert not COMPLAINTS.search(vm.console.text)
