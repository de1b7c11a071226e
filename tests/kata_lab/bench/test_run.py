"""``kata-lab bench run``: the shape of what it prints, and that it leaves nothing running. No timing is judged."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator

import pytest

from kata_lab.bench.command import run_table
from kata_lab.bench.run import PARTS, RunFigures
from kata_lab.cli import main
from kata_lab.runtime.state import list_sandboxes
from kata_lab.shim.records import list_containers

FIELDS = {
    *("start_s", "start_spread", "parts", "container_s", "container_spread", "container_instructions"),
    *("exec_s", "exec_spread", "exec_instructions", "stdout_mb_s", "agent_bytes", "pss_bytes"),
    *("ps_s", "help_s", "interpreter_s", "limits", "runs", "rounds", "versions"),
}


def figures(**changes: float) -> RunFigures:
    told = {
        "start_s": 2.5,
        "container_s": 0.1,
        "exec_s": 0.04,
        "stdout_mb_s": 9.0,
        "ps_s": 0.1,
        "help_s": 0.1,
        "interpreter_s": 0.02,
    }
    return RunFigures(
        **{**told, **changes},
        start_spread=0.1,
        container_spread=0.1,
        exec_spread=0.1,
        parts=dict.fromkeys(PARTS, 0.3),
        container_instructions=30_000_000,
        exec_instructions=10_000_000,
        agent_bytes=4_000_000,
        pss_bytes=200 << 20,
        limits=dict.fromkeys(changes, "what was busy"),
        runs=5,
        rounds=5,
        versions={"python": "3.11"},
    )


@pytest.fixture
def own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No other sandboxes than the test's; the path is short, since sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="kata-lab-") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield


@pytest.mark.usefixtures("boot_guest", "own_state")
def test_bench_run_prints_what_it_measured_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "run", "--json", "--runs", "1", "--rounds", "1"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert set(told) == FIELDS
    assert tuple(told["parts"]) == PARTS
    assert sum(told["parts"].values()) == pytest.approx(told["start_s"], rel=0.01)
    assert all(seconds > 0 for seconds in told["parts"].values())
    assert told["exec_instructions"] < told["container_instructions"]
    assert told["agent_bytes"] > 1 << 20
    assert {"python", "numba", "llvmlite", "guest kernel", "host"} == set(told["versions"])
    assert list_sandboxes() == []
    assert list_containers() == []


def test_a_table_tells_the_parts_and_what_misses_its_goal() -> None:
    told = run_table(figures(exec_s=0.09))

    assert re.search(r"^exec in a running container, ms +90$", told, re.MULTILINE)
    assert "exec in a running container, ms: what was busy" in told
    assert "  kernel" in told


def test_a_table_without_misses_tells_none() -> None:
    assert "busy" not in run_table(figures())
