"""A guest for x86-64 under QEMU: the same runtime, agent and share, on another machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from kata_lab.hypervisor import HypervisorError
from kata_lab.oci import OciError, ensure_busybox
from kata_lab.resource.sizing import SandboxSize
from kata_lab.runtime import RunResult, Sandbox
from tests.kata_lab.runtime.conftest import Guest, Loop, loop
from vmm.config import NetworkConfig

__all__ = ["loop"]

IMAGE, BUSYBOX = "lifsea-amd64", "busybox-amd64"
CONSOLE_PORT = 1026


@pytest.fixture(scope="module")
def guest(loop: Loop) -> Iterator[Guest]:
    ensure_busybox(architecture="amd64").close()
    sandbox = Sandbox.create(
        hypervisor="qemu",
        image=IMAGE,
        max_memory_mib=320,
        network=NetworkConfig(),
        append="agent.debug_console",
        shared_pid_namespace=True,
    )
    try:
        loop(sandbox.start())
        yield Guest(sandbox, loop)
    finally:
        loop(sandbox.stop())


def shell(guest: Guest, script: str, **wishes: Any) -> RunResult:
    return guest.run("sh", "-c", script, image=BUSYBOX, **wishes)


def test_program_of_its_architecture_runs_as_asked(guest: Guest) -> None:
    result = shell(guest, "uname -m; id -u; pwd; grep CapEff /proc/self/status; exit 7", user="33", cwd="/var/log")

    assert (result.status, result.output) == (7, "x86_64\n33\n/var/log\nCapEff:\t0000000000000000\n")


def test_devices_are_where_the_runtime_looks_for_them(guest: Guest) -> None:
    result = shell(guest, "echo kept > /file; cat /file; awk '$2 == \"/\" {print $3}' /proc/mounts; ls /sys/class/net")

    assert result.output == "kept\noverlay\neth0\nlo\n"


def test_exec_joins_the_container(guest: Guest) -> None:
    async def story() -> tuple[int, bytes]:
        container = await guest.sandbox.new_container(["sleep", "1000"], BUSYBOX)
        try:
            await container.start()
            process = await container.exec(
                {"args": ["uname", "-m"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]}
            )
            status, output, _ = await process.communicate()
        finally:
            await container.remove()
        return status, output

    assert guest.wait(story()) == (0, b"x86_64\n")


def test_memory_comes_and_goes(guest: Guest) -> None:
    assert guest.wait(guest.sandbox.resize(memory_mib=320)) == SandboxSize(1, 320)
    assert guest.wait(guest.sandbox.resize(memory_mib=256)) == SandboxSize(1, 256)


def test_image_for_another_architecture_is_refused(guest: Guest) -> None:
    with pytest.raises(OciError, match="'busybox' is not there for amd64: there is riscv64"):
        guest.run("true", image="busybox")


@pytest.mark.parametrize("arrangement", ["fused", "rpc"])
def test_other_arrangements_refuse_it(loop: Loop, arrangement: str) -> None:
    sandbox = Sandbox.create(hypervisor=arrangement, image=IMAGE)

    with pytest.raises(
        HypervisorError, match="the guest's image is for amd64: take one for riscv64, or hypervisor='qemu'"
    ):
        loop(sandbox.start())

    assert not sandbox.directory.exists()


def test_panic_is_told(guest: Guest) -> None:
    """The last test of the sandbox."""

    async def story() -> None:
        _, writer = await asyncio.open_connection(sock=await guest.sandbox.hypervisor.dial(CONSOLE_PORT))
        try:
            writer.write(b"echo c > /proc/sysrq-trigger\n")
            await guest.sandbox.stopped.wait()
        finally:
            writer.close()

    guest.wait(story())

    assert guest.sandbox.reason == "the guest's kernel panicked: sysrq triggered crash"
