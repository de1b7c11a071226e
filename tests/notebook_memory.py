"""A pytest plugin: notebooks that take more than 2 GB of memory, with guests and all their processes, have failed.

While notebooks run, the proportional set size (proc_pid_smaps_rollup(5)) of every process of the run is read and summed
several times a second; pytest's own counts too, in the place of Jupyter's server. A shorter peak is not seen.
"""

from __future__ import annotations

import os
import threading

import psutil
import pytest

from tests.left_behind import MARK

LIMIT = 2 << 30
PERIOD_SECONDS = 0.25

_current = ""  # the notebook that runs now
_peaks: dict[str, int] = {}
_over = threading.Event()
_sampler = threading.Thread(name="notebook-memory", daemon=True, target=lambda: _sample())
_known: dict[tuple[int, float], bool] = {}  # whether a process, known by id and start, is one of the run


@pytest.hookimpl
def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.path.suffix == ".ipynb" for item in session.items) and not session.config.option.collectonly:
        _sampler.start()


@pytest.hookimpl
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _current
    _current = item.path.name if item.path.suffix == ".ipynb" else ""


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> object:
    if _sampler.is_alive():
        _over.set()
        _sampler.join()
    for name, peak in sorted(_peaks.items()):
        session.config.get_terminal_writer().line(f"\n{name}: at most {peak >> 20} MiB of memory", red=peak > LIMIT)
        if peak > LIMIT and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


def _sample() -> None:
    while not _over.wait(PERIOD_SECONDS):
        if name := _current:
            _peaks[name] = max(_peaks.get(name, 0), sum(_size(process) for process in psutil.process_iter()))


def _size(process: psutil.Process) -> int:
    """In bytes, of a process of this run; 0 for all others."""
    try:
        key = process.pid, process.create_time()
        if key not in _known:
            _known[key] = process.pid == os.getpid() or process.environ().get(MARK) == os.environ[MARK]
        return _proportional(process.pid) if _known[key] else 0
    except (psutil.Error, OSError):
        return 0


def _proportional(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), 0)
