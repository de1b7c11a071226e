"""Hotplug in tables and pictures: the frames of the upcall protocol, what a hotplug consisted of, and ACPI beside it.

Frames are those that :class:`vmm.upcall.UpcallClient` sent and received, records those of :mod:`vmm.hotplug`. All times
are of the host's monotonic clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLUE, GREEN, ORANGE, SKY, Picture, Table, figure_picture
from kata_lab.lab.redraw import widgets_can_run

if TYPE_CHECKING:
    from kata_lab.runtime import Sandbox
    from vmm.hotplug import HotplugRecord
    from vmm.upcall import PassedFrame

_MOST_FRAMES: Final = 40
_SHOWN_BYTES: Final = 24  #: of a frame, whose rest is zeros
_STYLES: Final = ((SKY, "///"), (BLUE, ""), (ORANGE, "..."), (GREEN, "xx"))


def frame_table(frames: Sequence[PassedFrame], since: float = 0.0) -> Table:
    """Frames as they passed: when, which way, decoded, and their first bytes.

    Args:
        frames: oldest first; the last ones are shown.
        since: only those after that moment (``time.monotonic``).
    """
    shown = [each for each in frames if each.seconds >= since][-_MOST_FRAMES:]
    rows = [
        (
            f"{(each.seconds - shown[0].seconds) * 1e3:.1f}",
            "→" if each.direction.name == "REQUEST" else "←",
            each.describe(),
            each.data[:_SHOWN_BYTES].hex(" ", 4),
        )
        for each in shown
    ]
    return Table(("ms", "", "frame", f"the first {_SHOWN_BYTES} of 1024 bytes"), rows, "Between VMM and device manager")


def field_table(frame: PassedFrame) -> Table:
    """A frame, field by field: its offset, its bytes, and what they say."""
    from vmm.upcall import FrameType

    names = {int(each): each.name for each in FrameType}
    layout = [("magic", 0, 4), ("msg_size", 4, 4), ("msg_type", 8, 4), ("msg_flags", 12, 4)]
    at = 16
    if frame.direction.name == "REPLY":
        layout.append(("result", 16, 4))
        at = 20
    size = int(frame.fields.get("msg_size", 0))
    if size:
        layout.append(("body", at, size))
    rows = []
    body = {
        name: value for name, value in frame.fields.items() if name not in dict.fromkeys(each[0] for each in layout)
    }
    for name, offset, length in layout:
        value: object = frame.fields.get(name, "")
        if name == "magic":
            value = f"{value:#010x}"
        elif name == "msg_type":
            value = f"{value}, {names.get(int(str(value)), 'unknown')}"
        elif name == "body":
            value = ", ".join(
                f"{key}={each:#x}" if key in ("base", "size") and isinstance(each, int) else f"{key}={each!r}"
                for key, each in body.items()
            )
        rows.append((str(offset), name, frame.data[offset : offset + length].hex(" "), str(value)))
    return Table(("offset", "field", "bytes, little endian", "says"), rows, frame.describe())


@dataclass(frozen=True, slots=True)
class Steps:
    """What a hotplug consisted of, wherever it was done.

    Attributes:
        name: such as ``upcall, vCPU + 1``.
        parts: what was reached, and seconds from the request to it, in order.
    """

    name: str
    parts: Sequence[tuple[str, float]]

    @classmethod
    def of(cls, record: HotplugRecord, name: str = "") -> Steps:
        """Those of a record, whose last is the answer."""
        parts = [(each.name, each.seconds - record.requested_at) for each in record.steps]
        answered = ("refused" if record.error else "answered", record.answered_at - record.requested_at)
        return cls(name or record.action.name, (*parts, answered))

    @property
    def seconds(self) -> float:
        """From the request to the last step."""
        return self.parts[-1][1] if self.parts else 0.0


def hotplug_timeline(steps: Sequence[Steps], title: str = "From the request to its use in the guest") -> Picture:
    """Hotplugs beneath one another on one axis of time, each with its steps.

    Raises:
        LabError: there is none.
    """
    from matplotlib.figure import Figure

    if not steps:
        raise LabError("there is no hotplug to draw: change something first")
    figure = Figure(figsize=(9, 0.8 + 0.75 * len(steps)))
    axes = figure.subplots()
    whole = max(each.seconds for each in steps) * 1e3 or 1.0
    for row, each in enumerate(steps):
        before = 0.0
        for number, (_, seconds) in enumerate(each.parts):
            colour, hatch = _STYLES[number % len(_STYLES)]
            axes.barh(
                row,
                (seconds - before) * 1e3,
                left=before * 1e3,
                height=0.4,
                color=colour,
                hatch=hatch,
                edgecolor="black",
            )
            before = seconds
        said = "  ›  ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in each.parts)
        axes.annotate(
            f"{each.name}:  {said}", (0, row), xytext=(0, 14), textcoords="offset points", fontsize=8, va="bottom"
        )
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_ylim(len(steps) - 0.5, -0.85)
    axes.set_xlim(0, whole * 1.03)
    axes.set_xlabel("milliseconds since the request")
    axes.set_title(title, loc="left", fontsize=10)
    told = "; ".join(
        f"{each.name}: " + ", ".join(f"{name} after {seconds * 1e3:.1f} ms" for name, seconds in each.parts)
        for each in steps
    )
    return figure_picture(figure, f"{title}. {told}.")


def record_table(records: Sequence[HotplugRecord]) -> Table:
    """Hotplugs in the order in which they were done: what was asked for, how long it took, and what became of it."""
    rows = [
        (
            each.action.name,
            ", ".join(f"{part.name}={getattr(each.action, part.name)}" for part in fields(each.action)),
            f"{(each.answered_at - each.requested_at) * 1e3:.1f}",
            each.error or "done",
        )
        for each in records
    ]
    return Table(("action", "asked for", "ms", "outcome"), rows, "Hotplugs of this VM")


class HotplugControls:
    """Sliders for vCPUs and memory of a running sandbox, moved by hand or by :meth:`set`.

    In a notebook with ipywidgets, showing the object draws sliders; each move is a request, made on the event loop of
    the cell that showed it, and the line beneath says what the guest has since. Elsewhere that line is what is shown.

    Args:
        sandbox: one that runs on this event loop.
        changed: called after each request, with what became of it.
    """

    def __init__(self, sandbox: Sandbox, changed: Callable[[str], object] | None = None) -> None:
        self._sandbox = sandbox
        self._changed = changed
        self._asked: set[Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._box: Any = None
        self._line: Any = None
        self._sliders: tuple[Any, ...] = ()
        self._following = False
        self.status = self._told()

    def _told(self) -> str:
        size = self._sandbox.size
        return f"{size.vcpus} vCPUs and {size.memory_mib} MiB"

    async def set(self, vcpus: int | None = None, memory_mib: int | None = None) -> None:
        """Make a request as a slider does; what became of it is in :attr:`status`, whatever it was."""
        try:
            await self._sandbox.resize(vcpus, memory_mib)
            self.status = f"the guest has {self._told()}"
        except KataLabError as error:
            self.status = f"{error}; the guest has {self._told()}"
        if self._line is not None:
            self._line.value = self.status
            self._follow()
        if self._changed is not None:
            self._changed(self.status)

    async def settled(self) -> None:
        """Wait until every request that a slider made is answered."""
        while self._asked:
            await asyncio.wait([asyncio.wrap_future(each) for each in tuple(self._asked)])

    def widget(self) -> Any:
        """The sliders.

        Raises:
            LabError: this is no notebook with ipywidgets.
        """
        if not widgets_can_run():
            raise LabError("sliders need a notebook and the package ipywidgets; use set() instead")
        if self._box is None:
            self._loop = asyncio.get_running_loop()
            self._box = self._make()
        return self._box

    def _make(self) -> Any:
        import ipywidgets

        size, most = self._sandbox.size, self._sandbox.most
        wide = {"description_width": "8em"}
        common = {"continuous_update": False, "style": wide, "layout": {"width": "30em"}}
        vcpus = ipywidgets.IntSlider(size.vcpus, 1, most.vcpus, description="vCPUs", **common)
        memory = ipywidgets.IntSlider(
            size.memory_mib, min(64, size.memory_mib), most.memory_mib, step=16, description="memory, MiB", **common
        )
        vcpus.observe(lambda change: self._begin(vcpus=change["new"]), "value")
        memory.observe(lambda change: self._begin(memory_mib=change["new"]), "value")
        self._sliders = (vcpus, memory)
        self._line = ipywidgets.Label(self.status)
        return ipywidgets.VBox([vcpus, memory, self._line])

    def _begin(self, **wish: int) -> None:
        """A slider was moved: on the kernel's main thread, or on that of a subshell."""
        if self._following or self._loop is None:
            return
        self._line.value = "asking the guest…"
        asked = asyncio.run_coroutine_threadsafe(self.set(**wish), self._loop)
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)

    def _follow(self) -> None:
        """Let the sliders stand where the guest is, which is no request."""
        size = self._sandbox.size
        self._following = True
        try:
            for slider, value in zip(self._sliders, (size.vcpus, size.memory_mib), strict=True):
                slider.value = value
        finally:
            self._following = False

    def __repr__(self) -> str:
        return self.status

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        if not widgets_can_run():
            return {"text/plain": self.status}
        return self.widget()._repr_mimebundle_(include=include, exclude=exclude)
