"""The check and the views of notebook 5. The solution is the instructor's answer. One sandbox serves all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kata_lab import lab
from kata_lab.hypervisor.fused import FusedHypervisor
from kata_lab.lab import hotplug_exercise
from kata_lab.lab.hotplug_exercise import Attempt, check_half_way, try_resize
from kata_lab.runtime import Sandbox
from kata_lab.shell import GuestShell
from tests.kata_lab.lab.answers import answered
from vmm.microvm import MicroVm

pytestmark = pytest.mark.usefixtures("boot_guest")

NODE = "/sys/devices/system/cpu/cpu{}/online"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def sandbox(runner: asyncio.Runner) -> Iterator[Sandbox]:
    made = Sandbox.create(memory_mib=192, max_vcpus=4)
    runner.run(made.start())
    try:
        yield made
    finally:
        runner.run(made.stop())


@pytest.fixture(scope="module")
def vm(sandbox: Sandbox) -> MicroVm:
    assert isinstance(sandbox.hypervisor, FusedHypervisor)
    return sandbox.hypervisor.vm


@pytest.fixture
def blocked(vm: MicroVm) -> Iterator[Callable[[int], None]]:
    """Makes a CPU impossible to bring up, until the test is over."""
    done = []

    def block(cpu: int) -> None:
        in_guest(vm, f"mount --bind /dev/full {NODE.format(cpu)}")
        done.append(cpu)

    yield block
    for cpu in done:
        in_guest(vm, f"umount {NODE.format(cpu)}")


def in_guest(vm: MicroVm, command: str) -> None:
    with GuestShell(vm) as shell:
        shell.run(command, check=True)


@pytest.fixture
def uncovered(vm: MicroVm) -> Iterator[None]:
    """What a test covers in the guest is uncovered after it."""
    yield
    in_guest(vm, "grep -o '/sys/devices/system/cpu/cpu[0-9]*/online' /proc/mounts | xargs -r umount")


def explained(attempt: Attempt) -> dict[str, Any]:
    return {"came up": 1, "online now": 1, "vCPU threads now": 1, "errno": "ENOSPC"}


def test_nothing_tried_is_not_yet(runner: asyncio.Runner, sandbox: Sandbox) -> None:
    assert runner.run(check_half_way(None, {}, sandbox)).verdict == "not yet"


def test_a_resize_that_works_is_not_yet(runner: asyncio.Runner, sandbox: Sandbox) -> None:
    attempt = runner.run(try_resize(sandbox, 2))
    feedback = runner.run(check_half_way(attempt, {}, sandbox))
    down = runner.run(try_resize(sandbox, 1))

    assert feedback.verdict == "not yet"
    assert "every CPU came up" in feedback.text
    assert "takes CPUs away" in runner.run(check_half_way(down, {}, sandbox)).text


def test_failure_at_the_first_cpu_is_not_half_way(
    runner: asyncio.Runner, sandbox: Sandbox, blocked: Callable[[int], None]
) -> None:
    blocked(1)
    attempt = runner.run(try_resize(sandbox, 3))

    assert "before anything was done" in runner.run(check_half_way(attempt, explained(attempt), sandbox)).text


def test_half_way_is_solved_when_it_is_explained(
    runner: asyncio.Runner, sandbox: Sandbox, vm: MicroVm, uncovered: None
) -> None:
    async def guest(command: str) -> None:
        await asyncio.to_thread(in_guest, vm, command)

    names = {"guest": guest, "sandbox": sandbox, "hotplug_exercise": hotplug_exercise}
    answer = answered("05-half-way", runner, **names)
    attempt, right = answer["attempt"], answer["explanation"]

    assert attempt.came_up == [1]
    assert "is missing" in runner.run(check_half_way(attempt, {}, sandbox)).text
    for question, wrong in (("came up", 2), ("online now", 2), ("vCPU threads now", 4), ("errno", "EBUSY")):
        feedback = runner.run(check_half_way(attempt, {**right, question: wrong}, sandbox))
        assert feedback.verdict == "not right"
        assert repr(question) in feedback.text
    assert runner.run(check_half_way(attempt, right, sandbox)).passed


def test_device_manager_that_does_not_answer_is_not_what_was_asked_for(
    runner: asyncio.Runner, sandbox: Sandbox
) -> None:
    lost = Attempt(3, 1, "ADD_CPU count=2 was sent, but the VM is paused before it was answered", (), (), 1, 1)

    assert "did not answer" in runner.run(check_half_way(lost, {}, sandbox)).text


def test_frames_and_hotplugs_are_shown_as_they_passed(runner: asyncio.Runner, sandbox: Sandbox, vm: MicroVm) -> None:
    runner.run(sandbox.resize(vcpus=2))
    runner.run(sandbox.resize(vcpus=1))
    assert vm.upcall is not None
    request, reply = vm.upcall.frames[-2:]

    frames = lab.frame_table((request, reply))
    fields = lab.field_table(reply)

    assert [row[1:3] for row in frames.rows] == [("→", "DEL_CPU count=1"), ("←", "DEL_CPU → 0, index=1")]
    assert frames.rows[0][3].startswith("00014d44")
    assert [(row[0], row[1]) for row in fields.rows] == [
        *(("0", "magic"), ("4", "msg_size"), ("8", "msg_type")),
        *(("12", "msg_flags"), ("16", "result"), ("20", "body")),
    ]
    assert lab.record_table(vm.hotplugs[-1:]).rows[0][1] == "vcpus=1"
    picture = lab.hotplug_timeline([lab.Steps.of(vm.hotplugs[-1], "a CPU goes")])
    assert "a CPU goes: guest answered after" in picture.alternative


def test_controls_say_what_the_guest_has_since(runner: asyncio.Runner, sandbox: Sandbox) -> None:
    told: list[str] = []

    async def story() -> None:
        controls = lab.HotplugControls(sandbox, told.append)
        await controls.set(vcpus=3)
        await controls.set(vcpus=9)
        await controls.set(vcpus=1)

    runner.run(story())

    assert told[0] == "the guest has 3 vCPUs and 192 MiB"
    assert "must be a whole number from 1 to the sandbox's max_vcpus, 4; the guest has 3 vCPUs" in told[1]
    assert told[2] == "the guest has 1 vCPUs and 192 MiB"


def test_the_fifth_notebook_holds_the_exercise_and_not_its_solution() -> None:
    place = Path(__file__).parents[3] / "notebooks" / "05-hotplug.ipynb"
    text = "\n".join(cell.source for cell in nbformat.read(place, as_version=4).cells)

    assert "check_half_way" in text
    assert "/dev/full" not in text
    assert "--bind" not in text
