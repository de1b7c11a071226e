"""Check of the capstone, notebook 7: a design against a stated goal, by what was measured of it.

The goal has lines, each with a bound; the first that is not met is told, with where to look. Bounds are such that what
else the machine does makes no difference: right designs take 650 to 850 million instructions until the first answer
(a busy host lets a guest wait and spin differently), and less than 0.1 MiB of disk. Memory beside the guest's is told
and not judged: it depends on the host (huge pages, versions of libraries), and the number of processes says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kata_lab.lab.capstone import CONTAINERS, Inside, Measured, problem_of
from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved
from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import Table

_MIB: Final = 1 << 20
GUEST_MIB: Final = 160  #: that the guest may ever have
PROCESSES: Final = 1  #: that the sandbox may consist of
DISK_MIB: Final = 1  #: that the sandbox may take of the host's disk
INSTRUCTIONS: Final = 1_000_000_000  #: that the guest may retire until the first answer
REST_VCPUS, POD_VCPUS = 1, 2
CPUS: Final = {"web": 0.5, "cook": 1.5}  #: that each container may use

START: Final[Mapping[str, Any]] = {
    "guest": "lifsea",
    "sandbox": {
        "vcpus": 2,
        "max_vcpus": 8,
        "memory_mib": 512,
        "max_memory_mib": 1024,
        "rootfs": "fs",
        "hypervisor": "rpc",
    },
    "web": {},
    "cook": {},
}
"""What a learner begins with: it answers, and that is all."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the goal.

    Attributes:
        name: in a word.
        wanted: the bound, in words.
        found: what was measured, in words.
        met: whether it is so.
        where: what is wrong and where to look.
    """

    name: str
    wanted: str
    found: str
    met: bool
    where: str


def judge(measured: Measured) -> tuple[Line, ...]:
    """Every line of the goal, in the order in which one would work on them.

    Raises:
        LabError: nothing was measured.
    """
    if measured.failed:
        raise LabError(f"the design was not measured: {measured.failed}")
    return (
        _answers(measured),
        _limits(measured),
        _promises(measured),
        _guest(measured),
        _processors(measured),
        _processes(measured),
        _disk(measured),
        _console(measured),
        _start(measured),
    )


def _answers(measured: Measured) -> Line:
    killed = [name for name, each in measured.inside.items() if each.out_of_memory]
    where = "look at both containers: is the one that waits the one that is asked?"
    if killed:
        where = f"{killed[0]} was ended for want of memory: how much does its program hold at once, and what may it?"
    met = measured.answer == f"done: {measured.order}" and not killed
    found = repr(measured.answer) + (f", {killed[0]} out of memory" if killed else "")
    return Line("answers", f"'done: {measured.order}'", found, met, where)


def _limits(measured: Measured) -> Line:
    unlimited = [name for name in CONTAINERS if measured.inside[name].limit is None]
    wrong = [name for name in CONTAINERS if measured.design[name].get("cpus") != CPUS[name]]
    wanted = "memory for each; " + ", ".join(f"{name} {share:g} CPUs" for name, share in CPUS.items())
    found = [f"{name} {_limit(measured.inside[name])}" for name in CONTAINERS]
    if unlimited:
        where = f"{unlimited[0]} may use all memory of its neighbour: a container's wishes have a limit for it"
    else:
        where = f"the goal says how much of CPUs {wrong[0] if wrong else CONTAINERS[0]} may use: is that its wish?"
    return Line("limits", wanted, ", ".join(found), not unlimited and not wrong, where)


def _limit(inside: Inside) -> str:
    return "no limit" if inside.limit is None else f"{inside.limit / _MIB:.0f} MiB"


def _promises(measured: Measured) -> Line:
    limits = [each.limit for each in measured.inside.values()]
    has = min(each.available for each in measured.inside.values()) + sum(each.used for each in measured.inside.values())
    wanted = f"the {has / _MIB:.0f} MiB that the guest has for them"
    where = (
        "all limits together are more than what the guest has left: one container may take the guest down before it is"
        " at its limit. Give the guest more, or promise less: cook holds 24 MiB at once, web a shell"
    )
    if None in limits:
        return Line("promises", wanted, "no limit", False, where)
    promised = sum(each or 0 for each in limits)
    return Line("promises", wanted, f"{promised / _MIB:.0f} MiB", promised <= has, where)


def _guest(measured: Measured) -> Line:
    where = "memory_mib is what the guest has, max_memory_mib what it can ever have: the larger one counts"
    found = f"{measured.most_mib} MiB"
    return Line("guest", f"never more than {GUEST_MIB} MiB", found, measured.most_mib <= GUEST_MIB, where)


def _processors(measured: Measured) -> Line:
    pod = min(each.cpus for each in measured.inside.values())
    met = (measured.rest_vcpus, pod) == (REST_VCPUS, POD_VCPUS)
    if measured.rest_vcpus != REST_VCPUS:
        where = f"there are {measured.rest_vcpus} vCPUs before anybody needs them: with what does the sandbox begin?"
    else:
        where = "the sandbox follows its containers only as far as it has room to grow: notebook 5, part 6"
    return Line(
        "vCPUs", f"{REST_VCPUS}, then {POD_VCPUS} with the pod", f"{measured.rest_vcpus}, then {pod}", met, where
    )


def _processes(measured: Measured) -> Line:
    found = f"{', '.join(measured.processes)}; {measured.beside_bytes / _MIB:.0f} MiB beside the guest's memory"
    where = "each process has a heap, stacks and libraries of its own, and somebody has to watch it: notebook 6, part 5"
    return Line("processes", "one", found, len(measured.processes) <= PROCESSES, where)


def _disk(measured: Measured) -> Line:
    mib = measured.disk_bytes / _MIB
    where = (
        "each container has a copy of its image's files: rootfs says how they get into the guest, notebook 4, part 5"
    )
    return Line("disk", f"at most {DISK_MIB} MiB", f"{mib:.2f} MiB", mib <= DISK_MIB, where)


def _console(measured: Measured) -> Line:
    open_to = ", ".join(measured.consoles)
    where = (
        f"who gets to the guest's console finds the service {open_to}: describe a guest without it, as in notebook 2,"
        " part 6, and see what the others are for before you leave one out"
    )
    return Line("console", "nobody answers there", open_to or "nobody", not open_to, where)


def _start(measured: Measured) -> Line:
    wanted = f"at most {INSTRUCTIONS / 1e6:.0f} million instructions"
    if measured.instructions is None:
        where = "this VMM does not tell how many instructions its guest retires, so that nobody can hold it to that"
        return Line("first answer", wanted, "unknown", False, where)
    where = (
        "the guest works before it serves: for each CPU and each MiB that it may ever have, and for each service. What"
        " of that does the goal ask for? lab.sandbox_timeline(measured.timeline) shows where the time goes"
    )
    found = f"{measured.instructions / 1e6:.0f} million, {measured.seconds:.1f} s here"
    return Line("first answer", wanted, found, measured.instructions <= INSTRUCTIONS, where)


def score_card(measured: Measured) -> Table:
    """The goal and what was measured, line by line; those that are not met are marked.

    Raises:
        LabError: nothing was measured.
    """
    lines = judge(measured)
    rows = [("✔" if each.met else "✘", each.name, each.wanted, each.found) for each in lines]
    met = sum(each.met for each in lines)
    marked = frozenset(number for number, each in enumerate(lines) if not each.met)
    return Table(("", "", "wanted", "measured"), rows, f"{met} of {len(lines)} lines of the goal are met", marked)


def history_table(history: Sequence[Measured]) -> Table:
    """All designs that were measured, one to a row, the oldest first."""
    rows = []
    for number, each in enumerate(history, 1):
        if each.failed:
            rows.append((str(number), each.failed, "", "", "", ""))
            continue
        lines = judge(each)
        unmet = ", ".join(line.name for line in lines if not line.met)
        instructions = "unknown" if each.instructions is None else f"{each.instructions / 1e6:.0f}"
        host = (f"{each.guest_bytes / _MIB:.0f}", f"{each.beside_bytes / _MIB:.0f}")
        rows.append((str(number), unmet or "nothing", instructions, f"{each.seconds:.1f}", *host))
    header = ("design", "not met", "million instructions", "seconds", "guest's memory, MiB", "beside it, MiB")
    return Table(header, rows, "What was measured so far")


@checks("07-design")
def check_design(design: Mapping[str, Any], measured: Measured | None) -> Feedback:
    """Whether a design meets the goal, by what was measured of it.

    Args:
        design: the learner's.
        measured: what :meth:`kata_lab.lab.capstone.DesignBench.measure` gave for it.
    """
    if problem := problem_of(design):
        return not_right(f"this is no design: {problem}.")
    if design == START:
        return not_yet("this is still the design that you began with: change it, and measure again.")
    if measured is None or measured.design != design:
        return not_yet("the design was changed since it was measured: run the cell that measures.")
    if measured.failed:
        return not_right(f"it could not be measured: {measured.failed}.")
    lines = judge(measured)
    unmet = [each for each in lines if not each.met]
    if not unmet:
        return solved(
            f"all {len(lines)} lines are met, in {measured.instructions or 0:,} instructions: a small guest that grows"
            " when it has to, nobody at its console, and one process for it all."
        )
    first, *others = unmet
    more = f" ({len(others)} more not met.)" if others else ""
    end = "" if first.where.endswith("?") else "."
    return not_right(
        f"{first.name}: {first.found}; wanted: {first.wanted}. {first.where[0].upper()}{first.where[1:]}{end}{more}"
    )
