"""A container in tables and pictures: its image's parts, its sandbox's start, and the agent's calls as they pass.

Calls are those of Kata's agent API that :class:`kata_lab.agent.client.AgentClient` made. What the agent does for each
is what its code says (``kata_lab/guest/agent/containers.py``); the guest is not asked.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import BLACK, BLUE, GREEN, ORANGE, SKY, YELLOW, Picture, Table, drawing, figure_picture

if TYPE_CHECKING:
    from kata_lab.agent.client import AgentCall, AgentClient
    from kata_lab.oci import ImageHandle

#: call → what the agent has crun do for it
CRUN: Final[Mapping[str, str]] = {
    "CreateContainer": "create",
    "ExecProcess": "exec",
    "UpdateContainer": "update",
}
#: call → what the agent does for it itself
_DOES: Final[Mapping[str, str]] = {
    "StartContainer": "lets the waiting process go on",
    "WaitProcess": "answers when it has ended",
    "ReadStdout": "answers when there is something",
    "ReadStderr": "answers when there is something",
    "PauseContainer": "freezes the control group",
    "ResumeContainer": "thaws the control group",
    "RemoveContainer": "ends what is left, unmounts",
}
_DIGEST: Final = 19  # characters of one that are shown, ``sha256:`` and twelve digits
_MOST_WORDS: Final = 52
_MOST_CALLS: Final = 40
_LANES: Final = (90, 500, 750)
_BORDER: Final = 425
_ROW: Final = 30
_TOP: Final = 62
_WIDTH: Final = 830


# Images.


def layer_table(image: ImageHandle) -> Table:
    """The documents and layers of an image, each by its digest: what leads to what, from the manifest down."""
    manifest = image.manifest
    rows = [("manifest", image.digest[:_DIGEST], f"{image.descriptor.size:,}", image.descriptor.media_type)]
    rows.append(
        ("configuration", manifest.config.digest[:_DIGEST], f"{manifest.config.size:,}", _kind(manifest.config))
    )
    for number, layer in enumerate(manifest.layers, 1):
        rows.append((f"layer {number}", layer.digest[:_DIGEST], f"{layer.size:,}", _kind(layer)))
    return Table(("part", "digest", "bytes", "type"), rows, f"The image {image.reference}, for {image.architecture}")


def _kind(descriptor: Any) -> str:
    return str(descriptor.media_type)


# The start of a sandbox.


def sandbox_timeline(timeline: Sequence[tuple[str, float]]) -> Picture:
    """When a sandbox's start came to each moment: the part of the time before each is a bar.

    Args:
        timeline: names and seconds, in order (:attr:`kata_lab.runtime.Sandbox.timeline`).

    Raises:
        LabError: nothing happened yet.
    """
    from matplotlib.figure import Figure

    if not timeline:
        raise LabError("there is no start to draw: start the sandbox first")
    figure = Figure(figsize=(9, 1.0 + 0.34 * len(timeline)))
    axes = figure.subplots()
    whole, before = timeline[-1][1] or 1e-3, 0.0
    for row, (name, seconds) in enumerate(timeline):
        colour, hatch = (BLUE, "") if row % 2 else (SKY, "///")
        axes.barh(row, seconds - before, left=before, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
        said = f"{name}  +{(seconds - before) * 1e3:.0f} ms"
        left = seconds < 0.6 * whole
        axes.annotate(
            said,
            (seconds if left else before, row),
            xytext=(6 if left else -6, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
            fontsize=9,
        )
        before = seconds
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(0, whole * 1.02)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds since start() was called")
    axes.set_title(f"From nothing to {timeline[-1][0]}: {whole:.2f} s", loc="left", fontsize=10)
    told = "; ".join(f"{name} after {seconds:.2f} s" for name, seconds in timeline)
    return figure_picture(figure, f"Start of the sandbox: {told}.")


# The agent's calls.


@contextmanager
def agent_calls(agent: AgentClient, tell: Callable[[str], object] | None = None) -> Iterator[list[AgentCall]]:
    """The calls to an agent that end while the block runs; whoever listened before still hears of them.

    Args:
        agent: of a sandbox.
        tell: called with a line for each, as it ends; such as ``print``.
    """
    calls: list[AgentCall] = []
    before = agent.on_call

    def note(call: AgentCall) -> None:
        calls.append(call)
        if tell is not None:
            tell(f"{call.method:16} {call.seconds * 1e3:6.1f} ms  {_words(call.request)}")
        if before is not None:
            before(call)

    agent.on_call = note
    try:
        yield calls
    finally:
        agent.on_call = before


def call_table(calls: Sequence[AgentCall]) -> Table:
    """Calls in the order in which they were made: when, how long until the answer, and what was asked."""
    ordered = _ordered(calls)
    rows = [
        (
            f"{(each.began - ordered[0].began) * 1e3:.0f}",
            f"{each.seconds * 1e3:.1f}",
            each.method,
            _words(each.request),
            each.status.name,
        )
        for each in ordered
    ]
    return Table(("ms", "took, ms", "call", "request", "status"), rows, "Calls to the agent")


def call_diagram(calls: Sequence[AgentCall]) -> Picture:
    """Calls as a sequence: from the runtime on the host to the agent in the guest, and from there to ``crun``.

    Raises:
        LabError: there is none.
    """
    ordered = _ordered(calls)
    if not ordered:
        raise LabError("there is no call to draw: let something happen in the sandbox first")
    shown, rest = ordered[:_MOST_CALLS], len(ordered) - _MOST_CALLS
    height = _TOP + _ROW * len(shown) + 24
    body = [_heads(height), _arrow_tips()]
    for row, each in enumerate(shown):
        body.append(_call(each, _TOP + _ROW * (row + 1) - 8))
    if rest > 0:
        body.append(_text(_LANES[0] + 10, height - 8, f"and {rest} more"))
    said = "; ".join(_said(each) for each in shown) + (f"; and {rest} more" if rest > 0 else "")
    return drawing("".join(body), _WIDTH, height, f"Calls from the runtime to the agent, in order: {said}.")


def _ordered(calls: Sequence[AgentCall]) -> list[AgentCall]:
    return sorted(calls, key=lambda each: each.began)


def _heads(height: int) -> str:
    lanes = (("runtime", "on the host", SKY), ("agent", "in the guest", YELLOW), ("crun", "in the guest", ORANGE))
    parts = [
        f"<rect x='{_BORDER}' y='0' width='{_WIDTH - _BORDER}' height='{height}' fill='#f4f4f4'/>"
        f"<line x1='{_BORDER}' y1='0' x2='{_BORDER}' y2='{height}' stroke='{BLACK}' stroke-dasharray='2 4'/>"
        + _text(_BORDER + 6, 12, "the VM's border: ttrpc over vsock", "font-size='10'")
    ]
    for x, (name, where, colour) in zip(_LANES, lanes, strict=True):
        parts.append(
            f"<line x1='{x}' y1='50' x2='{x}' y2='{height}' stroke='{BLACK}' stroke-width='1'/>"
            f"<rect x='{x - 60}' y='18' width='120' height='34' fill='{colour}' stroke='{BLACK}'/>"
            + _text(x, 33, name, "text-anchor='middle' font-weight='bold'")
            + _text(x, 46, where, "text-anchor='middle' font-size='10'")
        )
    return "".join(parts)


def _arrow_tips() -> str:
    tip = "<path d='M0,0 L8,4 L0,8 z'/>"
    return (
        f"<defs><marker id='tip' markerWidth='9' markerHeight='9' refX='8' refY='4' orient='auto'>{tip}</marker></defs>"
    )


def _call(call: AgentCall, y: int) -> str:
    host, agent, crun = _LANES
    good = call.status.name == "OK"
    words = f"{call.method}  {_words(call.request, _MOST_WORDS - len(call.method))}"
    parts = [
        f"<line x1='{host}' y1='{y}' x2='{agent}' y2='{y}' stroke='{BLACK}' marker-end='url(#tip)'/>",
        _text(host + 8, y - 5, words, "font-size='11'"),
        _text(host - 6, y + 4, f"{call.seconds * 1e3:.0f} ms", "text-anchor='end' font-size='11'"),
    ]
    if not good:
        parts.append(_text(agent + 8, y + 4, call.status.name, "font-weight='bold' font-size='11'"))
    elif call.method in CRUN:
        parts.append(
            f"<line x1='{agent}' y1='{y}' x2='{crun}' y2='{y}' stroke='{GREEN}' stroke-width='2' "
            "marker-end='url(#tip)'/>" + _text(agent + 8, y - 5, f"crun {CRUN[call.method]}", "font-size='11'")
        )
    elif call.method in _DOES:
        parts.append(_text(agent + 8, y + 4, _DOES[call.method], "font-style='italic' font-size='11'"))
    return "".join(parts)


def _said(call: AgentCall) -> str:
    crun = f", for which the agent runs crun {CRUN[call.method]}" if call.method in CRUN else ""
    status = "" if call.status.name == "OK" else f", which failed with {call.status.name}"
    return f"{call.method} {_words(call.request)} answered after {call.seconds * 1e3:.0f} ms{crun}{status}"


def _text(x: int, y: int, text: str, more: str = "") -> str:
    return f"<text x='{x}' y='{y}' {more}>{html.escape(text)}</text>"


def _words(request: Mapping[str, Any], most: int = _MOST_WORDS) -> str:
    """What a request is about, in few words: its names and numbers, and how many of everything else."""
    words = []
    for name, value in request.items():
        if name == "exec_id" and value == request.get("container_id"):
            continue
        if name == "OCI":
            words.append(" ".join(value["Process"]["Args"]))
        elif name == "process" and isinstance(value, Mapping):
            words.append(" ".join(value["Args"]))
        elif name == "storages":
            words.append("+".join(each["driver"] for each in value))
        elif isinstance(value, str):
            words.append(value)
        elif isinstance(value, (int, float)):
            words.append(f"{name}={value}" if value else "")
        elif value:
            words.append(f"{name}({len(value)})")
    told = ", ".join(word for word in words if word)
    return told if len(told) <= most else told[: max(most - 1, 0)] + "…"
