"""The agent's files as they go into an image, with and without a compiler for them."""

from __future__ import annotations

from pathlib import Path

import pytest

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
