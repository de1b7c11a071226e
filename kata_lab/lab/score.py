"""What a learner has done: attempts, the best verdict and the hints taken of each exercise, kept on their machine.

One file, ``course.json`` in the records directory (:func:`kata_lab.paths.records_directory`), which outlives a restart
of the machine::

    {"format": 1, "exercises": {"05-half-way": {"attempts": 3, "best": "solved", "hints": 1, "earned": 9, "solved": …}}}

It is changed under a lock, written, synced and renamed; several notebooks may run at once. A check that found nothing
to judge ("not yet") is no attempt. Nothing leaves the machine unless the learner exports it.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import html
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.lab.course import EXERCISES, CourseError, Exercise, exercise
from kata_lab.lab.exercise import VERDICTS
from kata_lab.lab.picture import Table
from kata_lab.paths import records_directory

FORMAT: Final = 1
FILE: Final = "course.json"
_LOCK: Final = "course.lock"
_COLUMNS: Final = ("learner", "exercise", "title", "best", "attempts", "hints", "earned", "points", "solved")


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a learner came with one exercise.

    Attributes:
        attempts: times that a check had something to judge.
        best: the best verdict so far.
        hints: how many were taken.
        earned: points.
        solved: when it was first solved, in UTC (ISO 8601); empty if it was not.
    """

    attempts: int = 0
    best: str = "not yet"
    hints: int = 0
    earned: int = 0
    solved: str = ""

    def after(self, verdict: str, points: int, now: datetime) -> Standing:
        """The standing after one more attempt; what was earned once stays."""
        best = min(self.best, verdict, key=VERDICTS.index)
        tried = dataclasses.replace(self, attempts=self.attempts + 1, best=best)
        if verdict != "solved" or self.solved:
            return tried
        return dataclasses.replace(tried, earned=max(points - self.hints, 1), solved=now.isoformat(timespec="seconds"))


def standings() -> dict[str, Standing]:
    """The standing of each exercise of the course.

    Raises:
        CourseError: the record cannot be read.
    """
    found = _read(records_directory() / FILE)
    return {each.id: found.get(each.id, Standing()) for each in EXERCISES}


def note_attempt(id: str, verdict: str) -> None:
    """Record what a check said.

    Raises:
        CourseError: there is no such exercise, or the record cannot be read or written.
    """
    points, now = exercise(id).points, datetime.now(UTC)
    _change(id, lambda standing: standing.after(verdict, points, now))


@dataclass(frozen=True, slots=True)
class Hint:
    """The hints to an exercise that a learner has taken.

    Attributes:
        exercise: whose.
        taken: texts, the newest last.
    """

    exercise: Exercise
    taken: tuple[str, ...]

    @property
    def rest(self) -> str:
        """What there is besides."""
        left = len(self.exercise.hints) - len(self.taken)
        return "There are no more hints." if left == 0 else f"{left} more to be asked for."

    def __repr__(self) -> str:
        lines = [f"{number}. {text}" for number, text in enumerate(self.taken, 1)]
        return "\n".join([f"{self.exercise.id}: {self.exercise.title}", *lines, self.rest])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in self.taken)
        heading = f"<b>{html.escape(self.exercise.title)}</b>"
        markup = f"<div role='note'>{heading}<ol>{items}</ol><i>{html.escape(self.rest)}</i></div>"
        return {"text/html": markup, "text/plain": repr(self)}


def hint(id: str) -> Hint:
    """The next hint to an exercise, with those before it; each takes one point until the exercise is solved.

    Raises:
        CourseError: there is no such exercise, or the record cannot be read or written.
    """
    wanted = exercise(id)
    now = _change(id, lambda standing: dataclasses.replace(standing, hints=min(standing.hints + 1, len(wanted.hints))))
    return Hint(wanted, wanted.hints[: now.hints])


@dataclass(frozen=True)
class Score:
    """A learner's standing in the whole course; shows itself as a table."""

    standings: Mapping[str, Standing] = field(default_factory=standings)

    @property
    def earned(self) -> int:
        """Points."""
        return sum(each.earned for each in self.standings.values())

    @property
    def points(self) -> int:
        """That there are to earn."""
        return sum(each.points for each in EXERCISES)

    @property
    def solved(self) -> int:
        """Exercises."""
        return sum(bool(each.solved) for each in self.standings.values())

    @property
    def summary(self) -> str:
        """In one line."""
        return f"{self.earned} of {self.points} points, {self.solved} of {len(EXERCISES)} exercises solved"

    @property
    def table(self) -> Table:
        """A row for each exercise."""
        rows = []
        for each in EXERCISES:
            standing = self.standings[each.id]
            points = f"{standing.earned} of {each.points}"
            rows.append((each.id, each.title, standing.best, str(standing.attempts), str(standing.hints), points))
        return Table(("exercise", "title", "best", "attempts", "hints", "points"), rows, self.summary)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return self.table._repr_mimebundle_()


def exported(learner: str = "", form: str = "json") -> str:
    """A learner's results for an instructor.

    Args:
        learner: a name, if they want to give it.
        form: ``json`` or ``csv``.

    Raises:
        CourseError: the record cannot be read.
    """
    score = Score()
    rows = [
        {
            "exercise": each.id,
            "title": each.title,
            "points": each.points,
            **dataclasses.asdict(score.standings[each.id]),
        }
        for each in EXERCISES
    ]
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS)
        writer.writeheader()
        writer.writerows({"learner": _harmless(learner), **row} for row in rows)
        return text.getvalue()
    whole = {"format": FORMAT, "learner": learner, "earned": score.earned, "points": score.points, "exercises": rows}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _harmless(text: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _change(id: str, change: Callable[[Standing], Standing]) -> Standing:
    from kata_lab.image.store import publish, write_synced

    directory = records_directory()
    try:
        with _locked(directory):
            found = _read(directory / FILE)
            found[id] = change(found.get(id, Standing()))
            plain = {name: dataclasses.asdict(each) for name, each in sorted(found.items())}
            partial = directory / f"{FILE}.partial"
            try:
                write_synced(partial, json.dumps({"format": FORMAT, "exercises": plain}, indent=1).encode() + b"\n")
                publish(partial, directory / FILE)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise CourseError(
            f"the record in {directory} cannot be written ({error.strerror}): make it writable"
        ) from error
    return found[id]


def _read(place: Path) -> dict[str, Standing]:
    """The standings in a record; exercises of another version of the course are kept."""
    try:
        plain = json.loads(place.read_bytes())
        if plain["format"] != FORMAT:
            raise CourseError(
                f"the record {place} has format {plain['format']!r} and this version reads {FORMAT}: move it away to "
                "begin anew, or use the version that wrote it"
            )
        return {str(name): _standing(each) for name, each in plain["exercises"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CourseError(f"the record {place} cannot be read ({error}): move it away to begin anew") from error


def _standing(plain: Mapping[str, Any]) -> Standing:
    standing = Standing(**plain)
    numbers = (standing.attempts, standing.hints, standing.earned)
    if standing.best not in VERDICTS or not all(isinstance(each, int) and each >= 0 for each in numbers):
        raise ValueError(f"{dict(plain)!r} is no standing")
    if not isinstance(standing.solved, str):
        raise ValueError(f"solved is {standing.solved!r} and no time")
    return standing


def try_to_record(id: str, verdict: str) -> str:
    """Record what a check said in a notebook; what to tell the learner if that cannot be."""
    try:
        note_attempt(id, verdict)
    except KataLabError as error:
        return f"(This was not recorded: {error}.)"
    return ""
