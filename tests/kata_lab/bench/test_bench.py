"""The benchmarks: the shape of what they print, their loops, and how they watch processes. No timing is judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

from kata_lab.bench.compute import run_harts
from kata_lab.bench.measure import BenchError, Sample, Watched, alternate
from kata_lab.bench.peer import Peer, PeerError
from kata_lab.bench.programs import BASE, INTEGER, LOAD_STORE, TEST_DEVICE, Loop, assemble
from kata_lab.cli import main
from vmm.engine.base import ExitReason
from vmm.engine.rv64.hart import Rv64Engine
from vmm.memory import GuestMemory

BOOT_FIELDS = {
    *("ours_s", "qemu_s", "ratio", "mips", "ours_spread", "qemu_spread", "instructions", "first_instruction_s"),
    *("import_to_first_instruction_s", "pss_bytes", "qemu_pss_bytes", "idle_percent", "qemu_idle_percent"),
    *("cold_compile_s", "runs", "memory_mib", "versions"),
}
LOOP_FIELDS = {"ours_s", "qemu_s", "ratio", "mips", "qemu_mips", "ours_spread", "qemu_spread"}
COMPUTE_FIELDS = LOOP_FIELDS | {"load_store", "two_harts", "pss_bytes", "instructions", "runs", "versions"}


@pytest.fixture
def qemu(program: Callable[[str], str]) -> str:
    return program("qemu-system-riscv64")


@pytest.mark.usefixtures("boot_guest", "qemu")
def test_bench_boot_prints_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "boot", "--json", "--runs", "1", "--idle", "0.5"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert set(told) == BOOT_FIELDS
    assert told["ratio"] == pytest.approx(told["ours_s"] / told["qemu_s"], rel=0.01)
    assert told["instructions"] > 10_000_000
    assert told["pss_bytes"] > 1 << 20
    assert told["qemu_pss_bytes"] > 1 << 20
    assert 0 < told["import_to_first_instruction_s"] <= told["first_instruction_s"]
    assert {"python", "numba", "llvmlite", "qemu", "qemu cpu", "guest kernel", "host"} == set(told["versions"])


@pytest.mark.usefixtures("qemu")
def test_bench_compute_prints_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compute", "--json", "--runs", "1", "--size", "0.02"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert set(told) == COMPUTE_FIELDS
    assert set(told["load_store"]) == LOOP_FIELDS
    assert set(told["two_harts"]) == {"ours_s", "qemu_s", "speedup", "qemu_speedup"}
    assert told["mips"] == pytest.approx(told["instructions"] / told["ours_s"] / 1e6, rel=0.01)


@pytest.mark.usefixtures("qemu")
def test_bench_compute_prints_a_table_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compute", "--runs", "1", "--size", "0.01"]) == 0

    told = capsys.readouterr().out
    assert "integer loop, MIPS" in told
    assert "medians of 1 run in turns; python" in told


@pytest.mark.parametrize("loop", [INTEGER, LOAD_STORE], ids=lambda loop: loop.name)
def test_a_loop_retires_what_it_says(loop: Loop) -> None:
    counts = []
    for rounds in (1, 1001):
        with GuestMemory(BASE, 1 << 20) as memory, Rv64Engine(memory) as engine:
            memory.write(BASE, assemble(loop, rounds))
            hart = engine.harts[0]
            hart.reset(BASE)
            end = hart.run(100_000)
            assert (end.reason, end.address) == (ExitReason.MMIO_WRITE, TEST_DEVICE)
            counts.append(hart.instructions)

    assert counts[1] - counts[0] == 1000 * loop.instructions


def test_two_harts_end_together() -> None:
    assert run_harts(assemble(INTEGER, 1000, harts=2), 2) > 0


def test_a_program_that_stops_early_is_no_measurement() -> None:
    ecall = (0x73).to_bytes(4, "little")

    with pytest.raises(BenchError, match="not at its end"):
        run_harts(ecall, 1)


def test_more_rounds_than_the_counter_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds cannot be counted"):
        assemble(INTEGER, 1 << 31)


def test_sides_are_measured_in_turns_after_a_run_that_does_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    first, second = alternate(2, side("a"), side("b"))

    assert order == ["a", "b"] * 3
    assert (first.values, second.values) == ((3.0, 5.0), (4.0, 6.0))


def test_a_sample_has_a_median_and_a_spread() -> None:
    sample = Sample((1.0, 2.0, 4.0))

    assert sample.median == 2.0
    assert sample.spread == 1.5


def test_a_watched_process_that_ends_without_its_marker_is_told_with_its_words() -> None:
    with (
        Watched([sys.executable, "-c", "print('something else')"]) as process,
        pytest.raises(BenchError, match="something else"),
    ):
        process.seconds_until("marker")


def test_a_watched_process_that_takes_too_long_is_told() -> None:
    with (
        Watched([sys.executable, "-c", "input()"]) as process,
        pytest.raises(BenchError, match=r"ran for 0\.2 s"),
    ):
        process.seconds_until("marker", timeout=0.2)


def test_a_watched_process_that_fails_is_told() -> None:
    with (
        Watched([sys.executable, "-c", "raise SystemExit(3)"]) as process,
        pytest.raises(BenchError, match="status 3"),
    ):
        process.seconds_until_end()


def test_a_watched_process_can_be_weighed() -> None:
    with Watched([sys.executable, "-c", "print('up', flush=True); input()"]) as process:
        process.seconds_until("up")

        assert process.pss_bytes > 0
        assert process.cpu_seconds >= 0
        assert process.idle_percent(0.05) < 100


def test_a_peer_that_is_not_there_is_refused() -> None:
    with pytest.raises(PeerError, match="install the package"):
        Peer.find("qemu-system-nothing")
