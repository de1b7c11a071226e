"""A boot in pictures, from a VM's trace: milestones on a time line, and exits by cause.

Times are host seconds since the VM's start. What is drawn is what :class:`vmm.trace.Trace` recorded; a VM without
``trace=True`` has milestones but no exits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, Picture, Table, figure_picture

if TYPE_CHECKING:
    from vmm.trace import Activity, ExitCount, Milestone, Trace

#: kind of exit → colour and hatch; a kind that is not here gets the last pair.
_LOOKS: Final[Mapping[str, tuple[str, str]]] = {
    "mmio read": (SKY, ""),
    "mmio write": (ORANGE, "///"),
    "sbi call": (GREEN, "..."),
    "halted": (PURPLE, "xx"),
    "interrupted": (BLUE, "--"),
}
_OTHER: Final = (VERMILION, "oo")
_MOST_BARS: Final = 14
_SLICES: Final = 60


def milestone_table(trace: Trace) -> Table:
    """The milestones in the order in which they were reached."""
    rows = [(each.name, f"{each.seconds:.3f}", f"{each.instructions / 1e6:,.1f}") for each in trace.milestones]
    return Table(("milestone", "seconds", "million instructions"), rows, "Milestones of the boot")


def boot_timeline(trace: Trace) -> Picture:
    """When each milestone was reached, and, where exits were traced, how many of them there were until the last one.

    Raises:
        LabError: the VM has not started.
    """
    from matplotlib.figure import Figure

    milestones, activity = trace.milestones, trace.activity
    if not milestones:
        raise LabError("there is no boot to draw: start the VM first")
    # A guest that was used for an hour has booted in its first seconds all the same.
    end = max(milestones[-1].seconds * 1.08, 1e-3)
    activity = tuple(each for each in activity if each.seconds <= end)
    figure = Figure(figsize=(9, 2.4 + 0.28 * len(milestones)))
    shown = figure.subplots(
        2 if activity else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(activity)]
    )
    upper = shown[0][0]
    _draw_milestones(upper, milestones, end)
    if activity:
        _draw_activity(shown[1][0], activity, end)
    shown[-1][0].set_xlabel("host seconds since the start")
    figure.subplots_adjust(hspace=0.08)
    said = "; ".join(
        f"{each.name} after {each.seconds:.2f} s and {each.instructions / 1e6:.0f} million instructions"
        for each in milestones
    )
    exits = sum(each.count for each in activity)
    return figure_picture(figure, f"Time line of the boot: {said}. {exits:,} exits were counted meanwhile.")


def _draw_milestones(axes: Any, milestones: Sequence[Milestone], end: float) -> None:
    for row, each in enumerate(milestones):
        axes.plot(each.seconds, row, marker="o", color=BLUE)
        left = each.seconds < 0.55 * end
        axes.annotate(
            f"{each.name}  {each.seconds:.2f} s · {each.instructions / 1e6:,.0f} M instructions",
            (each.seconds, row),
            xytext=(8 if left else -8, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            zorder=3,
        )
    axes.set_ylim(len(milestones) - 0.4, -0.6)
    axes.set_xlim(-0.01 * end, end * 1.02)
    axes.set_yticks([])
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_title("Milestones of the boot", loc="left", fontsize=10)


def _draw_activity(axes: Any, activity: Sequence[Activity], end: float) -> None:
    width = end / _SLICES
    counts: dict[str, list[int]] = defaultdict(lambda: [0] * _SLICES)
    for each in activity:
        counts[each.kind][min(int(each.seconds / width), _SLICES - 1)] += each.count
    lefts, bottom = [number * width for number in range(_SLICES)], [0] * _SLICES
    for kind, heights in sorted(counts.items(), key=lambda item: -sum(item[1])):
        colour, hatch = _LOOKS.get(kind, _OTHER)
        axes.bar(
            lefts,
            heights,
            width,
            bottom=bottom,
            align="edge",
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.3,
            label=kind,
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel(f"exits per {width * 1e3:.0f} ms")
    axes.legend(fontsize=8, ncols=len(counts), loc="upper left", frameon=False)
    axes.set_ylim(0, max(bottom) * 1.25)


def exits_chart(trace: Trace) -> Picture:
    """How often guest code stopped for each cause, most often first; the bars' scale is logarithmic.

    Raises:
        LabError: no exit was counted.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    exits = sorted(trace.exits, key=lambda each: -each.count)
    if not exits:
        raise LabError("no exit was counted: configure the VM with trace=True, start it, and draw again")
    shown = exits[:_MOST_BARS]
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(shown)))
    axes = figure.subplots()
    for row, each in enumerate(shown):
        colour, hatch = _LOOKS.get(each.kind, _OTHER)
        axes.barh(row, each.count, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
        axes.text(each.count * 1.1, row, _cost(each), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{each.kind}  {each.name}".strip() for each in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_xlim(0.7, shown[0].count * 30)
    axes.set_xlabel("exits (logarithmic scale)")
    kinds = dict.fromkeys(each.kind for each in shown)
    looks = [(kind, *_LOOKS.get(kind, _OTHER)) for kind in kinds]
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="black", label=kind) for kind, colour, hatch in looks]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    axes.set_title(f"{sum(each.count for each in exits):,} exits by cause", loc="left", fontsize=10)
    said = "; ".join(f"{each.kind} {each.name}".strip() + f" {each.count:,} times" for each in shown)
    return figure_picture(figure, f"Exits by cause, most often first: {said}.")


def _cost(each: ExitCount) -> str:
    if each.kind == "halted":
        return f"{each.count:,}, asleep {each.seconds:.2f} s"
    return f"{each.count:,} × {each.seconds / each.count * 1e6:.0f} µs"
