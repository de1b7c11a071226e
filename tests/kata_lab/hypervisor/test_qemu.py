"""What is QEMU's own: what its machine refuses, how its guest ends, and the ports on which its agent serves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from kata_lab.hypervisor import HypervisorConfig, HypervisorError
from kata_lab.hypervisor.qemu import QemuHypervisor
from kata_lab.hypervisor.qemu_machine import machine_of
from kata_lab.image.build import build_named
from kata_lab.runtime import Sandbox
from tests.kata_lab.runtime.conftest import SECONDS, Guest, Loop, loop
from vmm.config import BlockConfig, EntropyConfig, FsConfig, NetworkConfig, VsockConfig

__all__ = ["loop"]

CONSOLE_PORT = 1026


def ours(directory: Path) -> HypervisorConfig:
    """Our guest with a shared directory."""
    image = build_named("lifsea")
    devices = (VsockConfig(name="agent", socket=directory / "vsock"), FsConfig(name="shared", tag="kataShared"))
    return HypervisorConfig(kernel=image.kernel, initrd=image.root, cmdline=image.append, devices=devices)


@pytest.fixture
def config(tmp_path: Path) -> HypervisorConfig:
    return ours(tmp_path)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def left(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "arm64"}, "the guest's image is for arm64: it must be for riscv64 or amd64"),
        ({"max_vcpus": 2}, "max_vcpus is 2, but the arrangement 'qemu' has no hotplug of vCPUs: it must be 1"),
        ({"devices": [EntropyConfig(name=f"r{n}") for n in range(9)]}, "needs 9 devices, qemu-system-riscv64 gives 8"),
        ({"devices": [NetworkConfig(name="n", queues=2)]}, "'n' has the backend 'passt' and 2 queues; .* and 1$"),
        ({"devices": [BlockConfig(name="b", path=Path("d"), format="overlay")]}, "'overlay', .* it must be 'raw'"),
    ],
)
def test_what_the_machine_cannot_have_is_refused(
    config: HypervisorConfig, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(HypervisorError, match=complaint):
        machine_of(replace(config, **changes))


def test_kernel_of_another_machine_is_refused(config: HypervisorConfig, tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bytes(1024))

    with pytest.raises(HypervisorError, match="bzImage is no kernel for qemu-system-riscv64: use an image for riscv64"):
        machine_of(replace(config, kernel=tmp_path / "bzImage"))


def test_qemu_that_does_not_start_says_why_and_leaves_nothing(
    loop: Loop, config: HypervisorConfig, tmp_path: Path
) -> None:
    missing = BlockConfig(name="disk", path=tmp_path / "missing")
    hypervisor = QemuHypervisor()

    with pytest.raises(HypervisorError, match=r"the VM cannot be made: QEMU .* ended with status 1: .*No such file"):
        loop(hypervisor.prepare_vm(replace(config, devices=[*config.devices, missing])))

    assert not children()
    assert not left(tmp_path)
    with pytest.raises(HypervisorError, match="has no VM: it is not prepared, or cleaned up already"):
        loop(hypervisor.resize_vcpu(1))


def test_preparation_that_is_cancelled_leaves_nothing(loop: Loop, config: HypervisorConfig, tmp_path: Path) -> None:
    async def story() -> None:
        hypervisor = QemuHypervisor()
        preparing = asyncio.ensure_future(hypervisor.prepare_vm(config))
        while not children():
            await asyncio.sleep(0)
        preparing.cancel()
        await asyncio.wait((preparing,))
        assert preparing.cancelled()
        await hypervisor.cleanup()

    loop(story())

    assert not children()
    assert not left(tmp_path)


# How its guest ends.


ENDS = {
    "kata.poweroff": "the guest shut down",
    'kata.run="kill -TERM 1; sleep 100"': "the guest asked for a reboot",
    'kata.run="echo c > /proc/sysrq-trigger"': "the guest's kernel panicked: sysrq triggered crash",
}
"""Words on the kernel's command line → what becomes of the guest."""


def test_end_of_the_guest_is_told(loop: Loop, tmp_path: Path) -> None:
    async def story(directory: Path, words: str) -> tuple[str, str | None]:
        directory.mkdir(0o700)
        config, hypervisor = ours(directory), QemuHypervisor()
        try:
            await hypervisor.prepare_vm(replace(config, cmdline=f"{config.cmdline} {words}"))
            await hypervisor.start_vm(SECONDS)
            return await hypervisor.wait_vm(), hypervisor.ended()
        finally:
            await hypervisor.cleanup()

    async def stories() -> list[tuple[str, str | None]]:
        async with asyncio.TaskGroup() as guests:
            told = [guests.create_task(story(tmp_path / str(number), words)) for number, words in enumerate(ENDS)]
        return [each.result() for each in told]

    assert loop(stories()) == [(end, end) for end in ENDS.values()]
    assert not children()
    assert not any(left(tmp_path / str(number)) for number in range(len(ENDS)))


# A sandbox.


@pytest.fixture(scope="module")
def guest(loop: Loop) -> Iterator[Guest]:
    sandbox = Sandbox.create(hypervisor="qemu", rootfs="fs", append="agent.debug_console", max_memory_mib=320)
    try:
        loop(sandbox.start())
        yield Guest(sandbox, loop)
    finally:
        loop(sandbox.stop())


async def typed(guest: Guest, line: str, expected: bytes) -> None:
    """Connect to the debug console once it is free, type a line, and wait for what it says."""
    while True:
        try:
            connection = await guest.sandbox.hypervisor.dial(CONSOLE_PORT)
            break
        except HypervisorError:
            await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        writer.write(f"{line}\n".encode())
        await reader.readuntil(expected)
    finally:
        writer.close()
        await writer.wait_closed()


def test_root_is_a_directory_that_the_guest_shares(guest: Guest) -> None:
    assert guest.shell("echo made > /made; cat /made; awk '$2 == \"/\" {print $3}' /proc/mounts") == "made\nvirtiofs\n"


def test_pages_are_cleared_when_they_are_allotted(guest: Guest) -> None:
    """So that QEMU never runs what it translated before another process wrote there."""
    assert guest.shell("cat /proc/cmdline").split()[-1] == "init_on_alloc=1"
    # Of two settings the kernel takes the last.
    guest.wait(typed(guest, "dmesg | grep -o 'heap alloc:[a-z]*'", b"heap alloc:on"))


def test_a_port_takes_one_connection_after_the_other(guest: Guest) -> None:
    for number in range(3):
        guest.wait(typed(guest, f"echo $(({number} + 40))", f"{number + 40}".encode()))

    with pytest.raises(HypervisorError, match=r"nobody listens at port 1024 .*, or somebody is connected already"):
        guest.wait(guest.sandbox.hypervisor.dial(1024))
    with pytest.raises(HypervisorError, match=r"no port 7 that can be dialled: it has 1024, 1025, 1026"):
        guest.wait(guest.sandbox.hypervisor.dial(7))


def test_disk_that_has_grown_is_seen(guest: Guest) -> None:
    before = int(guest.shell("cat /sys/block/vda/size"))
    os.truncate(guest.sandbox.directory / "scratch", (before << 9) + (1 << 20))

    guest.wait(guest.sandbox.hypervisor.update_device("scratch"))

    assert int(guest.shell("cat /sys/block/vda/size")) == before + (1 << 11)


def test_what_cannot_be_plugged_is_refused(guest: Guest, tmp_path: Path) -> None:
    hypervisor = guest.sandbox.hypervisor
    for work, complaint in (
        (
            hypervisor.add_device(BlockConfig(name="disk", path=tmp_path)),
            "has no hotplug of devices: name 'disk' when the",
        ),
        (hypervisor.remove_device("scratch"), "'scratch' stays for as long as the guest runs"),
        (hypervisor.remove_device("disk"), "has no device 'disk'; it has agent, shared, scratch, entropy, balloon"),
        (hypervisor.update_device("entropy"), "'entropy' is of kind 'rng'; only a disk can have another size"),
        (hypervisor.resize_vcpu(2), "has no hotplug of vCPUs: the sandbox has 1 and cannot have 2"),
        (hypervisor.resize_memory(512), "memory_mib is 512, it must be from 1 to 320"),
    ):
        with pytest.raises(HypervisorError, match=complaint):
            guest.wait(work)
    with pytest.raises(HypervisorError, match="cannot open a connection to port 9 of the host: it has no vsock"):
        hypervisor.listen(9, print)


def test_guest_that_gives_up_no_memory_is_told(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kata_lab.hypervisor.qemu.STALL_SECONDS", 0.3)
    hypervisor = guest.sandbox.hypervisor

    guest.wait(hypervisor.pause_vm())
    with pytest.raises(HypervisorError, match="the guest stays at 256 MiB of memory and does not go to 200"):
        guest.wait(hypervisor.resize_memory(200))
    guest.wait(hypervisor.resume_vm())

    assert guest.wait(hypervisor.resize_memory(256)) == 256


def test_agent_that_dies_is_a_lost_agent(guest: Guest) -> None:
    async def story() -> None:
        process = "for p in /proc/[0-9]*; do grep -q agent.py $p/cmdline && kill -9 ${p#/proc/}; done"
        with pytest.raises(asyncio.IncompleteReadError):
            await typed(guest, process, b"never said")
        await guest.sandbox.stopped.wait()

    guest.wait(story())

    assert guest.sandbox.reason.startswith("its agent is lost")
