"""The instructor's answers: one for each exercise, each of which a test runs through its check, and kept apart."""

from __future__ import annotations

import re
from pathlib import Path

from kata_lab.lab.course import EXERCISES, notebooks
from tests.kata_lab.lab.answers import PLACE, answers

HERE = Path(__file__).parent
_USED = re.compile(r"answered\(\s*\"([^\"]+)\"")


def test_every_exercise_has_an_answer_and_every_answer_an_exercise() -> None:
    assert list(answers()) == [each.id for each in EXERCISES]


def test_every_answer_is_run_by_a_test_of_its_check() -> None:
    used = {name for file in HERE.glob("test_*.py") for name in _USED.findall(file.read_text("utf-8"))}

    assert used == {each.id for each in EXERCISES}


def test_the_answers_are_not_where_learners_look() -> None:
    package = HERE.parents[2] / "kata_lab"

    assert PLACE.is_file()
    assert not [file for file in package.rglob("answers*") if "__pycache__" not in file.parts]
    assert not any("answers.md" in place.read_text("utf-8") for place in notebooks())


def test_the_guide_names_every_notebook_and_every_exercise() -> None:
    guide = (PLACE.parent / "guide.md").read_text("utf-8")

    assert all(place.stem in guide for place in notebooks())
    assert all(each.id in guide for each in EXERCISES)
