"""The action vocabulary: what can be asked of a VM, and what it answers.

After Dragonball's ``VmmAction`` and ``VmmData``: one frozen class per action and one per kind of answer, plain data
that could travel over a socket as it is. :meth:`vmm.MicroVm.request` takes an action and gives a future of its
answer; the methods of :class:`vmm.MicroVm` are conveniences over it. Actions on devices, hotplug and snapshots join
this list with the parts that carry them out.

=======================  =======================  ============================================================
action                   answer                   allowed in state
=======================  =======================  ============================================================
ConfigureBootSource      Empty                    configured
SetVmConfiguration       Empty                    configured
GetVmConfiguration       VmConfiguration          any
StartMicroVm             Empty                    configured
PauseMicroVm             Empty                    running
ResumeMicroVm            Empty                    paused
ShutdownMicroVm          MachineEnd               any (what is stopped already answers again)
GetState                 MachineState             any
GetHypervisorMetrics     HypervisorMetrics        any
GetReport                MachineReport            running, paused, stopped; a running VM pauses for a moment
=======================  =======================  ============================================================
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from vmm.config import VmConfig
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
