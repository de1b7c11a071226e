"""The referees themselves: they answer known cases as known, repeat themselves, and find and reduce a planted fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tests.referee import assembly as asm
from tests.referee.case import CODE_S, CODE_U, DATA_S, DATA_U, FS_DIRTY, Case, Outcome
from tests.referee.image import build_image
from tests.referee.machines import run_on_qemu
from tests.referee.page_cases import page_cases
from tests.referee.sequences import Recipe, generate, word_bytes
from tests.referee.unicorn_hart import unicorn_disagreements
from tests.referee.verdict import differences, disagreements

LOAD_PAGE_FAULT = 13
SUB_FOR_ADD = 1 << 30


def is_subtraction(unit: bytes) -> bool:
    word = int.from_bytes(unit, "little")
    return len(unit) == 4 and word & 0xFE00_707F == 0x4000_0033


def run_with_subtraction_broken(cases: Sequence[Case]) -> list[Outcome]:
    """QEMU, but every SUB adds."""
    broken = [
        replace(
            case,
            units=tuple(
                (int.from_bytes(unit, "little") ^ SUB_FOR_ADD).to_bytes(4, "little") if is_subtraction(unit) else unit
                for unit in case.units
            ),
        )
        for case in cases
    ]
    return run_on_qemu(broken)


def test_qemu_adds() -> None:
    case = Case((word_bytes(asm.add(5, 6, 7)),), x=tuple(range(32)))

    (outcome,) = run_on_qemu([case])

    assert outcome.fields["x5"] == 13
    assert outcome.fields["fcsr"] == 0
    assert outcome.fields["sstatus"] & FS_DIRTY == FS_DIRTY


def test_a_case_sees_its_own_data_page_and_no_other_mode_s() -> None:
    x = [0] * 32
    x[8], x[9] = DATA_U + 8, DATA_S + 8
    case = Case(
        (word_bytes(asm.ld(5, 8, 0)), word_bytes(asm.ld(6, 9, 0))), x=tuple(x), data=bytes(range(16)), user=True
    )

    (outcome,) = run_on_qemu([case])

    assert outcome.fields["x5"] == int.from_bytes(bytes(range(8, 16)), "little")
    assert (outcome.fields["scause"], outcome.fields["stval"]) == (LOAD_PAGE_FAULT, DATA_S + 8)


def test_a_recipe_always_names_the_same_batch() -> None:
    recipe = Recipe(seed=11, cases=20)

    assert generate(recipe) == generate(recipe)
    assert page_cases(11, 20) == page_cases(11, 20)


def test_qemu_answers_the_same_twice() -> None:
    cases = [*generate(Recipe(seed=12, cases=200)), *page_cases(12, 50)]

    first, second = run_on_qemu(cases), run_on_qemu(cases)

    assert not [case.title for case, a, b in zip(cases, first, second, strict=True) if differences(a, b)]


def test_a_planted_fault_is_found_and_reduced_to_its_instruction() -> None:
    cases = generate(Recipe(seed=13, cases=100, groups=("integer",)))

    reports = disagreements(cases, run_with_subtraction_broken, run_on_qemu, limit=1)

    (report,) = reports
    instructions = [line for line in report.splitlines() if line.startswith(f"    {CODE_S >> 32:#x}"[:8])]
    assert len(instructions) <= 3
    assert any(" sub " in line for line in instructions)
    assert "referee" in report


def test_unicorn_disputes_a_planted_fault() -> None:
    cases = generate(Recipe(seed=13, cases=100, groups=("integer",), user=0.0))

    judged, reports = unicorn_disagreements(cases, run_with_subtraction_broken(cases), build_image(cases).starts)

    assert judged > 50
    assert reports
    assert all(" sub " in report for report in reports)


def test_blocks_of_both_modes_start_in_their_own_window() -> None:
    cases = [Case((b"\x01\x00",)), Case((b"\x01\x00",), user=True)]

    supervisor, user = build_image(cases).starts

    assert CODE_S < supervisor < CODE_U < user
