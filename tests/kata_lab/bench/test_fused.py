"""``kata-lab bench fused``: the shape of what it prints, what it says of what it cannot measure, and that it leaves
nothing. No timing is judged. The processes are those of the arrangements that ours alone make; QEMU's has tests of its
own."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from kata_lab.bench import fused
from kata_lab.bench.command import fused_table
from kata_lab.bench.fused import PARTS, Run, busy, figures, start_parts
from kata_lab.bench.fused_account import BY_IO, BY_PERF, Memory, Part, SystemCalls, context_switches, cpu_seconds, parts
from kata_lab.bench.fused_call import Step, follow_resize, spans
from kata_lab.bench.fused_probe import ACTIONS
from kata_lab.bench.fused_runtime import RuntimeProcess
from kata_lab.bench.measure import BenchError
from kata_lab.cli import main

MINE = Part("runtime", os.getpid(), 1)


@pytest.fixture
def own_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; the path is short, since sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="kl-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@pytest.fixture(scope="module")
def rpc(boot_guest: object) -> Iterator[RuntimeProcess]:
    with RuntimeProcess("rpc") as runtime:
        runtime.start()
        yield runtime


def run(microseconds: float, processes: int = 1, **changes: Any) -> Run:
    made = Run(
        start_s=2.0,
        start_parts=dict.fromkeys(PARTS, 0.4),
        processes=processes,
        threads=2 * processes,
        memory=Memory({"runtime": 100_000_000}, {"guest": 60_000_000, "files": 10_000_000, "anonymous": 30_000_000}),
        action_us={name: [microseconds] * 100 for name in ACTIONS},
        way_us={"there": microseconds, "work": 9000.0, "back": 2 * microseconds},
        switches=dict.fromkeys(ACTIONS, 1.0),
        calls=dict.fromkeys(ACTIONS, 2.0),
        calls_by=BY_PERF,
        notice_ms={"runtime": 5.0},
        cleanup_ms={"runtime": 9.0},
        starts_per_s=1.0,
        cpu_s=3.0,
    )
    return replace(made, **changes)


FLOOR = {"thread": 40.0, "socket": 10.0}


@pytest.mark.usefixtures("boot_guest")
def test_it_prints_each_arrangement_and_leaves_nothing(
    own_place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = fused.run_once
    monkeypatch.setattr(fused, "AT_ONCE", 1)
    monkeypatch.setattr(fused, "ROUNDS", dict.fromkeys(ACTIONS, 2))
    monkeypatch.setattr(fused, "COUNTED", dict.fromkeys(ACTIONS, 2))
    monkeypatch.setattr(fused, "FOLLOWED", 1)
    monkeypatch.setattr(fused, "arrangements", lambda: (["fused", "rpc"], {"qemu": "left out"}))
    # The one of several processes is measured, since it has everything that the other one has.
    monkeypatch.setattr(fused, "run_once", lambda name, begin: measure(name, begin) if name == "rpc" else run(1.0))

    assert main(["bench", "fused", "--json", "--runs", "1"]) == 0

    told = json.loads(capsys.readouterr().out)
    side = told["rpc"]
    assert set(told) == {"fused", "rpc", "ratio", "floor_us", "limits", "at_once", "runs", "versions"}
    assert (side["processes"], told["ratio"]["processes"]) == (3, 3.0)
    assert set(side["pss_parts"]["process"]) == {"runtime", "vmm", "fs"}
    assert set(side["action_us"]) == set(side["system_calls_per_action"]) == set(ACTIONS)
    assert all(0 < each["median"] <= each["p99"] for each in side["action_us"].values())
    assert all(took > 0 for took in side["way_us"].values())
    assert sum(side["start_parts"].values()) == pytest.approx(side["start_s"], rel=0.01)
    assert sum(side["pss_parts"]["kind"].values()) == pytest.approx(side["pss_mb"], rel=0.01)
    assert side["pss_parts"]["kind"]["guest"] > 20
    assert set(side["notice_ms"]) == set(side["cleanup_ms"]) == {"runtime", "vmm", "fs"}
    assert min(side["starts_per_s"], side["cpu_s"]) > 0
    assert told["limits"]["qemu"] == "left out"
    assert list(own_place.iterdir()) == []


def test_actions_are_timed_by_the_one_who_asks(rpc: RuntimeProcess) -> None:
    assert len(rpc.ask("time", action="get_state", rounds=5)["us"]) == 5
    with pytest.raises(BenchError, match="'reboot' is no action of the measurement, it must be one of get_state"):
        rpc.ask("time", action="reboot", rounds=1)


def test_a_hotplug_is_followed_from_the_runtime_to_the_guest_and_back(rpc: RuntimeProcess) -> None:
    steps = follow_resize(rpc, 2)
    follow_resize(rpc, 1)

    assert ((steps[0].place, steps[0].what), (steps[-1].place, steps[-1].what)) == (
        ("runtime", "asks"),
        ("runtime", "goes on"),
    )
    assert {step.place for step in steps} == {"runtime", "vmm", "guest", "answers"}
    names = [step.what for step in steps]
    assert names.index("begins") < names.index("guest answered") < names.index("has answered")
    assert sum(spans(steps).values()) == pytest.approx(steps[-1].microseconds)


def test_steps_that_are_no_call_are_refused() -> None:
    with pytest.raises(BenchError, match="have no 'has answered'; they are begins, goes on"):
        spans([Step("vmm", "begins", 1.0), Step("runtime", "goes on", 2.0)])


def test_what_cannot_be_killed_is_refused_by_name(rpc: RuntimeProcess) -> None:
    with pytest.raises(BenchError, match="'rpc' has no process 'qemu' to kill; it has fs, vmm"):
        rpc.crash("qemu")


def test_a_runtime_that_cannot_start_says_why() -> None:
    with RuntimeProcess("none") as runtime, pytest.raises(BenchError, match="hypervisor is 'none', it must be one of"):
        runtime.start()


def test_children_are_called_by_their_part(rpc: RuntimeProcess) -> None:
    found = rpc.parts

    assert found[0].name == "runtime"
    assert {part.name for part in found} == {"runtime", "vmm", "fs"}
    assert {part.pid for part in found} == {rpc.pid, *(each.pid for each in psutil.Process(rpc.pid).children())}
    assert cpu_seconds(found) > 0
    memory = Memory.of(found, 256 << 20)
    assert memory.total == sum(memory.kinds.values())


@pytest.mark.parametrize("allowed", [True, False])
def test_system_calls_are_counted_with_perf_and_without(allowed: bool) -> None:
    switches = context_switches([MINE])
    with SystemCalls([MINE], allowed) as calls:
        for _ in range(100):
            Path("/proc/self/stat").read_bytes()
        count = calls.count()

    assert count >= 100
    assert calls.source in ((BY_PERF, BY_IO) if allowed else (BY_IO,))
    assert context_switches([MINE]) >= switches
    assert parts(os.getpid())[0].pid == os.getpid()


def test_the_parts_of_a_start_add_up_to_it() -> None:
    line = {"prepared": 0.5, "first instruction": 0.7, "VM runs": 0.8, "agent answers": 2.0, "sandbox ready": 2.1}

    told = start_parts(2.5, line)

    assert tuple(told) == PARTS
    assert sum(told.values()) == pytest.approx(2.5)
    assert (told["process"], told["vmm"], told["guest"]) == pytest.approx((0.4, 0.3, 1.2))


def test_latencies_of_all_runs_count_and_the_rest_is_medians() -> None:
    slow = run(1.0, action_us={name: [3.0] * 99 + [500.0] for name in ACTIONS}, start_s=9.0)
    told = figures({"fused": [run(1.0), slow, run(1.0)], "rpc": [run(30.0, 3)] * 3}, FLOOR, {}, {})

    ours = told.arrangements["fused"]
    assert (ours.action_us["get_state"].median, ours.action_us["get_state"].p99) == (1.0, 3.0)
    assert ours.start_s == 2.0
    assert (told.ratio["action"]["get_state"], told.ratio["processes"]) == (30.0, 3.0)
    assert told.ratio["way"] == {"there": 30.0, "work": 1.0, "back": 30.0}


def test_what_is_less_than_ten_times_as_quick_is_explained_by_the_floor() -> None:
    told = figures({"fused": [run(100.0)], "rpc": [run(300.0)]}, FLOOR, {"qemu": "left out"}, {}).limits

    assert told["pause_resume"].startswith("rpc takes 300 us, fused 100; what both do is vCPUs that come out of guest")
    assert (
        "waits for its turn on the VM's thread, and if there is nothing to do that takes 100 us" in told["pause_resume"]
    )
    assert told["pause_resume"].endswith("at least 10 us between two processes and 40 us between two threads here")
    assert "VMM and guest take 9000 us in fused and 9000 in rpc, the way there 100 and 300" in told["vcpu_plus_minus"]
    assert "turn" not in told["get_state"]
    assert told["qemu"] == "left out"
    assert "nobody in it is left to notice" in told["fused notice_ms"]
    assert not set(ACTIONS) & set(figures({"fused": [run(1.0)], "rpc": [run(30.0)]}, FLOOR, {}, {}).limits)


def test_a_machine_that_is_busy_is_told() -> None:
    assert busy(0.9, 2) == {}
    assert busy(3.25, 2)["machine"].startswith("its load average was 3.2 with 2 processors before this began: measure")


def test_late_notice_missing_actions_and_another_count_are_told() -> None:
    late = run(50.0, 3, notice_ms={"runtime": 5.0, "qemu": 250.0}, cleanup_ms={"runtime": 5.0, "qemu": 400.0})
    few = replace(late, action_us={"pause_resume": [9.0]}, way_us={}, calls_by=BY_IO)
    told = figures({"fused": [run(1.0)], "rpc": [run(30.0)], "qemu": [few]}, FLOOR, {}, {})

    assert told.limits["qemu notice_ms"] == "later than 100 ms: qemu 250 ms"
    assert told.limits["qemu action_us"].startswith("without get_state, get_state_awaited, nothing_to_change, share")
    assert "reads and writes" in told.limits["system_calls_per_action"]
    table = fused_table(told)
    assert re.search(r"^get_state, µs +1 +30 +30$", table, re.MULTILINE)
    assert re.search(r"^  VMM and guest, µs +9000 +9000 +1$", table, re.MULTILINE)
    assert re.search(r"^qemu killed, noticed after, ms +250$", table, re.MULTILINE)
    assert "a message of one byte and its answer, µs: thread 40, socket 10" in table
