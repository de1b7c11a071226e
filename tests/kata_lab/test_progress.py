"""Progress is seen where somebody watches and silent elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from kata_lab.errors import KataLabError
from kata_lab.progress import Progress, ProgressMode


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KATA_LAB_PROGRESS", raising=False)


def run(stream: io.StringIO, mode: ProgressMode = "auto") -> str:
    with Progress("Compiling the hart", total=4, mode=mode, stream=stream) as bar:
        bar.advance(1, "decoder")
        bar.advance_to(3, "loads")
    return stream.getvalue()


def test_terminal_sees_a_bar_with_the_stage() -> None:
    drawn = run(Terminal())

    assert "Compiling the hart" in drawn
    assert "100%" in drawn
    assert "loads" in drawn


def test_pipe_sees_nothing() -> None:
    assert run(io.StringIO()) == ""


def test_lines_on_request_say_how_each_step_ended() -> None:
    assert run(io.StringIO(), "lines").startswith("Compiling the hart: done after ")
    stream = io.StringIO()
    with pytest.raises(ValueError, match="inside"), Progress("Fetching", mode="lines", stream=stream):
        raise ValueError("inside")
    assert stream.getvalue().startswith("Fetching: failed after ")


def test_steps_on_request_are_told_when_they_begin_too() -> None:
    first, second = run(io.StringIO(), "steps").splitlines()

    assert first == "Compiling the hart…"
    assert second.startswith("Compiling the hart: done after ")


def test_step_that_its_owner_calls_failed_is_not_done() -> None:
    for stream, mode in ((io.StringIO(), "lines"), (Terminal(), "bar")):
        with Progress("Fetching", total=4, mode=mode, stream=stream) as bar:
            bar.advance(1)
            bar.fail()
        assert "failed" in stream.getvalue()
        assert "done" not in stream.getvalue()
        assert "100%" not in stream.getvalue()


def test_bar_of_a_step_that_an_exception_ends_says_so() -> None:
    stream = Terminal()
    with pytest.raises(ValueError, match="inside"), Progress("Fetching", total=4, stream=stream):
        raise ValueError("inside")
    assert "failed" in stream.getvalue()


def test_announced_step_is_told_when_it_begins() -> None:
    stream = io.StringIO()
    with Progress("Waiting for process 7", mode="lines", announced=True, stream=stream) as bar:
        assert stream.getvalue() == "Waiting for process 7…\n"
        bar.tick()


def test_bar_without_a_total_shows_the_time_that_passes() -> None:
    stream = Terminal()
    with Progress("Waiting for process 7", stream=stream) as bar:
        bar.tick()
    assert "Waiting for process 7: 00:00" in stream.getvalue()
    assert "step" not in stream.getvalue()


def test_environment_chooses_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_LAB_PROGRESS", "off")
    assert run(Terminal()) == ""
    monkeypatch.setenv("KATA_LAB_PROGRESS", "loud")
    with pytest.raises(KataLabError, match="progress mode 'loud' is unknown"):
        run(Terminal())


def test_progress_counts_what_was_done() -> None:
    with Progress("Fetching", total=10, mode="off") as bar:
        bar.advance_to(7)
        bar.advance_to(2)
        assert bar.done == 7
    assert bar.done == 10


def test_silence_imports_no_tqdm() -> None:
    script = (
        "import sys; from kata_lab.progress import Progress\n"
        "with Progress('x', total=1, mode='off'): pass\n"
        "assert 'tqdm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
