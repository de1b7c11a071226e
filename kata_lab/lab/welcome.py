"""What notebook 0 shows: what this machine can do, and a map of the course with how far its learner came.

The map is drawn from the notebooks themselves (title, time) and from the learner's record; nothing of it is kept twice.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kata_lab.lab.course import EXERCISES, exercises_of, notebooks, title
from kata_lab.lab.picture import BLACK, BLUE, GREEN, Picture, Table, drawing

if TYPE_CHECKING:
    from kata_lab.lab.score import Standing

_TIME: Final = re.compile(r"\*\*Time\*\*: ([^.]*)\.")
_SIGNS: Final = {"ok": "✔ ok", "note": "· note", "missing": "✘ missing"}
_BOX: Final = (170, 74)  # width and height of a notebook on the map
_GAP: Final = (30, 44)
_EDGE: Final = 12
_COLUMNS: Final = 4


def doctor_table() -> Table:
    """What ``kata-lab doctor`` finds; rows of what is missing are marked."""
    from kata_lab.doctor import examine

    found = tuple(examine())
    rows = [
        (_SIGNS[each.verdict], each.name, f"{each.found}\n→ {each.advice}" if each.advice else each.found)
        for each in found
    ]
    missing = frozenset(number for number, each in enumerate(found) if each.verdict == "missing")
    told = "This machine cannot run the lab yet" if missing else "This machine can run the lab"
    return Table(("", "what", "found"), rows, told, missing)


def course_map(standings: Mapping[str, Standing] | None = None) -> Picture:
    """The notebooks in their order, each with its time, and the points earned in it.

    Args:
        standings: exercise → standing; the learner's record if None.

    Raises:
        CourseError: the record cannot be read, or the notebooks are not there.
    """
    if standings is None:
        from kata_lab.lab.score import standings as recorded

        standings = recorded()
    body, said = [_arrowhead()], []
    places = notebooks()
    for number, place in enumerate(places):
        left, top = _corner(number)
        points = sum(each.points for each in exercises_of(place.stem))
        earned = sum(standings[each.id].earned for each in exercises_of(place.stem))
        name, time = title(place).partition(":")[0], _time(place)
        body.append(_box(left, top, name, time, f"{earned} of {points} points", points > 0 and earned > 0))
        if number + 1 < len(places):
            body.append(_arrow(number))
        said.append(f"{name}, {time}, {earned} of {points} points")
    rows = -(-len(places) // _COLUMNS)
    width = 2 * _EDGE + _COLUMNS * _BOX[0] + (_COLUMNS - 1) * _GAP[0]
    height = 2 * _EDGE + rows * _BOX[1] + (rows - 1) * _GAP[1]
    total = sum(each.points for each in EXERCISES)
    words = f"The course, {len(places)} notebooks one after the other, {total} points in all: {'; '.join(said)}."
    return drawing("".join(body), width, height, words)


def _time(notebook: Path) -> str:
    found = _TIME.search(notebook.read_text("utf-8"))
    return found[1] if found else "any time"


def _corner(number: int) -> tuple[int, int]:
    """Of a notebook's box; rows run from left to right."""
    row, column = divmod(number, _COLUMNS)
    return _EDGE + column * (_BOX[0] + _GAP[0]), _EDGE + row * (_BOX[1] + _GAP[1])


def _box(left: int, top: int, name: str, time: str, points: str, begun: bool) -> str:
    """A box; one in which points were earned has a thick edge and a sign."""
    colour, thick, sign = (GREEN, 4, " ✔") if begun else (BLUE, 1.5, "")
    lines = ((name, 24, "bold", 13), (time, 45, "normal", 11), (points + sign, 62, "normal", 11))
    text = "".join(
        f"<text x='{left + 10}' y='{top + down}' font-weight='{weight}' font-size='{size}'>{html.escape(words)}</text>"
        for words, down, weight, size in lines
    )
    return (
        f"<rect x='{left}' y='{top}' width='{_BOX[0]}' height='{_BOX[1]}' rx='6' fill='white' stroke='{colour}'"
        f" stroke-width='{thick}'/>{text}"
    )


def _arrow(number: int) -> str:
    """From a notebook to the next one: to the right, or from the end of a row to the beginning of the one below."""
    left, top = _corner(number)
    after_left, after_top = _corner(number + 1)
    if top == after_top:
        across = top + _BOX[1] // 2
        path = f"M{left + _BOX[0] + 3} {across} H{after_left - 7}"
    else:
        between = top + _BOX[1] + _GAP[1] // 2
        path = f"M{left + _BOX[0] // 2} {top + _BOX[1] + 3} V{between} H{after_left + _BOX[0] // 2} V{after_top - 7}"
    return f"<path d='{path}' fill='none' stroke='{BLACK}' stroke-width='1.5' marker-end='url(#next)'/>"


def _arrowhead() -> str:
    shape = f"<path d='M0 0 L6 3 L0 6 z' fill='{BLACK}'/>"
    size = "markerWidth='7' markerHeight='7' refX='1' refY='3' orient='auto'"
    return f"<defs><marker id='next' {size}>{shape}</marker></defs>"
