"""A virtqueue in a notebook, live: its picture and its counters, while the guest works.

The probe that listens to the device tells the view of every access, which redraws at most every 50 ms. Where no widgets
can run, the view is the picture as it is when it is asked for.
"""

from __future__ import annotations

import html
from typing import Any, Final

from kata_lab.lab.picture import Picture
from kata_lab.lab.redraw import Redraw, widgets_can_run
from kata_lab.lab.slot_probe import INTERRUPT_ACK, QUEUE_NOTIFY, Access, SlotProbe
from kata_lab.lab.virtqueue_view import draw_queue

_INDICES: Final = 1 << 16


class QueueView:
    """A queue of the device that a probe listens to; a context manager.

    Attributes:
        notifications: of this queue, since the view was made.
        interrupts: that the driver acknowledged, of the whole device.

    Args:
        probe: it is closed by its owner.
        number: of the queue.
    """

    def __init__(self, probe: SlotProbe, number: int = 0) -> None:
        self._probe = probe
        self._number = number
        self._buffers, self._used = 0, probe.frame(number).view.get("used_index", 0)
        self.notifications = self.interrupts = 0
        self._screen: Any = None
        if widgets_can_run():
            import ipywidgets as widgets

            self._screen = widgets.HTML()
        self._redraw = Redraw(self._draw, "queue-view")
        self._draw()
        probe.subscribe(self._accessed)

    @property
    def picture(self) -> Picture:
        """The queue as it is now, with its counters below."""
        drawn = draw_queue(self._probe.frame(self._number))
        counted = f"{self.buffers:,} buffers used, {self.notifications:,} notifications, {self.interrupts:,} interrupts"
        return Picture(
            f"{drawn.markup}<div role='status'>{html.escape(counted)}</div>", f"{drawn.alternative} {counted}."
        )

    @property
    def buffers(self) -> int:
        """How many went through since the view was made, if somebody looked at least every 65,535."""
        used = self._probe.frame(self._number).view.get("used_index", self._used)
        self._buffers += (used - self._used) % _INDICES
        self._used = used
        return self._buffers

    def close(self) -> None:
        """Draw a last time and stop listening; a second call does nothing."""
        self._probe.unsubscribe(self._accessed)
        self._redraw.close()

    def __enter__(self) -> QueueView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return self.picture.alternative

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        picture = self.picture
        bundle: dict[str, Any] = {"text/plain": picture.alternative, "text/html": picture.markup}
        if self._screen is not None:
            shown = self._screen._repr_mimebundle_()
            bundle |= {kind: data for kind, data in shown.items() if kind not in bundle}
        return bundle

    def _accessed(self, access: Access) -> None:
        """On the guest's thread."""
        if access.write and access.offset == QUEUE_NOTIFY:
            self.notifications += access.value == self._number
        elif access.write and access.offset == INTERRUPT_ACK:
            self.interrupts += 1
        if self._screen is not None:
            self._redraw.soon()

    def _draw(self) -> None:
        if self._screen is not None:
            self._screen.value = self.picture.markup
