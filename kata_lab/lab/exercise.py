"""What a check of an exercise answers: whether it is solved, and else what is wrong and where to look."""

from __future__ import annotations

import html
from dataclasses import dataclass

from kata_lab.lab.picture import GREEN, ORANGE, VERMILION

_SIGNS = {"solved": ("✔", GREEN), "not yet": ("…", ORANGE), "not right": ("✘", VERMILION)}


@dataclass(frozen=True, slots=True)
class Feedback:
    """The answer of a check.

    Attributes:
        verdict: ``solved``, ``not yet`` (nothing was tried) or ``not right``.
        text: one or two sentences for the learner; never the solution.
    """

    verdict: str
    text: str

    @property
    def passed(self) -> bool:
        """Whether the exercise is solved."""
        return self.verdict == "solved"

    def __repr__(self) -> str:
        sign, _ = _SIGNS[self.verdict]
        return f"{sign} {self.verdict}: {self.text}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        sign, colour = _SIGNS[self.verdict]
        style = f"border-left:6px solid {colour};padding:6px 12px;white-space:pre-wrap"
        markup = f"<div role='status' style='{style}'><b>{sign} {self.verdict}</b>: {html.escape(self.text)}</div>"
        return {"text/html": markup, "text/plain": repr(self)}


def solved(text: str) -> Feedback:
    """The exercise is solved."""
    return Feedback("solved", text)


def not_yet(text: str) -> Feedback:
    """Nothing was tried so far."""
    return Feedback("not yet", text)


def not_right(text: str) -> Feedback:
    """What was tried does not do it."""
    return Feedback("not right", text)
