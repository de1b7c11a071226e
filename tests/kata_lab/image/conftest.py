"""A cache directory and a mirror of its own for each test of image building."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kata_lab.image.fake_mirror import FakeMirror, Signer, serving


@pytest.fixture(scope="session")
def signer() -> Iterator[Signer]:
    with _signer() as made:
        yield made


@pytest.fixture(scope="session")
def stranger() -> Iterator[Signer]:
    """A key that nobody trusts."""
    with _signer() as made:
        yield made


class _signer:
    def __enter__(self) -> Signer:
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        Path(self._directory.name).chmod(0o755)
        self._made = Signer(Path(self._directory.name) / "gpg")
        return self._made

    def __exit__(self, *_: object) -> None:
        self._made.close()
        self._directory.cleanup()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``KATA_LAB_HOME``, and an APT that knows nothing of the host's proxies."""
    settings = tmp_path / "apt.conf"
    settings.write_text('Dir::Etc::parts "/dev/null";\nDir::Etc::main "/dev/null";\nAcquire::Retries "0";\n')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for variable in ("KATA_LAB_MIRROR", "KATA_LAB_KEYRING", "KATA_LAB_PROGRESS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("KATA_LAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def mirror(signer: Signer, home: Path) -> Iterator[FakeMirror]:
    with serving(FakeMirror(signer)) as served:
        yield served
