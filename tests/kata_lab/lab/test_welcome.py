"""Notebook 0: the map, the doctor's table, and the check that shows how checks answer."""

from __future__ import annotations

import platform
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from kata_lab.errors import KataLabError
from kata_lab.lab import course_map, doctor_table
from kata_lab.lab.course import EXERCISES, notebooks, title
from kata_lab.lab.picture import drawing, figure_picture
from kata_lab.lab.score import Standing, note_attempt
from kata_lab.lab.welcome_exercise import check_kernel
from kata_lab.runtime import RunResult
from tests.kata_lab.lab.answers import answered

UNAME = "Linux 637964bf126a 6.12.107+deb13-riscv64 #1 SMP Debian 6.12.107-1 (2026-08-29) riscv64 GNU/Linux\n"
TOTAL = sum(each.points for each in EXERCISES)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "home"))


def test_the_map_has_every_notebook_in_words_and_in_the_picture() -> None:
    picture = course_map({each.id: Standing() for each in EXERCISES})
    words = [text.text for text in ElementTree.fromstring(picture.markup).iter() if text.tag.endswith("}text")]

    assert f"{len(notebooks())} notebooks one after the other, {TOTAL} points in all" in picture.alternative
    for place in notebooks():
        name = title(place).partition(":")[0]
        assert name in words
        assert name in picture.alternative
    assert "any time" not in picture.alternative


def test_the_map_tells_what_was_earned_without_colour_alone() -> None:
    before = course_map()
    note_attempt("04-pod", "solved")
    after = course_map()

    assert "4 · Run a container, 45 to 60 minutes, 8 of 16 points" in after.alternative
    assert "8 of 16 points ✔" in after.markup
    assert "✔" not in before.markup


@pytest.mark.parametrize("words", ["", "  \n"])
def test_a_picture_without_words_is_refused(words: str) -> None:
    with pytest.raises(KataLabError, match="a picture has no words: say in one sentence"):
        drawing("<path d='M0 0'/>", 10, 10, words)
    with pytest.raises(KataLabError, match="a picture has no words: say in one sentence"):
        figure_picture(Figure(), words)


def test_the_doctors_table_marks_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = doctor_table()
    monkeypatch.setattr("kata_lab.doctor.LEAST_MEMORY", 1 << 60)
    lacking = doctor_table()

    assert fine.caption == "This machine can run the lab"
    assert not fine.marked
    (row,) = lacking.marked
    assert lacking.rows[row][:2] == ("✘ missing", "memory")
    assert "→ have" in lacking.rows[row][2]
    assert "cannot" in lacking.caption


def test_the_right_release_passes() -> None:
    answer = answered("00-which-kernel", result=RunResult(0, UNAME.encode(), b""))["answer"]

    assert check_kernel(answer, UNAME).passed
    assert check_kernel(f" {answer} ", UNAME).passed


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (platform.release(), "the kernel of this host"),
        ("riscv64", "begins with a version"),
        ("637964bf126a", "begins with a version"),
        ("6.12.107-1", "begins with a version"),
        ("6.12", "is no word of what the container said"),
        ("", "is no word of what the container said"),
    ],
)
def test_a_wrong_release_is_told_where_to_look(answer: str, hint: str) -> None:
    feedback = check_kernel(answer, UNAME)

    assert feedback.verdict == "not right"
    assert hint in feedback.text
    assert "6.12.107+deb13" not in feedback.text


def test_no_release_is_not_yet() -> None:
    assert check_kernel(None, UNAME).verdict == "not yet"
