"""How far a download, a build or a compilation has come: a thin face over tqdm.

tqdm is imported only when a bar is drawn, which is on a terminal and in a notebook. Elsewhere (a pipe, a log) nothing
is printed, unless the caller asks for ``"lines"``: then each finished step is one line. A step ends as failed when an
exception ends it, or when its owner says so with ``fail()``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Protocol, TextIO

from kata_lab.errors import KataLabError

ProgressMode = Literal["auto", "bar", "steps", "lines", "off"]
"""``auto``: a bar where somebody watches, silence elsewhere; ``lines``: one line per finished step; ``steps``: and one
when it begins."""

MODE_VARIABLE = "KATA_LAB_PROGRESS"


class _Bar(Protocol):
    def update(self, n: float) -> object: ...
    def set_postfix_str(self, s: str) -> None: ...
    def refresh(self) -> object: ...
    def close(self) -> None: ...


class Progress:
    """The progress of one step, as a context manager.

    ::

        with Progress("Compiling the hart", total=40) as bar:
            bar.advance(1, "loads and stores")

    Args:
        title: what is being done, in the words of a person.
        total: how many units make the whole; None when it is not known.
        unit: name of a unit; ``"B"`` prints thousands of bytes as kB, MB.
        announced: in ``lines``, print a line when the step begins, too: for what takes as long as somebody else likes.
        mode: see ProgressMode; ``auto`` gives way to the environment's ``KATA_LAB_PROGRESS``.
        stream: where to print; standard error when None.
    """

    def __init__(
        self,
        title: str,
        total: float | None = None,
        *,
        unit: str = "",
        announced: bool = False,
        mode: ProgressMode = "auto",
        stream: TextIO | None = None,
    ) -> None:
        self.title = title
        self.total = total
        self.done = 0.0
        self._unit = unit
        self._failed = False
        self._stream = sys.stderr if stream is None else stream
        resolved = resolved_mode(mode, self._stream)
        self._announced = announced or resolved == "steps"
        self._mode = "lines" if resolved == "steps" else resolved
        self._bar: _Bar | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._mode == "bar":
            self._bar = self._draw()
        elif self._mode == "lines" and self._announced:
            print(f"{self.title}…", file=self._stream, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._failed = True
        if not self._failed and self.total is not None:
            self.advance_to(self.total)
        if self._bar is not None:
            if self._failed:
                self._bar.set_postfix_str("failed")
            self._bar.close()
            self._bar = None
        if self._mode == "lines":
            outcome = "failed" if self._failed else "done"
            print(
                f"{self.title}: {outcome} after {time.monotonic() - self._started:.1f} s",
                file=self._stream,
                flush=True,
            )

    def fail(self) -> None:
        """Let the step end as failed although no exception ends it."""
        self._failed = True

    def tick(self) -> None:
        """Show that time passes while nothing is counted."""
        if self._bar is not None:
            self._bar.refresh()

    def advance(self, amount: float = 1, stage: str = "") -> None:
        """Count `amount` more units; `stage` names what is now being worked on."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
            if stage:
                self._bar.set_postfix_str(stage)

    def advance_to(self, done: float, stage: str = "") -> None:
        """Count up to `done` units; going backwards is ignored."""
        if done > self.done or stage:
            self.advance(max(done - self.done, 0), stage)

    def _draw(self) -> _Bar:
        import tqdm

        draw: Callable[..., _Bar] = tqdm.tqdm
        if _in_notebook():
            import tqdm.auto

            draw = tqdm.auto.tqdm
        layout = None
        if not self._unit:
            layout = "{desc}: {elapsed}{postfix}" if self.total is None else "{l_bar}{bar}| {elapsed}{postfix}"
        return draw(
            total=self.total,
            desc=self.title,
            unit=self._unit or "step",
            unit_scale=self._unit == "B",
            bar_format=layout,
            file=self._stream,
            dynamic_ncols=True,
        )


def resolved_mode(mode: ProgressMode, stream: TextIO) -> Literal["bar", "steps", "lines", "off"]:
    """What a mode means for a stream.

    Raises:
        KataLabError: the environment names a mode that there is not.
    """
    chosen: str = mode
    if mode == "auto":
        chosen = os.environ.get(MODE_VARIABLE) or "auto"
    match chosen:
        case "bar" | "steps" | "lines" | "off":
            return chosen
        case "auto":
            return "bar" if stream.isatty() or _in_notebook() else "off"
        case _:
            raise KataLabError(f"progress mode {chosen!r} is unknown: it is one of auto, bar, steps, lines, off")


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
