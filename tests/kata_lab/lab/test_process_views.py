"""The pictures of notebook 6: what they say of real sandboxes, one of each of our arrangements, and in words."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from kata_lab import lab
from kata_lab.bench.fused_account import Memory
from kata_lab.bench.fused_call import Step
from kata_lab.bench.fused_runtime import RuntimeProcess
from kata_lab.lab.machines import LabError
from kata_lab.lab.process_views import Crash, SandboxProcess

CALL = (
    *(Step("runtime", "asks", 0.0), Step("vmm", "begins", 100.0), Step("runtime", "has handed over", 120.0)),
    *(Step("guest", "guest answered", 800.0), Step("vmm", "has answered", 900.0)),
    *(Step("answers", "the answer is here", 950.0), Step("runtime", "goes on", 1000.0)),
)
SPLIT = (
    SandboxProcess("runtime", 10, 1, ("main thread", "watch-11")),
    SandboxProcess("fs", 11, 10, ("main thread",)),
    SandboxProcess("passt <1>", 12, 11, ("main thread",)),
)


@pytest.fixture(scope="module")
def runtimes(boot_guest: object) -> Iterator[dict[str, RuntimeProcess]]:
    with RuntimeProcess("fused") as fused, RuntimeProcess("rpc") as rpc:
        for runtime in (fused, rpc):
            runtime.begin()
        for runtime in (fused, rpc):
            runtime.receive("start")
        yield {"fused": fused, "rpc": rpc}


# Real sandboxes.


def test_a_fused_sandbox_is_one_process_with_the_guest_in_it(runtimes: dict[str, RuntimeProcess]) -> None:
    (found,) = lab.read_processes(runtimes["fused"])

    assert (found.name, found.pid) == ("runtime", runtimes["fused"].pid)
    assert found.threads[0] == "main thread"
    assert {"vm-loop", "vcpu-0"} <= set(found.threads)


def test_a_split_sandbox_is_three_processes_and_the_guest_is_in_the_vmm(runtimes: dict[str, RuntimeProcess]) -> None:
    found = {each.name: each for each in lab.read_processes(runtimes["rpc"])}

    assert set(found) == {"runtime", "vmm", "fs"}
    assert {"vm-loop", "vcpu-0"} <= set(found["vmm"].threads)
    assert not {"vm-loop", "vcpu-0"} & set(found["runtime"].threads)
    watching = {f"watch-{found['vmm'].pid}", f"watch-{found['fs'].pid}"}
    assert watching <= set(found["runtime"].threads)
    assert found["vmm"].parent == found["fs"].parent == found["runtime"].pid


def test_the_picture_of_a_sandbox_that_runs_names_its_processes(runtimes: dict[str, RuntimeProcess]) -> None:
    told = lab.process_tree(lab.read_processes(runtimes["rpc"]), "rpc").alternative

    assert told.startswith("rpc, 3 processes, ")
    for part in runtimes["rpc"].parts:
        assert f"{part.name} (process {part.pid}) with the threads main thread" in told


@pytest.mark.parametrize("name", ["fused", "rpc"])
def test_a_call_is_followed_into_the_guest_and_back(runtimes: dict[str, RuntimeProcess], name: str) -> None:
    steps = lab.follow_resize(runtimes[name], 2)
    lab.follow_resize(runtimes[name], 1)

    told = lab.call_path(steps, name, split=name == "rpc").alternative
    assert told.startswith(f"{name}. after 0 µs runtime: asks; ")
    assert "guest: guest answered" in told
    assert told.endswith("runtime: goes on.")
    assert [row[0] for row in lab.span_table({name: steps}).rows] == [name]


def test_memory_is_told_by_process_and_by_what_it_is_for(runtimes: dict[str, RuntimeProcess]) -> None:
    memories = {name: runtime.memory for name, runtime in runtimes.items()}

    told = lab.memory_chart(memories).alternative

    assert f"fused: {memories['fused'].total / 1e6:.0f} MB, of which the guest's memory" in told
    assert f"vmm {memories['rpc'].processes['vmm'] / 1e6:.0f}" in told
    # The same guest has touched the same pages, and what the hart has decoded is not its memory.
    guests = [memory.kinds["guest"] for memory in memories.values()]
    assert 20e6 < max(guests) < 1.2 * min(guests)


def test_a_killed_part_ends_the_sandbox_and_a_killed_runtime_everything(runtimes: dict[str, RuntimeProcess]) -> None:
    # The last test with sandboxes, since none is left.
    pids = [part.pid for runtime in runtimes.values() for part in runtime.parts]

    part = lab.crash(runtimes["rpc"], "vmm")
    whole = lab.crash(runtimes["fused"], "runtime")

    assert (part.noticed_by, part.survivors) == ("the runtime", ("runtime",))
    assert "was killed by SIGKILL" in part.reason
    assert (whole.noticed_by, whole.survivors, whole.reason) == ("its client", (), "")
    assert 0 < part.notice_ms <= part.cleanup_ms
    alive = {each.pid for each in psutil.process_iter(["status"]) if each.info["status"] != psutil.STATUS_ZOMBIE}
    assert alive & set(pids) == {runtimes["rpc"].pid}


# Words and drawings.


def test_processes_are_drawn_with_their_threads_and_who_started_them() -> None:
    picture = lab.process_tree(SPLIT, "mine")

    assert picture.alternative == (
        "mine, 3 processes, 4 threads: runtime (process 10) with the threads main thread, watch-11;"
        " fs (process 11) with the threads main thread, started by runtime;"
        " passt <1> (process 12) with the threads main thread, started by fs."
    )
    assert picture.markup.count("marker-end") == 2
    assert "passt &lt;1&gt;" in picture.markup
    assert "aria-label='mine, 3 processes" in picture.markup


def test_one_process_alone_does_everything() -> None:
    assert "runtime, VMM with guest, shared directories" in lab.process_tree(SPLIT[:1], "one").markup
    assert "runtime, VMM with guest, shared directories" not in lab.process_tree(SPLIT, "three").markup


def test_processes_are_told_as_a_table_too() -> None:
    table = lab.process_table(SPLIT, "mine")

    assert table.caption == "mine: 3 processes, 4 threads"
    assert table.rows[1] == ("fs", "11", "10", "main thread")


def test_a_call_has_a_frame_for_each_process() -> None:
    split = lab.call_path(CALL, "split", split=True)
    fused = lab.call_path(CALL, "fused", split=False)

    assert all(text in split.markup for text in ("runtime process", "VMM process", ">socket<", "reads the socket"))
    assert all(text in fused.markup for text in ("one process", ">queue<"))
    assert "reads the socket" not in fused.markup
    assert "after 800 µs guest: guest answered; after 900 µs vmm: has answered" in split.alternative


def test_the_way_and_the_work_of_calls_stand_side_by_side() -> None:
    table = lab.span_table({"fused": CALL})

    assert table.rows == [("fused", "100", "800", "100", "1,000", "20.0%")]


def test_latencies_are_told_with_median_and_late_ones() -> None:
    picture = lab.latency_histograms({"fused": [5.0] * 99 + [900.0], "rpc": [300.0, 400.0]}, "GetState")

    assert picture.alternative == (
        "GetState. fused: 100 times, median 5.0 µs, 99th percentile 5.0 µs;"
        " rpc: 2 times, median 350.0 µs, 99th percentile 400.0 µs."
    )
    assert picture.markup.startswith("<img alt='GetState. fused: 100 times")


def test_crashes_are_told_beneath_one_another() -> None:
    crashes = [Crash("rpc", "vmm", "the runtime", 4.6, 80.2, ("runtime",), "it was killed")]

    assert lab.crash_table([*crashes, Crash("fused", "runtime", "its client", 3.0, 3.0, ())]).rows == [
        ("rpc", "vmm", "the runtime, 5 ms", "80 ms", "runtime", "it was killed"),
        ("fused", "runtime", "its client, 3 ms", "3 ms", "nothing", ""),
    ]


def test_nothing_to_draw_is_refused_with_what_to_do() -> None:
    with pytest.raises(LabError, match="no process to draw: start a sandbox first"):
        lab.process_tree([], "none")
    with pytest.raises(LabError, match="no step to draw: follow a call first"):
        lab.call_path([], "none", split=False)
    with pytest.raises(LabError, match="nothing to draw: time an action over each arrangement first"):
        lab.latency_histograms({"fused": [1.0], "rpc": []})
    with pytest.raises(LabError, match="no memory to draw: start a sandbox first"):
        lab.memory_chart({})


def test_memory_of_each_arrangement_is_a_bar_in_parts() -> None:
    memory = Memory({"runtime": 100_000_000}, {"guest": 60_000_000, "files": 10_000_000, "anonymous": 30_000_000})

    told = lab.memory_chart({"fused": memory}).alternative

    assert told == (
        "Memory of one sandbox. fused: 100 MB, of which the guest's memory 60 MB, programs, libraries 10 MB,"
        " heaps, stacks, made code 30 MB; by process runtime 100."
    )
