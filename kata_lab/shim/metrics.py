"""Metrics of a shim: its process and containers, and then those of its sandbox (:mod:`kata_lab.runtime.metrics`).

``kata_shim_*`` are Kata's names (Kata Containers, docs/design/kata-2-0-metrics.md) of the sandbox's process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kata_lab.runtime.metrics import metric, sandbox_metrics

if TYPE_CHECKING:
    from kata_lab.shim.shim import Shim

_STATUS: Final = {"VmRSS": "vmrss", "VmHWM": "vmhwm", "VmSize": "vmsize", "RssAnon": "rssanon", "RssShmem": "rssshmem"}


async def metrics_text(shim: Shim) -> str:
    """All metrics of a shim; moments of the start are told from the beginning of its process on."""
    states = [task.state for task in shim.tasks.values()]
    counts = {f'state="{each}"': states.count(each) for each in ("created", "running", "paused", "stopped")}
    lines = [*_process(), *metric("kata_lab_containers", "gauge", "Containers of the sandbox.", counts)]
    return "\n".join(lines) + "\n" + await sandbox_metrics(shim.sandbox, shim.timeline)


def _process() -> Iterator[str]:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    yield from metric("kata_shim_threads", "gauge", "Threads of the sandbox's process.", {"": int(status["Threads"])})
    yield from metric("kata_shim_fds", "gauge", "Open descriptors.", {"": len(os.listdir("/proc/self/fd"))})
    sizes = {f'item="{item}"': int(status[name].split()[0]) * 1024 for name, item in _STATUS.items() if name in status}
    yield from metric("kata_shim_proc_status", "gauge", "From /proc/self/status, in bytes.", sizes)
    times = os.times()
    spent = {'item="utime"': times.user, 'item="stime"': times.system}
    yield from metric("kata_shim_proc_stat", "gauge", "Processor time in seconds.", spent)
