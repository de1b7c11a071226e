"""``kata-lab bench boot``: from exec to the first line of userland, against QEMU on the same kernel.

Ours is what a person runs, ``kata-lab boot``, as a process of its own; so is QEMU. Kernel, initrd, kernel command line,
memory and number of harts are the same; the clock runs from exec until the marker line has been read from the process's
standard output.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kata_lab.bench.measure import LONGEST_RUN, BenchError, Sample, Watched, alternate, steps, warm
from kata_lab.bench.peer import CPU, Peer
from kata_lab.image.boot import APPEND, USERLAND_MARKER, BootGuest, build_boot_guest

MEMORY_MIB = 256
PROMPT = "kata-lab:~# "


@dataclass(frozen=True, slots=True, kw_only=True)
class BootFigures:
    """What was measured.

    Attributes:
        ours_s: exec to the first line of userland, seconds, median.
        qemu_s: the same of QEMU.
        ratio: ours_s / qemu_s.
        ours_spread: largest less smallest run, as a fraction of the median.
        qemu_spread: the same of QEMU.
        mips: millions of guest instructions per second, from the first one to userland.
        instructions: of the guest until userland.
        first_instruction_s: exec to the guest's first instruction, seconds, median.
        import_to_first_instruction_s: ``import vmm`` to the guest's first instruction, seconds, median.
        pss_bytes: memory of our process at the first line of userland, median.
        qemu_pss_bytes: the same of QEMU.
        idle_percent: of one core, with a shell waiting.
        qemu_idle_percent: the same of QEMU.
        cold_compile_s: seconds that the one-time compilation takes; None unless asked for.
        runs: measured runs of each side.
        versions: of what took part.
    """

    ours_s: float
    qemu_s: float
    ratio: float
    ours_spread: float
    qemu_spread: float
    mips: float
    instructions: int
    first_instruction_s: float
    import_to_first_instruction_s: float
    pss_bytes: int
    qemu_pss_bytes: int
    idle_percent: float
    qemu_idle_percent: float
    cold_compile_s: float | None = None
    runs: int
    memory_mib: int = MEMORY_MIB
    versions: dict[str, str] = field(default_factory=dict)


def measure_boot(runs: int, idle_seconds: float, cold: bool = False) -> BootFigures:
    """Measure.

    Raises:
        PeerError: this machine has no QEMU.
        BenchError: a run did not get to userland.
        ImageError: the guest cannot be built.
    """
    peer = Peer.find()
    guest = build_boot_guest()
    prepare()
    ours = [sys.executable, "-m", "kata_lab", "boot", "--memory", str(MEMORY_MIB), "--cmdline", APPEND]
    theirs = list(peer.boot_command(guest.kernel, guest.initrd, APPEND, MEMORY_MIB))
    warm([guest.kernel, guest.initrd, peer.program])
    with steps("Measuring boots", 3 * (runs + 1) + 2 + cold) as begin:
        pss: dict[str, list[float]] = {"ours": [], "qemu": []}
        ours_s, qemu_s = alternate(
            runs,
            lambda: _boot("ours", ours, pss, begin),
            lambda: _boot("qemu", theirs, pss, begin),
        )
        probes = [_probe(guest, begin) for _ in range(runs + 1)][1:]
        begin("idling")
        ours_idle = _idle(ours, idle_seconds)
        begin("idling, QEMU")
        qemu_idle = _idle(theirs, idle_seconds)
        cold_compile_s = None
        if cold:
            begin("compiling")
            cold_compile_s = _cold_compile()

    def median(name: str) -> float:
        return Sample(tuple(probe[name] for probe in probes)).median

    return BootFigures(
        ours_s=ours_s.median,
        qemu_s=qemu_s.median,
        ratio=ours_s.median / qemu_s.median,
        ours_spread=ours_s.spread,
        qemu_spread=qemu_s.spread,
        mips=Sample(tuple(probe["userland_instructions"] / probe["userland_s"] / 1e6 for probe in probes)).median,
        instructions=int(median("userland_instructions")),
        first_instruction_s=median("exec_to_first_instruction_s"),
        import_to_first_instruction_s=median("first_instruction_s"),
        pss_bytes=int(Sample(tuple(pss["ours"][1:])).median),
        qemu_pss_bytes=int(Sample(tuple(pss["qemu"][1:])).median),
        idle_percent=ours_idle,
        qemu_idle_percent=qemu_idle,
        cold_compile_s=cold_compile_s,
        runs=runs,
        versions=versions(peer) | {"guest kernel": guest.release},
    )


def versions(peer: Peer | None = None) -> dict[str, str]:
    """Of what takes part in a measurement; `peer` is None where there is no QEMU to compare with."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "numba": version("numba"),
        "llvmlite": version("llvmlite"),
        **({} if peer is None else {"qemu": peer.version, "qemu cpu": CPU}),
        "host": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} processors",
    }


def prepare() -> None:
    """Compile, if need be, before anything is timed."""
    from vmm.engine.rv64.hart import Rv64Engine

    Rv64Engine.prepare()


def _boot(side: str, command: list[str], pss: dict[str, list[float]], begin: Callable[[str], None]) -> float:
    begin(side)
    with Watched(command) as process:
        seconds = process.seconds_until(USERLAND_MARKER)
        pss[side].append(process.pss_bytes)
    return seconds


def _idle(command: list[str], seconds: float) -> float:
    with Watched(command) as process:
        process.seconds_until(PROMPT)
        return process.idle_percent(seconds)


def _probe(guest: BootGuest, begin: Callable[[str], None]) -> dict[str, float]:
    import time

    begin("ours, from within")
    command = [sys.executable, "-m", "kata_lab.bench.probe", str(guest.kernel), str(guest.initrd), APPEND]
    began = time.monotonic()
    told = subprocess.run([*command, str(MEMORY_MIB)], capture_output=True, text=True, timeout=LONGEST_RUN, check=False)
    if told.returncode:
        raise BenchError(f"the probe failed with status {told.returncode}: {told.stderr.strip()[-500:]}")
    figures: dict[str, float] = json.loads(told.stdout)
    # CLOCK_MONOTONIC is the same clock in every process.
    figures["exec_to_first_instruction_s"] = figures["first_instruction_at"] - began
    return figures


def _cold_compile() -> float:
    """Seconds from exec to a loaded hart in a process that finds no compiled code."""
    program = "from vmm.engine.rv64.hart import Rv64Engine; Rv64Engine.prepare()"
    with tempfile.TemporaryDirectory(prefix="kata-lab-bench-") as home:
        environment = {**os.environ, "KATA_LAB_HOME": str(Path(home))}
        with Watched([sys.executable, "-c", program], environment) as process:
            return process.seconds_until_end()
