"""The fused arrangement: the VMM in the runtime's own process, its actions as function calls (RunD's way)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kata_lab.hypervisor.acting import SHARE, VSOCK, ActingHypervisor, told, vm_config
from kata_lab.hypervisor.base import HypervisorConfig, HypervisorError

if TYPE_CHECKING:
    from vmm.devices.virtio.fs.device import FsDevice
    from vmm.devices.virtio.vsock.device import VsockDevice
    from vmm.microvm import MicroVm


class FusedHypervisor(ActingHypervisor):
    """A :class:`~vmm.microvm.MicroVm` in this process."""

    name = "fused"

    def __init__(self) -> None:
        super().__init__()
        self._vm: MicroVm | None = None

    @property
    def vm(self) -> MicroVm:
        if self._vm is None:
            raise HypervisorError("the sandbox has no VM: it is not prepared, or cleaned up already")
        return self._vm

    def has_vm(self) -> bool:
        return self._vm is not None

    async def prepare_vm(self, config: HypervisorConfig) -> None:
        from vmm.microvm import MicroVm

        with told():
            self._vm = MicroVm(vm_config(config, tuple(config.devices)))

    async def dial(self, port: int) -> socket.socket:
        from vmm.devices.virtio.vsock.endpoint import dialled

        with told():
            return await dialled(self._vsock.dial(port))

    def listen(self, port: int, accept: Callable[[socket.socket], object]) -> None:
        with told():
            self._vsock.listen(port, accept)

    async def add_share(self, name: str, path: Path, read_only: bool, override_stat: bool) -> None:
        with told():
            self._share.add(name, path, read_only=read_only, override_stat=override_stat)

    async def remove_share(self, name: str) -> None:
        with told():
            self._share.remove(name)

    def get_pids(self) -> list[int]:
        return [os.getpid()]

    async def cleanup(self) -> None:
        vm, self._vm = self._vm, None
        if vm is not None:
            await asyncio.to_thread(vm.close)

    @property
    def _vsock(self) -> VsockDevice:
        return cast("VsockDevice", self.vm.machine.device(VSOCK))

    @property
    def _share(self) -> FsDevice:
        return cast("FsDevice", self.vm.machine.device(SHARE))
