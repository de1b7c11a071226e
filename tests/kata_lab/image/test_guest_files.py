"""The agent's files as they go into an image, with and without a compiler for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image import guest_files

PLACE = f"{guest_files.AGENT_DIRECTORY}/"


def _write_compiler(directory: Path, body: str) -> Path:
    """A program that stands for mpy-cross: called as ``mpy-cross -s NAME -o TARGET SOURCE``."""
    program = directory / "mpy-cross"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program


def test_without_a_compiler_modules_are_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_files, "_compiler", lambda: None)
    files = guest_files.agent_files()
    assert {Path(name).suffix for name in files} == {".py"}
    assert f"{PLACE}agent.py" in files


def test_a_compiler_makes_bytecode_of_all_but_the_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = _write_compiler(tmp_path, "printf 'M\\006code' > $4")
    monkeypatch.setattr(guest_files, "_compiler", lambda: compiler)
    files = guest_files.agent_files()
    assert files[f"{PLACE}sandbox.mpy"] == b"M\x06code"
    assert [name for name in files if name.endswith(".py")] == [f"{PLACE}agent.py", f"{PLACE}devices.py"]


@pytest.mark.parametrize("body", ["exit 1", "printf 'M\\005old' > $4", "true"])
def test_a_compiler_that_makes_nothing_of_use_leaves_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str
) -> None:
    compiler = _write_compiler(tmp_path, body)
    monkeypatch.setattr(guest_files, "_compiler", lambda: compiler)
    assert {Path(name).suffix for name in guest_files.agent_files()} == {".py"}


def test_a_compiler_that_is_killed_is_no_reason_for_another_guest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = _write_compiler(tmp_path, "kill -INT $$")
    monkeypatch.setattr(guest_files, "_compiler", lambda: compiler)
    with pytest.raises(ImageError, match="was ended by signal 2"):
        guest_files.agent_files()


def test_the_stop_button_does_not_reach_the_compiler(tmp_path: Path) -> None:
    """Jupyter interrupts the whole process group of the kernel."""
    compiler = _write_compiler(
        tmp_path, "kill -INT -- -$(cut -d ' ' -f 5 /proc/$PPID/stat); sleep 0.01; printf 'M\\006' > $4"
    )
    program = (
        "import pathlib, signal, sys\n"
        "from kata_lab.image import guest_files\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "guest_files._compiler = lambda: pathlib.Path(sys.argv[1])\n"
        "print(*{pathlib.Path(name).suffix for name in guest_files.agent_files()})\n"
    )
    command = [sys.executable, "-c", program, str(compiler)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=True)
    assert set(done.stdout.split()) == {".py", ".mpy"}


def test_a_machine_without_room_for_the_compiler_gets_no_slower_agent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler cannot be started, though it could be at another time: what is built now would stay."""
    monkeypatch.setattr(guest_files, "_compiler", lambda: tmp_path / "gone" / "mpy-cross")
    with pytest.raises(ImageError, match=r"mpy-cross, which compiles the agent, cannot be run: No such file"):
        guest_files.agent_files()


def test_a_compiler_of_another_machine_leaves_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "mpy-cross"
    compiler.write_bytes(b"\x7fELF of something else")
    compiler.chmod(0o755)
    monkeypatch.setattr(guest_files, "_compiler", lambda: compiler)
    assert {Path(name).suffix for name in guest_files.agent_files()} == {".py"}
