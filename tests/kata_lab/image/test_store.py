"""One writer at a time, whoever waits is told for whom, and what the system refuses is one sentence."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kata_lab.errors import ImageError
from kata_lab.image.store import exclusive, scratch, write_synced

HOLD = (
    "import sys; from pathlib import Path; from kata_lab.image.store import exclusive\n"
    "with exclusive(Path(sys.argv[1])): print('held', flush=True); input()"
)
LEAVE = (
    "import subprocess, sys; from pathlib import Path; from kata_lab.image.store import exclusive\n"
    "with exclusive(Path(sys.argv[1])) as lock:\n"
    "    none = subprocess.DEVNULL\n"
    "    print(subprocess.Popen(['sleep', '60'], pass_fds=(lock,), stdout=none, stderr=none).pid)"
)


class Watched(io.StringIO):
    """Standard error; does something at the first words about waiting."""

    def __init__(self, react: Callable[[], object]) -> None:
        super().__init__()
        self._react = react

    def write(self, text: str) -> int:
        if "Waiting" in text and "Waiting" not in self.getvalue():
            self._react()
        return super().write(text)


def run(script: str, directory: Path) -> list[str]:
    return [sys.executable, "-c", script, str(directory)]


@contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is the only writer until a line is sent to it."""
    command = run(HOLD, directory)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def release(process: subprocess.Popen[str]) -> None:
    process.communicate("\n")


def test_whoever_waits_is_told_for_which_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path) as process:
        told = Watched(lambda: release(process))
        monkeypatch.setattr(sys, "stderr", told)
        with exclusive(tmp_path, "lines"):
            assert process.poll() == 0

    first, last = told.getvalue().splitlines()
    assert first == f"Waiting for process {process.pid}, which writes to the cache…"
    assert last.startswith(f"Waiting for process {process.pid}, which writes to the cache: done after ")


def test_whoever_waits_for_leftovers_of_a_dead_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = int(subprocess.run(run(LEAVE, tmp_path), capture_output=True, text=True, check=True).stdout)
    told = Watched(lambda: os.kill(left, signal.SIGKILL))
    monkeypatch.setattr(sys, "stderr", told)

    with exclusive(tmp_path, "lines"):
        assert " left running, which writes to the cache…" in told.getvalue()


def test_nobody_is_told_of_a_lock_that_is_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(tmp_path, "lines"):
        pass

    assert capsys.readouterr().err == ""


def test_lock_whose_directory_was_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cache"
    with holder(place) as process:

        def remove() -> None:
            shutil.rmtree(place)
            release(process)

        monkeypatch.setattr(sys, "stderr", Watched(remove))
        with exclusive(place, "lines"), scratch(place) as partial:
            assert partial.is_dir()
            assert (place / "lock").read_text() == f"{os.getpid()}\n"


def test_directory_that_is_removed_in_the_middle_is_told(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    with pytest.raises(ImageError, match=r"cache/new is gone: somebody removed it from the cache .* try again"):
        write_after_removal(place)


def write_after_removal(place: Path) -> None:
    with exclusive(place):
        shutil.rmtree(place)
        (place / "new").write_text("")


def test_full_disk_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(
            ImageError, match=f"the disk with the cache directory {tmp_path} is full: make room .*KATA_LAB_HOME"
        ),
        exclusive(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_file_comes_in_chunks(tmp_path: Path) -> None:
    write_synced(tmp_path / "file", iter((b"one", b"", b"two")))

    assert (tmp_path / "file").read_bytes() == b"onetwo"


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent/file cannot be written \(No such file or directory\)"):
        write_synced(tmp_path / "absent" / "file", b"")
