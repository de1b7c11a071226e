"""A picture or table that is drawn again whenever what it shows has changed.

::

    lab.live(lambda: lab.sandbox_topology(sandbox), sandbox)   # drawn again at each event of a sandbox
    lab.live(lambda: lab.exits_chart(vm.trace), every=1)       # drawn again each second

What happens to a sandbox is pushed: it tells of its moments, containers and sizes as it logs them, and its agent of
each call that has ended. What nobody tells of, such as counters, is drawn again by the clock. The view is drawn at most
five times a second, on a thread of its own, which prints nothing; it goes when its cell is run again. Where no widget
can run it is the picture or table as it is when it is shown.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.lab.cells import close_with_cell
from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import Picture, Table
from kata_lab.lab.redraw import Redraw, widgets_can_run
from vmm.errors import VmmError

if TYPE_CHECKING:
    from kata_lab.agent.client import AgentCall
    from kata_lab.runtime import Sandbox, sync

LIVE_SECONDS: Final = 0.2  #: from a change to when it is drawn
FASTEST_SECONDS: Final = 0.2  #: of the clock

Drawn = Picture | Table


def live(
    draw: Callable[[], Drawn], sandbox: Sandbox | sync.Sandbox | None = None, *, every: float | None = None
) -> LiveView:
    """What ``draw`` gives, drawn again when something happens to ``sandbox``, and ``every`` so many seconds.

    Raises:
        LabError: there is neither, or ``every`` is too short.
    """
    if sandbox is None and every is None:
        raise LabError("a live view needs a sandbox to hear from, or a number of seconds with every=")
    view = LiveView(draw, every)
    if sandbox is not None:
        from kata_lab.runtime import sync

        view.listen(sandbox.asynchronous if isinstance(sandbox, sync.Sandbox) else sandbox)
    close_with_cell(view)
    return view


class LiveView:
    """A picture or table, live; a context manager.

    Args:
        draw: makes it; a KataLabError or VmmError that it raises is shown in its place.
        every: seconds between two drawings, None to draw only after :meth:`changed`.
    """

    def __init__(self, draw: Callable[[], Drawn], every: float | None = None) -> None:
        if every is not None and every < FASTEST_SECONDS:
            raise LabError(f"every is {every:g} s, it must be at least {FASTEST_SECONDS:g}")
        self._draw = draw
        self._screen: Any = None
        self._unsubscribe: list[Callable[[], None]] = []
        self._closed = threading.Event()
        if widgets_can_run():
            import ipywidgets

            self._screen = ipywidgets.HTML(self._markup())
        self._redraw = Redraw(self._show, "live-view", LIVE_SECONDS)
        if every is not None and self._screen is not None:
            threading.Thread(target=self._tick, args=(every,), name="live-clock", daemon=True).start()

    @property
    def drawn(self) -> Drawn:
        """The picture or table as it is now."""
        try:
            return self._draw()
        except (KataLabError, VmmError) as error:
            return Picture(f"<p role='status'>{html.escape(str(error))}</p>", str(error))

    def changed(self) -> None:
        """See to it that it is drawn again soon; on any thread."""
        if self._screen is not None:
            self._redraw.soon()

    def listen(self, sandbox: Sandbox) -> None:
        """Draw it again at each event of ``sandbox``, which may start later."""
        ears = _Ears(sandbox, self.changed)
        self._unsubscribe.append(ears.close)

    def close(self) -> None:
        """Draw a last time and stop listening; a second call does nothing."""
        self._closed.set()
        while self._unsubscribe:
            self._unsubscribe.pop()()
        self._redraw.close()

    def __enter__(self) -> LiveView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self.drawn)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        bundle: dict[str, Any] = dict(self.drawn._repr_mimebundle_())
        if self._screen is not None:
            shown = self._screen._repr_mimebundle_()
            bundle |= {kind: data for kind, data in shown.items() if kind not in bundle}
        return bundle

    def _markup(self) -> str:
        return self.drawn._repr_mimebundle_()["text/html"]

    def _show(self) -> None:
        if self._screen is not None:
            self._screen.value = self._markup()

    def _tick(self, every: float) -> None:
        while not self._closed.wait(every):
            self.changed()


class _Ears:
    """Hears what happens to a sandbox: what it logs, and the calls to its agent, once it has one.

    Args:
        sandbox: which may start later.
        heard: called at each event.
    """

    def __init__(self, sandbox: Sandbox, heard: Callable[[], None]) -> None:
        self._sandbox = sandbox
        self._heard = heard
        self._agent: Any = None
        self._before: Callable[[AgentCall], object] | None = None
        sandbox.log.listeners.append(self._logged)
        self._hear_agent()

    def close(self) -> None:
        """Hear no more."""
        listeners = self._sandbox.log.listeners
        if self._logged in listeners:
            listeners.remove(self._logged)
        if self._agent is not None and self._agent.on_call == self._called:
            self._agent.on_call = self._before

    def _logged(self, message: str) -> None:
        self._hear_agent()
        self._heard()

    def _called(self, call: AgentCall) -> None:
        self._heard()
        if self._before is not None:
            self._before(call)

    def _hear_agent(self) -> None:
        if self._agent is None and str(self._sandbox.state) == "running":
            self._agent = self._sandbox.agent
            self._before, self._agent.on_call = self._agent.on_call, self._called
