"""``kata-lab lab``: the course at the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kata_lab.cli import main
from kata_lab.lab.course import EXERCISES, exercise, notebooks

FIRST = exercise("01-read-a-loop")
CHECK = f"""
from kata_lab.lab.exercise import checks, not_right, not_yet, solved
@checks({FIRST.id!r})
def check(answer):
    if answer is None:
        return not_yet("nothing there")
    return solved("so it is") if answer == 1 else not_right("look again")
"""


@pytest.fixture(autouse=True)
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The learner's directory, where the command line is."""
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "home"))
    place = tmp_path / "course"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def notebook(place: Path, *cells: str) -> str:
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), place / "own.ipynb")
    return "own.ipynb"


def test_list_names_every_notebook_and_exercise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "list"]) == 0
    told = capsys.readouterr().out

    assert all(each.name in told for each in notebooks())
    assert all(each.id in told for each in EXERCISES)
    assert f"0 of {sum(each.points for each in EXERCISES)} points" in told


def test_the_course_is_copied_once(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "copy", "mine"]) == 0
    assert capsys.readouterr().out.count(": new") == len(notebooks())
    (course / "mine" / notebooks()[0].name).write_text("answers")
    assert main(["lab", "copy", "mine"]) == 0

    assert capsys.readouterr().out.count("kept as you left it") == 1
    assert (course / "mine" / notebooks()[0].name).read_text() == "answers"


@pytest.mark.parametrize(
    ("cells", "status", "said"),
    [
        (("check(None)",), 0, "… 01-read-a-loop       not yet: nothing there"),
        (("check(1)",), 0, "✔ 01-read-a-loop       solved: so it is"),
        (("check(2)", "1 / 0"), 3, "✘ 01-read-a-loop       not right: look again"),
        (("check(1)", "1 / 0"), 1, "! cell 3 ended with ZeroDivisionError: division by zero"),
    ],
)
def test_the_status_of_a_check_says_what_is_so(
    cells: tuple[str, ...], status: int, said: str, course: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "check", notebook(course, CHECK, *cells)]) == status
    assert said in capsys.readouterr().out


def test_a_check_tells_plain_data(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "check", "--json", notebook(course, CHECK, "check(1)")]) == 0

    assert json.loads(capsys.readouterr().out) == [
        {
            "notebook": "own.ipynb",
            "checks": [{"exercise": FIRST.id, "verdict": "solved", "text": "so it is"}],
            "unchecked": [],
            "failures": [],
        }
    ]


def test_a_directory_without_notebooks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "check"]) == 2
    assert "kata-lab lab copy DIRECTORY" in capsys.readouterr().err
    assert main(["lab", "check", "nothing.ipynb"]) == 2
    assert "no notebook 'nothing.ipynb' here" in capsys.readouterr().err


def test_hints_come_in_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "hint", FIRST.id]) == 0
    one = capsys.readouterr().out
    assert main(["lab", "hint", FIRST.id]) == 0
    two = capsys.readouterr().out

    assert FIRST.hints[0] in one
    assert FIRST.hints[1] not in one
    assert FIRST.hints[1] in two
    assert main(["lab", "hint", "05-halfway"]) == 2
    assert "did you mean '05-half-way'?" in capsys.readouterr().err


def test_results_are_written_where_the_learner_says(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["lab", "hint", FIRST.id])
    capsys.readouterr()

    assert main(["lab", "export", "results.csv", "--name", "Ada"]) == 0
    assert main(["lab", "export"]) == 0
    assert main(["lab", "export", "results.txt"]) == 2
    assert main(["lab", "export", "nowhere/results.json"]) == 1

    told = capsys.readouterr()
    with (course / "results.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["exercise"] == FIRST.id)
    assert (row["learner"], row["exercise"], row["hints"]) == ("Ada", FIRST.id, "1")
    assert json.loads(told.out)["learner"] == ""
    assert "neither .json nor .csv" in told.err
    assert "cannot be written" in told.err
    assert [path.name for path in course.iterdir()] == ["results.csv"]
