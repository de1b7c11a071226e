"""The course as data: exercises, copies of notebooks, the learner's record; notebooks run with nobody looking."""

from __future__ import annotations

import csv
import importlib
import io
import json
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kata_lab.errors import KataLabError
from kata_lab.lab.course import (
    EXERCISES,
    CourseError,
    copy_notebooks,
    exercise,
    exercises_of,
    find_notebooks,
    notebooks,
    title,
)
from kata_lab.lab.exercise import CHECKS, MIME_TYPE, Feedback, checks, not_right, solved
from kata_lab.lab.headless import run_notebook
from kata_lab.lab.score import Score, Standing, exported, hint, note_attempt, standings

TOP = Path(__file__).parents[3] / "notebooks"
FIRST, SECOND = exercise("01-read-a-loop"), exercise("01-upper-case")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_notebooks_of_the_package_are_those_of_the_repository() -> None:
    assert [path.name for path in notebooks()] == sorted(path.name for path in TOP.glob("*.ipynb"))
    assert title(notebooks()[0])


def test_every_exercise_has_a_notebook_a_check_and_hints() -> None:
    for module in ("capstone", "container", "device", "fused", "hotplug", "image", "welcome"):
        importlib.import_module(f"kata_lab.lab.{module}_exercise")
    importlib.import_module("kata_lab.lab.first_machine")

    assert len({each.id for each in EXERCISES}) == len(EXERCISES)
    for each in EXERCISES:
        text = (TOP / f"{each.notebook}.ipynb").read_text()
        assert each.id.partition("-")[0] == each.notebook.partition("-")[0]
        assert CHECKS[each.id].rpartition(".")[2] in text
        assert len(each.hints) >= 2
        assert each.points > len(each.hints)


def test_every_exercise_that_a_notebook_announces_is_in_the_course() -> None:
    for notebook in notebooks():
        cells = nbformat.read(notebook, as_version=4).cells
        announced = sum(cell.source.count("Exercise") for cell in cells if cell.cell_type == "markdown")
        assert announced == len(exercises_of(notebook.stem)), notebook.name


def test_an_unknown_exercise_is_refused_with_what_was_meant() -> None:
    with pytest.raises(CourseError, match=f"no exercise '01-read-a-lop': did you mean '{FIRST.id}'"):
        exercise("01-read-a-lop")
    with pytest.raises(CourseError, match="there are 00-"):
        exercise("zzz")


def test_a_copy_never_overwrites_what_a_learner_has(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    first = copy_notebooks(place)
    changed, gone, linked = (each.path for each in first[:3])
    changed.write_text("my answer")
    gone.unlink()
    linked.unlink()
    linked.symlink_to(tmp_path / "nowhere")

    second = copy_notebooks(place)

    assert {each.outcome for each in first} == {"new"}
    assert [each.outcome for each in second][:3] == ["kept", "new", "kept"]
    assert {each.outcome for each in second[3:]} == {"there already"}
    assert changed.read_text() == "my answer"
    assert not (tmp_path / "nowhere").exists()
    assert {path.name for path in place.iterdir()} == {path.name for path in notebooks()}


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CourseError, match="name a directory that is yours to write"):
        copy_notebooks(tmp_path / "file")


def test_notebooks_are_found_by_file_name_and_number(tmp_path: Path) -> None:
    copy_notebooks(tmp_path / "notebooks")
    whole = [each.name for each in find_notebooks([], tmp_path)]
    wanted = find_notebooks(["1", "02", "05-hotplug", "notebooks/01-boot-a-machine.ipynb", "04-pod"], tmp_path)

    assert whole == [path.name for path in notebooks()]
    assert [path.name[:2] for path in wanted] == ["01", "02", "05", "01", "04"]
    first = notebooks()[0].name
    assert find_notebooks([str(int(first[:2]))], tmp_path)[0].name == first
    with pytest.raises(CourseError, match="no notebook '99' here"):
        find_notebooks(["99"], tmp_path)
    with pytest.raises(CourseError, match="have them copied with kata-lab lab copy"):
        find_notebooks([], tmp_path / "notebooks" / "deeper")


def test_the_best_verdict_stays_and_what_was_earned_too() -> None:
    note_attempt(FIRST.id, "not right")
    before = standings()[FIRST.id]
    note_attempt(FIRST.id, "solved")
    note_attempt(FIRST.id, "not right")
    after = standings()[FIRST.id]

    assert before == Standing(attempts=1, best="not right")
    assert (after.attempts, after.best, after.earned) == (3, "solved", FIRST.points)
    assert after.solved.endswith("+00:00")


def test_hints_come_one_after_the_other_and_take_a_point_each() -> None:
    one, two, three = hint(FIRST.id), hint(FIRST.id), hint(FIRST.id)
    note_attempt(FIRST.id, "solved")
    hint(FIRST.id)

    assert one.taken == FIRST.hints[:1]
    assert two.taken == three.taken == FIRST.hints
    assert "1 more" in repr(one)
    assert "no more hints" in three._repr_mimebundle_()["text/html"]
    assert standings()[FIRST.id].earned == FIRST.points - 2
    assert f"{FIRST.points - 2} of {FIRST.points}" in repr(Score())


def test_several_notebooks_can_record_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: note_attempt(EXERCISES[number % 3].id, "not right"), range(30)))

    assert [standings()[each.id].attempts for each in EXERCISES[:4]] == [10, 10, 10, 0]


def test_a_record_that_cannot_be_read_is_left_alone_and_told(home: Path) -> None:
    note_attempt(FIRST.id, "solved")
    place = home / "records" / "course.json"
    for damaged, told in (
        ("{", "cannot be read"),
        ('{"format": 2, "exercises": {}}', "format 2 and this version reads 1"),
        ('{"format": 1, "exercises": {"x": {"best": "splendid"}}}', "is no standing"),
        ('{"format": 1, "exercises": {"x": {"attempts": -1}}}', "is no standing"),
        ('{"format": 1, "exercises": {"x": {"unknown": 1}}}', "cannot be read"),
    ):
        place.write_text(damaged)
        with pytest.raises(CourseError, match=f"{told}.*move it away"):
            note_attempt(FIRST.id, "solved")
        assert place.read_text() == damaged


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within it, a write beyond a size fails, as one on a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_record_as_it_was(home: Path) -> None:
    note_attempt(FIRST.id, "not right")
    before = (home / "records" / "course.json").read_bytes()
    with files_of_at_most(20), pytest.raises(KataLabError, match=r"course\.json\.partial cannot be written"):
        note_attempt(FIRST.id, "solved")

    assert (home / "records" / "course.json").read_bytes() == before
    assert {path.name for path in (home / "records").iterdir()} == {"course.json", "course.lock"}


def test_exercises_of_another_version_stay_in_the_record(home: Path) -> None:
    place = home / "records" / "course.json"
    place.parent.mkdir(parents=True)
    place.write_text('{"format": 1, "exercises": {"99-later": {"attempts": 2}}}')
    note_attempt(FIRST.id, "solved")

    assert json.loads(place.read_text())["exercises"]["99-later"]["attempts"] == 2


def test_results_are_exported_as_json_and_csv() -> None:
    note_attempt(FIRST.id, "solved")
    plain = json.loads(exported("Ada"))
    rows = list(csv.DictReader(io.StringIO(exported("=Ada()", "csv"))))

    assert (plain["learner"], plain["earned"]) == ("Ada", FIRST.points)
    assert [each["exercise"] for each in plain["exercises"]] == [each.id for each in EXERCISES]
    assert len(rows) == len(EXERCISES)
    solved_row = next(row for row in rows if row["exercise"] == FIRST.id)
    assert (solved_row["best"], solved_row["earned"]) == ("solved", str(FIRST.points))
    assert rows[0]["learner"] == "'=Ada()"  # no formula


def test_a_check_outside_of_a_notebook_is_not_recorded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The course's own check is known again afterwards.
    monkeypatch.setattr("kata_lab.lab.exercise.CHECKS", {})

    @checks(FIRST.id)
    def check(answer: int) -> Feedback:
        return solved("so it is") if answer == 1 else not_right("look again")

    told = check(2)

    assert (told.exercise, told.verdict) == (FIRST.id, "not right")
    assert told._repr_mimebundle_()[MIME_TYPE]["exercise"] == FIRST.id
    assert not (home / "records").exists()


CHECK = f"""
from kata_lab.lab.exercise import checks, not_right, not_yet, solved

@checks({FIRST.id!r})
def check(answer):
    return not_yet("answer") if answer is None else solved("yes") if answer == 1 else not_right("no")

@checks({SECOND.id!r})
async def check_later(answer):
    return check(answer)
"""


def written(place: Path, *cells: str) -> Path:
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), place)
    return place


def test_a_notebook_is_run_to_its_end_and_what_its_checks_say_is_recorded(tmp_path: Path, home: Path) -> None:
    notebook = written(
        tmp_path / f"{FIRST.notebook}.ipynb",
        CHECK,
        "check(None)",
        "1 / 0",
        "await check_later(2)",
        "check(1)",
        "open('last', 'w').close()",
    )
    before = notebook.read_bytes()
    seen: list[float] = []

    transcript = run_notebook(notebook, lambda done, what: seen.append(done))

    assert {each.exercise: each.verdict for each in transcript.feedback} == {
        FIRST.id: "solved",
        SECOND.id: "not right",
    }
    assert [str(each) for each in transcript.failures] == ["cell 3 ended with ZeroDivisionError: division by zero"]
    assert transcript.wrong
    assert transcript.broken
    assert not transcript.unchecked
    assert (tmp_path / "last").exists()
    assert notebook.read_bytes() == before
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    # The inner check of the coroutine's is a check as well: it is recorded as its own exercise.
    assert standings()[FIRST.id].attempts == 2
    assert standings()[SECOND.id] == Standing(attempts=1, best="not right")


def test_a_check_whose_record_cannot_be_written_still_answers(tmp_path: Path, home: Path) -> None:
    home.mkdir()
    (home / "records").write_text("in the way")

    transcript = run_notebook(written(tmp_path / f"{FIRST.notebook}.ipynb", CHECK, "check(1)"))

    (told,) = transcript.feedback
    assert told.passed
    assert "not recorded" in told.text
    assert transcript.unchecked == (SECOND.id,)


def test_a_kernel_that_dies_is_told(tmp_path: Path) -> None:
    notebook = written(tmp_path / "own.ipynb", "import os; os._exit(1)")

    with pytest.raises(CourseError, match=r"the kernel that ran own\.ipynb died"):
        run_notebook(notebook)


def test_what_is_no_notebook_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": "x"}'):
        (tmp_path / "own.ipynb").write_text(text)
        with pytest.raises(CourseError, match="cannot be read as a notebook"):
            run_notebook(tmp_path / "own.ipynb")
