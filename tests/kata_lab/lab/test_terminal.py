"""The terminal's ways: how much is under way to a page, what a page gets that comes later, and what is typed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from kata_lab import lab
from kata_lab.errors import KataLabError
from kata_lab.lab.machines import LabError
from kata_lab.lab.terminal_feed import KEPT, WAITING, WINDOW, Feed
from kata_lab.lab.terminal_lines import ProcessLine
from kata_lab.lab.terminal_view import Terminal
from kata_lab.lab.xterm import terminal_script
from tests.kata_lab.lab.test_console_view import Keyboard
from vmm import Console


class Page:
    """A page that draws when it is told to."""

    def __init__(self) -> None:
        self.feed = Feed(self._receive)
        self.received: list[tuple[dict[str, Any], bytes]] = []

    def _receive(self, message: dict[str, Any], data: bytes) -> None:
        self.received.append((message, data))

    @property
    def bytes(self) -> bytes:
        """Everything that came."""
        return b"".join(data for _, data in self.received)

    def draw(self, page: str = "one") -> None:
        """Draw all that has come."""
        self.feed.drawn(page, self.received[-1][0]["upto"])


class FakeProcess:
    """A process that prints what it is told to, and remembers what it is given."""

    def __init__(self, *chunks: bytes) -> None:
        self.stdout, self.stdin = self, self
        self.status: int | None = None
        self.typed = bytearray()
        self.sizes: list[tuple[int, int]] = []
        self.printed = 0
        self._chunks = chunks
        self.may_end = asyncio.Event()

    async def __aiter__(self) -> Any:
        for chunk in self._chunks:
            self.printed += len(chunk)
            yield chunk
        await self.may_end.wait()

    async def write(self, data: bytes) -> None:
        self.typed += data

    async def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    async def wait(self) -> int:
        self.status = 3
        return 3


class Opening:
    """Opens a process, and knows whether it is open."""

    def __init__(self, process: FakeProcess, error: Exception | None = None) -> None:
        self.process, self.error, self.open = process, error, False

    async def __aenter__(self) -> tuple[FakeProcess, str]:
        if self.error is not None:
            raise self.error
        self.open = True
        return self.process, "sh"

    async def __aexit__(self, *details: object) -> None:
        self.open = False


def on_process(opening: Opening) -> Terminal:
    return Terminal(ProcessLine(asyncio.get_running_loop(), lambda: opening))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_page_gets_no_more_than_it_has_drawn_and_a_window() -> None:
    page = Page()
    page.feed.join("one")

    room = page.feed.push(b"x" * (WINDOW + 1000))

    assert room is not None
    assert not room.done()
    assert WINDOW <= len(page.bytes) < WINDOW + 65536
    page.draw()
    assert room.done()
    assert len(page.bytes) == WINDOW + 1000


def test_a_hundred_megabytes_pass_in_order_and_little_of_it_is_kept() -> None:
    page, passed, most = Page(), 0, 0
    page.feed.join("one")
    piece = bytes(range(256)) * 4096

    for _ in range(100):
        room = page.feed.push(piece)
        while page.received:
            most = max(most, sum(len(data) for _, data in page.received))
            for _, data in page.received:
                start = passed % 256
                assert data == (piece[start : start + len(data)] if len(data) < len(piece) else piece)
                passed += len(data)
            last = page.received[-1][0]["upto"]
            page.received.clear()
            page.feed.drawn("one", last)
        assert room is None or room.done()

    assert passed == 100 << 20
    assert most <= WINDOW + 65536
    assert len(page.feed.kept) == KEPT


def test_who_cannot_wait_loses_the_oldest_bytes_and_the_page_is_told() -> None:
    page = Page()
    page.feed.join("one")
    for number in range(40):
        page.feed.push(b"%06d\r\n" % number * 8192)

    while not page.bytes.endswith(b"000039\r\n"):
        page.draw()

    assert b"bytes are left out: the guest prints faster than this page draws" in page.bytes
    assert len(page.bytes) < WAITING + 2 * WINDOW
    assert b"000000\r\n" in page.bytes


def test_a_page_that_comes_later_gets_the_last_bytes_once() -> None:
    page = Page()
    page.feed.push(b"before\r\n")
    page.feed.join("one")
    page.feed.push(b"after\r\n")

    assert [(message["kind"], data) for message, data in page.received] == [
        ("replay", b"before\r\n"),
        ("output", b"after\r\n"),
    ]


def test_a_page_that_went_away_without_a_word_stops_nobody() -> None:
    page = Page()
    page.feed.join("gone")
    page.feed.push(b"x" * (2 * WINDOW))
    page.feed.join("here")
    page.draw("here")

    assert page.feed.push(b"end") is None
    assert page.bytes.endswith(b"end")


def test_a_page_that_claims_to_have_drawn_the_future_is_not_believed() -> None:
    page = Page()
    page.feed.join("one")
    page.feed.drawn("one", 1 << 60)

    page.feed.push(b"x" * (4 * WINDOW))

    assert len(page.bytes) < 2 * WINDOW


def test_without_a_page_nothing_waits_and_the_last_bytes_are_kept() -> None:
    page = Page()

    assert page.feed.push(b"x" * (3 * KEPT) + b"end") is None
    assert page.received == []
    assert len(page.feed.kept) == KEPT
    assert page.feed.kept.endswith(b"end")


def test_without_widgets_a_terminal_on_a_console_is_its_text_and_types() -> None:
    console, keyboard = Console(), Keyboard()
    console.attach(keyboard)
    console.feed(b"\x1b[1mlogin:\x1b[0m ")
    with lab.terminal(console) as view:
        console.feed("grüße".encode()[:3])
        console.feed("grüße".encode()[3:])
        view.send("root\n")
        deadline = time.monotonic() + 30
        while keyboard.typed != b"root\n" or "grüße" not in view.text:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        bundle = view._repr_mimebundle_()

    assert bundle["text/plain"] == "login: grüße\n[the guest's serial console]"
    assert "login: grüße" in bundle["text/html"]
    assert not any("widget" in kind for kind in bundle)
    assert view.status == "closed; the guest goes on"


def test_typing_at_a_machine_that_is_off_says_why_and_closing_ends_the_threads() -> None:
    view = lab.terminal(Console())
    view.send("ls\n")
    deadline = time.monotonic() + 30
    while "no machine is connected" not in view.status:
        assert time.monotonic() < deadline
        time.sleep(0.005)

    view.close()
    view.close()

    for thread in [each for each in threading.enumerate() if each.name.startswith("terminal-")]:
        thread.join(30)
        assert not thread.is_alive()


async def pass_through_a_process() -> None:
    opening = Opening(FakeProcess(b"$ ", b"\xc3", b"\xbc"))
    view = on_process(opening)
    view.resize(30, 100)
    view.send("exit\n")
    await until(lambda: opening.process.typed == b"exit\n" and view.text == "$ ü")
    opening.process.may_end.set()
    await view.wait_closed()

    assert opening.process.sizes == [(30, 100)]
    assert view.status == "sh has ended with status 3; run the cell again for a new one"
    assert not opening.open


def test_bytes_keys_and_sizes_pass_to_a_process_whose_end_is_told() -> None:
    asyncio.run(pass_through_a_process())


async def close_an_open_one() -> None:
    opening = Opening(FakeProcess(b"$ "))
    view = on_process(opening)
    await until(lambda: view.text == "$ ")
    view.close()
    await view.wait_closed()
    view.close()

    assert not opening.open
    assert view.status == "closed"


def test_a_terminal_that_is_closed_ends_its_process() -> None:
    asyncio.run(close_an_open_one())


async def close_before_it_begins() -> None:
    opening = Opening(FakeProcess())
    view = on_process(opening)
    view.close()
    await view.wait_closed()

    assert not opening.open


def test_a_terminal_that_is_closed_at_once_begins_nothing() -> None:
    asyncio.run(close_before_it_begins())


async def refuse() -> None:
    view = on_process(Opening(FakeProcess(), KataLabError("there is no image 'x'")))
    await view.wait_closed()

    assert view.status == "there is no image 'x'"


def test_what_cannot_begin_says_why() -> None:
    asyncio.run(refuse())


class SlowScreen:
    """Has no room until it is told to."""

    def __init__(self) -> None:
        self.rooms: list[Future[None]] = []
        self.said = ""

    def show(self, data: bytes) -> Future[None]:
        self.rooms.append(Future())
        return self.rooms[-1]

    def say(self, text: str, over: bool = False) -> None:
        self.said = text


async def wait_for_the_page() -> None:
    opening, screen = Opening(FakeProcess(*[b"x" * 100] * 8)), SlowScreen()
    line = ProcessLine(asyncio.get_running_loop(), lambda: opening)
    line.open(screen)
    for number in range(1, 9):
        await until(lambda wanted=number: len(screen.rooms) == wanted)
        for _ in range(20):
            await asyncio.sleep(0)
        assert opening.process.printed == 100 * number
        screen.rooms[-1].set_result(None)
    opening.process.may_end.set()
    await asyncio.wrap_future(line.closed)

    assert "ended with status 3" in screen.said


def test_a_process_prints_no_faster_than_the_page_draws() -> None:
    asyncio.run(wait_for_the_page())


def test_a_terminal_on_something_else_is_refused() -> None:
    with pytest.raises(LabError, match="it is on a VM, a sandbox or a container"):
        lab.terminal(3)


def test_jupyterlab_carries_what_draws_terminals() -> None:
    script = terminal_script()

    assert script is not None
    assert script.startswith("const Terminal = ")
