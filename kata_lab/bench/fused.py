"""``kata-lab bench fused``: the same sandbox over each arrangement of runtime and VMM, in turns.

Every arrangement of :mod:`kata_lab.hypervisor` runs the same guest, with as much memory and the same devices, in a
runtime process of its own (:mod:`.fused_runtime`), which does nothing else; QEMU's is left out where it is not
installed. In each run each arrangement starts a sandbox, is looked at, is asked, and is killed; then it starts several
at once, in which its other processes are killed.

==========================  ==========================================================================================
figure                      what it is
==========================  ==========================================================================================
processes, threads          of one sandbox that is ready and idle
pss_mb, pss_parts           its memory then, in 10⁶ bytes, by process and by kind (:mod:`.fused_account`)
start_s, start_parts        exec of the runtime until its client reads that the sandbox is ready: ``process`` Python and
                            its modules, ``prepare`` files and compiled code, ``vmm`` until the VM runs (processes,
                            machine, kernel image), ``guest`` until the agent answers, ``agent`` until it is ready
action_us                   one action, asked and answered, in microseconds: median and 99th percentile
way_us                      how a call for one more vCPU divides (:mod:`.fused_call`): ``there`` until the VMM begins,
                            ``work`` of VMM and guest, ``back`` until the runtime goes on
context_switches_per_action of all threads of all processes, and likewise
system_calls_per_action     all of them, or reads and writes only (``system_calls_by``)
starts_per_s, cpu_s         of as many runtimes as ``at_once`` says, begun together; CPU seconds for each, all processes
notice_ms                   SIGKILL of a process until the runtime has its sandbox as stopped; of the runtime itself,
                            until its client knows
cleanup_ms                  the same until nothing is left; of the runtime, until no process of the sandbox lives
==========================  ==========================================================================================

Of the actions, ``get_state`` is the channel and nothing else: a thread asks the VM for its state and waits.
``get_state_awaited`` is the same as a coroutine of the runtime awaits it, event loop included. The others go through
the runtime's interface and may change something. ``nothing_to_change`` asks for as many vCPUs as there are (QEMU: for a
guest that runs to run): it waits for its turn on the VM's own thread, as changes do in every arrangement, and finds
nothing to do. ``pause_resume`` is a pause and a resume, ``share_add_remove`` a directory that comes and goes in the
shared one (fused: without a change of threads), ``vcpu_plus_minus`` a vCPU that comes and goes, in which the guest
takes part.

``ratio`` is rpc / fused. ``floor_us`` is what a message of one byte and its answer take on this machine, from thread to
thread in one process and over a unix socket between two processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from kata_lab.bench.boot import prepare, versions
from kata_lab.bench.fused_account import BY_PERF, RUNTIME, Memory, SystemCalls, context_switches, cpu_seconds
from kata_lab.bench.fused_call import WAY, follow_resize, spans
from kata_lab.bench.fused_probe import ACTING, ACTIONS
from kata_lab.bench.fused_runtime import RuntimeProcess
from kata_lab.bench.measure import Sample, steps

PARTS: Final = ("process", "prepare", "vmm", "guest", "agent")
AT_ONCE: Final = 4
ROUNDS: Final = {
    "get_state": 1000,
    "get_state_awaited": 500,
    "nothing_to_change": 200,
    "pause_resume": 30,
    "share_add_remove": 30,
    "vcpu_plus_minus": 3,
}
COUNTED: Final = {
    "get_state": 300,
    "get_state_awaited": 300,
    "nothing_to_change": 100,
    "pause_resume": 20,
    "share_add_remove": 20,
    "vcpu_plus_minus": 1,
}
FOLLOWED: Final = 5
GOAL_RATIO: Final = 10.0  #: of an action, rpc / fused
GOAL_NOTICE_MS: Final = 100.0
_WORK: Final = {
    "get_state": "looking the state up",
    "get_state_awaited": "a turn of the runtime's event loop, after which a coroutine goes on",
    "nothing_to_change": "a turn on the VM's own thread, where it finds that there is nothing to do",
    "pause_resume": "vCPUs that come out of guest code and go back",
    "share_add_remove": "opening the directory and entering it",
    "vcpu_plus_minus": "the guest's kernel, which brings a hart up and takes it down",
}
_MISSING: Final = (
    "the runtime has nothing to read from QEMU that is not known already, and QEMU's machine 'virt' for riscv64 has no"
    " hotplug of vCPUs"
)
_ENDS: Final = ("prepared", "VM runs", "agent answers", "sandbox ready")
_ECHO: Final = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\nwhile d := s.recv(1): s.send(d)"
_FLOOR_ROUNDS: Final = 500


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one action, in microseconds."""

    median: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Latency:
        """Of what was measured."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one arrangement; see the module. Medians of the runs, but for actions, of which all rounds count."""

    processes: int
    threads: int
    pss_mb: float
    pss_parts: dict[str, dict[str, float]]
    start_s: float
    start_parts: dict[str, float]
    action_us: dict[str, Latency]
    way_us: dict[str, float]
    context_switches_per_action: dict[str, float]
    system_calls_per_action: dict[str, float]
    system_calls_by: str
    starts_per_s: float
    cpu_s: float
    notice_ms: dict[str, float]
    cleanup_ms: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedFigures:
    """What was measured.

    Attributes:
        arrangements: by name.
        ratio: rpc / fused; ``action`` by its name, ``way`` by its part.
        floor_us: ``thread`` and ``socket``, see the module.
        limits: what misses its goal, and why; what was left out, and what is to be known.
        at_once: sandboxes that were started together.
        runs: measured runs of each arrangement.
        versions: of what took part.
    """

    arrangements: dict[str, Figures]
    ratio: dict[str, Any]
    floor_us: dict[str, float]
    limits: dict[str, str] = field(default_factory=dict)
    at_once: int = AT_ONCE
    runs: int
    versions: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON has it: the arrangements by their names, beside everything else."""
        told = asdict(self)
        return {**told.pop("arrangements"), **told}


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of an arrangement gave."""

    start_s: float
    start_parts: Mapping[str, float]
    processes: int
    threads: int
    memory: Memory
    action_us: Mapping[str, Sequence[float]]
    way_us: Mapping[str, float]
    switches: Mapping[str, float]
    calls: Mapping[str, float]
    calls_by: str
    notice_ms: Mapping[str, float]
    cleanup_ms: Mapping[str, float]
    starts_per_s: float
    cpu_s: float


def measure_fused(runs: int) -> FusedFigures:
    """Measure.

    Raises:
        BenchError: a sandbox cannot be started, or a process that was killed is not noticed, or is survived.
        ImageError: the guest cannot be built.
    """
    from kata_lab.image.build import build_named

    image = build_named("lifsea")
    prepare()
    names, left_out = arrangements()
    noted = {**left_out, **busy(os.getloadavg()[0], os.cpu_count() or 1)}
    measured: dict[str, list[Run]] = {name: [] for name in names}
    with steps("Measuring arrangements", 2 * runs * len(names) + 1) as begin:
        begin("floor")
        floor = floors()
        for _ in range(runs):
            for name in names:
                measured[name].append(run_once(name, begin))
    told = {**versions(), "guest kernel": str(image.manifest["release"])}
    return figures(measured, floor, noted, told)


def arrangements() -> tuple[list[str], dict[str, str]]:
    """Those that can run here; and of the others, why not."""
    from kata_lab.bench.peer import Peer, PeerError
    from kata_lab.hypervisor import HYPERVISORS

    names, left_out = list(HYPERVISORS), {}
    if "qemu" in names:
        try:
            Peer.find()
        except PeerError as error:
            names.remove("qemu")
            left_out["qemu"] = f"left out: {error}"
    return names, left_out


def busy(load: float, processors: int) -> dict[str, str]:
    """What is to be known of a machine with this load average before anything was measured."""
    if load <= processors / 2:
        return {}
    return {
        "machine": f"its load average was {load:.1f} with {processors} processors before this began: measure where"
        " nothing else runs; a scheduler that shares processors among sessions (autogroup, sched(7)) gives more of them"
        " to an arrangement of several processes, each of which has its own session, than to a fused one"
    }


def run_once(name: str, begin: Callable[[str], None]) -> Run:
    """Measure one arrangement once, saying each part with ``begin``; BenchError as :func:`measure_fused`."""
    begin(f"{name}, one")
    with RuntimeProcess(name) as runtime:
        timeline = dict(runtime.start()["timeline"])
        start_s = time.monotonic() - runtime.began
        found, memory = runtime.parts, runtime.memory
        action_us = {action: runtime.ask("time", action=action, rounds=rounds) for action, rounds in ROUNDS.items()}
        took = {action: each["us"] for action, each in action_us.items() if "us" in each}
        way_us = _follow(runtime) if name in ACTING else {}
        counted = {action: _count(runtime, action) for action in took}
        ended = runtime.kill()
    begin(f"{name}, {AT_ONCE} at once")
    with contextlib.ExitStack() as held:
        several = [held.enter_context(RuntimeProcess(name)) for _ in range(AT_ONCE)]
        starts_per_s, cpu_s = _start_at_once(several)
        crashes = _crash([part.name for part in found if part.name != RUNTIME], several)
    return Run(
        start_s,
        start_parts(start_s, timeline),
        len(found),
        sum(part.threads for part in found),
        memory,
        took,
        way_us,
        {action: each[0] for action, each in counted.items()},
        {action: each[1] for action, each in counted.items()},
        next(iter(counted.values()))[2],
        {RUNTIME: ended.notice_ms, **{part: told["notice_ms"] for part, told in crashes.items()}},
        {RUNTIME: ended.cleanup_ms, **{part: told["cleanup_ms"] for part, told in crashes.items()}},
        starts_per_s,
        cpu_s,
    )


def _follow(runtime: RuntimeProcess) -> dict[str, float]:
    """How a call for one more vCPU divides, medians."""
    told = []
    for _ in range(FOLLOWED):
        told.append(spans(follow_resize(runtime, 2)))
        follow_resize(runtime, 1)
    return {name: statistics.median(each[name] for each in told) for name in WAY}


def start_parts(seconds: float, timeline: Mapping[str, float]) -> dict[str, float]:
    """How a start divides; the parts add up to ``seconds``, and what the time line does not cover is the process's."""
    ends = [0.0, *(timeline[name] for name in _ENDS)]
    parts = [seconds - ends[-1], *(end - before for before, end in itertools.pairwise(ends))]
    return dict(zip(PARTS, parts, strict=True))


def _count(runtime: RuntimeProcess, action: str) -> tuple[float, float, str]:
    """Context switches and system calls of one action, and what the latter are counted by."""
    found, rounds = runtime.parts, COUNTED[action]
    with SystemCalls(found) as calls:
        before = context_switches(found)
        runtime.ask("time", action=action, rounds=rounds)
        switches = context_switches(found) - before
        called = calls.count()
    # The round that is not timed counts here.
    return switches / (rounds + 1), called / (rounds + 1), calls.source


def _start_at_once(runtimes: Sequence[RuntimeProcess]) -> tuple[float, float]:
    """Start a sandbox in each: starts per second, and CPU seconds of each."""
    for runtime in runtimes:
        runtime.begin()
    for runtime in runtimes:
        runtime.receive("start")
    seconds = time.monotonic() - runtimes[0].began
    cpu_s = sum(cpu_seconds(runtime.parts) for runtime in runtimes)
    return len(runtimes) / seconds, cpu_s / len(runtimes)


def _crash(names: Sequence[str], runtimes: Sequence[RuntimeProcess]) -> dict[str, dict[str, Any]]:
    """Kill a process of each of these parts, each in a sandbox of its own; what the runtime tells of it."""
    told = {}
    for number, name in enumerate(names):
        runtime = runtimes[number % len(runtimes)]
        if number >= len(runtimes):
            runtime.start()
        told[name] = runtime.crash(name)
    return told


def floors() -> dict[str, float]:
    """Microseconds of a message and its answer, medians: between threads of this process, and between processes."""
    return {"thread": _thread_floor(), "socket": _socket_floor()}


def _thread_floor() -> float:
    from vmm.loop_thread import LoopThread

    async def answer() -> None:
        pass

    other = LoopThread()
    loop = other.start()
    try:
        return _median_us(lambda: asyncio.run_coroutine_threadsafe(answer(), loop).result())
    finally:
        other.stop()


def _socket_floor() -> float:
    here, there = socket.socketpair()
    with here, there:
        command = [sys.executable, "-c", _ECHO, str(there.fileno())]
        with subprocess.Popen(command, pass_fds=(there.fileno(),)) as echo:
            there.close()

            def ask() -> None:
                here.send(b"?")
                here.recv(1)

            try:
                return _median_us(ask)
            finally:
                here.shutdown(socket.SHUT_RDWR)
                echo.wait()


def _median_us(ask: Callable[[], object]) -> float:
    ask()
    took = []
    for _ in range(_FLOOR_ROUNDS):
        began = time.perf_counter()
        ask()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def figures(
    measured: Mapping[str, Sequence[Run]], floor: dict[str, float], noted: dict[str, str], told: dict[str, str]
) -> FusedFigures:
    """Put runs together."""
    sides = {name: _figures(runs) for name, runs in measured.items()}
    fused, rpc = sides["fused"], sides["rpc"]
    ratio: dict[str, Any] = {
        "action": {name: rpc.action_us[name].median / each.median for name, each in fused.action_us.items()},
        "way": {name: rpc.way_us[name] / took for name, took in fused.way_us.items()},
        **{name: getattr(rpc, name) / getattr(fused, name) for name in ("processes", "threads", "pss_mb", "start_s")},
        **{name: getattr(rpc, name) / getattr(fused, name) for name in ("starts_per_s", "cpu_s")},
    }
    return FusedFigures(
        arrangements=sides,
        ratio=ratio,
        floor_us=floor,
        limits={**noted, **_limits(sides, ratio["action"], floor)},
        runs=len(measured["fused"]),
        versions=told,
    )


def _figures(runs: Sequence[Run]) -> Figures:
    def median(values: Iterable[float]) -> float:
        return Sample(tuple(values)).median

    def medians(mappings: Iterable[Mapping[str, float]]) -> dict[str, float]:
        found = list(mappings)
        return {name: median(each[name] for each in found) for name in found[0]}

    def megabytes(counts: Mapping[str, float]) -> dict[str, float]:
        return {name: count / 1e6 for name, count in counts.items()}

    first = runs[0]
    return Figures(
        processes=max(run.processes for run in runs),
        threads=max(run.threads for run in runs),
        pss_mb=median(run.memory.total for run in runs) / 1e6,
        pss_parts={
            "process": megabytes(medians(run.memory.processes for run in runs)),
            "kind": megabytes(medians(run.memory.kinds for run in runs)),
        },
        start_s=median(run.start_s for run in runs),
        start_parts=medians(run.start_parts for run in runs),
        action_us={name: Latency.of(us for run in runs for us in run.action_us[name]) for name in first.action_us},
        way_us=medians(run.way_us for run in runs),
        context_switches_per_action=medians(run.switches for run in runs),
        system_calls_per_action=medians(run.calls for run in runs),
        system_calls_by=first.calls_by,
        starts_per_s=median(run.starts_per_s for run in runs),
        cpu_s=median(run.cpu_s for run in runs),
        notice_ms=medians(run.notice_ms for run in runs),
        cleanup_ms=medians(run.cleanup_ms for run in runs),
    )


def _limits(sides: Mapping[str, Figures], ratio: Mapping[str, float], floor: Mapping[str, float]) -> dict[str, str]:
    told = {name: _explain(name, sides, floor) for name, times in ratio.items() if times < GOAL_RATIO}
    for name, side in sides.items():
        late = [f"{part} {took:.0f} ms" for part, took in side.notice_ms.items() if took > GOAL_NOTICE_MS]
        if late:
            told[f"{name} notice_ms"] = f"later than {GOAL_NOTICE_MS:.0f} ms: {', '.join(late)}"
        missing = [each for each in ACTIONS if each not in side.action_us]
        if missing:
            told[f"{name} action_us"] = f"without {', '.join(missing)}: {_MISSING}"
        if side.system_calls_by != BY_PERF:
            told["system_calls_per_action"] = f"perf counts nothing here; these are {side.system_calls_by}"
    told["fused notice_ms"] = " ".join(
        [
            "the one process is the runtime: nobody in it is left to notice, and this is when its client finds the end"
            " of the pipe.",
            *filter(None, [told.get("fused notice_ms", "")]),
        ]
    )
    return told


def _explain(name: str, sides: Mapping[str, Figures], floor: Mapping[str, float]) -> str:
    """Why rpc takes less than :data:`GOAL_RATIO` times as long: what an action waits for in both."""
    fused, rpc = sides["fused"], sides["rpc"]
    parts = [
        f"rpc takes {rpc.action_us[name].median:.0f} us, fused {fused.action_us[name].median:.0f}; what both do is"
        f" {_WORK[name]}"
    ]
    if name.startswith("vcpu"):
        parts.append(
            f"of one more vCPU, VMM and guest take {fused.way_us['work']:.0f} us in fused and"
            f" {rpc.way_us['work']:.0f} in rpc, the way there {fused.way_us['there']:.0f} and"
            f" {rpc.way_us['there']:.0f}, the way back {fused.way_us['back']:.0f} and {rpc.way_us['back']:.0f}"
        )
    elif not name.startswith("get_state") and name != "nothing_to_change":
        parts.append(
            "what may change something waits for its turn on the VM's thread, and if there is nothing to do that takes"
            f" {fused.action_us['nothing_to_change'].median:.0f} us in fused"
        )
    parts.append(
        f"a message and its answer take at least {floor['socket']:.0f} us between two processes and"
        f" {floor['thread']:.0f} us between two threads here"
    )
    return "; ".join(parts)
