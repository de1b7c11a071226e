"""The action vocabulary: what can be asked of a VM, and what it answers.

After Dragonball's ``VmmAction`` and ``VmmData``: one frozen class per action and one per kind of answer, plain data
that could travel over a socket as it is. :meth:`vmm.MicroVm.request` takes an action and gives a future of its
answer; the methods of :class:`vmm.MicroVm` are conveniences over it. Snapshots join this list with the parts that
carry them out.

========================  ======================  ============================================================
action                    answer                  allowed in state
========================  ======================  ============================================================
ConfigureBootSource       Empty                   configured
SetVmConfiguration        Empty                   configured
GetVmConfiguration        VmConfiguration         any
StartMicroVm              Empty                   configured
PauseMicroVm              Empty                   running; a hotplug that waits for the guest ends
ResumeMicroVm             Empty                   paused
ShutdownMicroVm           MachineEnd              any (what is stopped already answers again)
GetState                  MachineState            any
GetHypervisorMetrics      HypervisorMetrics       any
GetReport                 MachineReport           running, paused, stopped; a running VM pauses for a moment
GetUpcallState            UpcallState             any
ResizeVcpu                VcpusResized            configured, running
ResizeMemory              MemoryResized           configured, running
InsertMemDevice           (none)                  refused, whatever the state
InsertBlockDevice         DeviceInserted          configured, running
InsertNetworkDevice       DeviceInserted          configured, running
InsertFsDevice            DeviceInserted          configured, running
InsertBalloonDevice       DeviceInserted          configured, running
InsertVsockDevice         DeviceInserted          configured
PrepareRemoveBlockDevice  Empty                   running
RemoveBlockDevice         Empty                   configured, running
RemoveNetworkDevice       Empty                   configured, running
RemoveFsDevice            Empty                   configured, running
UpdateBlockDevice         BlockDeviceUpdated      running
UpdateNetworkDevice       Empty                   running
UpdateBalloonDevice       Empty                   running
ManipulateFsBackend       Empty                   running
========================  ======================  ============================================================

Before the start, what inserts, removes or resizes amends the configuration. On a running VM it is a hotplug
(:mod:`vmm.hotplug`): answered once the guest uses what came or has given up what goes, and if it does not, the VM is as
before and the error says why. Hotplugs are carried out one after the other, apart from all other actions, which do not
wait for them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from vmm.config import BalloonConfig, BlockConfig, DeviceConfig, FsConfig, NetworkConfig, VmConfig, VsockConfig
from vmm.metrics import VmMetrics
from vmm.report import CrashReport

AnswerT_co = TypeVar("AnswerT_co", covariant=True)


class VmState(enum.Enum):
    """The life of a VM: configured → running ⇄ paused → stopped."""

    CONFIGURED = "configured"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


class EndKind(enum.Enum):
    """How a VM ended."""

    SHUTDOWN = "shutdown"  #: the guest powered itself off (SBI SRST type 0)
    FAILURE = "failure"  #: the guest powered itself off and gave "system failure" as its reason (SRST reason 1)
    REBOOT = "reboot"  #: the guest asked for a reboot (SRST type 1 or 2), which ends a micro-VM
    PANIC = "panic"  #: the guest reset itself, or hangs, after a kernel panic on its console
    HANG = "hang"  #: the last hart jumps to itself with interrupts off: nothing can happen any more
    CRASH = "crash"  #: the VM could not go on: an engine or device fault, or no hart left to run
    HOST = "host"  #: the host shut the VM down

    def __str__(self) -> str:
        return self.value


_EXIT_STATUS = {EndKind.FAILURE: 1, EndKind.PANIC: 2, EndKind.HANG: 3, EndKind.CRASH: 3}


@dataclass(frozen=True, slots=True)
class MachineEnd:
    """How the VM ended.

    Attributes:
        kind: see :class:`EndKind`.
        reset_type: the SRST reset type, None if the guest did not reset itself.
        reset_reason: the SRST reset reason, None likewise.
        detail: one sentence for a person.
    """

    kind: EndKind
    reset_type: int | None = None
    reset_reason: int | None = None
    detail: str = ""

    @property
    def status(self) -> int:
        """As a process would exit: 0 shutdown, reboot or host; 1 failure; 2 panic; 3 crash."""
        return _EXIT_STATUS.get(self.kind, 0)


@dataclass(frozen=True, slots=True)
class Empty:
    """Done; there is nothing to tell."""


@dataclass(frozen=True, slots=True)
class VmConfiguration:
    """The VM's configuration as it stands."""

    config: VmConfig


@dataclass(frozen=True, slots=True)
class MachineState:
    """The VM's state, and how it ended if it has."""

    state: VmState
    end: MachineEnd | None = None


@dataclass(frozen=True, slots=True)
class HypervisorMetrics:
    """The VM's counters at one moment."""

    metrics: VmMetrics


@dataclass(frozen=True, slots=True)
class MachineReport:
    """Where every hart stands; why the VM ended if it has."""

    report: CrashReport


@dataclass(frozen=True, slots=True)
class UpcallState:
    """How the VMM stands with the guest's device manager.

    Attributes:
        state: Dragonball's name for it, such as ``ServiceConnected``; empty if it was never asked for anything.
    """

    state: str


@dataclass(frozen=True, slots=True)
class VcpusResized:
    """How many vCPUs there are now."""

    vcpus: int


@dataclass(frozen=True, slots=True)
class MemoryResized:
    """How many MiB of RAM the guest has now."""

    memory_mib: int


@dataclass(frozen=True, slots=True)
class DeviceInserted:
    """A device is there.

    Attributes:
        name: what actions call it.
        slot: the number of its virtio-mmio slot; None before the VM starts.
    """

    name: str
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class BlockDeviceUpdated:
    """The disk's size now, in bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class VmmAction(Generic[AnswerT_co]):
    """Base of all actions; ``AnswerT_co`` is what the VM answers."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(VmmAction, cls).__init_subclass__(**kwargs)
        cls.name = cls.__name__


@dataclass(frozen=True, slots=True)
class ConfigureBootSource(VmmAction[Empty]):
    """Name the kernel, the initrd and the command line (None keeps the present command line)."""

    kernel: Path | str
    initrd: Path | str | None = None
    cmdline: str | None = None


@dataclass(frozen=True, slots=True)
class SetVmConfiguration(VmmAction[Empty]):
    """Change fields of the configuration, such as ``{"vcpus": 2}``: all of them, or none if one is refused."""

    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GetVmConfiguration(VmmAction[VmConfiguration]):
    """Ask for the configuration."""


@dataclass(frozen=True, slots=True)
class StartMicroVm(VmmAction[Empty]):
    """Build the machine, load the kernel and let the harts run."""


@dataclass(frozen=True, slots=True)
class PauseMicroVm(VmmAction[Empty]):
    """Answered when every vCPU thread is out of guest code."""


@dataclass(frozen=True, slots=True)
class ResumeMicroVm(VmmAction[Empty]):
    """Let the harts run on."""


@dataclass(frozen=True, slots=True)
class ShutdownMicroVm(VmmAction[MachineEnd]):
    """End the VM now, as pulling the plug does; answered when every vCPU thread is gone."""


@dataclass(frozen=True, slots=True)
class GetState(VmmAction[MachineState]):
    """Ask for the state."""


@dataclass(frozen=True, slots=True)
class GetHypervisorMetrics(VmmAction[HypervisorMetrics]):
    """Ask for the counters."""


@dataclass(frozen=True, slots=True)
class GetReport(VmmAction[MachineReport]):
    """Ask where every hart stands."""


@dataclass(frozen=True, slots=True)
class GetUpcallState(VmmAction[UpcallState]):
    """Ask how the VMM stands with the guest's device manager."""


@dataclass(frozen=True, slots=True)
class HotplugAction(VmmAction[AnswerT_co]):
    """Base of the actions that change a running VM and not only its configuration."""


@dataclass(frozen=True, slots=True)
class ResizeVcpu(HotplugAction[VcpusResized]):
    """Have that many vCPUs, 1 to the configuration's ``max_vcpus``; the highest numbers come and go."""

    vcpus: int


@dataclass(frozen=True, slots=True)
class ResizeMemory(HotplugAction[MemoryResized]):
    """Have that many MiB of RAM, at most the configuration's ``max_memory_mib``; the balloon holds what is left."""

    memory_mib: int


@dataclass(frozen=True, slots=True)
class InsertMemDevice(HotplugAction[MemoryResized]):
    """Dragonball's way to more memory (virtio-mem), refused: the kernels of our guests have no driver for it."""

    size_mib: int


@dataclass(frozen=True, slots=True)
class InsertDevice(HotplugAction[DeviceInserted]):
    """Base of the actions that insert a device."""

    KIND: ClassVar[type[DeviceConfig]] = DeviceConfig

    device: DeviceConfig


@dataclass(frozen=True, slots=True)
class InsertBlockDevice(InsertDevice):
    """Insert a disk."""

    KIND: ClassVar[type[DeviceConfig]] = BlockConfig


@dataclass(frozen=True, slots=True)
class InsertNetworkDevice(InsertDevice):
    """Insert a network interface."""

    KIND: ClassVar[type[DeviceConfig]] = NetworkConfig


@dataclass(frozen=True, slots=True)
class InsertFsDevice(InsertDevice):
    """Insert a shared directory."""

    KIND: ClassVar[type[DeviceConfig]] = FsConfig


@dataclass(frozen=True, slots=True)
class InsertBalloonDevice(InsertDevice):
    """Insert a balloon."""

    KIND: ClassVar[type[DeviceConfig]] = BalloonConfig


@dataclass(frozen=True, slots=True)
class InsertVsockDevice(InsertDevice):
    """Insert the sockets between host and guest; before the start only, since it is through them that a guest hears of
    devices that come later."""

    KIND: ClassVar[type[DeviceConfig]] = VsockConfig


@dataclass(frozen=True, slots=True)
class PrepareRemoveBlockDevice(HotplugAction[Empty]):
    """Have the guest give a disk up, which it refuses while the disk is in use. Its file stays open until
    :class:`RemoveBlockDevice`."""

    device: str


@dataclass(frozen=True, slots=True)
class RemoveDevice(HotplugAction[Empty]):
    """Base of the actions that remove a device: the guest gives it up, and the host closes what belongs to it."""

    KIND: ClassVar[type[DeviceConfig]] = DeviceConfig

    device: str


@dataclass(frozen=True, slots=True)
class RemoveBlockDevice(RemoveDevice):
    """Remove a disk, prepared for that or not."""

    KIND: ClassVar[type[DeviceConfig]] = BlockConfig


@dataclass(frozen=True, slots=True)
class RemoveNetworkDevice(RemoveDevice):
    """Remove a network interface."""

    KIND: ClassVar[type[DeviceConfig]] = NetworkConfig


@dataclass(frozen=True, slots=True)
class RemoveFsDevice(RemoveDevice):
    """Remove a shared directory, which the guest refuses while it is mounted."""

    KIND: ClassVar[type[DeviceConfig]] = FsConfig


@dataclass(frozen=True, slots=True)
class UpdateBlockDevice(HotplugAction[BlockDeviceUpdated]):
    """Look at a disk's file again, which may have another size now, and tell the guest."""

    device: str


@dataclass(frozen=True, slots=True)
class UpdateNetworkDevice(HotplugAction[Empty]):
    """Plug a network interface's cable in or out. What else there is to its port is decided when it is inserted."""

    device: str
    link_up: bool


@dataclass(frozen=True, slots=True)
class UpdateBalloonDevice(HotplugAction[Empty]):
    """Ask the guest to give up that many MiB of its memory, in its own time."""

    device: str
    target_mib: int


@dataclass(frozen=True, slots=True)
class ManipulateFsBackend(HotplugAction[Empty]):
    """Let a directory or file of the host appear in, or vanish from, a shared directory that has no path of its own.

    Attributes:
        device: the shared directory.
        operation: ``"add"`` or ``"remove"``.
        entry: the name under which it appears.
        path: what to add.
        read_only: the guest can only read it.
        override_stat: see :meth:`vmm.devices.virtio.fs.device.FsDevice.add`.
    """

    device: str
    operation: str
    entry: str
    path: Path | str | None = None
    read_only: bool = False
    override_stat: bool = False
