"""Arrangements of runtime and VMM in pictures: processes and threads, one call on its way, latencies, memory, crashes.

What is shown is read from outside, of runtimes in processes of their own (:mod:`kata_lab.bench.fused_runtime`): process
trees by psutil, memory from ``/proc/PID/smaps`` (proc(5)). The steps of a call were noted by the processes themselves,
on the clock that all of them have in common.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import psutil

from kata_lab.bench.fused_account import parts
from kata_lab.bench.fused_call import HANDED_OVER, Step, spans
from kata_lab.bench.fused_call import follow_resize as follow_resize
from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLACK, BLUE, GREEN, ORANGE, SKY, YELLOW, Picture, Table, drawing, figure_picture

if TYPE_CHECKING:
    from kata_lab.bench.fused_account import Memory
    from kata_lab.bench.fused_runtime import RuntimeProcess

MAIN: Final = "main thread"
OTHER: Final = "another thread"
_COLOURS: Final = {"runtime": SKY, "vmm": ORANGE, "fs": YELLOW, "qemu": ORANGE}
_DOES: Final = {
    "runtime": "the runtime",
    "vmm": "the VMM, with the guest",
    "fs": "shared directories",
    "qemu": "QEMU, with the guest",
}
_ALL: Final = "runtime, VMM with guest, shared directories"
_KINDS: Final = {
    "guest": ("the guest's memory", BLUE, ""),
    "anonymous": ("heaps, stacks, made code", ORANGE, "///"),
    "files": ("programs, libraries", GREEN, "..."),
}
_SIDES: Final = ((BLUE, ""), (ORANGE, "///"), (GREEN, "..."))
_HALO: Final = "stroke='#f4f4f4' stroke-width='4' paint-order='stroke'"
_BOX: Final = 250
_GAP: Final = 26
_LINE: Final = 16


# Processes.


@dataclass(frozen=True, slots=True)
class SandboxProcess:
    """A process of a sandbox.

    Attributes:
        name: its part: ``runtime``, ``vmm``, ``fs``, ``qemu``.
        pid: process id.
        parent: that of the process that started it.
        threads: names of its threads, as far as the runtime knows them.
    """

    name: str
    pid: int
    parent: int
    threads: tuple[str, ...]


def read_processes(runtime: RuntimeProcess) -> list[SandboxProcess]:
    """The processes of a runtime and its sandbox as they are now, the runtime's first."""
    known: dict[str, str] = runtime.ask("threads")["threads"]
    found = []
    for part in parts(runtime.pid):
        process = psutil.Process(part.pid)
        # The main thread first: numbers begin anew at some point, so that another one's may be lower.
        numbers = sorted((each.id for each in process.threads()), key=lambda number: (number != part.pid, number))
        threads = [MAIN if number == part.pid else known.get(str(number), OTHER) for number in numbers]
        found.append(SandboxProcess(part.name, part.pid, process.ppid(), tuple(threads)))
    return found


def process_tree(processes: Sequence[SandboxProcess], title: str) -> Picture:
    """Processes as boxes, with their threads inside, and an arrow from each to those that it started.

    Args:
        processes: of one sandbox, the first of them being the root.
        title: of the picture, such as the arrangement's name.

    Raises:
        LabError: there are none.
    """
    if not processes:
        raise LabError("there is no process to draw: start a sandbox first")
    root, *children = processes
    rows = max(len(each.threads) for each in processes)
    high = 44 + _LINE * rows + 8
    width = _BOX * len(processes) + _GAP * 2 * len(children) + 20
    body = [
        _text(10, 16, f"{title}: {_count(processes)}", "font-weight='bold'"),
        "<defs><marker id='tip' markerWidth='9' markerHeight='9' refX='8' refY='4' orient='auto'>"
        "<path d='M0,0 L8,4 L0,8 z'/></marker></defs>",
    ]
    order = [root, *children]
    for number, process in enumerate(order):
        x = 10 + number * (_BOX + 2 * _GAP)
        does = _DOES.get(process.name, "a part of the sandbox") if children else _ALL
        body.append(_process_box(process, does, x, 28, high))
        if number:
            # Beneath the boxes, since a runtime may have started all of them.
            y = 28 + high + 14
            start = 10 + order.index(_parent(process, order)) * (_BOX + 2 * _GAP) + _BOX / 2 - 10 * number
            body.append(
                f"<path d='M{start:.0f},{28 + high} V{y} H{x + _BOX / 2:.0f} V{28 + high + 1}' fill='none'"
                f" stroke='{BLACK}' marker-end='url(#tip)'/>"
            )
    said = "; ".join(
        f"{each.name} (process {each.pid}) with the threads {', '.join(each.threads)}"
        + ("" if each is root else f", started by {_parent(each, order).name}")
        for each in order
    )
    return drawing("".join(body), width, 28 + high + 24, f"{title}, {_count(processes)}: {said}.")


def _count(processes: Sequence[SandboxProcess]) -> str:
    threads = sum(len(each.threads) for each in processes)
    return f"{len(processes)} process{'es' if len(processes) > 1 else ''}, {threads} threads"


def _parent(process: SandboxProcess, order: Sequence[SandboxProcess]) -> SandboxProcess:
    return next((each for each in order if each.pid == process.parent), order[0])


def _process_box(process: SandboxProcess, does: str, x: int, y: int, high: int) -> str:
    colour = _COLOURS.get(process.name, "#dddddd")
    lines = [
        f"<rect x='{x}' y='{y}' width='{_BOX}' height='{high}' fill='white' stroke='{BLACK}' stroke-width='2'/>"
        f"<rect x='{x}' y='{y}' width='{_BOX}' height='34' fill='{colour}' stroke='{BLACK}'/>",
        _text(x + 8, y + 15, f"{process.name}  {process.pid}", "font-weight='bold'"),
        _text(x + 8, y + 29, does, "font-size='10'"),
    ]
    for row, name in enumerate(process.threads):
        lines.append(_text(x + 18, y + 44 + _LINE * row + 8, f"› {name}", "font-family='monospace' font-size='11'"))
    return "".join(lines)


def process_table(processes: Sequence[SandboxProcess], title: str) -> Table:
    """The same as a table: part, number, parent, threads."""
    rows = [(each.name, str(each.pid), str(each.parent), ", ".join(each.threads)) for each in processes]
    return Table(("part", "process", "parent", "threads"), rows, f"{title}: {_count(processes)}")


# One call.


def call_path(steps: Sequence[Step], title: str, split: bool) -> Picture:
    """A call as a sequence: lanes for the runtime, the VM's event loop and the guest, time going down step by step.

    Args:
        steps: in the order of their times.
        title: of the picture.
        split: whether runtime and VMM are two processes, with a socket between them.

    Raises:
        LabError: there are none.
    """
    if not steps:
        raise LabError("there is no step to draw: follow a call first")
    lanes = {"runtime": 150, "answers": 290, "vmm": 540, "guest": 740}
    # In one process the answer arrives on the VM's own thread.
    place_of = {"answers": "answers" if split else "vmm"}
    height = 74 + 26 * len(steps) + 12
    body = [_text(10, 16, title, "font-weight='bold'"), _call_frames(height, split)]
    heads = [("runtime", "runtime's event loop"), ("vmm", "VM's event loop"), ("guest", "guest")]
    heads += [("answers", "reads the socket")] if split else []
    for lane, name in heads:
        x = lanes[lane]
        body.append(f"<line x1='{x}' y1='58' x2='{x}' y2='{height - 8}' stroke='{BLACK}' stroke-dasharray='3 3'/>")
        body.append(_text(x, 52, name, "text-anchor='middle'"))
    points = [(lanes[place_of.get(step.place, step.place)], 80 + 26 * row) for row, step in enumerate(steps)]
    # Who has handed a call over is beside it from then on: at the same time it may be elsewhere already.
    way = [point for point, step in zip(points, steps, strict=True) if step.what != HANDED_OVER]
    asking = [point for point, step in zip(points, steps, strict=True) if step.what in (steps[0].what, HANDED_OVER)]
    for line in (way, asking):
        drawn = " ".join(f"{x},{y}" for x, y in line)
        body.append(f"<polyline points='{drawn}' fill='none' stroke='{BLUE}' stroke-width='2'/>")
    for (x, y), step in zip(points, steps, strict=True):
        body.append(f"<circle cx='{x}' cy='{y}' r='5' fill='{ORANGE}' stroke='{BLACK}'/>")
        body.append(_text(x + 10, y + 4, step.what, f"font-size='11' {_HALO}"))
        body.append(_text(64, y + 4, f"{step.microseconds:,.0f} µs", "text-anchor='end' font-size='11'"))
    said = "; ".join(f"after {each.microseconds:,.0f} µs {each.place}: {each.what}" for each in steps)
    return drawing("".join(body), 900, height, f"{title}. {said}.")


def _call_frames(height: int, split: bool) -> str:
    """A frame for each process, and between them what carries a call."""
    frames = ((72, 322, "runtime process"), (450, 210, "VMM process")) if split else ((72, 588, "one process"),)
    drawn = [
        f"<rect x='{x}' y='26' width='{wide}' height='{height - 30}' fill='#f4f4f4' stroke='{BLACK}'/>"
        + _text(x + 6, 38, name, "font-size='10'")
        for x, wide, name in frames
    ]
    drawn.append(
        _text(422 if split else 345, 52, "socket" if split else "queue", "text-anchor='middle' font-size='10'")
    )
    return "".join(drawn) + f"<rect x='672' y='26' width='222' height='{height - 30}' fill='none' stroke='{BLACK}'/>"


def span_table(calls: Mapping[str, Sequence[Step]]) -> Table:
    """How calls divide, side by side: the way there, what VMM and guest did, the way back; in microseconds."""
    rows = []
    for name, steps in calls.items():
        told = spans(steps)
        whole = sum(told.values())
        way = (told["there"] + told["back"]) / whole
        rows.append((name, *(f"{each:,.0f}" for each in told.values()), f"{whole:,.0f}", f"{way:.1%}"))
    return Table(
        ("", "there", "work", "back", "all of it, µs", "on the way"), rows, "One more vCPU: where the time went"
    )


# Latencies.


def latency_histograms(
    latencies: Mapping[str, Sequence[float]], title: str = "One action, asked and answered"
) -> Picture:
    """Latencies of the same action over several arrangements, in microseconds, on one axis that counts in decades.

    Raises:
        LabError: one of them has no values.
    """
    import numpy
    from matplotlib.figure import Figure

    if not latencies or not all(latencies.values()):
        raise LabError("there is nothing to draw: time an action over each arrangement first")
    everything = [value for values in latencies.values() for value in values]
    bins = numpy.geomspace(min(everything), max(everything) * 1.01, 60)
    figure = Figure(figsize=(9, 1.2 + 1.3 * len(latencies)))
    rows = figure.subplots(len(latencies), 1, sharex=True, squeeze=False)
    said = []
    for number, (name, values) in enumerate(latencies.items()):
        axes = rows[number][0]
        colour, hatch = _SIDES[number % len(_SIDES)]
        ordered, median = sorted(values), statistics.median(values)
        late = ordered[-(-99 * len(ordered) // 100) - 1]
        axes.hist(values, bins=bins, color=colour, hatch=hatch, edgecolor="black", linewidth=0.5)
        axes.axvline(median, color="black", linewidth=1.5)
        axes.set_title(f"{name}: median {median:,.1f} µs, 99th percentile {late:,.1f} µs", loc="left", fontsize=9)
        axes.set_xscale("log")
        axes.set_yticks([])
        said.append(f"{name}: {len(values)} times, median {median:,.1f} µs, 99th percentile {late:,.1f} µs")
    rows[-1][0].set_xlabel("microseconds, each mark ten times the one before")
    figure.suptitle(title, x=0.125, ha="left", fontsize=10)
    figure.tight_layout()
    return figure_picture(figure, f"{title}. {'; '.join(said)}.")


# Memory.


def memory_chart(memories: Mapping[str, Memory]) -> Picture:
    """Memory of each arrangement as one bar, in parts: what it is for; beneath it, which process has how much.

    Raises:
        LabError: there is none.
    """
    from matplotlib.figure import Figure

    if not memories:
        raise LabError("there is no memory to draw: start a sandbox first")
    figure = Figure(figsize=(9, 0.9 + 0.85 * len(memories)))
    axes = figure.subplots()
    said = []
    for row, (name, memory) in enumerate(memories.items()):
        left = 0.0
        for kind, (label, colour, hatch) in _KINDS.items():
            size = memory.kinds[kind] / 1e6
            axes.barh(
                row,
                size,
                left=left,
                height=0.42,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                label=label if row == 0 else None,
            )
            left += size
        each = ", ".join(f"{part} {count / 1e6:.0f}" for part, count in memory.processes.items())
        axes.annotate(
            f"{name}: {memory.total / 1e6:.0f} MB ({each})",
            (0, row),
            xytext=(0, 15),
            textcoords="offset points",
            fontsize=9,
        )
        kinds = ", ".join(f"{_KINDS[kind][0]} {count / 1e6:.0f} MB" for kind, count in memory.kinds.items())
        said.append(f"{name}: {memory.total / 1e6:.0f} MB, of which {kinds}; by process {each}")
    axes.set_yticks([])
    axes.set_ylim(len(memories) - 0.6, -0.75)
    axes.set_xlabel("MB (PSS: a page that n processes share counts 1/n for each)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=3, fontsize=8, frameon=False)
    return figure_picture(figure, f"Memory of one sandbox. {'. '.join(said)}.")


# Crashes.


@dataclass(frozen=True, slots=True)
class Crash:
    """A process that was killed, and what came of it.

    Attributes:
        arrangement: of its sandbox.
        killed: its part.
        noticed_by: who found out.
        notice_ms: after how many milliseconds.
        cleanup_ms: after how many nothing was left.
        survivors: parts whose processes went on.
        reason: what the runtime says of it, if it survived.
    """

    arrangement: str
    killed: str
    noticed_by: str
    notice_ms: float
    cleanup_ms: float
    survivors: tuple[str, ...]
    reason: str = ""


def crash(runtime: RuntimeProcess, name: str) -> Crash:
    """Kill a process of a running sandbox with SIGKILL, and see who notices and who survives.

    Args:
        runtime: whose sandbox runs.
        name: the part to be killed; ``runtime`` for itself.
    """
    before = {part.name: part.pid for part in runtime.parts}
    if name == "runtime":
        ended = runtime.kill()
        return Crash(runtime.arrangement, name, "its client", ended.notice_ms, ended.cleanup_ms, ())
    told: dict[str, Any] = runtime.crash(name)
    after = {part.pid for part in runtime.parts}
    survivors = tuple(part for part, pid in before.items() if pid in after)
    return Crash(
        runtime.arrangement, name, "the runtime", told["notice_ms"], told["cleanup_ms"], survivors, told["reason"]
    )


def crash_table(crashes: Sequence[Crash]) -> Table:
    """Crashes beneath one another."""
    rows = [
        (
            each.arrangement,
            each.killed,
            f"{each.noticed_by}, {each.notice_ms:.0f} ms",
            f"{each.cleanup_ms:.0f} ms",
            ", ".join(each.survivors) or "nothing",
            each.reason,
        )
        for each in crashes
    ]
    header = ("arrangement", "killed", "noticed by, after", "all cleared after", "survives", "the runtime says")
    return Table(header, rows, "SIGKILL to one process")


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}' {more}>{html.escape(text)}</text>"
