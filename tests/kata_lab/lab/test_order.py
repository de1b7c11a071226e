"""What a cell says that was run out of order, in a real kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kata_lab.errors import KataLabError
from kata_lab.lab.course import CourseError, notebooks
from kata_lab.lab.headless import run_notebook
from kata_lab.lab.order import explain_errors, name_homes, sentence

CELLS = (
    "from kata_lab import lab\nlab.explain_errors('05-hotplug')",
    "await sandbox.resize(vcpus=2)",
    "what_is_nowhere",
    "from kata_lab.errors import KataLabError\nraise KataLabError('the disk is full: empty it')",
    "assert 1 == 2",
    "def deep():\n    return Path",
    "deep()",
    "1 / 0",
)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Number of the cell → error and what it said."""
    place = tmp_path_factory.mktemp("order") / "own.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in CELLS]), place)
    return {each.cell: f"{each.error}: {each.said}" for each in run_notebook(place).failures}


def test_a_name_that_is_not_there_yet_is_told_with_its_part(said: dict[int, str]) -> None:
    assert said[2] == (
        "NameError: 'sandbox' is not there yet: the part “1. The two ways” makes it, and was not run since this kernel "
        "started; choose Run → Run All Above Selected Cell, and then run this cell again"
    )
    assert "'Path' is not there yet: cell 2 of the notebook makes it" in said[7]


def test_a_name_of_no_cell_is_an_ordinary_error(said: dict[int, str]) -> None:
    assert said[3] == "NameError: name 'what_is_nowhere' is not defined"


def test_what_kata_lab_says_is_a_sentence_and_everything_else_stays(said: dict[int, str]) -> None:
    assert said[4] == "KataLabError: the disk is full: empty it"
    assert said[5].startswith("AssertionError")
    assert said[8] == "ZeroDivisionError: division by zero"
    assert sorted(said) == [2, 3, 4, 5, 7, 8]


def test_every_cell_of_the_first_notebook_may_be_run_twice(boot_guest: object, tmp_path: Path) -> None:
    content = nbformat.read(notebooks()[0], as_version=4)
    doubled = [cell for cell in content.cells for _ in range(2) if cell.cell_type == "code"]
    place = tmp_path / "own.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(cell.source) for cell in doubled]), place)

    transcript = run_notebook(place)

    assert not transcript.failures
    assert [each.verdict for each in transcript.feedback] == ["not yet"]


def test_a_notebook_that_is_not_in_the_course_is_refused() -> None:
    with pytest.raises(CourseError, match=r"no notebook '05-hotplug\.ipynb': give its name without"):
        explain_errors("05-hotplug.ipynb")


def test_outside_of_a_notebook_nothing_changes() -> None:
    explain_errors("05-hotplug")

    assert name_homes("05-hotplug")["attempt"] == "the part “Exercise: a hotplug that fails half-way”"
    assert sentence(KataLabError("so it is"), {}) == "so it is"
    assert sentence(NameError("name 'x' is not defined", name="x"), {}) == ""
    assert sentence(ValueError("7"), {}) == ""
