"""Pictures and tables that a notebook can show, a terminal can print and a screen reader can say.

Every picture carries its content in words; where no HTML can be shown, the words are what is printed. Colours are those
of Okabe and Ito (Color Universal Design, 2008), which people with any kind of colour vision tell apart, and no colour
is the only carrier of a meaning: hatches, labels or positions say it too.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kata_lab.errors import KataLabError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK: Final = "#000000"
ORANGE: Final = "#E69F00"
SKY: Final = "#56B4E9"
GREEN: Final = "#009E73"
YELLOW: Final = "#F0E442"
BLUE: Final = "#0072B2"
VERMILION: Final = "#D55E00"
PURPLE: Final = "#CC79A7"

_CELL: Final = "padding:2px 8px;text-align:left;vertical-align:top"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture.

    Attributes:
        markup: HTML.
        alternative: what the picture shows, in words.
    """

    markup: str
    alternative: str

    def __repr__(self) -> str:
        return self.alternative

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.markup, "text/plain": self.alternative}


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text.

    Attributes:
        header: the columns' names.
        rows: one text per column.
        caption: what the table shows.
        marked: numbers of the rows to point at.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: frozenset[int] = field(default_factory=frozenset)

    def __repr__(self) -> str:
        widths = [max(len(row[at]) for row in (self.header, *self.rows)) for at in range(len(self.header))]
        lines = [self.caption] if self.caption else []
        for number, row in enumerate((self.header, *self.rows), -1):
            sign = ("> " if number in self.marked else "  ") if self.marked else ""
            lines.append(sign + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        caption = (
            f"<caption style='text-align:left;white-space:nowrap'>{html.escape(self.caption)}</caption>"
            if self.caption
            else ""
        )
        head = "".join(f"<th scope='col' style='{_CELL}'>{html.escape(name)}</th>" for name in self.header)
        body = "".join(self._row(number, row) for number, row in enumerate(self.rows))
        inside = f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        markup = f"<table style='border-collapse:collapse'>{inside}</table>"
        return {"text/html": markup, "text/plain": repr(self)}

    def _row(self, number: int, row: Sequence[str]) -> str:
        style = f"{_CELL};font-family:monospace;white-space:pre-wrap"
        mark = ""
        if number in self.marked:
            style += ";font-weight:bold"
            mark = f" style='border-left:4px solid {VERMILION}'"
        return f"<tr{mark}>" + "".join(f"<td style='{style}'>{html.escape(text)}</td>" for text in row) + "</tr>"


def drawing(body: str, width: int, height: int, alternative: str) -> Picture:
    """A picture from the elements of an SVG of ``width`` × ``height`` pixels, on white.

    Raises:
        KataLabError: it has no words.
    """
    _check_words(alternative)
    markup = (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' aria-label='{html.escape(alternative)}' "
        f"width='{width}' height='{height}' viewBox='0 0 {width} {height}' "
        "style='background:white;max-width:100%;height:auto' font-family='sans-serif' font-size='12'>"
        f"<title>{html.escape(alternative)}</title>{body}</svg>"
    )
    return Picture(markup, alternative)


def figure_picture(figure: Figure, alternative: str) -> Picture:
    """A picture from a matplotlib figure, which is drawn and let go.

    Raises:
        KataLabError: it has no words.
    """
    _check_words(alternative)
    file = io.BytesIO()
    figure.savefig(file, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return Picture(
        f"<img alt='{html.escape(alternative)}' src='data:image/svg+xml;base64,{data}' style='max-width:100%'>",
        alternative,
    )


def _check_words(alternative: str) -> None:
    if not alternative.strip():
        raise KataLabError("a picture has no words: say in one sentence what somebody who cannot see it should know")
