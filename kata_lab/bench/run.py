"""``kata-lab bench run``: how long a container takes, from nothing and in a sandbox that runs, and what it costs.

A warm start is what a person runs, ``kata-lab run``, from its exec until the container's first output has been read:
image, kernel and compiled code are in the caches. Its time is divided where the time line of the sandbox's process
and the guest kernel's own log (``Run /init``, seconds since it began) say that one part ended and the next began.
Containers and execs in a running sandbox are taken through :mod:`kata_lab.runtime`, from the call to the first byte of
output. There is no peer in it: goals are times and sizes.

Where a goal is missed, ``limits`` says what was busy meanwhile, as measured in the same run.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kata_lab.bench.boot import prepare, versions
from kata_lab.bench.measure import LONGEST_RUN, BenchError, Sample, Watched, steps

if TYPE_CHECKING:
    from kata_lab.runtime import Container, Sandbox

IMAGE: Final = "busybox"
MARKER: Final = "bench-run: first output"
STREAM_BYTES: Final = 16 << 20
STAY: Final = ("sleep", "1000")
PARTS: Final = ("command", "process", "vmm", "kernel", "init", "agent", "container")
GOALS: Final = {
    "container_s": 0.120,
    "exec_s": 0.050,
    "agent_bytes": 8e6,
    "ps_s": 0.200,
    "help_s": 0.200,
}  #: the most that each may be; ``limits`` tells of those that are more

# What the kernel wrote when it handed over, in seconds since it began; that log needs the capability SYSLOG.
_TELL_INIT: Final = "dmesg | grep 'as init process'"
_INIT_RUNS: Final = re.compile(r"\[ *(\d+\.\d+)\] Run /init as init process")
_AGENT_MEMORY: Final = re.compile(r"^kata_agent_process_resident_memory_bytes (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What was measured; medians.

    Attributes:
        start_s: exec of ``kata-lab run`` to the container's first output, seconds.
        start_spread: largest less smallest run, as a fraction of the median.
        parts: name → seconds, in the order in which they follow each other: ``command`` until the sandbox's process
            began, ``process`` until the VM was prepared, ``vmm`` until the guest's first instruction, ``kernel`` until
            init ran, ``init`` until the services were started, ``agent`` until the sandbox was ready, ``container``
            until its first output was read.
        container_s: a container in a running sandbox: created and started, until its first output; seconds.
        container_spread: as ``start_spread``, over all containers.
        container_instructions: that the guest retired meanwhile.
        exec_s: a process more in a running container, until its first output; seconds.
        exec_spread: as ``start_spread``, over all execs.
        exec_instructions: that the guest retired meanwhile.
        stdout_mb_s: what a container writes to its standard output, as it is read; 10⁶ bytes per second.
        agent_bytes: resident memory of the agent in the guest, with one container.
        pss_bytes: memory of the sandbox's process on the host, with one container.
        ps_s: ``kata-lab ps``, exec to end, with one container; seconds.
        help_s: the same of ``kata-lab --help``.
        interpreter_s: the same of a Python that does nothing.
        limits: figure → what was busy, of those that miss their goal.
        runs: measured runs.
        rounds: containers, and execs, of each run.
        versions: of what took part.
    """

    start_s: float
    start_spread: float
    parts: dict[str, float]
    container_s: float
    container_spread: float
    container_instructions: int
    exec_s: float
    exec_spread: float
    exec_instructions: int
    stdout_mb_s: float
    agent_bytes: int
    pss_bytes: int
    ps_s: float
    help_s: float
    interpreter_s: float
    limits: dict[str, str] = field(default_factory=dict)
    runs: int
    rounds: int
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Timed:
    """One thing that was timed in a sandbox.

    Attributes:
        seconds: that it took.
        instructions: that the guest retired meanwhile.
        ran: CPU seconds of the hart's thread.
        asleep: seconds that the hart had nothing to do.
        calls: to the agent that were answered meanwhile: method and seconds.
    """

    seconds: float
    instructions: int
    ran: float
    asleep: float
    calls: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class _Start:
    """One warm start, and what was measured while its container ran."""

    seconds: float
    parts: dict[str, float]
    pss_bytes: int
    commands: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Inside:
    """What one sandbox gave."""

    containers: list[_Timed]
    execs: list[_Timed]
    stdout_mb_s: float
    agent_bytes: int
    agent_heap: str


def measure_run(runs: int, rounds: int) -> RunFigures:
    """Measure, with so many containers and execs in each sandbox.

    Raises:
        BenchError: a run did not do what was to be measured.
        KataLabError: the guest or the container's image cannot be built, or a container cannot be run.
    """
    from kata_lab.image.build import build_named
    from kata_lab.oci import ensure_busybox

    image = build_named("lifsea")
    ensure_busybox()
    prepare()
    starts: list[_Start] = []
    insides: list[_Inside] = []
    with steps("Measuring containers", 2 * (runs + 1)) as begin:
        for number in range(runs + 1):
            begin("from nothing")
            starts.append(_start(f"bench-{os.getpid()}-{number}"))
            begin("in a sandbox")
            insides.append(asyncio.run(_inside(rounds)))
    release = str(image.manifest["release"])
    return _figures(starts[1:], insides[1:], rounds, versions() | {"guest kernel": release})


def _figures(starts: list[_Start], insides: list[_Inside], rounds: int, told: dict[str, str]) -> RunFigures:
    def median(values: list[float]) -> float:
        return Sample(tuple(values)).median

    start = Sample(tuple(each.seconds for each in starts))
    containers = [each for inside in insides for each in inside.containers]
    execs = [each for inside in insides for each in inside.execs]
    container, execution = (Sample(tuple(each.seconds for each in timed)) for timed in (containers, execs))
    commands = {name: median([each.commands[name] for each in starts]) for name in starts[0].commands}
    figures = RunFigures(
        start_s=start.median,
        start_spread=start.spread,
        parts={name: median([each.parts[name] for each in starts]) for name in PARTS},
        container_s=container.median,
        container_spread=container.spread,
        container_instructions=int(median([each.instructions for each in containers])),
        exec_s=execution.median,
        exec_spread=execution.spread,
        exec_instructions=int(median([each.instructions for each in execs])),
        stdout_mb_s=median([each.stdout_mb_s for each in insides]),
        agent_bytes=int(median([each.agent_bytes for each in insides])),
        pss_bytes=int(median([each.pss_bytes for each in starts])),
        ps_s=commands["ps"],
        help_s=commands["help"],
        interpreter_s=commands["interpreter"],
        limits={},
        runs=len(starts),
        rounds=rounds,
        versions=told,
    )
    busy = {
        "container_s": _busy(containers),
        "exec_s": _busy(execs),
        "agent_bytes": insides[-1].agent_heap,
        "ps_s": f"a Python that does nothing takes {figures.interpreter_s * 1e3:.0f} ms of it",
        "help_s": f"a Python that does nothing takes {figures.interpreter_s * 1e3:.0f} ms of it",
    }
    figures.limits.update({name: busy[name] for name, goal in GOALS.items() if getattr(figures, name) > goal})
    return figures


def _busy(timed: list[_Timed]) -> str:
    """What the time went to, of the one hart's thread, and which calls to the agent it was."""
    seconds, ran, asleep = (sum(getattr(each, name) for each in timed) for name in ("seconds", "ran", "asleep"))
    retired = sum(each.instructions for each in timed)
    calls: dict[str, list[float]] = {}
    for method, took in (call for each in timed for call in each.calls):
        calls.setdefault(method, []).append(took)
    told = ", ".join(f"{method} {Sample(tuple(took)).median * 1e3:.0f} ms" for method, took in calls.items())
    return (
        f"the guest's hart was busy for {min(ran / seconds, 1):.0%} of the time and asleep for {asleep / seconds:.0%}; "
        f"it retired {retired / len(timed) / 1e6:.0f} million instructions for each, at {retired / ran / 1e6:.0f} "
        f"million a second; {told}"
    )


# A warm start, through the command line.


def _start(name: str) -> _Start:
    told = f"echo {MARKER}; {_TELL_INIT}; exec {' '.join(STAY)}"
    run = _command("run", "--rm", "--cap-add", "SYSLOG", "--name", name, IMAGE, "sh", "-c", told)
    try:
        with Watched(run) as process:
            seconds = process.seconds_until(MARKER)
            process.seconds_until("as init process")
            kernel_s = _INIT_RUNS.search(process.text)
            if kernel_s is None:
                raise BenchError(f"the guest's kernel log does not say when init ran; it says {process.text[-300:]!r}")
            line = {each["name"]: float(each["seconds"]) for each in json.loads(_told("timeline", "--json", name))}
            owner = _owner(name)
            parts = _parts(seconds, owner.began - process.began, line, float(kernel_s[1]))
            pss_bytes = owner.pss_bytes
            commands = {
                "ps": _seconds(_command("ps")),
                "help": _seconds(_command("--help")),
                "interpreter": _seconds([sys.executable, "-c", ""]),
            }
    finally:
        # The container has no say in it, and the process that a sandbox is must not outlive the measurement.
        subprocess.run(_command("rm", "-f", name), capture_output=True, timeout=LONGEST_RUN, check=False)
    return _Start(seconds, parts, pss_bytes, commands)


def _parts(seconds: float, process_began: float, line: dict[str, float], kernel_s: float) -> dict[str, float]:
    """How a start divides; the parts add up to it.

    Args:
        seconds: of all of it.
        process_began: when the sandbox's process began, seconds after the command.
        line: the time line, name → seconds since that process began.
        kernel_s: from the kernel's beginning to init's.
    """
    from vmm.trace import FIRST_CONSOLE_BYTE, FIRST_INSTRUCTION

    try:
        prepared, first, up, ready = (
            line[name] for name in ("prepared", FIRST_INSTRUCTION, FIRST_CONSOLE_BYTE, "sandbox ready")
        )
    except KeyError as missing:
        raise BenchError(f"the time line has no moment {missing}; it has {', '.join(line)}") from None
    ends = [process_began, *(process_began + at for at in (prepared, first, first + kernel_s, up, ready)), seconds]
    return {name: end - before for name, before, end in zip(PARTS, [0.0, *ends], ends, strict=False)}


@dataclass(frozen=True, slots=True)
class _Owner:
    """The process of a sandbox: when it began (``time.monotonic``), and its memory."""

    began: float
    pss_bytes: int


def _owner(name: str) -> _Owner:
    from pathlib import Path

    from kata_lab.runtime.state import StateDirectory
    from vmm.metrics import ProcessMemory

    sandboxes = [each["sandbox"] for each in json.loads(_told("ps", "--json")) if each["name"] == name]
    record = StateDirectory(sandboxes[0]).read() if sandboxes else None
    if record is None:
        raise BenchError(f"container {name} has no sandbox while it runs")
    ticks = record.owner.started / os.sysconf("SC_CLK_TCK")
    began = ticks + time.monotonic() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return _Owner(began, ProcessMemory.now(Path(f"/proc/{record.owner.pid}/smaps_rollup")).pss)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kata_lab", *arguments]


def _told(*arguments: str) -> str:
    ended = subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=LONGEST_RUN, check=False)
    if ended.returncode:
        raise BenchError(f"kata-lab {arguments[0]} ended with status {ended.returncode}: {ended.stderr.strip()[-300:]}")
    return ended.stdout


def _seconds(command: list[str]) -> float:
    with Watched(command) as process:
        return process.seconds_until_end()


# In a sandbox that runs, through the runtime.


async def _inside(rounds: int) -> _Inside:
    from kata_lab.runtime import Sandbox

    async with Sandbox.create() as sandbox:
        stays = await sandbox.new_container(STAY, IMAGE)
        await stays.start()
        # The first of each warms caches of guest and host, and does not count.
        containers = [await _timed(sandbox, lambda: _new(sandbox)) for _ in range(rounds + 1)][1:]
        execs = [await _timed(sandbox, lambda: _exec(stays)) for _ in range(rounds + 1)][1:]
        speed = await _stream(stays)
        metrics = str((await sandbox.agent.call("GetMetrics"))["metrics"])
    found = _AGENT_MEMORY.search(metrics)
    if found is None:
        raise BenchError(f"the agent does not tell its memory; it tells {metrics[:300]!r}")
    heap = ", ".join(line for line in metrics.splitlines() if line.startswith("kata_agent_heap"))
    return _Inside(containers, execs, speed, int(found[1]), f"the agent's metrics say {heap or 'nothing of its heap'}")


async def _timed(
    sandbox: Sandbox, action: Callable[[], Awaitable[tuple[float, Callable[[], Awaitable[Any]]]]]
) -> _Timed:
    """Time what gives the moment of its first output, and a way to clear it away."""
    before, began = sandbox.hypervisor.get_hypervisor_metrics(), time.monotonic()
    ended, clear = await action()
    after = sandbox.hypervisor.get_hypervisor_metrics()
    calls = tuple((each.method, each.seconds) for each in sandbox.agent.calls if each.began >= began)
    await clear()
    (earlier,), (later,) = before.vcpus, after.vcpus
    return _Timed(
        ended - began,
        later.instructions - earlier.instructions,
        later.run_seconds - earlier.run_seconds,
        later.wait_seconds - earlier.wait_seconds,
        calls,
    )


async def _new(sandbox: Sandbox) -> tuple[float, Callable[[], Awaitable[Any]]]:
    container = await sandbox.new_container(["echo", MARKER], IMAGE)
    process = await container.start()
    return await _first_output(process), container.remove


async def _exec(container: Container) -> tuple[float, Callable[[], Awaitable[Any]]]:
    process = await container.exec({**container.spec["process"], "args": ["echo", MARKER]})
    return await _first_output(process), process.wait


async def _first_output(process: Any) -> float:
    if not await process.stdout.read():
        raise BenchError(f"the process {process.exec_id} ended without output")
    return time.monotonic()


async def _stream(container: Container) -> float:
    """10⁶ bytes per second, from the first of them."""
    count = STREAM_BYTES >> 20
    args = ["dd", "if=/dev/zero", "bs=1M", f"count={count}"]
    process = await container.exec({**container.spec["process"], "args": args})
    first = received = len(await process.stdout.read())
    began = time.monotonic()
    async for chunk in process.stdout:
        received += len(chunk)
    seconds = time.monotonic() - began
    if received != STREAM_BYTES:
        raise BenchError(f"{STREAM_BYTES - received} of {STREAM_BYTES} bytes of the container's output are missing")
    await process.wait()
    return (received - first) / 1e6 / seconds
