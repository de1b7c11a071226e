"""A stock Linux kernel in a MicroVm: its console, its harts, its ends, and a pause in the middle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from kata_lab.image.boot import USERLAND_MARKER, BootGuest, append_running, build_boot_guest
from vmm import ConsoleConfig, EndKind, MicroVm, VmConfig, VmState
from vmm.trace import FIRST_CONSOLE_BYTE, FIRST_INSTRUCTION

PROMPT = re.compile(r"kata-lab:\S*# ")
BOOT_SECONDS = 120.0
COMPLAINTS = re.compile(r"rcu.*stall|soft lockup|hung task|BUG:|Oops", re.IGNORECASE)


@pytest.fixture(scope="module")
def guest() -> BootGuest:
    return build_boot_guest(progress="off")


def config(guest: BootGuest, run: str | None = None, **settings: Any) -> VmConfig:
    cmdline = guest.append if run is None else append_running(run, guest.append)
    return VmConfig(**{"kernel": guest.kernel, "initrd": guest.initrd, "cmdline": cmdline, **settings})


@pytest.fixture
def shell(guest: BootGuest) -> Iterator[MicroVm]:
    """A VM with two harts whose shell waits for a command."""
    with MicroVm(config(guest, vcpus=2, console=ConsoleConfig(milestones={"userland": USERLAND_MARKER}))) as vm:
        vm.start()
        vm.console.expect(PROMPT, timeout=BOOT_SECONDS)
        yield vm


def answer(vm: MicroVm, command: str) -> str:
    """What the shell prints for ``command``."""
    vm.console.write(command + "\n")
    match = vm.console.expect(PROMPT, timeout=60)
    return match.string[: match.start()].replace("\r", "").split("\n", 1)[1]


def test_the_shell_answers_and_its_exit_ends_the_vm(shell: MicroVm) -> None:
    assert "riscv64 GNU/Linux" in answer(shell, "uname -a")

    shell.console.write("exit 3\n")
    end = shell.wait(60)

    assert (end.kind, end.status) == (EndKind.SHUTDOWN, 0)
    assert "kata-lab: exit status 3" in shell.console.text


def test_the_boot_leaves_milestones_in_order(shell: MicroVm) -> None:
    names = [each.name for each in shell.trace.milestones]
    instructions = [each.instructions for each in shell.trace.milestones]

    assert names[:2] == [FIRST_INSTRUCTION, FIRST_CONSOLE_BYTE]
    assert "userland" in names
    assert instructions == sorted(instructions)


def test_a_guest_survives_being_paused(shell: MicroVm) -> None:
    before = answer(shell, "cat /proc/loadavg | wc -w")
    for _ in range(10):
        shell.pause()
        instructions = shell.metrics().instructions
        assert shell.metrics().instructions == instructions
        shell.resume()

    assert answer(shell, "cat /proc/loadavg | wc -w") == before
    assert shell.state is VmState.RUNNING
    assert not COMPLAINTS.search(answer(shell, "dmesg"))


def test_a_report_of_a_running_guest_shows_every_hart_in_the_kernel_or_a_program(shell: MicroVm) -> None:
    report = shell.report()

    assert len(report.harts) == 2
    for hart in report.harts:
        assert hart.csrs["satp"] >> 60 in (8, 9)
        assert any(line.address == hart.pc and line.raw is not None for line in hart.code)
    assert PROMPT.search(report.console[-1] + " ")


def test_a_cpu_goes_offline_and_comes_back(shell: MicroVm) -> None:
    states = shell.machine.states

    answer(shell, "echo 0 > /sys/devices/system/cpu/cpu1/online")
    assert answer(shell, "cat /sys/devices/system/cpu/online").strip() == "0"
    stopped = states[1].name
    answer(shell, "echo 1 > /sys/devices/system/cpu/cpu1/online")

    assert (stopped, states[1].name) == ("STOPPED", "STARTED")
    assert answer(shell, "taskset 2 cat /sys/devices/system/cpu/online").strip() == "0-1"


def test_the_kernels_reboot_ends_the_vm_as_a_reboot(shell: MicroVm) -> None:
    shell.console.write("reboot -f\n")

    assert shell.wait(60).kind is EndKind.REBOOT


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_every_cpu_comes_online_without_complaint(guest: BootGuest, vcpus: int) -> None:
    with MicroVm(config(guest, run="nproc; dmesg", vcpus=vcpus)) as vm:
        vm.start()
        end = vm.wait(BOOT_SECONDS)

    text = vm.console.text.replace("\r", "")
    assert end.kind is EndKind.SHUTDOWN
    assert f"{USERLAND_MARKER}\n{vcpus}\n" in text
    assert not COMPLAINTS.search(text)


def test_the_deterministic_clock_repeats_a_boot(guest: BootGuest) -> None:
    counts = set()
    for _ in range(2):
        with MicroVm(config(guest, run="true", clock="deterministic")) as vm:
            vm.start()
            vm.wait(BOOT_SECONDS)
            counts.add((vm.metrics().instructions, vm.console.text))

    assert len(counts) == 1


def test_a_panic_is_told_with_the_kernels_own_words(guest: BootGuest) -> None:
    settings = config(guest)
    with MicroVm(settings.replace(initrd=None)) as vm:
        vm.start()
        end = vm.wait(BOOT_SECONDS)

    assert (end.kind, end.status) == (EndKind.PANIC, 2)
    assert "Unable to mount root fs" in end.detail
    assert "Unable to mount root fs" in (vm.report().panic or "")
    assert any("Kernel panic" in line for line in vm.report().console)


def test_too_little_memory_ends_in_a_panic_that_the_early_console_tells(guest: BootGuest) -> None:
    # So early a panic can neither reach the serial driver nor reset the machine.
    with MicroVm(config(guest, memory_mib=48)) as vm:
        vm.start()
        end = vm.wait(60)

        assert (end.kind, end.status) == (EndKind.PANIC, 2)
        assert "Failed to allocate" in end.detail
        assert "Failed to allocate" in (vm.report().panic or "")
