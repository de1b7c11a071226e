"""``kata-lab bench fused``: the same sandbox over each arrangement of runtime and VMM, in turns.

Every arrangement of :mod:`kata_lab.hypervisor` runs the same guest, with as much memory and the same devices, in a
runtime process of its own (:mod:`.fused_runtime`), which does nothing else; QEMU's is left out where it is not
installed. In each run each arrangement starts a sandbox, is looked at, is asked, and is killed process by process.

==========================  ==========================================================================================
figure                      what it is
==========================  ==========================================================================================
processes, threads          of one sandbox that is ready and idle
pss_mb, pss_parts           its memory then, in 10⁶ bytes, by process and by kind (:mod:`.fused_account`)
start_s, start_parts        exec of the runtime until its client reads that the sandbox is ready: ``process`` Python and
                            its modules, ``prepare`` files and compiled code, ``vmm`` until the VM runs (processes,
                            machine, kernel image), ``guest`` until the agent answers, ``agent`` until it is ready
action_us                   one action, asked and answered, in microseconds: median and 99th percentile
context_switches_per_action of all threads of all processes, and likewise
system_calls_per_action     all of them, or reads and writes only (``system_calls_by``)
starts_per_s, cpu_s         of as many runtimes as ``at_once`` says, begun together; CPU seconds for each, all processes
notice_ms                   SIGKILL of a process until the runtime has its sandbox as stopped; of the runtime itself,
                            until its client knows
cleanup_ms                  the same until nothing is left; of the runtime, until no process of the sandbox lives
==========================  ==========================================================================================

Of the actions, ``get_state`` is the channel and nothing else: a thread asks the VM for its state and waits.
``get_state_awaited`` is the same as a coroutine of the runtime awaits it, event loop included; for QEMU, the command
``cont`` to a guest that runs, which has nothing to do either. The others go through the runtime's interface:
``pause_resume`` a pause and a resume, ``share_add_remove`` a directory that comes and goes in the shared one,
``vcpu_plus_minus`` a vCPU that comes and goes, in which the guest takes part.

``ratio`` is rpc / fused, with the actions by name. ``floor_us`` is what a message of one byte and its answer take on
this machine, from thread to thread in one process and over a unix socket between two processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
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
from kata_lab.bench.fused_probe import ACTIONS
from kata_lab.bench.fused_runtime import RuntimeProcess
from kata_lab.bench.measure import Sample, steps

PARTS: Final = ("process", "prepare", "vmm", "guest", "agent")
AT_ONCE: Final = 4
ROUNDS: Final = {
    "get_state": 1000,
    "get_state_awaited": 500,
    "pause_resume": 30,
    "share_add_remove": 30,
    "vcpu_plus_minus": 3,
}
COUNTED: Final = {
    "get_state": 300,
    "get_state_awaited": 300,
    "pause_resume": 20,
    "share_add_remove": 20,
    "vcpu_plus_minus": 1,
}
GOAL_RATIO: Final = 10.0  #: of an action, rpc / fused
GOAL_NOTICE_MS: Final = 100.0
_WORK: Final = {
    "get_state": "looking the state up",
    "get_state_awaited": "a turn of the runtime's event loop, after which a coroutine goes on",
    "pause_resume": "vCPUs that come out of guest code and go back",
    "share_add_remove": "opening the directory and entering it",
    "vcpu_plus_minus": "the guest's kernel, which brings a hart up and takes it down",
}
_MISSING: Final = "QMP is spoken by an event loop only, and QEMU's machine 'virt' for riscv64 has no hotplug of vCPUs"
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
        ratio: rpc / fused.
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
    measured: dict[str, list[Run]] = {name: [] for name in names}
    with steps("Measuring arrangements", 2 * runs * len(names) + 1) as begin:
        begin("floor")
        floor = floors()
        for _ in range(runs):
            for name in names:
                measured[name].append(_run(name, begin))
    told = {**versions(), "guest kernel": str(image.manifest["release"])}
    return figures(measured, floor, left_out, told)


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


def _run(name: str, begin: Callable[[str], None]) -> Run:
    begin(f"{name}, one")
    with RuntimeProcess(name) as runtime:
        timeline = dict(runtime.start()["timeline"])
        start_s = time.monotonic() - runtime.began
        found, memory = runtime.parts, runtime.memory
        action_us = {action: runtime.ask("time", action=action, rounds=rounds) for action, rounds in ROUNDS.items()}
        took = {action: each["us"] for action, each in action_us.items() if "us" in each}
        counted = {action: _count(runtime, action) for action in took}
        notice, cleanup = _crash_all(runtime)
    begin(f"{name}, {AT_ONCE} at once")
    starts_per_s, cpu_s = _at_once(name)
    return Run(
        start_s,
        start_parts(start_s, timeline),
        len(found),
        sum(part.threads for part in found),
        memory,
        took,
        {action: each[0] for action, each in counted.items()},
        {action: each[1] for action, each in counted.items()},
        next(iter(counted.values()))[2],
        notice,
        cleanup,
        starts_per_s,
        cpu_s,
    )


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


def _crash_all(runtime: RuntimeProcess) -> tuple[dict[str, float], dict[str, float]]:
    """Kill each process of a sandbox, every other time in a new one; the runtime comes last."""
    notice, cleanup = {}, {}
    for name in [part.name for part in runtime.parts if part.name != RUNTIME]:
        told = runtime.crash(name)
        notice[name], cleanup[name] = told["notice_ms"], told["cleanup_ms"]
        runtime.start()
    ended = runtime.kill()
    return {RUNTIME: ended.notice_ms, **notice}, {RUNTIME: ended.cleanup_ms, **cleanup}


def _at_once(name: str) -> tuple[float, float]:
    """Starts per second of as many as :data:`AT_ONCE`, and CPU seconds of each."""
    with contextlib.ExitStack() as held:
        runtimes = [held.enter_context(RuntimeProcess(name)) for _ in range(AT_ONCE)]
        for runtime in runtimes:
            runtime.begin()
        for runtime in runtimes:
            runtime.receive("start")
        seconds = time.monotonic() - runtimes[0].began
        cpu_s = sum(cpu_seconds(runtime.parts) for runtime in runtimes)
    return AT_ONCE / seconds, cpu_s / AT_ONCE


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
    measured: Mapping[str, Sequence[Run]], floor: dict[str, float], left_out: dict[str, str], told: dict[str, str]
) -> FusedFigures:
    """Put runs together."""
    sides = {name: _figures(runs) for name, runs in measured.items()}
    fused, rpc = sides["fused"], sides["rpc"]
    ratio: dict[str, Any] = {
        "action": {name: rpc.action_us[name].median / each.median for name, each in fused.action_us.items()},
        **{name: getattr(rpc, name) / getattr(fused, name) for name in ("processes", "threads", "pss_mb", "start_s")},
        **{name: getattr(rpc, name) / getattr(fused, name) for name in ("starts_per_s", "cpu_s")},
    }
    return FusedFigures(
        arrangements=sides,
        ratio=ratio,
        floor_us=floor,
        limits={**left_out, **_limits(sides, ratio["action"], floor)},
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
        context_switches_per_action=medians(run.switches for run in runs),
        system_calls_per_action=medians(run.calls for run in runs),
        system_calls_by=first.calls_by,
        starts_per_s=median(run.starts_per_s for run in runs),
        cpu_s=median(run.cpu_s for run in runs),
        notice_ms=medians(run.notice_ms for run in runs),
        cleanup_ms=medians(run.cleanup_ms for run in runs),
    )


def _limits(sides: Mapping[str, Figures], ratio: Mapping[str, float], floor: Mapping[str, float]) -> dict[str, str]:
    fused, rpc = sides["fused"], sides["rpc"]
    told = {}
    for name, times in ratio.items():
        if times < GOAL_RATIO:
            ours, theirs = fused.action_us[name].median, rpc.action_us[name].median
            told[name] = (
                f"rpc takes {theirs:.0f} us, fused {ours:.0f}; a message and its answer take at least"
                f" {floor['socket']:.0f} us between two processes and {floor['thread']:.0f} us between two threads"
                f" here, and what both do is {_WORK[name]}"
            )
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
