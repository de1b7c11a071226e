"""How a sandbox follows the limits of its containers, and what becomes of a resize that fails; without a guest."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from kata_lab.hypervisor import HypervisorError
from kata_lab.resource.sizing import SandboxSize
from kata_lab.runtime import RuntimeFault, Sandbox
from tests.kata_lab.runtime.fake import FakeHypervisor, Fault
from vmm.config import BlockConfig


def made(faults: dict[str, Fault] | None = None, **config: Any) -> tuple[Sandbox, FakeHypervisor]:
    hypervisor = FakeHypervisor(**(faults or {}))
    wanted = {"vcpus": 1, "memory_mib": 256, "max_vcpus": 8, "max_memory_mib": 1024} | config
    return Sandbox.create(hypervisor=hypervisor, **wanted), hypervisor


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_sandbox_grows_before_a_container_comes_and_shrinks_after_it_has_gone() -> None:
    sandbox, hypervisor = made()

    async def story() -> None:
        async with sandbox:
            container = await sandbox.new_container(["true"], cpus=2.5, memory="512m")
            assert hypervisor.resizes == [("vcpus", 3), ("memory_mib", 640)]
            assert sandbox.size == SandboxSize(3, 640)
            await container.remove()
            assert sandbox.size == SandboxSize(1, 256)

    run(story())


def test_containers_together_and_a_floor_of_ones_own() -> None:
    sandbox, _ = made()

    async def story() -> None:
        async with sandbox:
            first = await sandbox.new_container(["true"], cpus=1.5)
            second = await sandbox.new_container(["true"], cpus=2.5)
            assert sandbox.size.vcpus == 4
            assert await sandbox.resize(vcpus=3) == SandboxSize(4, 384)
            await first.remove()
            await second.remove()
            assert sandbox.size == SandboxSize(3, 256)

    run(story())


def test_limits_beyond_the_maximum_give_the_maximum() -> None:
    sandbox, _ = made(max_vcpus=2, max_memory_mib=300)

    async def story() -> None:
        async with sandbox:
            await sandbox.new_container(["true"], cpus=16, memory="4g")
            assert sandbox.size == SandboxSize(2, 300)

    run(story())


def test_updated_limits_change_the_sandbox_too() -> None:
    sandbox, _ = made()

    async def story() -> None:
        async with sandbox:
            container = await sandbox.new_container(["true"], memory="64m")
            await container.update({"cpu": {"quota": 400_000, "period": 100_000}})
            assert sandbox.size.vcpus == 4
            assert container.spec["linux"]["resources"]["memory"]["limit"] == 64 << 20

    run(story())


def test_container_for_which_the_guest_cannot_grow_is_not_there() -> None:
    sandbox, hypervisor = made({"resize_memory": HypervisorError("the guest has no balloon")})

    async def story() -> None:
        async with sandbox:
            with pytest.raises(RuntimeFault, match="cannot have 3 vCPUs and 640 MiB: the guest has no balloon"):
                await sandbox.new_container(["true"], cpus=2.5, memory="512m")
            assert sandbox.containers == {}
            assert hypervisor.agent.containers == set()
            # The half that had been done is undone, and what comes next works.
            assert hypervisor.resizes == [("vcpus", 3), ("vcpus", 1)]
            del hypervisor.faults["resize_memory"]
            await sandbox.new_container(["true"], memory="512m")
            assert sandbox.size == SandboxSize(1, 640)

    run(story())


def test_container_goes_although_the_guest_gives_nothing_back() -> None:
    sandbox, hypervisor = made()

    async def story() -> None:
        async with sandbox:
            container = await sandbox.new_container(["true"], cpus=2)
            hypervisor.faults["resize_vcpu"] = HypervisorError("CPU 1 is busy")
            await container.remove()
            assert sandbox.containers == {}
            assert sandbox.size.vcpus == 2

    run(story())


def test_sandbox_without_room_is_never_asked() -> None:
    sandbox, hypervisor = made(max_vcpus=None, max_memory_mib=None)

    async def story() -> None:
        async with sandbox:
            await (await sandbox.new_container(["true"], cpus=4)).remove()
            assert hypervisor.resizes == []

    run(story())


@pytest.mark.parametrize(("name", "value"), [("vcpus", 9), ("vcpus", 0), ("vcpus", True), ("memory_mib", 2048)])
def test_resize_beyond_the_maximum_is_refused(name: str, value: int) -> None:
    sandbox, hypervisor = made()

    async def story() -> None:
        async with sandbox:
            with pytest.raises(RuntimeFault, match=f"{name} is {value}, it must be a whole number from 1 to .*max_"):
                await sandbox.resize(**{name: value})
            assert hypervisor.resizes == []

    run(story())


def test_two_resizes_at_once_are_ordered() -> None:
    sandbox, hypervisor = made()

    async def story() -> None:
        async with sandbox:
            await asyncio.gather(sandbox.resize(vcpus=4), sandbox.resize(vcpus=2), sandbox.resize(vcpus=6))
            assert hypervisor.resizes == [("vcpus", 4), ("vcpus", 2), ("vcpus", 6)]
            assert sandbox.size.vcpus == 6

    run(story())


def test_devices_come_and_go_while_it_runs_and_not_before() -> None:
    sandbox, hypervisor = made()

    async def story() -> None:
        with pytest.raises(RuntimeFault, match="is init and cannot be given a device"):
            await sandbox.add_device(BlockConfig(name="data", path="x"))
        async with sandbox:
            name = await sandbox.add_device(BlockConfig(name="data", path="x"))
            assert hypervisor.plugged == ["data"]
            await sandbox.remove_device(name)
            assert hypervisor.plugged == []

    run(story())
