"""How the runtime reaches a virtual machine monitor: one interface, and the arrangements behind it.

=========  =========================================================================================
fused      the VMM in the runtime's process, its actions as function calls (:mod:`.fused`)
rpc        runtime, VMM and file system in a process each, with sockets between them (:mod:`.rpc`)
qemu       QEMU as the VMM, driven over QMP, and the file system process (:mod:`.qemu`)
=========  =========================================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from kata_lab.hypervisor.base import Hypervisor, HypervisorConfig, HypervisorError

__all__ = ["HYPERVISORS", "Hypervisor", "HypervisorConfig", "HypervisorError", "make_hypervisor"]

HYPERVISORS: Final = {"fused": "FusedHypervisor", "rpc": "RpcHypervisor", "qemu": "QemuHypervisor"}
"""Names that a configuration may give, and the class of each."""


def make_hypervisor(name: str) -> Hypervisor:
    """One of :data:`HYPERVISORS`."""
    made: Hypervisor = getattr(import_module(f"kata_lab.hypervisor.{name}"), HYPERVISORS[name])()
    return made
