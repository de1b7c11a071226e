"""A stock kernel to which CPUs, memory, disks, shares and interfaces come while it runs, and which uses them."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kata_lab.image.build import build_named
from kata_lab.shell import GuestShell, boot_image
from vmm.actions import (
    InsertBlockDevice,
    InsertFsDevice,
    InsertNetworkDevice,
    ManipulateFsBackend,
    PrepareRemoveBlockDevice,
    RemoveBlockDevice,
    RemoveFsDevice,
    RemoveNetworkDevice,
    ResizeMemory,
    ResizeVcpu,
    UpdateBlockDevice,
    UpdateNetworkDevice,
    VmmAction,
)
from vmm.config import MIB, BlockConfig, FsConfig, NetworkConfig, VsockConfig
from vmm.errors import StateError
from vmm.hotplug import HotplugError
from vmm.metrics import ProcessMemory
from vmm.microvm import MicroVm

COMPLAINTS = re.compile(r"rcu.*stall|soft lockup|hung task|BUG:|Oops|Unable to handle|WARNING:", re.IGNORECASE)
CPU1 = "/sys/devices/system/cpu/cpu1/online"
ROUNDS = 100
FILLED = 100  #: MiB that are written
SLACK = 50  #: MiB that guest and host may use for something else meanwhile

Guest = tuple[MicroVm, GuestShell]


@pytest.fixture(scope="module")
def booted() -> Iterator[Guest]:
    """1 CPU of at most 8, and 192 MiB of at most 320."""
    with boot_image(
        build_named("lifsea", progress="off"),
        devices=[VsockConfig(name="agent")],
        vcpus=1,
        max_vcpus=8,
        memory_mib=192,
        max_memory_mib=320,
    ) as (vm, shell):
        yield vm, shell


@pytest.fixture
def guest(booted: Guest) -> Iterator[Guest]:
    """With 1 CPU, and a kernel that has nothing to complain of."""
    vm, shell = booted
    ask(vm, ResizeVcpu(1))
    yield vm, shell
    ask(vm, ResizeVcpu(1))
    assert COMPLAINTS.search(shell.run("dmesg", check=True).output) is None


def ask(vm: MicroVm, action: VmmAction[Any]) -> Any:
    return vm.request(action).result(120)


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def online(shell: GuestShell) -> str:
    return shell.run("cat /sys/devices/system/cpu/online", check=True).output.strip()


def background(shell: GuestShell, command: str) -> int:
    """Its process id."""
    return int(shell.run(f"{command} >/dev/null 2>&1 & echo $!", check=True).output)


def processor(shell: GuestShell, process: int) -> tuple[int, int]:
    """On which CPU a process is, and how many ticks it has run (proc(5), stat)."""
    fields = shell.run(f"cat /proc/{process}/stat", check=True).output.rpartition(")")[2].split()
    return int(fields[36]), int(fields[11])


def test_a_task_runs_on_the_cpu_that_came_and_leaves_it_when_it_goes(guest: Guest) -> None:
    vm, shell = guest

    ask(vm, ResizeVcpu(2))

    assert online(shell) == "0-1"
    task = background(shell, "taskset 2 sh -c 'while :; do :; done'")
    eventually(lambda: processor(shell, task)[0] == 1)
    ran = processor(shell, task)[1]
    eventually(lambda: processor(shell, task)[1] > ran + 10)
    assert {"vcpu-0", "vcpu-1"} <= vm.thread_ids.keys()
    assert vm.metrics().vcpus[1].instructions > 1_000_000

    ask(vm, ResizeVcpu(1))

    assert online(shell) == "0"
    assert "vcpu-1" not in vm.thread_ids
    eventually(lambda: processor(shell, task)[0] == 0)
    ran = processor(shell, task)[1]
    eventually(lambda: processor(shell, task)[1] > ran)
    shell.run(f"kill {task}", check=True)


def test_cpus_come_and_go_a_hundred_times_under_load(guest: Guest) -> None:
    vm, shell = guest
    tasks = [background(shell, "sh -c 'while :; do dd if=/dev/zero bs=4k count=50 | cksum; done'") for _ in range(2)]

    for _ in range(ROUNDS):
        ask(vm, ResizeVcpu(8))
        assert online(shell) == "0-7"
        ask(vm, ResizeVcpu(1))
        assert online(shell) == "0"

    ran = [processor(shell, task)[1] for task in tasks]
    eventually(lambda: all(processor(shell, task)[1] >= before for task, before in zip(tasks, ran, strict=True)))
    shell.run(f"kill {' '.join(map(str, tasks))}", check=True)
    assert sum(name.startswith("vcpu") for name in vm.thread_ids) == 1


def test_a_guest_takes_no_cpu_by_itself(guest: Guest) -> None:
    _, shell = guest

    assert shell.run(f"echo 1 > {CPU1}").status != 0
    assert online(shell) == "0"


def test_a_cpu_that_the_guest_does_not_give_up_stays(guest: Guest) -> None:
    vm, shell = guest
    ask(vm, ResizeVcpu(2))
    # Writing to this file fails, as writing to that of a CPU which is needed does.
    shell.run(f"mount -o bind /proc/version {CPU1}", check=True)

    with pytest.raises(HotplugError, match="the VM has 2 vCPUs and not 1: the guest refused DEL_CPU count=1"):
        ask(vm, ResizeVcpu(1))

    shell.run(f"umount {CPU1}", check=True)
    assert online(shell) == "0-1"
    assert len(vm.machine.vcpus) == vm.config.vcpus == 2
    ask(vm, ResizeVcpu(1))


def test_a_device_manager_that_was_killed_comes_back(guest: Guest) -> None:
    vm, shell = guest
    ask(vm, ResizeVcpu(2))
    killed = shell.run("kill -9 $(ps | grep '[u]pcall\\|[d]evices.py' | awk '{print $1}')")
    assert killed.status == 0

    assert ask(vm, ResizeVcpu(3)).vcpus == 3
    assert online(shell) == "0-2"


def test_a_pause_in_the_middle_leaves_a_vm_that_works(guest: Guest) -> None:
    vm, shell = guest
    for _ in range(3):
        request = vm.request(ResizeVcpu(4))
        vm.pause()
        assert isinstance(request.exception(60), HotplugError | StateError)
        vm.resume()
        assert ask(vm, ResizeVcpu(2)).vcpus == 2
        assert online(shell) == "0-1"
        ask(vm, ResizeVcpu(1))


def test_memory_that_came_is_written_and_goes_back_to_the_host(guest: Guest) -> None:
    vm, shell = guest

    def total() -> float:
        return int(shell.run("grep MemTotal: /proc/meminfo", check=True).output.split()[1]) / 1024

    small = total()
    ask(vm, ResizeMemory(320))
    assert total() - small == pytest.approx(128, abs=1)
    shell.run("mkdir -p /mnt/ram && mount -t tmpfs -o size=90% none /mnt/ram", check=True)
    before = ProcessMemory.now().pss
    shell.run(f"dd if=/dev/zero of=/mnt/ram/filled bs=1M count={FILLED}", check=True)
    full = ProcessMemory.now().pss
    shell.run("umount /mnt/ram && echo 3 > /proc/sys/vm/drop_caches", check=True)
    ask(vm, ResizeMemory(192))
    shrunk = ProcessMemory.now().pss

    assert vm.config.memory_mib == 192
    assert total() == pytest.approx(small, abs=1)
    assert full - before > (FILLED - SLACK) * MIB
    assert full - shrunk > (FILLED - SLACK) * MIB


def test_memory_that_the_guest_needs_is_not_taken(guest: Guest) -> None:
    vm, shell = guest
    shell.run("mkdir -p /mnt/ram && mount -t tmpfs -o size=90% none /mnt/ram", check=True)
    shell.run("dd if=/dev/zero of=/mnt/ram/needed bs=1M count=60", check=True)

    with pytest.raises(HotplugError, match=r"memory instead of 96: the guest is asked for 96 MiB, and can spare \d+"):
        ask(vm, ResizeMemory(96))

    assert vm.config.memory_mib == 192
    assert vm.machine.device("balloon0").target_mib == 128
    shell.run("umount /mnt/ram", check=True)
    assert ask(vm, ResizeMemory(192)).memory_mib == 192


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """8 MiB with an empty ext4."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", os.fspath(path)], check=True)
    return path


def test_a_disk_is_filled_and_stays_while_it_is_mounted(guest: Guest, disk: Path) -> None:
    vm, shell = guest
    name = ask(vm, InsertBlockDevice(BlockConfig(path=disk, serial="hot"))).name
    shell.run("mkdir -p /mnt/disk && mount -t ext4 /dev/vda /mnt/disk", check=True)
    shell.run("head -c 1000000 /dev/urandom > /mnt/disk/data", check=True)
    assert "No space left" in shell.run("cat /dev/zero > /mnt/disk/rest").output
    said = shell.run("sync; sha256sum < /mnt/disk/data", check=True).output

    for action in (PrepareRemoveBlockDevice(name), RemoveBlockDevice(name)):
        with pytest.raises(HotplugError, match=r"blk0 stays: the guest refused DEL_MMIO .*EBUSY"):
            ask(vm, action)
    assert shell.run("sha256sum < /mnt/disk/data", check=True).output == said

    shell.run("umount /mnt/disk", check=True)
    ask(vm, RemoveBlockDevice(name))
    assert shell.run("test -e /dev/vda").status == 1

    with disk.open("r+b") as file:
        file.truncate(16 * MIB)
    ask(vm, InsertBlockDevice(BlockConfig(path=disk, read_only=True)))
    assert int(shell.run("cat /sys/block/vda/size").output) * 512 == 16 * MIB
    shell.run("mount -t ext4 -o ro /dev/vda /mnt/disk", check=True)
    assert shell.run("sha256sum < /mnt/disk/data", check=True).output == said
    shell.run("umount /mnt/disk", check=True)
    ask(vm, RemoveBlockDevice("blk0"))


def test_a_disk_grows(guest: Guest, disk: Path) -> None:
    vm, shell = guest
    ask(vm, InsertBlockDevice(BlockConfig(path=disk)))
    with disk.open("r+b") as file:
        file.truncate(24 * MIB)

    assert ask(vm, UpdateBlockDevice("blk0")).size == 24 * MIB

    eventually(lambda: int(shell.run("cat /sys/block/vda/size").output) * 512 == 24 * MIB)
    ask(vm, RemoveBlockDevice("blk0"))


def test_one_slot_serves_many_disks(guest: Guest, tmp_path: Path) -> None:
    vm, shell = guest
    slots = set()
    for number in range(15):
        path = tmp_path / f"{number}.img"
        path.write_bytes(f"disk {number}\n".encode().ljust(4096, b"\0"))
        slots.add(ask(vm, InsertBlockDevice(BlockConfig(path=path))).slot)
        assert shell.run("head -n 1 /dev/vda", check=True).output == f"disk {number}\n"
        ask(vm, RemoveBlockDevice("blk0"))
    assert len(slots) == 1


def test_a_share_is_read_and_written(guest: Guest, tmp_path: Path) -> None:
    vm, shell = guest
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "greeting").write_text("from the host")
    name = ask(vm, InsertFsDevice(FsConfig(tag="hot"))).name
    ask(vm, ManipulateFsBackend(name, "add", "shared", tmp_path / "in"))
    shell.run("mkdir -p /mnt/share && mount -t virtiofs hot /mnt/share", check=True)

    assert shell.run("cat /mnt/share/shared/greeting").output == "from the host"
    shell.run("echo from the guest > /mnt/share/shared/answer", check=True)
    assert (tmp_path / "in" / "answer").read_text() == "from the guest\n"
    with pytest.raises(HotplugError, match=r"fs0 stays: the guest refused DEL_MMIO .*EBUSY"):
        ask(vm, RemoveFsDevice(name))

    shell.run("umount /mnt/share", check=True)
    ask(vm, RemoveFsDevice(name))


LEASE = """cat > /tmp/lease <<'END'
#!/bin/sh
[ $1 = bound ] && ip addr add $ip/${mask:-24} dev $interface && ip route add default via $router && echo $router
END
chmod +x /tmp/lease; ip link set eth0 up; busybox udhcpc -i eth0 -n -q -s /tmp/lease 2> /dev/null"""


RECEIVE = """
import socket, sys
connection = socket.socket()
connection.connect(socket.getaddrinfo(*PLACE)[0][-1])
while data := connection.recv(65536):
    sys.stdout.buffer.write(data)"""


def test_an_interface_gets_an_address_and_carries_data(guest: Guest) -> None:
    vm, shell = guest
    data = os.urandom(MIB)
    name = ask(vm, InsertNetworkDevice(NetworkConfig())).name
    gateway = shell.run(LEASE, check=True).output.split()[-1]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        sender = threading.Thread(target=_serve, args=(server, data))
        sender.start()
        place = f"('{gateway}', {server.getsockname()[1]})"
        said = shell.run(f'micropython -c "{RECEIVE.replace("PLACE", place)}" | sha256sum', check=True).output
        sender.join(60)
    assert said.split()[0] == hashlib.sha256(data).hexdigest()

    ask(vm, UpdateNetworkDevice(name, link_up=False))
    eventually(lambda: shell.run("cat /sys/class/net/eth0/carrier").output == "0\n")
    ask(vm, UpdateNetworkDevice(name, link_up=True))
    eventually(lambda: shell.run("cat /sys/class/net/eth0/carrier").output == "1\n")

    ask(vm, RemoveNetworkDevice(name))
    assert shell.run("test -e /sys/class/net/eth0").status == 1


def _serve(server: socket.socket, data: bytes) -> None:
    with server.accept()[0] as connection:
        connection.sendall(data)


def test_what_failed_and_what_did_not_is_on_record(guest: Guest) -> None:
    vm, _ = guest
    ask(vm, ResizeVcpu(2))

    record = vm.hotplugs[-1]

    assert (record.action, record.error) == (ResizeVcpu(2), "")
    assert record.requested_at <= record.steps[0].seconds <= record.steps[-1].seconds <= record.answered_at
    assert vm.upcall is not None
    assert vm.upcall.frames[-1].name == "ADD_CPU"
