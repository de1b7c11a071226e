"""The live console: what it shows, how what is printed gets there, and what is typed."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kata_lab import lab
from vmm import Console


class Keyboard:
    """The device end of the line."""

    def __init__(self) -> None:
        self.typed = bytearray()

    def receive(self, data: bytes) -> int:
        self.typed += data
        return len(data)

    def wait_for_room(self, timeout: float) -> bool:
        return True


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notebook's kernel looks like from inside."""
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))


def screen(view: lab.ConsoleView) -> str:
    return str(view._widget.children[0].value)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_widgets_the_view_is_the_text_so_far() -> None:
    console = Console()
    with lab.ConsoleView(console) as view:
        console.feed(b"\x1b[1mhello\x1b[0m\r\n<b>")
        bundle = view._repr_mimebundle_()

    assert repr(view) == bundle["text/plain"] == "hello\n<b>"
    assert "&lt;b&gt;" in bundle["text/html"]
    assert not any("widget" in kind for kind in bundle)


@pytest.mark.usefixtures("notebook")
def test_what_the_guest_prints_is_pushed_to_the_widget() -> None:
    console = Console()
    with lab.ConsoleView(console) as view:
        assert "(nothing printed yet)" in screen(view)
        console.feed(b"Linux version 6\r\n")
        until(lambda: "Linux version 6" in screen(view))
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "console-view"])
        kinds = view._repr_mimebundle_()

    assert "application/vnd.jupyter.widget-view+json" in kinds


@pytest.mark.usefixtures("notebook")
def test_a_closed_view_shows_the_last_word_and_listens_no_more() -> None:
    console = Console()
    view = lab.ConsoleView(console)
    console.feed(b"last word")
    view.close()
    console.feed(b", and more")
    view.close()

    assert "last word" in screen(view)
    assert not [thread for thread in threading.enumerate() if thread.name == "console-view"]


@pytest.mark.usefixtures("notebook")
def test_a_typed_line_goes_to_the_guest_and_the_field_is_empty_again() -> None:
    console, keyboard = Console(), Keyboard()
    console.attach(keyboard)
    with lab.ConsoleView(console) as view:
        line, interrupt = view._widget.children[1].children
        line.value = "uname -a"
        interrupt.click()

    assert keyboard.typed == b"uname -a\n\x03"
    assert line.value == ""


def test_typing_to_a_machine_that_is_off_says_why() -> None:
    with lab.ConsoleView(Console()) as view:
        assert "no machine is connected" in view.send("ls")


def test_a_transcript_is_the_last_lines() -> None:
    console = Console()
    console.feed(b"one\r\ntwo\r\nthree")

    assert repr(lab.transcript(console, lines=2)) == "two\nthree"
