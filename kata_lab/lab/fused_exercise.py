"""Check of the exercise of notebook 6, "Fused or RPC": predict how much an action gains, then measure it.

Predictions are data: an order of the actions, and a factor for each. They are kept with the measurement that follows
them; who changes them measures again. Order and factors are compared with what was measured on this machine, not with
numbers of another one, and with room for what runs beside.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final, Protocol

from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved
from kata_lab.lab.picture import Table

ROUNDS: Final = {"get_state": 500, "share_add_remove": 40, "pause_resume": 40, "vcpu_plus_minus": 3}
ROOM: Final = 5.0  #: that a factor may be off, either way
TIE: Final = 3.0  #: actions whose factors are nearer than that may stand in either order
_WHERE: Final = {
    "get_state": "the histogram of part 4 shows this very action over both",
    "share_add_remove": "count the processes that the call has to reach over rpc, and look at what is left to do over"
    " fused: part 2 says where the shared directory is served",
    "pause_resume": "over fused this is no mere function call either: who has to stop before it can be answered? Think"
    " of the threads in part 2, and of two messages",
    "vcpu_plus_minus": "look at the table of part 3 once more: which part of the time does the way take, and which part"
    " do VMM and guest take over both",
}


class Timing(Protocol):
    """Times actions, as :class:`kata_lab.bench.fused_runtime.RuntimeProcess` does."""

    def ask(self, order: str, **arguments: Any) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What came after a prediction.

    Attributes:
        predictions: as they were then.
        medians: arrangement → action → microseconds.
    """

    predictions: dict[str, Any]
    medians: dict[str, dict[str, float]]

    @property
    def factors(self) -> dict[str, float]:
        """Action → rpc / fused."""
        return {action: self.medians["rpc"][action] / took for action, took in self.medians["fused"].items()}

    def table(self) -> Table:
        """Predicted and measured side by side."""
        rows = []
        for action, factor in sorted(self.factors.items(), key=lambda each: -each[1]):
            fused, rpc = (self.medians[side][action] for side in ("fused", "rpc"))
            predicted = self.predictions["factor"][action]
            rows.append((action, f"{fused:,.0f}", f"{rpc:,.0f}", f"{factor:.2g}", f"{predicted:g}"))
        return Table(("action", "fused, µs", "rpc, µs", "rpc / fused", "predicted"), rows, "Medians")


def problem_of(predictions: Mapping[str, Any]) -> str:
    """What a prediction lacks, "" if it is whole."""
    order, factors = predictions.get("order"), predictions.get("factor")
    if not isinstance(factors, Mapping) or not isinstance(order, (list, tuple)):
        return "`predictions` has an `order`, a list, and a `factor`, a dictionary"
    missing = [action for action in ROUNDS if factors.get(action) is None]
    if missing:
        return f"there is no factor for {', '.join(missing)} yet"
    for action in ROUNDS:
        factor = factors[action]
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool) and math.isfinite(factor)
        if not number or factor <= 0:
            return f"the factor of {action} is {factor!r}, it must be a number above 0: rpc / fused"
    if sorted(map(str, order)) != sorted(ROUNDS):
        return f"`order` must have each of {', '.join(sorted(ROUNDS))} once, the largest factor first"
    return ""


def measure(
    predictions: Mapping[str, Any], fused: Timing, rpc: Timing, rounds: Mapping[str, int] = ROUNDS
) -> Measured | None:
    """Time the actions over both, in turns; None as long as nothing is predicted.

    Args:
        predictions: whole, see :func:`problem_of`.
        fused: with a sandbox that runs.
        rpc: likewise.
        rounds: of each action.
    """
    if problem_of(predictions):
        return None
    medians: dict[str, dict[str, float]] = {"fused": {}, "rpc": {}}
    for action, count in rounds.items():
        for side, runtime in (("fused", fused), ("rpc", rpc)):
            medians[side][action] = statistics.median(runtime.ask("time", action=action, rounds=count)["us"])
    return Measured(copy.deepcopy(dict(predictions)), medians)


@checks("06-predict")
def check_predictions(predictions: Mapping[str, Any], measured: Measured | None) -> Feedback:
    """Whether what was predicted is what was measured then: the order of the actions, and the factor of each.

    Args:
        predictions: the learner's.
        measured: what :func:`measure` gave for them.
    """
    if problem := problem_of(predictions):
        return not_yet(f"{problem}: write your predictions down, then measure.")
    if measured is None or dict(predictions) != measured.predictions:
        return not_yet("nothing was measured since you wrote these predictions: run the cell that measures.")
    factors = measured.factors
    for first, second in combinations(predictions["order"], 2):
        if factors[second] > factors[first] * TIE:
            return not_right(
                f"the order is not: {second} gains clearly more than {first}, which stands before it."
                f" {_sentence(second)}"
            )
    for action, factor in factors.items():
        predicted = predictions["factor"][action]
        if not factor / ROOM <= predicted <= factor * ROOM:
            return not_right(
                f"the factor of {action} is more than {ROOM:g} times {'smaller' if predicted > factor else 'larger'}"
                f" than your {predicted:g}. {_sentence(action)}"
            )
    return solved(
        "order and factors are as on this machine: the less an action does besides being asked for, the more it gains"
        " from being a function call."
    )


def _sentence(action: str) -> str:
    where = _WHERE[action]
    return f"{where[0].upper()}{where[1:]}."
