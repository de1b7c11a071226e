"""Our hart against QEMU and unicorn: generated blocks, all short encodings, near misses, floating-point corners.
How many examples: `tests/referee/effort.py`.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.referee.case import Case
from tests.referee.effort import BATCH, SCALE, SEED, examples
from tests.referee.float_sweep import NUMERIC, float_sweep
from tests.referee.image import build_image
from tests.referee.machines import run_on_engine, run_on_qemu
from tests.referee.sequences import GROUPS, Recipe, generate, lone_words, near_misses
from tests.referee.unicorn_hart import unicorn_disagreements
from tests.referee.verdict import disagreements

seeds = st.integers(0, 2**32 - 1).map(lambda seed: seed + SEED)
mixtures = st.one_of(
    st.just(GROUPS),
    st.sampled_from(GROUPS).map(lambda group: (group,)),
    st.lists(st.sampled_from(GROUPS), min_size=2, max_size=4, unique=True).map(tuple),
)
recipes = st.builds(
    Recipe,
    seed=seeds,
    cases=st.just(200),
    groups=mixtures,
    length=st.sampled_from((1, 4, 12, 30)),
    user=st.sampled_from((0.0, 0.25, 1.0)),
)


def assert_agreement(cases: list[Case]) -> None:
    reports = disagreements(cases, run_on_engine, run_on_qemu)
    assert not reports, "\n\n".join(reports)


@examples(150)
@given(recipes)
def test_generated_blocks_leave_the_state_that_qemu_leaves(recipe: Recipe) -> None:
    assert_agreement(generate(recipe))


@pytest.mark.parametrize("group", ["integer multiply compressed control", "memory", "atomic", "float"])
def test_generated_blocks_leave_the_state_that_unicorn_leaves(group: str) -> None:
    for seed in range(SEED, SEED + SCALE):
        cases = generate(Recipe(seed, cases=800, groups=tuple(group.split()), length=8))

        judged, reports = unicorn_disagreements(cases, run_on_engine(cases), build_image(cases).starts)

        assert judged > len(cases) // 5
        assert not reports, "\n\n".join(reports[:3])


def test_every_16_bit_word_has_the_effect_that_it_has_on_qemu() -> None:
    words = [word for word in range(1 << 16) if word & 3 != 3]
    for start in range(0, len(words), BATCH):
        assert_agreement(lone_words(words[start : start + BATCH], seed=start))


def test_words_near_legal_instructions_are_as_legal_as_on_qemu() -> None:
    for seed in range(SEED, SEED + 2 * SCALE):
        assert_agreement(lone_words(near_misses(seed, BATCH), seed))


def test_random_32_bit_words_are_as_legal_as_on_qemu() -> None:
    random = Random(SEED)
    for seed in range(SCALE):
        assert_agreement(lone_words([random.getrandbits(32) | 3 for _ in range(BATCH)], seed))


def test_every_float_instruction_gives_the_bits_and_flags_of_qemu_for_special_values_in_all_rounding_modes() -> None:
    cases = [case for row in NUMERIC for case in float_sweep(row, SEED, most=400 * SCALE)]
    for start in range(0, len(cases), BATCH):
        assert_agreement(cases[start : start + BATCH])
