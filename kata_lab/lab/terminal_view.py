"""A real terminal in a notebook: on a guest's serial console, or on a process with a terminal in a sandbox.

::

    lab.terminal(vm)                      # the serial console of a VM
    lab.terminal(sandbox)                 # a shell in a container of its own
    lab.terminal(container, ["vi", "x"])  # one more process in a container

The page draws it with xterm.js (:mod:`kata_lab.lab.xterm`), so that editors, colours and job control work; bytes pass
as they are in both directions, and how many are under way is bounded (:mod:`kata_lab.lab.terminal_feed`). Nothing is
printed from a thread. A terminal goes when its cell is run again, when it is closed, and with the kernel; a page that
is closed or loaded anew finds it as it was. Where no widget can run, the view is the text so far, and
:meth:`Terminal.send` types. Leaves out links: a guest is not trusted to say where a click leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from kata_lab.lab.cells import close_with_cell
from kata_lab.lab.console_view import markup, plain
from kata_lab.lab.machines import LabError
from kata_lab.lab.redraw import widgets_can_run
from kata_lab.lab.terminal_feed import Feed
from kata_lab.lab.terminal_lines import ConsoleLine, Line, ProcessLine, killed_at_end
from kata_lab.lab.xterm import terminal_script
from kata_lab.runtime import Container, Process, Sandbox, sync
from kata_lab.terminal import WindowSize
from vmm.console import Console
from vmm.microvm import MicroVm

SHELL: Final = ("sh",)
TERM: Final = "TERM=xterm-256color"
ROWS: Final = 18
_MOST: Final = 1000  #: rows or columns of a window

Place = MicroVm | Console | Sandbox | Container | sync.Sandbox | sync.SyncContainer


def terminal(
    place: Place, args: Sequence[str] = SHELL, image: str = "busybox", *, height: int = ROWS, **wishes: Any
) -> Terminal:
    """A terminal on ``place``; it is shown where it is the last thing in a cell.

    Args:
        place: a VM, for its serial console; a sandbox, for a container of its own that goes with the terminal; or a
            container, for one more process in it.
        args: the command, in a sandbox or container.
        image: of the container, in a sandbox.
        height: in lines, until the page makes it higher.
        wishes: as of :func:`kata_lab.oci.make_spec`, in a sandbox: env, user, cwd …

    Raises:
        LabError: ``place`` is none of these, or its event loop does not run.
    """
    made = Terminal(_line(place, tuple(args), image, wishes), height)
    close_with_cell(made)
    return made


def _line(place: Place, args: Sequence[str], image: str, wishes: Mapping[str, Any]) -> Line:
    match place:
        case MicroVm():
            return ConsoleLine(place.console)
        case Console():
            return ConsoleLine(place)
        case sync.Sandbox():
            return ProcessLine(sync.running_loop(), lambda: _in_sandbox(place.asynchronous, args, image, wishes))
        case sync.SyncContainer():
            return ProcessLine(sync.running_loop(), lambda: _in_container(place.asynchronous, args))
        case Sandbox():
            return ProcessLine(_loop(), lambda: _in_sandbox(place, args, image, wishes))
        case Container():
            return ProcessLine(_loop(), lambda: _in_container(place, args))
    raise LabError(f"a terminal cannot be on {type(place).__name__}: it is on a VM, a sandbox or a container")


def _loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise LabError(
            "a terminal on a sandbox needs the sandbox's event loop: open it in a notebook or a coroutine, or use "
            "kata_lab.runtime.sync"
        ) from None


@contextlib.asynccontextmanager
async def _in_sandbox(
    sandbox: Sandbox, args: Sequence[str], image: str, wishes: Mapping[str, Any]
) -> AsyncIterator[tuple[Process, str]]:
    wished = {**wishes, "env": [TERM, *wishes.get("env", ())], "tty": True}
    container = await sandbox.new_container(args, image, **wished)
    try:
        yield await container.start(), f"{args[0] if args else image} in container {container.id}"
    finally:
        await container.remove()


@contextlib.asynccontextmanager
async def _in_container(container: Container, args: Sequence[str]) -> AsyncIterator[tuple[Process, str]]:
    like = container.spec.get("process", {})
    env = [each for each in like.get("env", ()) if not each.startswith("TERM=")]
    process = await container.exec({**like, "args": [*args], "env": [*env, TERM], "terminal": True})
    async with killed_at_end(process):
        yield process, f"{args[0]} in container {container.id}"


class Terminal:
    """A terminal; a context manager that closes it.

    Args:
        line: what it is on.
        height: in lines.
    """

    def __init__(self, line: Line, height: int = ROWS) -> None:
        self._line = line
        self._height = height
        self._size: WindowSize | None = None
        self._widget: Any = None
        self._feed = Feed(self._send)
        #: How things are, in one sentence.
        self.status = ""
        if terminals_can_run():
            self._widget = _widget_class()(height=height, sized=line.sized)
            self._widget.model = self._widget.model_id
            self._widget.on_msg(self._heard)
        line.open(self)

    @property
    def text(self) -> str:
        """What was printed last, without escape sequences."""
        return plain(self._feed.kept.decode(errors="replace"))

    @property
    def size(self) -> WindowSize | None:
        """The window's, once a page shows it."""
        return self._size

    def send(self, text: str) -> None:
        """Type ``text``; returns at once."""
        self._line.type(text.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Have a window of that size, as a page does when its own changes."""
        self._size = WindowSize(min(max(rows, 1), _MOST), min(max(columns, 1), _MOST))
        if self._line.sized:
            self._line.resize(self._size)

    def close(self) -> None:
        """End it, and what runs in it; returns at once. A second call does nothing."""
        self._feed.close()
        self._line.close()

    async def wait_closed(self) -> None:
        """Wait until nothing of it is left."""
        await asyncio.wrap_future(self._line.closed)

    def show(self, data: bytes) -> Future[None] | None:
        """For the line: take output."""
        return self._feed.push(data)

    def say(self, text: str, over: bool = False) -> None:
        """For the line: say how things are."""
        self.status = text
        if self._widget is not None:
            with self._widget.hold_sync():
                self._widget.status, self._widget.over = text, over

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{self.text}\n[{self.status}]" if self.text else f"[{self.status}]"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": markup(self.text, self._height)}
        if self._widget is not None:
            bundle["application/vnd.jupyter.widget-view+json"] = {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self._widget.model_id,
            }
        return bundle

    def _send(self, message: dict[str, Any], data: bytes) -> None:
        self._widget.send(message, buffers=[data])

    def _heard(self, widget: object, message: Mapping[str, Any], buffers: Sequence[memoryview]) -> None:
        """A page says something; on the kernel's main thread, or on that of a subshell."""
        page = str(message.get("page", ""))
        match message.get("kind"):
            case "joined":
                self._feed.join(page)
            case "left":
                self._feed.leave(page)
            case "drawn":
                self._feed.drawn(page, int(message["upto"]))
            case "typed":
                self._line.type(b"".join(bytes(each) for each in buffers))
            case "size":
                self.resize(int(message["rows"]), int(message["columns"]))
            case "tell size" if self._size is not None:
                self._line.resize(self._size)


def terminals_can_run() -> bool:
    """Whether this is a notebook's kernel with what a terminal is drawn with: anywidget, and xterm.js of JupyterLab."""
    return widgets_can_run() and importlib.util.find_spec("anywidget") is not None and terminal_script() is not None


@functools.cache
def _widget_class() -> Any:
    import anywidget
    import traitlets

    here = Path(__file__).parent
    parts = {
        "_esm": f"{terminal_script()}{(here / 'terminal.js').read_text(encoding='utf-8')}",
        "_css": (here / "terminal.css").read_text(encoding="utf-8"),
        "height": traitlets.Int(ROWS).tag(sync=True),
        "sized": traitlets.Bool(True).tag(sync=True),
        "model": traitlets.Unicode("").tag(sync=True),
        "status": traitlets.Unicode("").tag(sync=True),
        "over": traitlets.Bool(False).tag(sync=True),
    }
    return type("TerminalWidget", (anywidget.AnyWidget,), parts)
