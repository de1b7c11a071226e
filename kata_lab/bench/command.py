"""``kata-lab bench``: measures and prints, for a person or as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from kata_lab.bench.boot import BootFigures, measure_boot
from kata_lab.bench.compute import ComputeFigures, measure_compute
from kata_lab.bench.fused import PARTS as START_PARTS
from kata_lab.bench.fused import ROUNDS, FusedFigures, measure_fused
from kata_lab.bench.fused_call import WAY
from kata_lab.bench.hotplug import HotplugFigures, measure_hotplug
from kata_lab.bench.image import ImageFigures, measure_images
from kata_lab.bench.io import IoFigures, measure_io
from kata_lab.bench.run import PARTS, RunFigures, measure_run

_DIGITS = 4


def run_boot(runs: int, as_json: bool, idle_seconds: float, cold: bool) -> int:
    """``kata-lab bench boot``; the exit status."""
    figures = measure_boot(runs, idle_seconds, cold)
    print(_json(figures) if as_json else boot_table(figures))
    return 0


def run_compute(runs: int, as_json: bool, size: float) -> int:
    """``kata-lab bench compute``; the exit status."""
    figures = measure_compute(runs, size)
    print(_json(figures) if as_json else compute_table(figures))
    return 0


def run_fused(runs: int, as_json: bool) -> int:
    """``kata-lab bench fused``; the exit status."""
    figures = measure_fused(runs)
    print(_dumped(figures.plain()) if as_json else fused_table(figures))
    return 0


def run_hotplug(runs: int, as_json: bool) -> int:
    """``kata-lab bench hotplug``; the exit status."""
    figures = measure_hotplug(runs)
    print(_json(figures) if as_json else hotplug_table(figures))
    return 0


def run_image(runs: int, as_json: bool) -> int:
    """``kata-lab bench image``; the exit status."""
    figures = measure_images(runs)
    print(_json(figures) if as_json else image_table(figures))
    return 0


def run_io(runs: int, as_json: bool, seconds: float) -> int:
    """``kata-lab bench io``; the exit status."""
    figures = measure_io(runs, seconds)
    print(_json(figures) if as_json else io_table(figures))
    return 0


def run_run(runs: int, as_json: bool, rounds: int) -> int:
    """``kata-lab bench run``; the exit status."""
    figures = measure_run(runs, rounds)
    print(_json(figures) if as_json else run_table(figures))
    return 0


def boot_table(figures: BootFigures) -> str:
    """For a person."""
    rows = [
        ("", "ours", "qemu"),
        ("exec to userland, s", f"{figures.ours_s:.2f}", f"{figures.qemu_s:.2f}"),
        ("  spread of runs", f"{figures.ours_spread:.0%}", f"{figures.qemu_spread:.0%}"),
        ("  ratio, ours / qemu", f"{figures.ratio:.2f}", ""),
        ("exec to first instruction, s", f"{figures.first_instruction_s:.2f}", ""),
        ("import vmm to first instruction, s", f"{figures.import_to_first_instruction_s:.2f}", ""),
        ("boot, MIPS", f"{figures.mips:.0f}", ""),
        ("boot, million instructions", f"{figures.instructions / 1e6:.0f}", ""),
        ("memory (PSS) at userland, MiB", _mib(figures.pss_bytes), _mib(figures.qemu_pss_bytes)),
        ("idle guest, % of a core", f"{figures.idle_percent:.1f}", f"{figures.qemu_idle_percent:.1f}"),
    ]
    if figures.cold_compile_s is not None:
        rows.append(("one-time compilation, s", f"{figures.cold_compile_s:.1f}", ""))
    return _table(rows, figures.runs, figures.versions)


def compute_table(figures: ComputeFigures) -> str:
    """For a person."""
    memory, parallel = figures.load_store, figures.two_harts
    rows = [
        ("", "ours", "qemu"),
        ("integer loop, MIPS", f"{figures.mips:.0f}", f"{figures.qemu_mips:.0f}"),
        ("  spread of runs", f"{figures.ours_spread:.0%}", f"{figures.qemu_spread:.0%}"),
        ("  seconds", f"{figures.ours_s:.2f}", f"{figures.qemu_s:.2f}"),
        ("  ratio, ours / qemu", f"{figures.ratio:.2f}", ""),
        ("load/store loop, MIPS", f"{memory.mips:.0f}", f"{memory.qemu_mips:.0f}"),
        ("  ratio, ours / qemu", f"{memory.ratio:.2f}", ""),
        ("two harts, times one", f"{parallel.speedup:.2f}", f"{parallel.qemu_speedup:.2f}"),
        ("memory (PSS), MiB", _mib(figures.pss_bytes), ""),
    ]
    return _table(rows, figures.runs, figures.versions)


def fused_table(figures: FusedFigures) -> str:
    """For a person."""
    sides = list(figures.arrangements.values())
    rows: list[tuple[str, ...]] = [("", *figures.arrangements, "rpc/fused")]

    def add(name: str, values: list[float | None], form: str, ratio: float | None = None) -> None:
        told = ("" if value is None else format(value, form) for value in values)
        rows.append((name, *told, "" if ratio is None else f"{ratio:.2g}"))

    for field, name, form in _FUSED_ROWS:
        add(name, [getattr(side, field) for side in sides], form, figures.ratio.get(field))
        if field == "start_s":
            for part in START_PARTS:
                add(f"  {part}", [side.start_parts[part] for side in sides], form)
        elif field == "pss_mb":
            for part in sides[0].pss_parts["kind"]:
                add(f"  {part}", [side.pss_parts["kind"][part] for side in sides], form)
    for action in ROUNDS:
        found = [side.action_us.get(action) for side in sides]
        medians = [None if each is None else each.median for each in found]
        add(f"{action}, µs", medians, ".0f", figures.ratio["action"].get(action))
        add("  99th percentile", [None if each is None else each.p99 for each in found], ".0f")
        add("  context switches", [side.context_switches_per_action.get(action) for side in sides], ".1f")
        add("  system calls", [side.system_calls_per_action.get(action) for side in sides], ".1f")
    for part in WAY:
        add(_WAY_ROWS[part], [side.way_us.get(part) for side in sides], ".0f", figures.ratio["way"].get(part))
    for part in dict.fromkeys(name for side in sides for name in side.notice_ms):
        add(f"{part} killed, noticed after, ms", [side.notice_ms.get(part) for side in sides], ".0f")
        add("  all cleared after, ms", [side.cleanup_ms.get(part) for side in sides], ".0f")
    width = max(len(row[0]) for row in rows)
    lines = [(f"{name:{width}}" + "".join(f"  {each:>9}" for each in told)).rstrip() for name, *told in rows]
    lines += [f"{name}: {limit}" for name, limit in figures.limits.items()]
    floor = ", ".join(f"{name} {took:.0f}" for name, took in figures.floor_us.items())
    lines.append(f"a message of one byte and its answer, µs: {floor}")
    lines.append(_medians(figures.runs, figures.versions))
    return "\n".join(lines)


def hotplug_table(figures: HotplugFigures) -> str:
    """For a person."""
    rows: list[tuple[str, ...]] = [("", "ours", "worst", "qemu", "worst", "sooner")]
    for name, ours in figures.ours.items():
        theirs, ratio = figures.qemu[name], f"{figures.ratio[name]:.1f}"
        times = (ours.median, ours.worst, theirs.median, theirs.worst)
        rows.append((_HOTPLUG_NAMES[name], *(f"{each:.0f}" for each in times), ratio))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:{width}}" + "".join(f"  {each:>8}" for each in told) for name, *told in rows]
    lines += [f"{_HOTPLUG_NAMES[name].strip()}: {limit}" for name, limit in figures.limits.items()]
    lines.append(_medians(figures.runs, figures.versions))
    return "\n".join(lines)


def image_table(figures: ImageFigures) -> str:
    """For a person."""
    lifsea, debian = figures.lifsea, figures.debian
    rows = [
        ("", "lifsea", "debian"),
        ("packages", str(lifsea.packages), str(debian.packages)),
        ("  fewer than debian", f"{figures.fewer_packages:.0%}", ""),
        ("root, MiB", _mib(lifsea.bytes), _mib(debian.bytes)),
        ("  less than debian", f"{figures.fewer_bytes:.0%}", ""),
        ("exec to services up, s", f"{lifsea.boot_s:.2f}", f"{debian.boot_s:.2f}"),
        ("  spread of runs", f"{lifsea.boot_spread:.0%}", f"{debian.boot_spread:.0%}"),
        ("  times sooner than debian", f"{figures.times_sooner:.1f}", ""),
        ("memory (PSS) at services up, MiB", _mib(lifsea.pss_bytes), _mib(debian.pss_bytes)),
    ]
    return _table(rows, figures.runs, figures.versions)


def io_table(figures: IoFigures) -> str:
    """For a person."""
    rows = [("", "ours", "qemu", "ratio")]
    for name, ours in figures.ours.items():
        theirs = figures.qemu.get(name)
        told = (f"{theirs:.0f}", f"{figures.ratio[name]:.2f}") if theirs is not None else ("", "")
        rows.append((_IO_NAMES.get(name, name), f"{ours:.0f}", *told))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:{width}}  {ours:>8}  {theirs:>8}  {ratio:>6}".rstrip() for name, ours, theirs, ratio in rows]
    lines += [f"{_IO_NAMES[name]}: {limit}" for name, limit in figures.limits.items()]
    lines.append(_medians(figures.runs, figures.versions))
    return "\n".join(lines)


def run_table(figures: RunFigures) -> str:
    """For a person."""
    rows = [
        ("kata-lab run to first output, s", f"{figures.start_s:.2f}"),
        ("  spread of runs", f"{figures.start_spread:.0%}"),
        *((f"  {_RUN_PARTS[name]}", f"{figures.parts[name]:.2f}") for name in PARTS),
        (_RUN_NAMES["container_s"], f"{figures.container_s * 1e3:.0f}"),
        ("  spread", f"{figures.container_spread:.0%}"),
        ("  million instructions", f"{figures.container_instructions / 1e6:.0f}"),
        (_RUN_NAMES["exec_s"], f"{figures.exec_s * 1e3:.0f}"),
        ("  spread", f"{figures.exec_spread:.0%}"),
        ("  million instructions", f"{figures.exec_instructions / 1e6:.0f}"),
        ("standard output, MB/s", f"{figures.stdout_mb_s:.1f}"),
        (_RUN_NAMES["agent_bytes"], f"{figures.agent_bytes / 1e6:.1f}"),
        ("memory (PSS) of the sandbox's process, MiB", _mib(figures.pss_bytes)),
        (_RUN_NAMES["ps_s"], f"{figures.ps_s * 1e3:.0f}"),
        (_RUN_NAMES["help_s"], f"{figures.help_s * 1e3:.0f}"),
        ("a Python that does nothing, ms", f"{figures.interpreter_s * 1e3:.0f}"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value:>8}" for name, value in rows]
    lines += [f"{_RUN_NAMES[name]}: {limit}" for name, limit in figures.limits.items()]
    lines.append(_medians(figures.runs, figures.versions))
    return "\n".join(lines)


_FUSED_ROWS = (
    ("processes", "processes", "d"),
    ("threads", "threads", "d"),
    ("pss_mb", "memory (PSS), MB", ".0f"),
    ("start_s", "exec to sandbox ready, s", ".2f"),
    ("starts_per_s", "starts a second, several at once", ".2f"),
    ("cpu_s", "  CPU of each, s", ".2f"),
)

_WAY_ROWS = {
    "there": "one more vCPU: until the VMM begins, µs",
    "work": "  VMM and guest, µs",
    "back": "  until the runtime goes on, µs",
}

_RUN_PARTS = {
    "command": "command",
    "process": "process",
    "vmm": "VMM",
    "kernel": "kernel",
    "init": "init",
    "agent": "agent",
    "container": "container",
}

_RUN_NAMES = {
    "container_s": "container in a running sandbox, ms",
    "exec_s": "exec in a running container, ms",
    "agent_bytes": "agent's memory in the guest, MB",
    "ps_s": "kata-lab ps, ms",
    "help_s": "kata-lab --help, ms",
}

_HOTPLUG_NAMES = {
    "vcpu_plus_1_ms": "one vCPU more, ms",
    "vcpu_2_to_3_ms": "  and one more, ms",
    "vcpu_plus_4_ms": "four vCPUs more, ms",
    "disk_ms": "disk, ms",
    "share_ms": "shared directory, ms",
    "memory_plus_64_ms": "memory, 64 MiB more, ms",
    "memory_minus_64_ms": "memory, 64 MiB less, ms",
    "vcpu_minus_1_ms": "one vCPU less, ms",
    "disk_removal_ms": "disk gone, ms",
    "share_removal_ms": "shared directory gone, ms",
}

_IO_NAMES = {
    "seq_read_mb_s": "disk, sequential read, MB/s",
    "seq_write_mb_s": "disk, sequential write, MB/s",
    "rand_read_iops": "disk, random 4 KiB reads, per s",
    "rand_write_iops": "disk, random 4 KiB writes, per s",
    "net_to_host_mb_s": "network, guest to host, MB/s",
    "net_to_guest_mb_s": "network, host to guest, MB/s",
    "fs_read_mb_s": "shared directory, read, MB/s",
    "fs_write_mb_s": "shared directory, write, MB/s",
    "vsock_to_guest_mb_s": "vsock, host to guest, MB/s",
    "vsock_to_host_mb_s": "vsock, guest to host, MB/s",
}


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f}"


def _table(rows: list[tuple[str, str, str]], runs: int, versions: dict[str, str]) -> str:
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:{width}}  {ours:>8}  {theirs:>8}".rstrip() for name, ours, theirs in rows]
    lines.append(_medians(runs, versions))
    return "\n".join(lines)


def _medians(runs: int, versions: dict[str, str]) -> str:
    return f"medians of {runs} run{'s' if runs > 1 else ''} in turns; " + ", ".join(_told(versions))


def _told(versions: dict[str, str]) -> list[str]:
    return [f"{name} {version}" for name, version in versions.items()]


def _json(figures: BootFigures | ComputeFigures | HotplugFigures | ImageFigures | IoFigures | RunFigures) -> str:
    return _dumped(asdict(figures))


def _dumped(figures: dict[str, Any]) -> str:
    return json.dumps(_rounded(figures), indent=1)


def _rounded(value: Any) -> Any:
    """Floats to four significant digits: what follows is noise."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, float) and value and math.isfinite(value):
        return round(value, _DIGITS - 1 - math.floor(math.log10(abs(value))))
    return value
