"""Caches and state lie where the environment says, and state is private."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from kata_lab.errors import KataLabError
from kata_lab.paths import cache_directory, records_directory, state_directory


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("KATA_LAB_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


def test_cache_follows_the_base_directory_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "user/.cache/kata-lab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_directory() == tmp_path / "user/.cache/kata-lab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg/kata-lab"


def test_one_variable_moves_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "lab"))

    assert cache_directory() == tmp_path / "lab/cache"
    assert state_directory() == tmp_path / "lab/state"


def test_state_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    (runtime / "kata-lab").mkdir(parents=True, mode=0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))

    assert stat.S_IMODE(state_directory().stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert state_directory().parent == tmp_path / "temporary"
    assert stat.S_IMODE(state_directory().stat().st_mode) == 0o700


def test_state_through_a_link_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "kata-lab").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    with pytest.raises(KataLabError, match="or is a link: remove it"):
        state_directory()


def test_unusable_home_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "file"))
    with pytest.raises(KataLabError, match="cannot be used"):
        cache_directory()
    monkeypatch.setenv("KATA_LAB_HOME", "relative")
    with pytest.raises(KataLabError, match="KATA_LAB_HOME is 'relative': it must be an absolute path"):
        cache_directory()


def test_records_outlive_a_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))

    assert records_directory() == tmp_path / "user/.local/state/kata-lab"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert records_directory() == tmp_path / "xdg/kata-lab"
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "lab"))
    assert records_directory() == tmp_path / "lab/records"
