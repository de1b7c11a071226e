"""The device manager in a real guest: its bytes, CPUs that come and go, slots that are filled, emptied and in use."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from kata_lab.image.build import build_named
from kata_lab.resource.scratch import make_ext4
from kata_lab.shell import GuestShell, boot_image
from vmm.board.riscv_virt import virtio_address, virtio_interrupt
from vmm.config import BlockConfig, EntropyConfig, FsConfig, NetworkConfig, VsockConfig
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import Queue
from vmm.devices.virtio.vsock.device import VsockDevice
from vmm.microvm import MicroVm
from vmm.upcall import PORT, FrameType, UpcallClient, UpcallRefused

SECONDS = 60.0
VSOCK, DISK, SHARE, ENTROPY, WIRE, STRANGE, EMPTY = range(7)
COMPLAINTS = re.compile(r"rcu.*stall|soft lockup|hung task|BUG:|Oops|Unable to handle", re.IGNORECASE)
CPUS = "/sys/devices/system/cpu"
DRIVER = "/sys/bus/platform/drivers/virtio-mmio"


def padded(text: str) -> bytes:
    """A frame that begins with these hexadecimal bytes."""
    return bytes.fromhex(text).ljust(1024, b"\0")


CONNECT = padded("00014d44 00000000 00000000 00000000 00000000")
ADD_CPU = padded("00014d44 01000000 01000000 00000000 01")
DEL_CPU = padded("00014d44 01000000 02000000 00000000 01")
CPU_1_CAME = padded("00014d44 04000000 01000000 00000000 00000000 01000000")
CPU_1_WENT = padded("00014d44 04000000 02000000 00000000 00000000 01000000")
ADD_EMPTY = padded("00014d44 18000000 05000000 00000000 0070001000000000 0010000000000000 07000000 00000000")
NO_DEVICE = padded("00014d44 00000000 05000000 00000000 edffffff")


def slot(number: int) -> tuple[int, int, int]:
    """Base, size and interrupt."""
    return virtio_address(number), 0x1000, virtio_interrupt(number)


class StrangeDevice(VirtioDevice):
    """A device of a kind that no driver is for."""

    DEVICE_ID: ClassVar[int] = 63
    KIND: ClassVar[str] = "strange"

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (16,)

    def notify(self, queue: Queue, index: int) -> None:
        queue.signal()


class Booted:
    """A guest of which CPU 0 is up and 1 to 3 are not, and the device manager in it."""

    def __init__(self, vm: MicroVm, shell: GuestShell, runner: asyncio.Runner) -> None:
        device = vm.machine.device("vsock")
        assert isinstance(device, VsockDevice)
        self._vsock = device
        self._runner = runner
        self._client = UpcallClient(self._dial)
        runner.run(self._client.connect())
        self.shell = shell

    async def _dial(self) -> socket.socket:
        return await asyncio.wrap_future(self._vsock.dial(PORT))

    def dial(self) -> socket.socket:
        """A connection to the device manager, to be spoken to by hand."""
        connection = self._vsock.dial(PORT).result(SECONDS)
        connection.settimeout(SECONDS)
        return connection

    def greeted(self) -> socket.socket:
        """A connection for which the device manager waits."""
        connection = self.dial()
        connection.sendall(b"d")
        assert receive(connection) == CONNECT
        return connection

    async def _ask(self, kind: FrameType, wishes: tuple[int, ...]) -> int | None:
        client = self._client
        match kind:
            case FrameType.ADD_CPU:
                return await client.add_cpu(*wishes)
            case FrameType.DEL_CPU:
                return await client.del_cpu(*wishes)
            case FrameType.ADD_MMIO:
                await client.add_mmio(*wishes)
            case FrameType.DEL_MMIO:
                await client.del_mmio(*wishes)
            case FrameType.ADD_MEM:
                await client.add_mem(*wishes)
            case _:
                await client.del_mem(*wishes)
        return None

    def ask(self, kind: FrameType, *wishes: int) -> int | None:
        """A request through the client."""
        return self._runner.run(asyncio.wait_for(self._ask(kind, wishes), SECONDS))

    def refused(self, kind: FrameType, *wishes: int) -> int:
        """The errno with which the guest refuses a request."""
        with pytest.raises(UpcallRefused) as refused:
            self.ask(kind, *wishes)
        return refused.value.errno

    def close(self) -> None:
        """Close the client."""

        async def close() -> None:
            self._client.close()

        self._runner.run(close())

    def say(self, command: str) -> str:
        """What a command in the guest prints, which must succeed."""
        return self.shell.run(command, timeout=SECONDS, check=True).output.strip()

    @property
    def service(self) -> int:
        """The process of the device manager."""
        return int(self.say("ps -o pid,args | awk '$2 ~ /micropython$/ && $NF ~ /devices.py$/ { print $1 }'"))

    @property
    def online(self) -> str:
        """The CPUs that are up."""
        return self.say(f"cat {CPUS}/online")


def receive(connection: socket.socket) -> bytes:
    """A frame; what came before the end if that is shorter."""
    data = b""
    while len(data) < 1024:
        try:
            part = connection.recv(1024 - len(data))
        except ConnectionResetError:
            part = b""
        if not part:
            break
        data += part
    return data


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("upcall")
    make_ext4(directory / "disk", 16 << 20)
    (directory / "disk").chmod(0o600)
    (directory / "share").mkdir()
    (directory / "share" / "note").write_text("from the host")
    return directory


@pytest.fixture(scope="module")
def machine(shared: Path) -> Iterator[Booted]:
    devices = [
        VsockConfig(name="vsock"),
        BlockConfig(path=shared / "disk"),
        FsConfig(path=shared / "share", tag="notes"),
        EntropyConfig(),
        NetworkConfig(backend="socket", socket=shared / "wire"),
    ]
    image = build_named("lifsea", progress="off")
    with (
        boot_image(image, devices=devices, custom=[StrangeDevice()], vcpus=4, append="maxcpus=1") as (vm, shell),
        asyncio.Runner() as runner,
    ):
        booted = Booted(vm, shell, runner)
        yield booted
        booted.close()


@pytest.fixture
def guest(machine: Booted) -> Iterator[Booted]:
    """With CPU 0 alone, and a kernel that has nothing to complain of."""
    assert machine.online == "0"
    yield machine
    assert machine.online == "0"
    assert COMPLAINTS.search(machine.say("dmesg")) is None


# Bytes.


def test_bytes_are_those_of_the_format(guest: Booted) -> None:
    with guest.greeted() as connection:
        for request, reply in ((ADD_CPU, CPU_1_CAME), (DEL_CPU, CPU_1_WENT), (ADD_EMPTY, NO_DEVICE)):
            connection.sendall(request)
            assert receive(connection) == reply


def test_a_frame_may_come_in_pieces_and_two_at_once(guest: Booted) -> None:
    with guest.greeted() as connection:
        for place in range(0, 1024, 100):
            connection.sendall(ADD_CPU[place : place + 100])
        assert receive(connection) == CPU_1_CAME
        connection.sendall(DEL_CPU + ADD_EMPTY)
        assert receive(connection) == CPU_1_WENT
        assert receive(connection) == NO_DEVICE


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        ("00014d44 10000000 03000000 00000000", errno.EOPNOTSUPP),
        ("00014d44 10000000 04000000 00000000", errno.EOPNOTSUPP),
        ("00014d44 00000000 07000000 00000000", errno.EOPNOTSUPP),
        ("00014d44 00000000 ffffffff 00000000", errno.EOPNOTSUPP),
        ("00014d44 02000000 01000000 00000000 01", errno.EINVAL),
        ("00014d44 ffffffff 05000000 00000000", errno.EINVAL),
        ("00014d44 01000000 01000000 00000000 00", errno.EINVAL),
        ("00014d44 01000000 01000000 00000000 04", errno.ENODEV),
        ("00014d44 01000000 02000000 00000000 01", errno.EINVAL),
    ],
    ids=["add mem", "del mem", "pci", "unknown", "size", "huge", "no cpus", "more cpus than there are", "cpu 0"],
)
def test_what_cannot_be_done_is_answered_with_an_errno(guest: Booted, request_: str, number: int) -> None:
    request = padded(request_)
    with guest.greeted() as connection:
        connection.sendall(request)
        assert receive(connection) == (request[:4] + bytes(4) + request[8:12] + bytes(4)) + (-number).to_bytes(
            4, "little", signed=True
        ) + bytes(1004)


def test_nothing_that_is_said_ends_the_service(guest: Booted) -> None:
    before = guest.service
    for said in (b"x", b"CONNECT 219\n", b"d" + b"\xff" * 1024, b"d" + b"\0" * 1024):
        with guest.dial() as connection:
            connection.sendall(said)
            answer = receive(connection) if said[:1] == b"d" else CONNECT
            assert answer == CONNECT
            assert receive(connection) == b""
    for said in (b"", b"d", b"d" + ADD_CPU[:500]):
        with guest.dial() as connection:
            connection.sendall(said)
    for _ in range(20):
        guest.greeted().close()
    with guest.greeted() as connection:
        connection.sendall(ADD_EMPTY)
        assert receive(connection) == NO_DEVICE
    assert guest.service == before


def test_who_connects_last_is_served(guest: Booted) -> None:
    with guest.greeted() as first, guest.greeted() as second:
        assert receive(first) == b""
        second.sendall(ADD_EMPTY)
        assert receive(second) == NO_DEVICE


def test_a_client_that_goes_before_its_answer_leaves_the_service_to_others(guest: Booted) -> None:
    with guest.greeted() as connection:
        connection.sendall(ADD_CPU)
    # By the time the next client is greeted, the request has been carried out or never will be.
    with guest.greeted() as connection:
        online = guest.online
        assert online in ("0", "0-1")
        connection.sendall(ADD_EMPTY)
        assert receive(connection) == NO_DEVICE
        assert guest.online == online
        if online == "0-1":
            connection.sendall(DEL_CPU)
            assert receive(connection) == CPU_1_WENT


def test_a_service_that_is_killed_comes_back(guest: Booted) -> None:
    with guest.greeted():
        guest.say(f"kill -9 {guest.service}")
    assert guest.refused(FrameType.ADD_MMIO, *slot(EMPTY)) == errno.ENODEV


# CPUs.


def test_a_cpu_that_comes_runs_what_is_pinned_to_it(guest: Booted) -> None:
    pinned = "taskset -c 2 awk '{print $39}' /proc/self/stat"
    assert guest.shell.run(pinned).status != 0

    assert guest.ask(FrameType.ADD_CPU, 2) == 2
    assert guest.online == "0-2"
    assert guest.say(pinned) == "2"

    assert guest.ask(FrameType.DEL_CPU, 1) == 2
    assert guest.shell.run(pinned).status != 0
    assert guest.ask(FrameType.DEL_CPU, 1) == 1


def test_cpus_come_in_order_and_fill_gaps(guest: Booted) -> None:
    assert guest.ask(FrameType.ADD_CPU, 3) == 3
    guest.say(f"echo 0 >{CPUS}/cpu1/online")
    assert guest.online == "0,2-3"
    assert guest.ask(FrameType.ADD_CPU, 1) == 1
    assert guest.online == "0-3"
    assert guest.ask(FrameType.DEL_CPU, 3) == 1


def test_where_one_cpu_does_not_come_up_none_does(guest: Booted) -> None:
    guest.say(f"mount -o bind /dev/full {CPUS}/cpu3/online")
    try:
        assert guest.refused(FrameType.ADD_CPU, 3) == errno.ENOSPC
        assert guest.online == "0"
    finally:
        guest.say(f"umount {CPUS}/cpu3/online")
    assert guest.ask(FrameType.ADD_CPU, 3) == 3
    assert guest.ask(FrameType.DEL_CPU, 3) == 1


def test_where_one_cpu_does_not_go_none_does(guest: Booted) -> None:
    guest.ask(FrameType.ADD_CPU, 3)
    guest.say(f"mount -o bind /dev/full {CPUS}/cpu1/online")
    try:
        assert guest.refused(FrameType.DEL_CPU, 3) == errno.ENOSPC
        assert guest.online == "0-3"
    finally:
        guest.say(f"umount {CPUS}/cpu1/online")
    assert guest.ask(FrameType.DEL_CPU, 3) == 1


def test_a_change_leaves_the_kernels_habits_as_they_were(guest: Booted) -> None:
    assert guest.say("cat /sys/kernel/rcu_expedited") == "0"
    assert guest.refused(FrameType.ADD_CPU, 4) == errno.ENODEV
    assert guest.say("cat /sys/kernel/rcu_expedited") == "0"


# Slots.


def test_an_empty_slot_is_refused_without_a_trace(guest: Booted) -> None:
    look = f"ls {DRIVER} /sys/bus/virtio/devices /sys/bus/platform/devices"
    before = guest.say(look)
    assert guest.refused(FrameType.ADD_MMIO, *slot(EMPTY)) == errno.ENODEV
    assert guest.refused(FrameType.DEL_MMIO, *slot(EMPTY)) == errno.ENODEV
    assert guest.say(look) == before


def test_a_slot_that_is_not_as_told_is_refused(guest: Booted) -> None:
    base, size, interrupt = slot(DISK)
    for kind in (FrameType.ADD_MMIO, FrameType.DEL_MMIO):
        assert guest.refused(kind, 0x2000_0000, size, interrupt) == errno.ENODEV
        assert guest.refused(kind, (1 << 64) - 1, size, interrupt) == errno.ENODEV
        assert guest.refused(kind, base, 2 * size, interrupt) == errno.EINVAL
        assert guest.refused(kind, base, size, interrupt + 1) == errno.EINVAL
    assert guest.refused(FrameType.ADD_MMIO, base, size, interrupt) == errno.EEXIST
    guest.say("test -b /dev/vda")


def test_a_disk_goes_and_comes_back_with_what_is_on_it(guest: Booted) -> None:
    guest.say("mount -t ext4 /dev/vda /mnt && echo kept >/mnt/file && umount /mnt")

    guest.ask(FrameType.DEL_MMIO, *slot(DISK))
    assert guest.shell.run("test -b /dev/vda").status == 1
    assert guest.refused(FrameType.DEL_MMIO, *slot(DISK)) == errno.ENODEV

    guest.ask(FrameType.ADD_MMIO, *slot(DISK))
    assert guest.say("mount -t ext4 /dev/vda /mnt && cat /mnt/file && umount /mnt") == "kept"


def test_a_disk_in_use_stays(guest: Booted) -> None:
    guest.say("mount -t ext4 /dev/vda /mnt")
    try:
        assert guest.refused(FrameType.DEL_MMIO, *slot(DISK)) == errno.EBUSY
        guest.say("dd if=/dev/zero of=/mnt/more bs=64k count=16 2>/dev/null && sync")
    finally:
        guest.say("umount /mnt")


def test_a_share_that_any_process_has_mounted_stays(guest: Booted) -> None:
    guest.say(
        "unshare -m sh -c 'mount -t virtiofs notes /mnt && touch /tmp/mounted; exec sleep 1000' >/dev/null 2>&1 & "
        "until test -e /tmp/mounted; do usleep 10000; done; echo $! >/tmp/holder"
    )
    assert guest.say("grep -c virtiofs /proc/mounts || true") == "0"
    assert guest.refused(FrameType.DEL_MMIO, *slot(SHARE)) == errno.EBUSY

    guest.say("kill -9 $(cat /tmp/holder); while kill -0 $(cat /tmp/holder) 2>/dev/null; do usleep 10000; done")
    guest.ask(FrameType.DEL_MMIO, *slot(SHARE))
    assert guest.shell.run("mount -t virtiofs notes /mnt").status != 0
    guest.ask(FrameType.ADD_MMIO, *slot(SHARE))
    assert guest.say("mount -t virtiofs notes /mnt && cat /mnt/note && umount /mnt") == "from the host"


def test_an_interface_is_taken_down_and_goes(guest: Booted) -> None:
    guest.say("ip link set eth0 up && ip addr add 192.0.2.2/24 dev eth0")
    guest.ask(FrameType.DEL_MMIO, *slot(WIRE))
    assert guest.shell.run("ip link show eth0").status != 0
    guest.ask(FrameType.ADD_MMIO, *slot(WIRE))
    guest.say("ip link set eth0 up")


def test_the_driver_of_a_device_is_loaded(guest: Booted) -> None:
    guest.ask(FrameType.DEL_MMIO, *slot(ENTROPY))
    unload = "import ffi; print(ffi.open('libc.so.6').func('l', 'syscall', 'lsi')(106, 'virtio_rng', 0))"
    assert guest.say(f'micropython -c "{unload}"') == "0"
    assert guest.say("grep -c virtio_rng /proc/modules || true") == "0"

    guest.ask(FrameType.ADD_MMIO, *slot(ENTROPY))
    assert guest.say("head -c 16 /dev/hwrng | wc -c") == "16"


def test_a_device_without_a_driver_is_refused_without_a_trace(guest: Booted) -> None:
    guest.ask(FrameType.DEL_MMIO, *slot(STRANGE))
    before = guest.say(f"ls {DRIVER} /sys/bus/virtio/devices")
    assert guest.refused(FrameType.ADD_MMIO, *slot(STRANGE)) == errno.EOPNOTSUPP
    assert guest.say(f"ls {DRIVER} /sys/bus/virtio/devices") == before


def test_the_device_over_which_requests_come_stays(guest: Booted) -> None:
    assert guest.refused(FrameType.DEL_MMIO, *slot(VSOCK)) == errno.EBUSY
    with guest.greeted() as connection:
        connection.sendall(ADD_EMPTY)
        assert receive(connection) == NO_DEVICE
