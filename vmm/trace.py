"""What a VM did, as plain data: exits by kind, device and SBI call, and the milestones of its boot.

Exits are counted and timed only while the trace is enabled; otherwise a vCPU thread pays one attribute test for each.
Milestones cost nothing until one is reached, and are always kept. Each vCPU thread writes its own recorder, so that
no exit takes a lock; who reads adds them up.

Times are host seconds: of an exit, those spent outside guest code to serve it; of a milestone, those since the VM
started.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vmm.errors import ConfigError

ACTIVITY_BUCKET_SECONDS = 0.01
RECENT_EXITS = 64  #: how many of the last exits of each vCPU are kept

FIRST_INSTRUCTION = "first instruction"
FIRST_CONSOLE_BYTE = "first console byte"

LINUX_MILESTONES: Mapping[str, str] = {
    "kernel banner": r"Linux version ",
    "free memory for init": r"Freeing unused kernel image",
    "init runs": r"Run /\S+ as init process",
    "kernel panic": r"Kernel panic - not syncing",
    "power off": r"reboot: (Power down|Restarting system|System halted)",
}
"""What a stock kernel prints on its way, unless its command line says ``quiet``."""


@dataclass(frozen=True, slots=True)
class ExitCount:
    """How often guest code stopped for one cause, and how long serving it took.

    Attributes:
        kind: ``mmio read``, ``mmio write``, ``sbi``, ``halted``, ``interrupted`` …
        name: the device, the SBI function (``time.set_timer``), or "" where the kind says it all.
        count: exits.
        seconds: host time spent on them outside guest code; of ``halted``, time asleep.
    """

    kind: str
    name: str
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Milestone:
    """A point of the boot: host seconds since the start, instructions that all harts together had retired by then."""

    name: str
    seconds: float
    instructions: int


@dataclass(frozen=True, slots=True)
class Activity:
    """Exits of one kind that began within one span of host time of :data:`ACTIVITY_BUCKET_SECONDS`."""

    seconds: float
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class RecentExit:
    """One of the last exits: when (seconds since the start), where, and for what guest code stopped.

    ``raw`` is the instruction word at ``pc``, None where it cannot be read.
    """

    seconds: float
    vcpu: int
    pc: int
    raw: int | None
    kind: str
    name: str

    @property
    def instruction(self) -> str:
        """Assembly of the instruction that stopped; empty where it cannot be read."""
        from vmm.engine.rv64.disassembler import disassemble

        return "" if self.raw is None else disassemble(self.raw, self.pc)


class ExitRecorder:
    """The exits of one vCPU. Only its own thread writes to it."""

    def __init__(self, started_ns: Callable[[], int]) -> None:
        self._started_ns = started_ns
        self.recent: deque[RecentExit] = deque(maxlen=RECENT_EXITS)
        self.totals: dict[tuple[str, str], list[int]] = {}
        self.activity: Counter[tuple[int, str]] = Counter()

    def record(self, kind: str, name: str, began_ns: int) -> None:
        """Count an exit whose service began at ``began_ns`` (``time.monotonic_ns``) and ends now."""
        spent = time.monotonic_ns() - began_ns
        total = self.totals.get((kind, name))
        if total is None:
            self.totals[kind, name] = [1, spent]
        else:
            total[0] += 1
            total[1] += spent
        bucket = (began_ns - self._started_ns()) // int(ACTIVITY_BUCKET_SECONDS * 1e9)
        self.activity[bucket, kind] += 1

    def remember(self, vcpu: int, pc: int, raw: int | None, kind: str, name: str, began_ns: int) -> None:
        """Keep an exit among the last ones."""
        self.recent.append(RecentExit((began_ns - self._started_ns()) / 1e9, vcpu, pc, raw, kind, name))


class Trace:
    """The trace of one VM.

    Args:
        enabled: whether exits are counted and timed. It may be changed while the VM runs.
        milestones: name → regular expression for lines of the console.

    Raises:
        ConfigError: a pattern that is not a regular expression.
    """

    def __init__(self, enabled: bool = False, milestones: Mapping[str, str] | None = None) -> None:
        self.enabled = enabled
        self._lock = threading.Lock()
        self._recorders: list[ExitRecorder] = []
        self._milestones: list[Milestone] = []
        self._awaited: dict[str, re.Pattern[str]] = {}
        self._console_is_silent = True
        self._partial_line = bytearray()
        self._epoch_ns = time.monotonic_ns()
        self._instructions: Callable[[], int] = lambda: 0
        for name, pattern in {**LINUX_MILESTONES, **(milestones or {})}.items():
            try:
                self._awaited[name] = re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"milestone {name!r} has pattern {pattern!r}, which is no regular expression: {error}"
                ) from error

    def start(self, instructions: Callable[[], int]) -> None:
        """The VM starts now; ``instructions`` gives the number retired so far."""
        self._epoch_ns = time.monotonic_ns()
        self._instructions = instructions
        self.reach(FIRST_INSTRUCTION)

    def recorder(self) -> ExitRecorder:
        """A recorder for one vCPU thread."""
        recorder = ExitRecorder(lambda: self._epoch_ns)
        with self._lock:
            self._recorders.append(recorder)
        return recorder

    def reach(self, name: str) -> None:
        """Record a milestone; a second time under the same name is ignored."""
        milestone = Milestone(name, (time.monotonic_ns() - self._epoch_ns) / 1e9, self._instructions())
        with self._lock:
            self._awaited.pop(name, None)
            if all(known.name != name for known in self._milestones):
                self._milestones.append(milestone)

    def console_output(self, data: bytes) -> None:
        """Record the milestones that the console's output reaches with ``data``."""
        with self._lock:
            first, self._console_is_silent = self._console_is_silent, False
            self._partial_line += data
            if not first and b"\n" not in data:
                return
            *lines, rest = self._partial_line.split(b"\n")
            self._partial_line = bytearray(rest)
            awaited = list(self._awaited.items())
        if first:
            self.reach(FIRST_CONSOLE_BYTE)
        for line in lines:
            text = line.decode("utf-8", "replace")
            for name in [name for name, pattern in awaited if pattern.search(text)]:
                self.reach(name)

    @property
    def milestones(self) -> tuple[Milestone, ...]:
        """In the order in which they were reached."""
        with self._lock:
            return tuple(self._milestones)

    @property
    def exits(self) -> tuple[ExitCount, ...]:
        """Exits of all vCPUs by kind and name, the most time first."""
        sums: dict[tuple[str, str], list[int]] = {}
        for recorder in self._copy():
            for key, (count, spent) in list(recorder.totals.items()):
                total = sums.setdefault(key, [0, 0])
                total[0] += count
                total[1] += spent
        counts = (ExitCount(kind, name, count, spent / 1e9) for (kind, name), (count, spent) in sums.items())
        return tuple(sorted(counts, key=lambda each: (-each.seconds, each.kind, each.name)))

    @property
    def activity(self) -> tuple[Activity, ...]:
        """Exits of all vCPUs over time, in order of time; spans without an exit are left out."""
        sums: Counter[tuple[int, str]] = Counter()
        for recorder in self._copy():
            sums.update(recorder.activity.copy())
        return tuple(
            Activity(bucket * ACTIVITY_BUCKET_SECONDS, kind, count) for (bucket, kind), count in sorted(sums.items())
        )

    @property
    def recent(self) -> tuple[RecentExit, ...]:
        """The last exits of every vCPU in the order of time, with the instructions that stopped."""
        return tuple(
            sorted((each for one in self._copy() for each in one.recent.copy()), key=lambda each: each.seconds)
        )

    def _copy(self) -> Iterable[ExitRecorder]:
        with self._lock:
            return tuple(self._recorders)
