"""State directories of their own, short enough for sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Everything that Kata Lab keeps is beneath it."""
    with tempfile.TemporaryDirectory(prefix="kl-", ignore_cleanup_errors=True) as directory:
        monkeypatch.setenv("KATA_LAB_HOME", directory)
        yield Path(directory)


@pytest.fixture
def root(home: Path) -> Path:
    """A root file system with nothing in it."""
    place = home / "root"
    place.mkdir()
    return place
