"""The notebooks as files: their parts, in one order for all; what is stored in them, opened, closed and drawn."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
from pathlib import Path

import nbformat
import pytest

from kata_lab.lab.course import exercises_of
from kata_lab.lab.exercise import CHECKS
from tests.kata_lab.lab.test_first_machine import ECHO_TEMPLATE

TOP = Path(__file__).parents[3]
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
_FENCE = re.compile(r"```[^\n]*\n(.*?)```\n*(.*?)(?=\n\n|\Z)", re.DOTALL)
_ROW = re.compile(r"^\| (\d+) \|", re.MULTILINE)
_PART = re.compile(r"^## (\d+)\. \S", re.MULTILINE)
_HEADING = re.compile(r"^(#+) \S", re.MULTILINE)
_CODE_PLACE = re.compile(r"`((?:vmm|kata_lab)/[\w/.-]+)`")
_SECTION = re.compile(r"\b\d+\.\d+\b|[Ss]ections? \d|[Cc]hapter \d|\(\d\)")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def place(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


each_notebook = pytest.mark.parametrize("place", NOTEBOOKS, ids=lambda path: path.name)


@pytest.fixture
def notebook(place: Path) -> nbformat.NotebookNode:
    found = nbformat.read(place, as_version=4)
    nbformat.validate(found)
    return found


def words(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_nothing_is_stored_that_a_run_can_change(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "widgets" not in notebook.metadata


def test_it_begins_with_what_one_learns(place: Path, notebook: nbformat.NotebookNode) -> None:
    first = notebook.cells[0].source

    assert first.startswith(f"# {int(place.name[:2])} · ")
    for part in ("**What you will learn.**", "**Time**: ", "**You need**: ", "| | part | what you do |"):
        assert part in first
    assert "Run the cells from top to bottom" in first


def test_its_table_names_its_parts_and_nothing_else(notebook: nbformat.NotebookNode) -> None:
    parts = [number for cell in words(notebook) for number in _PART.findall(cell)]

    assert _ROW.findall(notebook.cells[0].source) == parts
    assert parts == [str(number) for number in range(1, len(parts) + 1)]


def test_its_headings_are_an_outline(notebook: nbformat.NotebookNode) -> None:
    fenceless = [_FENCE.sub("", cell) for cell in words(notebook)]
    levels = [len(marks) for cell in fenceless for marks in _HEADING.findall(cell)]

    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_it_ends_with_a_summary_and_with_what_to_read(notebook: nbformat.NotebookNode) -> None:
    last = notebook.cells[-1].source
    summary, _, rest = last.partition("**Read the code**")
    files, _, reading = rest.partition("**Further reading**")

    assert summary.startswith("## What you have seen")
    assert summary.count("\n- ") >= 3
    assert all((TOP / file).exists() for file in _CODE_PLACE.findall(files))
    assert _CODE_PLACE.findall(files)
    assert reading.count("\n- ") >= 3
    assert _SECTION.search(reading), "name sections of specifications"


@each_notebook
def test_every_drawing_is_told_in_words(place: Path, notebook: nbformat.NotebookNode) -> None:
    drawings = [found for cell in words(notebook) for found in _FENCE.findall(cell)]

    assert drawings
    for drawing, behind in drawings:
        assert behind.startswith("*In words: "), drawing
        assert behind.endswith("*"), drawing
    for cell in words(notebook):
        assert "![" not in cell
        assert "<img" not in cell


@each_notebook
def test_every_exercise_is_announced_answered_and_checked(place: Path, notebook: nbformat.NotebookNode) -> None:
    exercises = exercises_of(place.stem)
    announced = [at for at, cell in enumerate(notebook.cells) if re.search(r"^### Exercise", cell.source, re.MULTILINE)]
    checked = [cell for cell in code(notebook) if any(f"{name}(" in cell for name in check_names(place))]

    assert len(announced) == len(exercises) == len(checked)
    for each in exercises:
        assert f'lab.hint("{each.id}")' in "".join(words(notebook))
    for at in announced:
        assert "code" in [cell.cell_type for cell in notebook.cells[at + 1 : at + 3]]


def check_names(place: Path) -> list[str]:
    for module in sorted((TOP / "kata_lab" / "lab").glob("*_exercise.py")):
        importlib.import_module(f"kata_lab.lab.{module.stem}")
    return [CHECKS[each.id].rpartition(".")[2] for each in exercises_of(place.stem)]


def test_every_cell_can_be_read_in_one_look(notebook: nbformat.NotebookNode) -> None:
    for cell in code(notebook):
        ast.parse(cell)
        assert len(cell.splitlines()) <= 40


@each_notebook
def test_errors_are_explained_from_the_first_cell_on(place: Path, notebook: nbformat.NotebookNode) -> None:
    assert f'lab.explain_errors("{place.stem}")' in code(notebook)[0]


def test_what_is_opened_is_closed(notebook: nbformat.NotebookNode) -> None:
    cells = code(notebook)

    assert 'machines = globals().get("machines") or lab.Machines()' in cells[0]
    assert "machines.close()" in cells[-1]
    assert "\n## Close" in f"\n{words(notebook)[-2]}"
    for name in re.findall(r"^(\w+) = Sandbox\.create\(", "\n".join(cells), re.MULTILINE):
        assert f"await {name}.stop()" in cells[-1]
    for name in re.findall(r"^(\w+) = lab\.(?:DesignBench|Workshop|ConsoleView|QueueView)\(", "\n".join(cells)):
        pytest.fail(f"{name} is owned by nobody: machines.replace() does")


def test_the_first_notebook_holds_the_exercise_and_not_its_solution() -> None:
    place = next(each for each in NOTEBOOKS if each.stem == "01-boot-a-machine")
    cells = [cell.source for cell in nbformat.read(place, as_version=4).cells]

    assert any(ECHO_TEMPLATE in cell for cell in cells)
    assert not any("-32" in cell for cell in cells)
