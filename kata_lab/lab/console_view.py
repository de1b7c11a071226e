"""The guest's console in a notebook: it grows while the guest prints, and has a line to type into.

What the guest prints is pushed: the console tells the view, which redraws at most every 50 ms, from a short-lived
thread that is there only while something is to be drawn. Nothing is printed from a thread. Where no widgets can run (a
terminal, a script, a notebook that is only read) the view is the text so far. Escape sequences of a terminal
(ECMA-48, 5.4) are left out, and a carriage return starts the line anew.
"""

from __future__ import annotations

import html
import re
from types import TracebackType
from typing import Any, Final

from kata_lab.lab.picture import Picture
from kata_lab.lab.redraw import Redraw, widgets_can_run
from vmm.console import Console
from vmm.errors import VmmError

LINES: Final = 400
_ESCAPES: Final = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[\x00-\x07\x0b-\x0c\x0e-\x1f\x7f]")
_STYLE: Final = "background:#111;color:#eee;padding:8px;margin:0;overflow:auto;white-space:pre-wrap;font-size:12px"


def transcript(console: Console, lines: int = LINES) -> Picture:
    """The console's last ``lines`` lines as they are now."""
    text = plain(console.text, lines)
    return Picture(markup(text), text)


class ConsoleView:
    """A console, live; a context manager.

    Args:
        console: of a VM, which may start later.
        height: of the view, in lines.
    """

    def __init__(self, console: Console, height: int = 18) -> None:
        self._console = console
        self._height = height
        self._screen: Any = None
        self._widget: Any = None
        if widgets_can_run():
            self._build()
        self._redraw = Redraw(self._draw, "console-view")
        console.subscribe(self._printed)

    @property
    def text(self) -> str:
        """What the view shows."""
        return plain(self._console.text, LINES)

    def send(self, text: str) -> str:
        """Type a line at the guest's console; returns "", or why it could not be typed."""
        try:
            self._console.write(text + "\n", timeout=1)
        except VmmError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Draw a last time and stop listening; a second call does nothing."""
        self._console.unsubscribe(self._printed)
        self._redraw.close()

    def __enter__(self) -> ConsoleView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.text, "text/html": markup(self.text, self._height)}
        if self._widget is not None:
            shown = self._widget._repr_mimebundle_()
            bundle |= {kind: data for kind, data in shown.items() if kind not in bundle}
        return bundle

    def _printed(self, data: bytes) -> None:
        """On the guest's thread: see to it that somebody draws soon."""
        if self._screen is not None:
            self._redraw.soon()

    def _draw(self) -> None:
        if self._screen is not None:
            self._screen.value = markup(self.text, self._height)

    def _build(self) -> None:
        import ipywidgets as widgets

        self._screen = widgets.HTML(markup(self.text, self._height))
        line = widgets.Text(placeholder="type a command for the guest, then Enter", continuous_update=False)
        line.layout.width = "60%"
        interrupt = widgets.Button(description="Ctrl-C", tooltip="Interrupt what runs in the guest")
        said = widgets.Label()

        def typed(change: dict[str, Any]) -> None:
            if change["new"]:
                said.value = self.send(change["new"])
                line.value = ""

        def interrupted(button: object) -> None:
            try:
                self._console.write(b"\x03", timeout=1)
            except VmmError as error:
                said.value = str(error)

        line.observe(typed, names="value")
        interrupt.on_click(interrupted)
        self._widget = widgets.VBox([self._screen, widgets.HBox([line, interrupt]), said])


def plain(text: str, lines: int = LINES) -> str:
    """The last lines of a console's text, without escape sequences."""
    cleaned = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(cleaned.split("\n")[-lines:])


def markup(text: str, height: int | None = None) -> str:
    """Such lines as HTML; scrolled to their end if they are more than ``height``."""
    # The newest line is at the bottom and stays in sight: a reversed column scrolls from its end.
    limit = f"max-height:{1.35 * height:.0f}em;display:flex;flex-direction:column-reverse;" if height else ""
    return (
        f"<pre role='log' aria-label='console of the guest' tabindex='0' style='{limit}{_STYLE}'>"
        f"<code style='background:inherit;color:inherit'>{html.escape(text) or '(nothing printed yet)'}</code></pre>"
    )
