"""What a check of an exercise answers: whether it is solved, and else what is wrong and where to look.

A check is a function, or a coroutine, that returns a :class:`Feedback` and says with :func:`checks` which exercise it
judges. What it answers in a notebook is recorded (:mod:`kata_lab.lab.score`), and the notebook's output has it as data
beside the words (``application/vnd.kata-lab.feedback+json``), for whoever runs the notebook without looking at it.
"""

from __future__ import annotations

import functools
import html
import inspect
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final, ParamSpec, TypeVar, cast

from kata_lab.lab.picture import GREEN, ORANGE, VERMILION

VERDICTS: Final = ("solved", "not right", "not yet")  #: the best first
MIME_TYPE: Final = "application/vnd.kata-lab.feedback+json"

CHECKS: Final[dict[str, str]] = {}
"""The exercises that have a check in a module that was imported: id → name of the function."""

_SIGNS = {"solved": ("✔", GREEN), "not yet": ("…", ORANGE), "not right": ("✘", VERMILION)}


@dataclass(frozen=True, slots=True)
class Feedback:
    """The answer of a check.

    Attributes:
        verdict: ``solved``, ``not yet`` (nothing was tried) or ``not right``.
        text: one or two sentences for the learner; never the solution.
        exercise: whose check this is; empty for none of the course.
    """

    verdict: str
    text: str
    exercise: str = ""

    @property
    def passed(self) -> bool:
        """Whether the exercise is solved."""
        return self.verdict == "solved"

    def __repr__(self) -> str:
        sign, _ = _SIGNS[self.verdict]
        return f"{sign} {self.verdict}: {self.text}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        sign, colour = _SIGNS[self.verdict]
        style = f"border-left:6px solid {colour};padding:6px 12px;white-space:pre-wrap"
        markup = f"<div role='status' style='{style}'><b>{sign} {self.verdict}</b>: {html.escape(self.text)}</div>"
        data = {"exercise": self.exercise, "verdict": self.verdict, "text": self.text}
        return {"text/html": markup, "text/plain": repr(self), MIME_TYPE: data}


def solved(text: str) -> Feedback:
    """The exercise is solved."""
    return Feedback("solved", text)


def not_yet(text: str) -> Feedback:
    """Nothing was tried so far."""
    return Feedback("not yet", text)


def not_right(text: str) -> Feedback:
    """What was tried does not do it."""
    return Feedback("not right", text)


_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer", Feedback, Coroutine[Any, Any, Feedback])


def checks(exercise: str) -> Callable[[Callable[_Arguments, _Answer]], Callable[_Arguments, _Answer]]:
    """Say which exercise of the course a check judges.

    Args:
        exercise: its id, see :data:`kata_lab.lab.course.EXERCISES`.
    """

    def mark(check: Callable[_Arguments, _Answer]) -> Callable[_Arguments, _Answer]:
        CHECKS[exercise] = f"{check.__module__}.{check.__qualname__}"

        @functools.wraps(check)
        def judge(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Any:
            answer: Any = check(*args, **kwargs)
            return _told(exercise, answer)

        @functools.wraps(check)
        async def judge_later(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Feedback:
            answer: Any = check(*args, **kwargs)
            return _told(exercise, await answer)

        marked = judge_later if inspect.iscoroutinefunction(check) else judge
        return cast(Callable[_Arguments, _Answer], marked)

    return mark


def _told(exercise: str, feedback: Feedback) -> Feedback:
    """Feedback that knows its exercise, and is recorded if it came in a notebook and judges something."""
    marked = replace(feedback, exercise=exercise)
    if feedback.verdict == "not yet" or not _in_notebook():
        return marked
    from kata_lab.lab.score import try_to_record

    problem = try_to_record(exercise, feedback.verdict)
    return replace(marked, text=f"{marked.text} {problem}") if problem else marked


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
