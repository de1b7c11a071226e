"""``kata-lab bench compute``: loops on bare harts, against QEMU.

Our harts run in this process, each on a thread of its own, without a VM around them; the clock runs from the first
instruction to the last. QEMU is a process that runs the same code; a run of one round, which is all start and end, is
taken off its time.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kata_lab.bench.boot import versions
from kata_lab.bench.measure import LONGEST_RUN, BenchError, Sample, Watched, alternate, steps
from kata_lab.bench.peer import Peer
from kata_lab.bench.programs import BASE, INTEGER, LOAD_STORE, TEST_DEVICE, Loop, assemble
from vmm.engine.base import Exit, ExitReason
from vmm.engine.rv64.hart import Rv64Engine
from vmm.memory import GuestMemory

INSTRUCTIONS = 500_000_000  #: of each hart, at size 1
PEER_FACTOR = 4  #: QEMU's loop is so many times as long, to stand out from its start; its time is divided by it
MEMORY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """One loop on one hart.

    Attributes:
        ours_s: seconds, median.
        qemu_s: seconds that QEMU takes for the same loop, median, without its start.
        ratio: ours_s / qemu_s.
        mips: our millions of instructions per second.
        qemu_mips: QEMU's.
        ours_spread: largest less smallest run, as a fraction of the median.
        qemu_spread: the same of QEMU.
    """

    ours_s: float
    qemu_s: float
    ratio: float
    mips: float
    qemu_mips: float
    ours_spread: float
    qemu_spread: float


@dataclass(frozen=True, slots=True)
class ParallelFigures:
    """The integer loop on two harts at once, each the whole of it.

    Attributes:
        ours_s: seconds, median.
        qemu_s: QEMU's seconds, median, without its start.
        speedup: work done per second, as a multiple of one hart's: 2 is perfect.
        qemu_speedup: QEMU's.
    """

    ours_s: float
    qemu_s: float
    speedup: float
    qemu_speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFigures:
    """What was measured; the first fields are those of the integer loop, see :class:`LoopFigures`."""

    ours_s: float
    qemu_s: float
    ratio: float
    mips: float
    qemu_mips: float
    ours_spread: float
    qemu_spread: float
    load_store: LoopFigures
    two_harts: ParallelFigures
    pss_bytes: int
    instructions: int
    runs: int
    versions: dict[str, str] = field(default_factory=dict)


def measure_compute(runs: int, size: float = 1.0) -> ComputeFigures:
    """Measure; ``size`` scales the length of the loops.

    Raises:
        PeerError: this machine has no QEMU.
        BenchError: a loop did not end as it should.
    """
    peer = Peer.find()
    Rv64Engine.prepare()
    with (
        tempfile.TemporaryDirectory(prefix="kata-lab-bench-") as directory,
        steps("Measuring loops", 6 * (runs + 1)) as begin,
    ):
        place = Path(directory)

        def sides(loop: Loop, harts: int) -> tuple[Sample, Sample]:
            rounds = max(int(INSTRUCTIONS * size) // loop.instructions, 1)
            what = f"{loop.name} loop, {harts} harts" if harts > 1 else f"{loop.name} loop"
            ours, qemu = alternate(
                runs,
                lambda: _announced(begin, what, lambda: run_harts(assemble(loop, rounds, harts), harts)),
                lambda: _announced(begin, f"{what}, QEMU", lambda: _run_peer(peer, place, loop, rounds, harts)),
            )
            return ours, qemu

        integer = sides(INTEGER, 1)
        load_store = sides(LOAD_STORE, 1)
        parallel = sides(INTEGER, 2)
    figures = _figures(INTEGER, integer, size)
    ours_2, qemu_2 = (side.median for side in parallel)
    from vmm.metrics import ProcessMemory

    return ComputeFigures(
        ours_s=figures.ours_s,
        qemu_s=figures.qemu_s,
        ratio=figures.ratio,
        mips=figures.mips,
        qemu_mips=figures.qemu_mips,
        ours_spread=figures.ours_spread,
        qemu_spread=figures.qemu_spread,
        load_store=_figures(LOAD_STORE, load_store, size),
        two_harts=ParallelFigures(
            ours_s=ours_2,
            qemu_s=qemu_2,
            speedup=2 * figures.ours_s / ours_2,
            qemu_speedup=2 * figures.qemu_s / qemu_2,
        ),
        pss_bytes=ProcessMemory.now().pss,
        instructions=int(INSTRUCTIONS * size),
        runs=runs,
        versions=versions(peer),
    )


def _announced(begin: Callable[[str], None], what: str, run: Callable[[], float]) -> float:
    begin(what)
    return run()


def _figures(loop: Loop, sides: tuple[Sample, Sample], size: float) -> LoopFigures:
    ours, qemu = sides
    instructions = max(int(INSTRUCTIONS * size) // loop.instructions, 1) * loop.instructions
    return LoopFigures(
        ours_s=ours.median,
        qemu_s=qemu.median,
        ratio=ours.median / qemu.median,
        mips=instructions / ours.median / 1e6,
        qemu_mips=instructions / qemu.median / 1e6,
        ours_spread=ours.spread,
        qemu_spread=qemu.spread,
    )


def run_harts(program: bytes, harts: int) -> float:
    """Run a program on fresh harts, and return the seconds from the first instruction to the last.

    Raises:
        BenchError: a hart stopped anywhere but at the end.
    """
    with GuestMemory(BASE, MEMORY_BYTES) as memory, Rv64Engine(memory, harts) as engine:
        memory.write(BASE, program)
        for hart in engine.harts:
            hart.reset(BASE, hart.id)
        ends: list[Exit] = []
        together = threading.Barrier(harts + 1)

        def live(number: int) -> None:
            together.wait()
            ends.append(engine.harts[number].run())

        threads = [threading.Thread(target=live, args=(number,), name=f"bench-{number}") for number in range(harts)]
        try:
            for thread in threads:
                thread.start()
            together.wait()
            began = time.perf_counter()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - began
        except BaseException:
            together.abort()
            for hart in engine.harts:
                hart.interrupt()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
    finished = [end for end in ends if end.reason is ExitReason.MMIO_WRITE and end.address == TEST_DEVICE]
    waiting = [end for end in ends if end.reason is ExitReason.HALTED]
    if len(finished) != 1 or len(waiting) != harts - 1:
        raise BenchError(f"the loop ended with {', '.join(map(str, ends)) or 'nothing'}, not at its end")
    return seconds


def _run_peer(peer: Peer, place: Path, loop: Loop, rounds: int, harts: int) -> float:
    """Seconds for the rounds, without start and end; never less than the clock's noise."""
    seconds = []
    for count in (1, rounds * PEER_FACTOR):
        program = place / "program"
        program.write_bytes(assemble(loop, count, harts))
        with Watched(peer.program_command(program, harts)) as process:
            seconds.append(process.seconds_until_end(LONGEST_RUN))
    empty, whole = seconds
    return max(whole - empty, 1e-6) / PEER_FACTOR
