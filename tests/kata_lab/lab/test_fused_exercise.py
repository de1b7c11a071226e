"""The check of notebook 6. What is measured is given here; the notebook itself measures real sandboxes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kata_lab.lab.fused_exercise import ROUNDS, Measured, check_predictions, measure
from tests.kata_lab.lab.answers import answered

FUSED = {"get_state": 5.0, "share_add_remove": 40.0, "pause_resume": 300.0, "vcpu_plus_minus": 15_000.0}
RPC = {"get_state": 350.0, "share_add_remove": 4000.0, "pause_resume": 3600.0, "vcpu_plus_minus": 18_000.0}
RIGHT: dict[str, Any] = answered("06-predict")["predictions"]


class Timed:
    """A runtime that always takes as long as this."""

    def __init__(self, microseconds: dict[str, float]) -> None:
        self._microseconds = microseconds
        self.asked: list[str] = []

    def ask(self, order: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append(arguments["action"])
        return {"us": [self._microseconds[arguments["action"]]] * arguments["rounds"]}


def changed(order: list[str] | None = None, **factors: object) -> dict[str, Any]:
    """The right answer, but for these."""
    made = copy.deepcopy(RIGHT)
    made["factor"] |= factors
    made["order"] = made["order"] if order is None else order
    return made


def judged(predictions: dict[str, Any]) -> tuple[str, str]:
    feedback = check_predictions(predictions, Measured(predictions, {"fused": FUSED, "rpc": RPC}))
    return feedback.verdict, feedback.text


def test_what_was_predicted_and_then_measured_is_solved() -> None:
    measured = measure(RIGHT, Timed(FUSED), Timed(RPC))

    assert measured is not None
    assert check_predictions(RIGHT, measured).passed
    assert measured.factors["get_state"] == 70.0
    assert [row[0] for row in measured.table().rows] == [
        *("share_add_remove", "get_state", "pause_resume", "vcpu_plus_minus")
    ]


def test_actions_of_nearly_the_same_factor_stand_in_either_order() -> None:
    swapped = ["share_add_remove", "get_state", "pause_resume", "vcpu_plus_minus"]

    assert judged(changed(swapped))[0] == "solved"


def test_nothing_is_measured_before_everything_is_predicted() -> None:
    fused = Timed(FUSED)
    unsolved: dict[str, Any] = {"order": [], "factor": dict.fromkeys(ROUNDS)}

    assert measure(unsolved, fused, Timed(RPC)) is None
    assert fused.asked == []
    feedback = check_predictions(unsolved, None)
    assert feedback.verdict == "not yet"
    assert "there is no factor for get_state, share_add_remove, pause_resume, vcpu_plus_minus yet" in feedback.text


@pytest.mark.parametrize(
    ("predictions", "sentence"),
    [
        ({}, "`predictions` has an `order`, a list, and a `factor`, a dictionary"),
        (changed(get_state=None), "there is no factor for get_state yet"),
        (changed(get_state="many"), "the factor of get_state is 'many', it must be a number above 0"),
        (changed(pause_resume=0), "the factor of pause_resume is 0, it must be a number above 0"),
        (changed(pause_resume=float("inf")), "the factor of pause_resume is inf, it must be a number above 0"),
        (changed(vcpu_plus_minus=True), "the factor of vcpu_plus_minus is True, it must be a number above 0"),
        (changed(["get_state"] * 4), "`order` must have each of get_state, pause_resume, share_add_remove, vcpu"),
    ],
)
def test_predictions_that_are_not_whole_are_not_yet(predictions: dict[str, Any], sentence: str) -> None:
    verdict, text = judged(predictions)

    assert verdict == "not yet"
    assert text.startswith(sentence)


def test_predictions_that_were_changed_after_the_measurement_are_not_yet() -> None:
    measured = measure(changed(get_state=2), Timed(FUSED), Timed(RPC))

    feedback = check_predictions(RIGHT, measured)

    assert feedback.verdict == "not yet"
    assert "nothing was measured since you wrote these predictions" in feedback.text


def test_a_wrong_order_is_not_right_and_says_which_two() -> None:
    verdict, text = judged(changed(["vcpu_plus_minus", "get_state", "share_add_remove", "pause_resume"]))

    assert verdict == "not right"
    assert "get_state gains clearly more than vcpu_plus_minus, which stands before it" in text


@pytest.mark.parametrize(
    ("factors", "sentence"),
    [
        ({"get_state": 1}, "the factor of get_state is more than 5 times larger than your 1."),
        ({"get_state": 1000}, "the factor of get_state is more than 5 times smaller than your 1000."),
        ({"vcpu_plus_minus": 10}, "the factor of vcpu_plus_minus is more than 5 times smaller than your 10."),
    ],
)
def test_a_wrong_factor_is_not_right_and_says_where_to_look(factors: dict[str, object], sentence: str) -> None:
    verdict, text = judged(changed(**factors))

    assert verdict == "not right"
    assert text.startswith(sentence)
    assert "part" in text
    assert "1.2" not in text


def test_the_sixth_notebook_holds_the_exercise_and_not_its_solution() -> None:
    place = Path(__file__).parents[3] / "notebooks" / "06-fused-or-rpc.ipynb"
    code = [cell.source for cell in nbformat.read(place, as_version=4).cells if cell.cell_type == "code"]
    (given,) = (source for source in code if source.startswith("predictions ="))
    names: dict[str, Any] = {}
    exec(given, names)

    assert any("check_predictions(predictions, measured)" in source for source in code)
    assert names["predictions"] == {"order": [], "factor": dict.fromkeys(names["predictions"]["factor"])}
    assert set(names["predictions"]["factor"]) == set(ROUNDS)
