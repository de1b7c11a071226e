"""A pytest plugin: a run that leaves a process behind, or a thread that keeps its own from ending, has failed.

Processes of the run are known by a variable in their environment, which children inherit, whoever their parent becomes.
What is left is named and killed, since it may hold the pipe on which somebody waits for the end of the run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import uuid

import psutil
import pytest

MARK = "KATA_LAB_TEST_RUN"
LINGER_SECONDS = 60.0  #: how long the process may take to end after its last test

_run = f"{os.getpid()}-{uuid.uuid4()}"


def pytest_configure() -> None:
    os.environ[MARK] = _run


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> object:
    # Behind the other plugins' ends, which stop the kernels of notebooks and print the summary.
    try:
        return (yield)
    finally:
        for line in _left():
            session.config.get_terminal_writer().line(f"LEFT BEHIND by the tests, now killed: {line}", red=True)
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    # Says where every thread stands, and ends the process with status 1, if the interpreter does not end.
    faulthandler.dump_traceback_later(LINGER_SECONDS, exit=True, file=sys.__stderr__)


def _left() -> list[str]:
    """Processes of this run that still live, as process id and command; they are killed."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(MARK) == _run
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
