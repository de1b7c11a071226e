"""kill -9 of a shim, and of its client, at every step of a container's life: what is told is true, and rm takes all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kata_lab.shim.records import ShimDirectory
from tests.kata_lab.cli_process import SECONDS, environment
from tests.kata_lab.shim.cli import COMMAND, cli, said
from tests.kata_lab.shim.fake import STOP_AT

RUN = ("run", "-d", "--name", "web")
#: The command under way, and the step that the shim has come to.
STEPS = [
    ("run", "process runs"),
    ("run", "sandbox starts"),
    ("run", "CreateContainer"),
    ("run", "StartContainer"),
    ("run", "WaitProcess"),
    ("exec", "ExecProcess"),
    ("pause", "PauseContainer"),
    ("update", "UpdateContainer"),
    ("stop", "SignalProcess"),
    ("stop", "RemoveContainer"),
    ("stop", "sandbox stops"),
]
COMMANDS = {
    "exec": ("exec", "web", "true"),
    "pause": ("pause", "web"),
    "update": ("update", "-m", "64m", "web"),
    "stop": ("stop", "-t", "1", "web"),
}


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it has not come to be within {SECONDS:g} s"
        time.sleep(0.01)
    return found


def shims(home: Path) -> list[psutil.Process]:
    """Processes of shims whose state is here."""
    found = []
    for process in psutil.process_iter():
        try:
            if "tests.kata_lab.shim.fake" in process.cmdline() and process.environ().get("KATA_LAB_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def stopped_shim(home: Path) -> psutil.Process | None:
    return next((each for each in shims(home) if each.status() == psutil.STATUS_STOPPED), None)


def left(home: Path) -> list[str]:
    found = (each for kind in ("containers", "shims", "sandboxes") for each in (home / "state" / kind).glob("*"))
    return [str(each) for each in found if each.name != ".lock"]


@pytest.fixture(autouse=True)
def nothing_runs_on(home: Path) -> Iterator[None]:
    yield
    for each in shims(home):
        each.kill()


@pytest.mark.parametrize("victim", ["shim", "client"])
@pytest.mark.parametrize(("command", "step"), STEPS)
def test_whoever_is_killed_the_truth_is_told_and_rm_takes_all(
    home: Path, root: Path, command: str, step: str, victim: str
) -> None:
    run = (*RUN, "--rootfs", str(root), "sleep", "60")
    if command != "run":
        assert cli(*run, **{STOP_AT: step}).returncode == 0
    arguments = [*COMMAND, *(run if command == "run" else COMMANDS[command])]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(arguments, env=environment(**{STOP_AT: step}), **streams) as client:
        shim = wait_until(lambda: stopped_shim(home))
        if victim == "shim":
            shim.kill()
            _, errors = client.communicate(timeout=SECONDS)
            assert b"Traceback" not in errors
        else:
            client.kill()
            client.communicate(timeout=SECONDS)
            os.kill(shim.pid, signal.SIGCONT)

    records = wait_until(lambda: _settled(home))[0]
    for record in records:
        alive = ShimDirectory(record["sandbox"]).owner() is not None
        assert alive == (record["state"] in ("created", "running", "paused")), record
        # A pause that was asked for may still come.
        if record["state"] == "running" and command != "pause":
            assert cli("exec", "web", "true").returncode == 0
        if not alive and record["status"] is not None:
            assert cli("wait", "web").stdout.decode().strip() == str(record["status"])
    if victim == "shim":
        assert all(record["state"] == "stopped" for record in records)

    assert cli("rm", "-f", "web").returncode == 0
    wait_until(lambda: not shims(home))
    assert (said("ps", "-a", "-q"), left(home)) == ("", [])


def _settled(home: Path) -> list[Any]:
    """All records, once no shim is on its way; in a list, since there may be none."""
    records = json.loads(said("ps", "-a", "--json"))
    serving = {each.pid for each in shims(home)}
    known = {owner.pid for each in records if (owner := ShimDirectory(each["sandbox"]).owner()) is not None}
    return [records] if serving == known and all(each["state"] != "creating" for each in records) else []
