"""A cache of its own for each test of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``KATA_LAB_HOME``."""
    place = tmp_path / "home"
    monkeypatch.setenv("KATA_LAB_HOME", str(place))
    return place


def need(program: str) -> str:
    """The path of a referee; without it the test fails, since a referee that is not asked judges nothing."""
    found = shutil.which(program)
    if found is None:
        pytest.fail(f"the program {program} is not installed: install the Debian package {program}")
    return found
