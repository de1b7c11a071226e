"""A VM's counters at one moment, as plain data.

Process memory comes from ``/proc/self/smaps_rollup`` (Linux ≥ 4.14; proc(5)): RSS counts every resident page, PSS
divides a shared one by the number of processes that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class VcpuMetrics:
    """One vCPU.

    Attributes:
        vcpu: its number, that of its hart.
        state: the state of its thread.
        instructions: retired by the guest on it.
        exits: returns from guest code by kind.
        run_seconds: CPU time of its thread: guest code, and serving exits.
        wait_seconds: host time that its thread slept because the hart waited for an interrupt.
    """

    vcpu: int
    state: str
    instructions: int
    exits: dict[str, int]
    run_seconds: float
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of the whole host process, in bytes."""

    rss: int
    pss: int

    @classmethod
    def now(cls, rollup: Path = Path("/proc/self/smaps_rollup")) -> ProcessMemory:
        """Read it; zeros where the host has no such file."""
        fields = {"Rss": 0, "Pss": 0}
        try:
            text = rollup.read_text()
        except OSError:
            text = ""
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name in fields:
                fields[name] = int(value.split()[0]) * 1024
        return cls(fields["Rss"], fields["Pss"])


@dataclass(frozen=True, slots=True)
class VmMetrics:
    """One VM.

    Attributes:
        uptime_seconds: host time since the start, 0 before it; it stands still once the VM has stopped.
        vcpus: one entry per vCPU.
        memory: of the process that holds the VM.
    """

    uptime_seconds: float
    vcpus: tuple[VcpuMetrics, ...]
    memory: ProcessMemory

    @property
    def instructions(self) -> int:
        """Retired by all vCPUs together."""
        return sum(each.instructions for each in self.vcpus)
