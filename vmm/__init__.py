"""A virtual machine monitor as a library; it knows nothing of containers.

::

    from vmm import MicroVm, VmConfig

    with MicroVm(VmConfig(kernel="Image", initrd="initrd.cpio")) as vm:
        vm.start()
        vm.console.expect("login")

The names below are imported when they are first used, so that ``import vmm`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.actions import (
        ConfigureBootSource,
        EndKind,
        GetHypervisorMetrics,
        GetReport,
        GetState,
        GetVmConfiguration,
        InsertBlockDevice,
        InsertFsDevice,
        InsertNetworkDevice,
        MachineEnd,
        PauseMicroVm,
        RemoveBlockDevice,
        RemoveFsDevice,
        RemoveNetworkDevice,
        ResizeMemory,
        ResizeVcpu,
        ResumeMicroVm,
        SetVmConfiguration,
        ShutdownMicroVm,
        StartMicroVm,
        VmState,
    )
    from vmm.bus import Bus
    from vmm.config import ConsoleConfig, VmConfig
    from vmm.console import Console
    from vmm.errors import (
        BootError,
        BusError,
        ConfigError,
        ConsoleTimeout,
        EngineError,
        GuestAddressError,
        StateError,
        VmmError,
    )
    from vmm.hotplug import HotplugError, HotplugRecord
    from vmm.machine import Machine
    from vmm.memory import GuestMemory
    from vmm.metrics import VmMetrics
    from vmm.microvm import MicroVm, VmTimeout
    from vmm.report import CrashReport
    from vmm.trace import Trace
    from vmm.vcpu import Vcpu

_HOMES = {
    "vmm.actions": (
        *("ConfigureBootSource", "EndKind", "GetHypervisorMetrics", "GetReport", "GetState", "GetVmConfiguration"),
        *("InsertBlockDevice", "InsertFsDevice", "InsertNetworkDevice", "MachineEnd", "PauseMicroVm"),
        *("RemoveBlockDevice", "RemoveFsDevice", "RemoveNetworkDevice", "ResizeMemory", "ResizeVcpu"),
        *("ResumeMicroVm", "SetVmConfiguration", "ShutdownMicroVm", "StartMicroVm", "VmState"),
    ),
    "vmm.bus": ("Bus",),
    "vmm.config": ("ConsoleConfig", "VmConfig"),
    "vmm.console": ("Console",),
    "vmm.errors": (
        *("BootError", "BusError", "ConfigError", "ConsoleTimeout", "EngineError", "GuestAddressError", "StateError"),
        "VmmError",
    ),
    "vmm.hotplug": ("HotplugError", "HotplugRecord"),
    "vmm.machine": ("Machine",),
    "vmm.memory": ("GuestMemory",),
    "vmm.metrics": ("VmMetrics",),
    "vmm.microvm": ("MicroVm", "VmTimeout"),
    "vmm.report": ("CrashReport",),
    "vmm.trace": ("Trace",),
    "vmm.vcpu": ("Vcpu",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BootError",
    "Bus",
    "BusError",
    "ConfigError",
    "ConfigureBootSource",
    "Console",
    "ConsoleConfig",
    "ConsoleTimeout",
    "CrashReport",
    "EndKind",
    "EngineError",
    "GetHypervisorMetrics",
    "GetReport",
    "GetState",
    "GetVmConfiguration",
    "GuestAddressError",
    "GuestMemory",
    "HotplugError",
    "HotplugRecord",
    "InsertBlockDevice",
    "InsertFsDevice",
    "InsertNetworkDevice",
    "Machine",
    "MachineEnd",
    "MicroVm",
    "PauseMicroVm",
    "RemoveBlockDevice",
    "RemoveFsDevice",
    "RemoveNetworkDevice",
    "ResizeMemory",
    "ResizeVcpu",
    "ResumeMicroVm",
    "SetVmConfiguration",
    "ShutdownMicroVm",
    "StartMicroVm",
    "StateError",
    "Trace",
    "Vcpu",
    "VmConfig",
    "VmMetrics",
    "VmState",
    "VmTimeout",
    "VmmError",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'vmm' has no attribute {name!r}; it has {', '.join(sorted(_HOME_OF))}")
    found: object = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
