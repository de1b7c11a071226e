"""The trace of a boot as text: a timeline of milestones, and the exits by kind and device.

The same data as :mod:`vmm.trace` gives a notebook to draw.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmm.trace import ExitCount, Milestone, RecentExit

BAR_WIDTH = 32
MOST_EXITS = 20
MOST_RECENT = 8

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def timeline(milestones: Sequence[Milestone]) -> str:
    """One line per milestone: seconds since the start, instructions retired until then, and where that is on a bar."""
    if not milestones:
        return "timeline: nothing happened"
    whole = max(each.seconds for each in milestones) or 1.0
    width = max(len(each.name) for each in milestones)
    lines = [f"{'timeline':{width}}  {'seconds':>8}  {'M instr.':>9}"]
    for each in milestones:
        figures = f"{each.seconds:8.3f}  {each.instructions / 1e6:9.1f}"
        lines.append(f"{each.name:{width}}  {figures}  {_bar(each.seconds / whole)}".rstrip())
    return "\n".join(lines)


def exits_table(exits: Sequence[ExitCount]) -> str:
    """One line per cause, the most time first: how often guest code stopped for it, and what serving it took."""
    if not exits:
        return "exits: none"
    width = max(len(_cause(each)) for each in exits)
    lines = [f"{'exits':{width}}  {'count':>9}  {'ms':>9}  {'µs each':>8}"]
    for each in exits[:MOST_EXITS]:
        average = each.seconds / each.count * 1e6
        lines.append(f"{_cause(each):{width}}  {each.count:9,}  {each.seconds * 1e3:9.2f}  {average:8.1f}")
    if len(exits) > MOST_EXITS:
        rest = exits[MOST_EXITS:]
        count, seconds = sum(each.count for each in rest), sum(each.seconds for each in rest)
        lines.append(f"{f'{len(rest)} more':{width}}  {count:9,}  {seconds * 1e3:9.2f}")
    return "\n".join(lines)


def recent_exits(exits: Sequence[RecentExit]) -> str:
    """The last exits: when, where, the instruction that stopped and what it wanted."""
    lines = [f"{'last exits':16}  {'seconds':>8}  {'instruction':32}  for"]
    for each in exits[-MOST_RECENT:]:
        lines.append(f"{each.pc:016x}  {each.seconds:8.3f}  {each.instruction:32}  {each.kind} {each.name}".rstrip())
    return "\n".join(lines)


def _cause(each: ExitCount) -> str:
    return f"{each.kind} {each.name}".rstrip()


def _bar(fraction: float) -> str:
    eighths = round(min(max(fraction, 0.0), 1.0) * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
