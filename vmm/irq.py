"""An interrupt line: the wire from a device to one input of an interrupt controller.

The line is level-triggered: it stays raised as long as the device wants attention. The device knows only this object;
the board decides which controller input it ends at. Message-signalled interrupts are not covered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class IrqLine:
    """A wire that is low when made.

    Args:
        sink: called with each new level, never from two threads at once and never twice with the same level.
        number: the controller's number of the input, for reports.
    """

    def __init__(self, sink: Callable[[bool], None], number: int = 0) -> None:
        self.number = number
        self._sink = sink
        self._lock = threading.Lock()
        self._level = False

    @property
    def level(self) -> bool:
        """Whether the line is raised."""
        return self._level

    def set(self, level: bool) -> None:
        """Raise or lower the line, from any thread; a level that it already has costs one comparison."""
        if level == self._level:
            return
        with self._lock:
            if level != self._level:
                self._sink(level)
                self._level = level
