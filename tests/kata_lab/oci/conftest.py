"""A cache of its own for each test of images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``KATA_LAB_HOME``."""
    place = tmp_path / "home"
    monkeypatch.setenv("KATA_LAB_HOME", str(place))
    return place


@pytest.fixture
def root() -> None:
    """For tests of what only root can do."""
    if os.geteuid() != 0:
        pytest.skip("only root can do this")


def need(program: str) -> str:
    """The path of a referee, which ``make test`` installs."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"this machine has no {program}: make test installs it")
    return found
