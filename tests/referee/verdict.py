"""Compares outcomes, reduces a disagreement to its core, and says it in words.

`ALLOWANCES` is the one place where two machines may differ: each names the freedom that the specification gives, or the
fault of QEMU 7.2, and recognises it as narrowly as it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tests.referee import assembly as asm
from tests.referee.case import CODE_S, CODE_U, FS_DIRTY, FS_MASK, SD, Case, Outcome, RefereeError, Space
from vmm.engine.rv64.disassembler import disassemble

Machine = Callable[[Sequence[Case]], list[Outcome]]

_BREAKPOINT = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which two machines disagree: ours first."""

    name: str
    ours: int
    theirs: int

    def __str__(self) -> str:
        return f"{self.name}: ours {self.ours:#x}, referee {self.theirs:#x}"


@dataclass(frozen=True, slots=True)
class Allowance:
    """A difference that is no fault of ours, and why."""

    reason: str
    covers: Callable[[Difference, dict[str, int], dict[str, int]], bool]


def _breakpoint_value(difference: Difference, ours: dict[str, int], theirs: dict[str, int]) -> bool:
    return difference.name == "stval" and theirs["scause"] == _BREAKPOINT and difference.ours in (0, theirs["sepc"])


def _dirty_early(difference: Difference, ours: dict[str, int], theirs: dict[str, int]) -> bool:
    """We say Dirty where QEMU says Initial or Clean."""
    rest = difference.ours ^ difference.theirs
    return (
        difference.name == "sstatus"
        and not rest & ~(FS_MASK | SD)
        and difference.ours & FS_MASK == FS_DIRTY
        and difference.theirs & FS_MASK != 0
    )


ALLOWANCES: tuple[Allowance, ...] = (
    Allowance(
        "an ebreak may leave stval zero or set it to its own address (volume II, 4.1.9); QEMU 7.2 leaves zero",
        _breakpoint_value,
    ),
    Allowance(
        "any floating-point instruction may set FS to Dirty, state changed or not (volume II, 3.1.6.6); "
        "QEMU 7.2 also misses instructions that only raise flags, such as feq.s",
        _dirty_early,
    ),
)


def differences(ours: Outcome, theirs: Outcome) -> list[Difference]:
    """All fields that differ and that no allowance covers."""
    if ours == theirs:
        return []
    mine, other = ours.fields, theirs.fields
    found = [Difference(name, mine[name], other[name]) for name in mine if mine[name] != other[name]]
    found = [item for item in found if not any(allowance.covers(item, mine, other) for allowance in ALLOWANCES)]
    for label, left, right in (("data", ours.data, theirs.data), *_page_pairs(ours, theirs)):
        if left != right:
            at = next(at for at in range(0, len(left), 8) if left[at : at + 8] != right[at : at + 8])
            words = (int.from_bytes(content[at : at + 8], "little") for content in (left, right))
            found.append(Difference(f"{label}+{at:#x}", *words))
    return found


def _page_pairs(ours: Outcome, theirs: Outcome) -> list[tuple[str, bytes, bytes]]:
    pairs = zip(ours.pages, theirs.pages, strict=True)
    return [(f"page {index}", left, right) for index, (left, right) in enumerate(pairs)]


def reduce_case(case: Case, differ: Callable[[Sequence[Case]], list[bool]]) -> Case:
    """The same disagreement with as few instructions and as plain registers as a greedy search finds.

    ``differ`` says for each of several candidates whether it still shows a disagreement.
    """
    for index, unit in enumerate(case.units):
        blank = asm.C_NOP.to_bytes(2, "little") * (len(unit) // 2)
        shorter = replace(case, units=(*case.units[:index], blank, *case.units[index + 1 :]))
        if unit != blank and differ([shorter])[0]:
            case = shorter
    places = [(name, index) for name in "xf" for index in range(32) if getattr(case, name)[index]]
    verdicts = differ([_plainer(case, [place]) for place in places]) if places else []
    idle = [place for place, still in zip(places, verdicts, strict=True) if still]
    plain = _plainer(case, idle)
    if differ([plain])[0]:
        return plain
    for place in idle:
        plainer = _plainer(case, [place])
        if differ([plainer])[0]:
            case = plainer
    return case


def _plainer(case: Case, places: Sequence[tuple[str, int]]) -> Case:
    """``case`` with the registers at ``places`` zero."""
    x = tuple(0 if ("x", index) in places else value for index, value in enumerate(case.x))
    f = tuple(0 if ("f", index) in places else value for index, value in enumerate(case.f))
    return replace(case, x=x, f=f)


def listing(code: bytes, start: int) -> list[str]:
    """The block as our disassembler reads it; runs of c.nop are left out."""
    lines = []
    at = 0
    while at < len(code):
        size = 4 if code[at] & 3 == 3 else 2
        raw = int.from_bytes(code[at : at + size], "little")
        if raw != asm.C_NOP:
            lines.append(f"    {start + at:#x}: {raw:0{2 * size}x}  {disassemble(raw, start + at)}")
        at += size
    return lines


def _layout(space: Space) -> list[str]:
    """The pages of a case's own address space, and its code up to the first ebreak."""
    entries = [
        f"    {entry.address:#x} level {entry.level}: "
        + (f"entry {entry.flags:#x}" if entry.raw else f"frame {entry.target}, flags {entry.flags:#x}")
        for entry in space.entries
    ]
    code = space.frames[0].content.partition(asm.C_EBREAK.to_bytes(2, "little"))[0]
    return [f"  Sv{12 + 9 * space.levels}:", *entries, "  code:", *listing(code[: len(code) & ~1], space.pc)]


def describe(case: Case, found: Sequence[Difference]) -> str:
    """A report for people: where, which state, what differs."""
    state = [f"{name}{index}={value:#x}" for name in "xf" for index, value in enumerate(getattr(case, name)) if value]
    block = ["  block:", *listing(case.code, CODE_U if case.user else CODE_S)]
    return "\n".join(
        (
            f"{case.title}: {'U' if case.user else 'S'}-mode, fcsr {case.fcsr:#x}, sstatus {case.sstatus:#x}",
            f"  registers: {', '.join(state) or 'all zero'}",
            *(_layout(case.space) if case.space else block),
            *(f"  {difference}" for difference in found),
        )
    )


def disagreements(cases: Sequence[Case], ours: Machine, theirs: Machine, limit: int = 3) -> list[str]:
    """Run ``cases`` on both machines; a report, reduced, for each of the first ``limit`` that differ."""
    reports = []
    for case, mine, other in zip(cases, ours(cases), theirs(cases), strict=True):
        if not differences(mine, other):
            continue

        def differ(candidates: Sequence[Case]) -> list[bool]:
            try:
                pairs = zip(ours(candidates), theirs(candidates), strict=True)
            except RefereeError:
                # What is left of a block may loop.
                return [False] * len(candidates)
            return [bool(differences(left, right)) for left, right in pairs]

        if not differ([case])[0]:
            reports.append(f"differs only after its predecessors: {describe(case, differences(mine, other))}")
        else:
            small = reduce_case(case, differ)
            reports.append(describe(small, differences(ours([small])[0], theirs([small])[0])))
        if len(reports) == limit:
            break
    return reports
