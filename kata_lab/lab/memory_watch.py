"""A sandbox's memory over time: what the guest was given, what its process on the host has, what its containers use.

A sample is taken at each tick of the clock, by the sandbox's own event loop: what the guest has is the runtime's word,
what its process has is the PSS of that which holds the VM (proc(5), ``smaps_rollup``; fused, that is this process with
everything else in it), and what containers use is the agent's ``StatsContainer``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.lab.cells import close_with_cell
from kata_lab.lab.live_view import LiveView
from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLACK, BLUE, GREEN, VERMILION, Picture, Table, drawing

if TYPE_CHECKING:
    from kata_lab.runtime import Sandbox

REMEMBERED: Final = 600  #: samples
STATS_SECONDS: Final = 2.0  #: that the agent may take to say what containers use
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 860, 300, 60, 40, 160, 40
_ROWS: Final = 20


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory at one moment, in MiB.

    Attributes:
        seconds: since the first sample.
        guest: what the guest has.
        host: what the process on the host has that holds the VM.
        containers: what containers use.
    """

    seconds: float
    guest: float
    host: float
    containers: float


#: of a sample → what it is called, its colour, and how its line is dashed
_CURVES: Final = {
    "guest": ("the guest has", BLUE, ""),
    "host": ("its process has", VERMILION, "8 3"),
    "containers": ("containers use", GREEN, "2 3"),
}


def memory_over_time(samples: Sequence[MemorySample]) -> Picture:
    """Memory as three curves over time.

    Raises:
        LabError: there is no sample yet.
    """
    if not samples:
        raise LabError("there is no memory to draw yet: the first sample comes in a moment")
    span = max(samples[-1].seconds, 1.0)
    most = max(max(each.guest, each.host, each.containers) for each in samples) * 1.1
    body = [_axes(span, most)]
    ends = []
    for name, (label, colour, dash) in _CURVES.items():
        points = [(_x(each.seconds, span), _y(getattr(each, name), most)) for each in samples]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*points, points[-1]])
        body.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2.5' stroke-dasharray='{dash}'/>"
        )
        x, y = points[-1]
        body.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='{colour}' stroke='{BLACK}'/>")
        ends.append((y, f"{label} {getattr(samples[-1], name):.0f}"))
    body.append(_labels(_x(samples[-1].seconds, span) + 8, ends))
    last = samples[-1]
    said = f"after {last.seconds:.0f} s the guest has {last.guest:.0f} MiB, its process on the host {last.host:.0f} MiB"
    return drawing(
        "".join(body),
        _WIDTH,
        _HEIGHT,
        f"Memory of the sandbox over time: {said}, and containers use {last.containers:.1f} MiB.",
    )


def _x(seconds: float, span: float) -> float:
    return _LEFT + seconds / span * (_WIDTH - _LEFT - _RIGHT)


def _y(mib: float, most: float) -> float:
    return _HEIGHT - _BOTTOM - mib / most * (_HEIGHT - _TOP - _BOTTOM)


def _labels(x: float, ends: Sequence[tuple[float, str]]) -> str:
    """What each curve is, at its end and from the top down, so that no label covers another."""
    drawn, free = [], 0.0
    for y, label in sorted(ends):
        free = max(y, free)
        drawn.append(f"<text x='{x:.1f}' y='{free + 4:.1f}'>{label}</text>")
        free += 15
    return "".join(drawn)


def _axes(span: float, most: float) -> str:
    drawn = [f"<text x='{_LEFT}' y='22' font-weight='bold'>Memory of the sandbox, MiB</text>"]
    right = _WIDTH - _RIGHT
    step = next(each for each in (16, 32, 64, 128, 256, 512, 1024, 4096, 1 << 20) if most / each <= 6)
    for mib in range(0, int(most) + 1, step):
        y = _y(mib, most)
        drawn.append(f"<line x1='{_LEFT}' y1='{y:.1f}' x2='{right}' y2='{y:.1f}' stroke='#dddddd'/>")
        drawn.append(f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{mib}</text>")
    for part in range(5):
        seconds = span * part / 4
        x = _x(seconds, span)
        drawn.append(f"<text x='{x:.1f}' y='{_HEIGHT - 18}' text-anchor='middle'>{seconds:.3g} s</text>")
    return "".join(drawn)


class MemoryWatch:
    """Memory of a running sandbox, sampled until it stops; a context manager, which shows itself as a live picture.

    Args:
        sandbox: which runs on this event loop.
        every: seconds between two samples.

    Raises:
        LabError: there is no event loop.
    """

    def __init__(self, sandbox: Sandbox, every: float = 1.0) -> None:
        self._sandbox = sandbox
        self._every = every
        self._began = time.monotonic()
        self._samples: deque[MemorySample] = deque(maxlen=REMEMBERED)
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise LabError("watching memory needs the sandbox's event loop: begin in a notebook or coroutine") from None
        self._view = LiveView(lambda: memory_over_time(self.samples))
        self._task = self._loop.create_task(self._watch(), name="memory-watch")
        close_with_cell(self)

    @property
    def samples(self) -> tuple[MemorySample, ...]:
        """The last ones, oldest first."""
        return tuple(self._samples)

    @property
    def table(self) -> Table:
        """The last samples in rows."""
        rows = [
            (f"{each.seconds:.1f}", *(f"{value:.1f}" for value in (each.guest, each.host, each.containers)))
            for each in self.samples[-_ROWS:]
        ]
        return Table(("seconds", *(label for label, _, _ in _CURVES.values())), rows, "Memory of the sandbox, MiB")

    async def sample(self) -> MemorySample:
        """Take one now."""
        at = time.monotonic() - self._began
        # Reading how much a process has walks its page tables.
        metrics = await asyncio.to_thread(self._sandbox.hypervisor.get_hypervisor_metrics)
        used = 0
        if not self._sandbox.paused:
            async with asyncio.timeout(STATS_SECONDS):
                for container in tuple(self._sandbox.containers.values()):
                    used += _used(await container.stats())
        taken = MemorySample(at, float(self._sandbox.size.memory_mib), metrics.memory.pss / 2**20, used / 2**20)
        self._samples.append(taken)
        self._view.changed()
        return taken

    def close(self) -> None:
        """Take no more; a second call does nothing."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._view.close()

    async def _watch(self) -> None:
        while str(self._sandbox.state) == "running":
            # A container that has just gone, or an agent that is too busy: the next sample tells.
            with contextlib.suppress(KataLabError, TimeoutError):
                await self.sample()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._sandbox.stopped.wait()

    def __enter__(self) -> MemoryWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._view)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return self._view._repr_mimebundle_(include, exclude)


def _used(stats: dict[str, Any]) -> int:
    usage = ((stats.get("cgroup_stats") or {}).get("memory_stats") or {}).get("usage") or {}
    return int(usage.get("usage") or 0)
