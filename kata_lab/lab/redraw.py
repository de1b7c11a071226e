"""Redraws a view soon after what it shows has changed, from a thread that is there only while something is to be drawn.

Whoever changes it, such as a vCPU's thread, only says so and goes on; a view is redrawn at most every 50 ms.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from typing import Final

REDRAW_SECONDS: Final = 0.05


class Redraw:
    """Calls ``draw`` soon after :meth:`soon`.

    Args:
        draw: sets a widget's value, which may be done on any thread.
        name: of the thread.
        seconds: from a change to when it is drawn.
    """

    def __init__(self, draw: Callable[[], None], name: str, seconds: float = REDRAW_SECONDS) -> None:
        self._draw = draw
        self._name = name
        self._seconds = seconds
        self._lock = threading.Lock()
        self._waiting: threading.Timer | None = None
        self._closed = False

    def soon(self) -> None:
        """See to it that somebody draws soon; on any thread."""
        if self._waiting is not None or self._closed:
            return
        with self._lock:
            if self._waiting is None and not self._closed:
                self._waiting = threading.Timer(self._seconds, self._now)
                self._waiting.name = self._name
                self._waiting.daemon = True
                self._waiting.start()

    def _now(self) -> None:
        # Before it is drawn, so that what changes from now on is drawn again.
        with self._lock:
            self._waiting = None
        self._draw()

    def close(self) -> None:
        """Draw a last time, and not again; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()
            waiting.join()
        self._draw()


def widgets_can_run() -> bool:
    """Whether this is a notebook's kernel with ipywidgets."""
    if importlib.util.find_spec("ipywidgets") is None:
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
