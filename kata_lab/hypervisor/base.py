"""The interface between the runtime and a VMM, after runtime-rs's ``Hypervisor`` (Kata Containers 3.0).

A hypervisor drives one VM: prepared → running ⇄ paused → stopped. Every method may be called from one event loop only.
"""

from __future__ import annotations

import abc
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kata_lab.errors import KataLabError
from vmm.config import DeviceConfig, VsockConfig


class HypervisorError(KataLabError):
    """A VM that does not do what was asked of it; its cause is the VMM's own error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorConfig:
    """The VM of a sandbox.

    Attributes:
        architecture: that its kernel is for, as Debian names it.
        kernel: its kernel.
        initrd: its initial RAM file system, or None.
        cmdline: the kernel's command line.
        vcpus: how many.
        memory_mib: how much memory.
        max_vcpus: how many there can be while it runs; None for no more.
        max_memory_mib: how much memory there can be while it runs; None for no more.
        devices: in the order in which the guest finds them; one of them is the vsock device ``agent``.
        milestones: name → pattern of a console line, for the start time line.
        trace: count exits.
    """

    architecture: str = "riscv64"
    kernel: Path
    initrd: Path | None
    cmdline: str
    vcpus: int = 1
    memory_mib: int = 256
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    devices: Sequence[DeviceConfig] = ()
    milestones: dict[str, str] = field(default_factory=dict)
    trace: bool = False

    @property
    def directory(self) -> Path:
        """Where sockets go: beside that of vsock, in the sandbox's own directory, which also goes if we are killed.

        Raises:
            HypervisorError: there is no vsock device with a socket.
        """
        for device in self.devices:
            if isinstance(device, VsockConfig) and device.socket is not None:
                return device.socket.parent
        raise HypervisorError("the VM has no vsock device with a socket: its agent is reached by one")


class Hypervisor(abc.ABC):
    """A VMM that runs one VM.

    Attributes:
        name: of the arrangement.
        disk_format: of the disk for what containers write, as :class:`~vmm.config.BlockConfig` has it.
    """

    name: str
    disk_format: ClassVar[str] = "overlay"

    @abc.abstractmethod
    async def load(self) -> None:
        """Load what every VM needs; takes seconds the first time on a machine."""

    @abc.abstractmethod
    async def prepare_vm(self, config: HypervisorConfig) -> None:
        """Make the VM; nothing of the guest runs yet.

        Raises:
            HypervisorError: it cannot be made; nothing is left behind.
        """

    @abc.abstractmethod
    async def start_vm(self, timeout: float) -> None:
        """Let the guest run.

        Raises:
            HypervisorError: it cannot be started, or not within ``timeout`` seconds.
        """

    @abc.abstractmethod
    async def stop_vm(self) -> None:
        """Stop the guest as pulling the plug does. A second time is nothing."""

    @abc.abstractmethod
    async def wait_vm(self) -> str:
        """Wait for the end of the guest; says how it ended."""

    @abc.abstractmethod
    async def pause_vm(self) -> None:
        """Stop every vCPU and device until :meth:`resume_vm`."""

    @abc.abstractmethod
    async def resume_vm(self) -> None:
        """Undo :meth:`pause_vm`."""

    @abc.abstractmethod
    async def dial(self, port: int) -> socket.socket:
        """Connect to a vsock port of the guest; HypervisorError while nobody listens there."""

    @abc.abstractmethod
    def listen(self, port: int, accept: Callable[[socket.socket], object]) -> None:
        """Give ``accept``, on any thread, a socket for each connection that the guest opens to ``port`` of the host."""

    @abc.abstractmethod
    async def add_share(self, name: str, path: Path, read_only: bool, override_stat: bool) -> None:
        """Make a host directory or file appear as ``name`` in the shared directory."""

    @abc.abstractmethod
    async def remove_share(self, name: str) -> None:
        """Undo :meth:`add_share`."""

    @abc.abstractmethod
    async def resize_vcpu(self, vcpus: int) -> int:
        """Have that many vCPUs, all online in the guest; how many there are now.

        Raises:
            HypervisorError: there cannot be as many; there are as many as before.
        """

    @abc.abstractmethod
    async def resize_memory(self, memory_mib: int) -> int:
        """Have that much memory; how much there is now, in MiB.

        Raises:
            HypervisorError: there cannot be as much, or the guest does not give up so much; it is as before.
        """

    @abc.abstractmethod
    async def add_device(self, device: DeviceConfig) -> str:
        """Plug a disk, a network interface or a shared directory into the running guest; its name.

        Returns when the guest's driver has it.

        Raises:
            HypervisorError: it cannot be; all is as before.
        """

    @abc.abstractmethod
    async def update_device(self, name: str) -> None:
        """Have the guest see the new size of a disk whose file has grown."""

    @abc.abstractmethod
    async def remove_device(self, name: str) -> None:
        """Undo :meth:`add_device`.

        Raises:
            HypervisorError: there is none of that name, or the guest uses it; all is as before.
        """

    @abc.abstractmethod
    def ended(self) -> str | None:
        """How the guest ended; None while it has not."""

    @abc.abstractmethod
    def get_pids(self) -> list[int]:
        """The processes that the VM consists of."""

    @abc.abstractmethod
    def get_thread_ids(self) -> dict[str, int]:
        """The host's thread of each vCPU, by name."""

    @abc.abstractmethod
    def get_hypervisor_metrics(self) -> Any:
        """The VM's counters (:class:`vmm.metrics.VmMetrics`)."""

    @abc.abstractmethod
    def timeline(self) -> list[tuple[str, float]]:
        """Milestones of the boot: name, and host time (``time.monotonic``)."""

    @abc.abstractmethod
    def console_lines(self, count: int) -> list[str]:
        """The last lines of the guest's console."""

    @abc.abstractmethod
    async def cleanup(self) -> None:
        """Give everything back; the VM is stopped if need be."""
