"""The notebooks as files: no stored output, a beginning and an end, no solution inside."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from tests.kata_lab.lab.test_first_machine import ECHO_TEMPLATE

NOTEBOOKS = sorted((Path(__file__).parents[3] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    found = nbformat.read(request.param, as_version=4)
    nbformat.validate(found)
    return found


def test_nothing_is_stored_that_a_run_can_change(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "widgets" not in notebook.metadata


def test_it_begins_with_what_one_learns_and_ends_with_what_to_read(notebook: nbformat.NotebookNode) -> None:
    assert "What you will learn" in notebook.cells[0].source
    assert "Time" in notebook.cells[0].source
    assert "Further reading" in notebook.cells[-1].source


def test_every_cell_can_be_read_in_one_look(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
            assert len(cell.source.splitlines()) <= 40


def test_what_is_opened_is_closed(notebook: nbformat.NotebookNode) -> None:
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]

    assert "machines.close()" in code[-1]


def test_the_first_notebook_holds_the_exercise_and_not_its_solution() -> None:
    place = next(each for each in NOTEBOOKS if each.stem == "01-boot-a-machine")
    cells = [cell.source for cell in nbformat.read(place, as_version=4).cells]

    assert any(ECHO_TEMPLATE in cell for cell in cells)
    assert not any("-32" in cell for cell in cells)
