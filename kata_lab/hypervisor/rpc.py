"""The classic split: runtime, VMM and file system are three processes, which speak over unix sockets (Kata 2's way).

::

    runtime (this process) ──actions──► python -m vmm.rpc        the VM, its vCPUs and devices
                           ──shares───► python -m vmm.vhost.fs   virtio-fs, over the VM's memory (vhost-user)

The actions, the guest and the devices' code are those of the fused arrangement. Either process that dies ends the VM;
both end with this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kata_lab.hypervisor.acting import SHARE, ActingHypervisor, compile_hart, told, vm_config
from kata_lab.hypervisor.base import HypervisorConfig, HypervisorError
from kata_lab.hypervisor.vm_end import end_of_vm
from vmm import actions
from vmm.config import DeviceConfig, FsConfig

if TYPE_CHECKING:
    from vmm.rpc.client import RemoteVm
    from vmm.vhost.process import FsProcess


class RpcHypervisor(ActingHypervisor):
    """A :class:`~vmm.rpc.client.RemoteVm` and a file system process."""

    name = "rpc"

    def __init__(self) -> None:
        super().__init__()
        self._vm: RemoteVm | None = None
        self._files: FsProcess | None = None
        self._made = contextlib.ExitStack()

    @property
    def vm(self) -> RemoteVm:
        if self._vm is None:
            raise HypervisorError("the sandbox has no VM: it is not prepared, or cleaned up already")
        return self._vm

    def has_vm(self) -> bool:
        return self._vm is not None

    async def load(self) -> None:
        await asyncio.to_thread(compile_hart, load=False)

    async def prepare_vm(self, config: HypervisorConfig) -> None:
        await asyncio.to_thread(self._prepare, config)

    def _prepare(self, config: HypervisorConfig) -> None:
        from vmm.rpc.client import RemoteVm
        from vmm.vhost.process import FsProcess

        with told(), contextlib.ExitStack() as made:
            devices: list[DeviceConfig] = []
            for device in config.devices:
                if isinstance(device, FsConfig) and device.name == SHARE:
                    self._files = FsProcess(config.directory / "fs", cache=device.cache, queues=device.queues)
                    made.callback(self._files.close)
                    devices.append(self._files.device(device.tag, device.name))
                else:
                    devices.append(device)
            self._vm = RemoteVm(vm_config(config, tuple(devices)), config.directory / "vmm")
            made.callback(self._vm.close)
            self._made = made.pop_all()

    async def wait_vm(self) -> str:
        vmm = asyncio.ensure_future(super().wait_vm())
        try:
            return await end_of_vm(vmm, self._files)
        finally:
            vmm.cancel()

    async def dial(self, port: int) -> socket.socket:
        from vmm.devices.virtio.vsock.endpoint import dialled

        with told():
            return await dialled(self.vm.dial(port))

    def listen(self, port: int, accept: Callable[[socket.socket], object]) -> None:
        with told():
            self.vm.listen(port, accept)

    async def add_share(self, name: str, path: Path, read_only: bool, override_stat: bool) -> None:
        await self._ask(
            actions.ManipulateFsBackend(SHARE, "add", name, path, read_only=read_only, override_stat=override_stat)
        )

    async def remove_share(self, name: str) -> None:
        # With the VM went everything that it shared.
        if self.ended() is None:
            await self._ask(actions.ManipulateFsBackend(SHARE, "remove", name))

    def get_pids(self) -> list[int]:
        files = [] if self._files is None else [self._files.pid]
        return [os.getpid(), self.vm.pid, *files]

    async def cleanup(self) -> None:
        self._vm, self._files = None, None
        await asyncio.to_thread(self._made.close)
