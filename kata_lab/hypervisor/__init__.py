"""How the runtime reaches a virtual machine monitor."""

from __future__ import annotations

from kata_lab.hypervisor.base import Hypervisor, HypervisorConfig, HypervisorError

__all__ = ["Hypervisor", "HypervisorConfig", "HypervisorError"]
