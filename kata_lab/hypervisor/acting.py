"""What the arrangements have in common in which the VMM is ours: the runtime's wishes as the VMM's actions.

An action is put, and its answer awaited, in the same way whether the VMM is in this process or in another one
(:mod:`vmm.actions`); the arrangements differ in what carries them.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from kata_lab.hypervisor.base import Hypervisor, HypervisorConfig, HypervisorError
from kata_lab.progress import Progress
from vmm import actions
from vmm.config import ConsoleConfig, DeviceConfig, VmConfig
from vmm.errors import VmmError

if TYPE_CHECKING:
    from vmm.microvm import MicroVm
    from vmm.rpc.client import RemoteVm

AnswerT = TypeVar("AnswerT")

ARCHITECTURE = "riscv64"  #: of our harts
VSOCK = "agent"  #: the name of the vsock device
SHARE = "shared"  #: the name of the virtio-fs device


class ActingHypervisor(Hypervisor):
    """Carries the runtime's wishes out by actions of a VM of ours."""

    def __init__(self) -> None:
        self._started_at = 0.0

    @property
    @abc.abstractmethod
    def vm(self) -> MicroVm | RemoteVm:
        """The VM.

        Raises:
            HypervisorError: it is not made yet, or gone.
        """

    @abc.abstractmethod
    def has_vm(self) -> bool:
        """Whether there is one."""

    async def load(self) -> None:
        await asyncio.to_thread(compile_hart)

    async def start_vm(self, timeout: float) -> None:
        # The first time on a machine it compiles for seconds, which is no part of the limit.
        await self.load()
        self._started_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await self._ask(actions.StartMicroVm())
        except TimeoutError:
            raise HypervisorError(f"the VM did not start within {timeout:g} s") from None

    async def stop_vm(self) -> None:
        if self.has_vm():
            await self._ask(actions.ShutdownMicroVm())

    async def wait_vm(self) -> str:
        return (await asyncio.wrap_future(self.vm.ended)).detail

    async def pause_vm(self) -> None:
        await self._ask(actions.PauseMicroVm())

    async def resume_vm(self) -> None:
        await self._ask(actions.ResumeMicroVm())

    async def resize_vcpu(self, vcpus: int) -> int:
        return (await self._ask(actions.ResizeVcpu(vcpus))).vcpus

    async def resize_memory(self, memory_mib: int) -> int:
        return (await self._ask(actions.ResizeMemory(memory_mib))).memory_mib

    async def add_device(self, device: DeviceConfig) -> str:
        return (await self._ask(insertion(device))).name

    async def update_device(self, name: str) -> None:
        await self._ask(actions.UpdateBlockDevice(name))

    async def remove_device(self, name: str) -> None:
        await self._ask(removal(self.vm.config, name))

    def ended(self) -> str | None:
        end = self.vm.end
        return None if end is None else end.detail

    def get_thread_ids(self) -> dict[str, int]:
        return self.vm.thread_ids

    def get_hypervisor_metrics(self) -> Any:
        return self.vm.metrics()

    def timeline(self) -> list[tuple[str, float]]:
        return [(each.name, self._started_at + each.seconds) for each in self.vm.trace.milestones]

    def console_lines(self, count: int) -> list[str]:
        return self.vm.console.lines(count)

    async def _ask(self, action: actions.VmmAction[AnswerT]) -> AnswerT:
        with told():
            return await asyncio.wrap_future(self.vm.request(action))


def vm_config(config: HypervisorConfig, devices: tuple[DeviceConfig, ...]) -> VmConfig:
    """The VM's configuration, with these devices.

    Raises:
        HypervisorError: its kernel is for another architecture than our harts.
    """
    if config.architecture != ARCHITECTURE:
        raise HypervisorError(
            f"the guest's image is for {config.architecture}: take one for {ARCHITECTURE}, or hypervisor='qemu'"
        )
    return VmConfig(
        kernel=config.kernel,
        initrd=config.initrd,
        cmdline=config.cmdline,
        vcpus=config.vcpus,
        memory_mib=config.memory_mib,
        max_vcpus=config.max_vcpus,
        max_memory_mib=config.max_memory_mib,
        devices=devices,
        console=ConsoleConfig(milestones=config.milestones),
        trace=config.trace,
    )


def insertion(device: DeviceConfig) -> actions.InsertDevice:
    """The action that plugs a device in.

    Raises:
        HypervisorError: no device of that kind can come while the guest runs.
    """
    for action in (actions.InsertBlockDevice, actions.InsertNetworkDevice, actions.InsertFsDevice):
        if isinstance(device, action.KIND):
            return action(device)
    raise HypervisorError(
        f"a device of kind {device.KIND!r} cannot come to a guest that runs: it must be a disk (blk), a network"
        " interface (net) or a shared directory (fs)"
    )


def removal(config: VmConfig, name: str) -> actions.RemoveDevice:
    """The action that takes a device of a VM away.

    Raises:
        HypervisorError: there is none of that name, or it is of a kind that stays.
    """
    device = next((each for each in config.devices if each.name == name), None)
    if device is None:
        known = ", ".join(each.name for each in config.devices)
        raise HypervisorError(f"the sandbox has no device {name!r}; it has {known}")
    for action in (actions.RemoveBlockDevice, actions.RemoveNetworkDevice, actions.RemoveFsDevice):
        if isinstance(device, action.KIND):
            return action(name)
    raise HypervisorError(f"device {name!r} is of kind {device.KIND!r}, which stays for as long as the guest runs")


def compile_hart(load: bool = True) -> None:
    """Make the compiled hart ready; if it must be made first, which takes seconds, that is shown.

    Args:
        load: also load it into this process.
    """
    from vmm.engine.rv64 import library

    with contextlib.ExitStack() as shown:
        bars: list[Progress] = []

        def show(fraction: float, what: str) -> None:
            if not bars:
                bars.append(shown.enter_context(Progress("Compiling the hart (once)", total=1.0)))
            bars[0].advance_to(fraction, what)

        if load:
            library.load(show)
        else:
            library.ensure(show)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """The VMM's errors as the runtime's."""
    try:
        yield
    except VmmError as error:
        raise HypervisorError(str(error)) from error
