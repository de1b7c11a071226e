"""The action vocabulary on a VM that has not started: answers, refusals, and the channel itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from vmm import (
    BootError,
    ConfigError,
    ConfigureBootSource,
    EndKind,
    GetHypervisorMetrics,
    GetReport,
    GetState,
    GetVmConfiguration,
    MachineEnd,
    MicroVm,
    PauseMicroVm,
    ResumeMicroVm,
    SetVmConfiguration,
    ShutdownMicroVm,
    StartMicroVm,
    StateError,
    VmConfig,
    VmState,
)


def test_configuration_is_changed_and_read_back() -> None:
    with MicroVm() as vm:
        vm.request(ConfigureBootSource("Image", "initrd.cpio", "quiet")).result(10)
        vm.request(SetVmConfiguration({"vcpus": 2, "memory_mib": 128})).result(10)

        answer = vm.request(GetVmConfiguration()).result(10)

    assert answer.config == VmConfig(
        vcpus=2, memory_mib=128, kernel=Path("Image"), initrd=Path("initrd.cpio"), cmdline="quiet"
    )


def test_a_boot_source_without_command_line_keeps_the_present_one() -> None:
    with MicroVm(VmConfig(cmdline="quiet")) as vm:
        vm.request(ConfigureBootSource("Image")).result(10)

        assert vm.config.cmdline == "quiet"


def test_a_refused_change_changes_nothing() -> None:
    with MicroVm() as vm:
        with pytest.raises(ConfigError, match="did you mean 'memory_mib'"):
            vm.request(SetVmConfiguration({"vcpus": 4, "memory_mb": 128})).result(10)

        assert vm.config == VmConfig()


@pytest.mark.parametrize("action", [PauseMicroVm(), ResumeMicroVm(), GetReport()])
def test_an_action_in_the_wrong_state_is_refused_and_names_both(action: Any) -> None:
    with MicroVm() as vm, pytest.raises(StateError, match=f"{action.name} came to a VM that is configured; it needs"):
        vm.request(action).result(10)


def test_start_without_a_kernel_is_refused() -> None:
    with MicroVm() as vm:
        with pytest.raises(ConfigError, match="the VM has no kernel"):
            vm.request(StartMicroVm()).result(10)

        assert vm.state is VmState.CONFIGURED


def test_state_and_metrics_of_a_vm_that_has_not_started() -> None:
    with MicroVm() as vm:
        state = vm.request(GetState()).result(10)
        metrics = vm.request(GetHypervisorMetrics()).result(10).metrics

    assert (state.state, state.end) == (VmState.CONFIGURED, None)
    assert (metrics.uptime_seconds, metrics.instructions, metrics.vcpus) == (0.0, 0, ())
    assert metrics.memory.rss >= metrics.memory.pss > 0


def test_shutdown_before_the_start_ends_the_vm_for_good() -> None:
    with MicroVm() as vm:
        end = vm.request(ShutdownMicroVm()).result(10)

        assert (end.kind, end.status, vm.state) == (EndKind.HOST, 0, VmState.STOPPED)
        with pytest.raises(StateError, match="stopped; it needs one that is configured"):
            vm.request(StartMicroVm()).result(10)
        assert vm.request(ShutdownMicroVm()).result(10) is end


def test_what_is_no_action_is_refused() -> None:
    with MicroVm() as vm, pytest.raises(ConfigError, match="'start' is no action; the actions are ConfigureBootSource"):
        vm.request(cast(Any, "start"))


def test_a_closed_vm_answers_no_action() -> None:
    vm = MicroVm()
    vm.close()
    vm.close()

    with pytest.raises(StateError, match="GetState came to a VM that is closed"):
        vm.request(GetState()).result(10)


def test_waiting_for_a_vm_that_was_never_started_is_refused() -> None:
    with MicroVm() as vm, pytest.raises(StateError, match="cannot be waited for; start it first"):
        vm.wait(1)


def test_actions_can_be_awaited() -> None:
    async def scenario() -> VmState:
        async with MicroVm() as vm:
            ended = asyncio.wrap_future(vm.ended)
            await asyncio.wrap_future(vm.request(ShutdownMicroVm()))
            assert (await ended).kind is EndKind.HOST
            return vm.state

    assert asyncio.run(scenario()) is VmState.STOPPED


@pytest.mark.parametrize(
    ("kind", "status"),
    [(EndKind.SHUTDOWN, 0), (EndKind.REBOOT, 0), (EndKind.FAILURE, 1), (EndKind.PANIC, 2), (EndKind.CRASH, 3)],
)
def test_an_end_has_the_status_of_a_process(kind: EndKind, status: int) -> None:
    assert MachineEnd(kind).status == status


def test_a_kernel_that_is_missing_leaves_the_vm_configured(tmp_path: Path) -> None:
    with MicroVm(VmConfig(kernel=tmp_path / "none")) as vm:
        with pytest.raises(BootError, match="cannot be read"):
            vm.start()

        assert vm.state is VmState.CONFIGURED
