"""How large the sandbox of some containers is, by their limits.

=========  ===========================================================================================
vCPUs      the CPUs of all containers together, rounded up; at least one, at most 32
memory     128 MiB for the guest itself (kernel, init, agent, page tables and caches), and each
           container's limit; one without a limit counts as 128 MiB
=========  ===========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

GUEST_MIB: Final = 128  #: that the guest needs before any container
UNLIMITED_MIB: Final = 128  #: that a container without a limit is given
MOST_VCPUS: Final = 32


@dataclass(frozen=True, slots=True)
class SandboxSize:
    """Of a sandbox's machine."""

    vcpus: int
    memory_mib: int


def size_for(specs: Iterable[Mapping[str, Any]]) -> SandboxSize:
    """The size of a sandbox for containers with these OCI configurations."""
    cpus, memory = 0.0, GUEST_MIB
    for spec in specs:
        resources = (spec.get("linux") or {}).get("resources") or {}
        cpu = resources.get("cpu") or {}
        quota, period = cpu.get("quota") or 0, cpu.get("period") or 100_000
        cpus += max(quota, 0) / period
        limit = (resources.get("memory") or {}).get("limit") or 0
        memory += (limit + (1 << 20) - 1) >> 20 if limit > 0 else UNLIMITED_MIB
    # A sum such as 0.1 + 0.2 is a little more than it says.
    return SandboxSize(min(max(math.ceil(round(cpus, 6)), 1), MOST_VCPUS), memory)
