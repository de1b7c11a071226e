"""Metrics of a sandbox in Prometheus's text format 0.0.4, with the names of Kata Containers where they fit.

Kata's names (Kata Containers, docs/design/kata-2-0-metrics.md): ``kata_shim_*`` of the sandbox's process,
``kata_hypervisor_*`` of the VMM (here threads of the same process), ``kata_shim_agent_rpc_durations_histogram_
milliseconds``, ``kata_guest_*`` and ``kata_agent_*`` as the agent tells them. ``kata_lab_*`` are our own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kata_lab.ttrpc import RpcError

if TYPE_CHECKING:
    from kata_lab.shim.shim import Shim

BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  #: upper bounds in milliseconds
AGENT_SECONDS: Final = 2.0

_STATUS: Final = {"VmRSS": "vmrss", "VmHWM": "vmhwm", "VmSize": "vmsize", "RssAnon": "rssanon", "RssShmem": "rssshmem"}


async def metrics_text(shim: Shim) -> str:
    """All metrics of a shim."""
    sandbox = shim.sandbox
    lines = [*_process(), *_agent_calls(shim)]
    threads = len(sandbox.hypervisor.get_thread_ids())
    lines += _metric("kata_hypervisor_threads", "gauge", "Threads that run vCPUs.", {"": threads})
    states = [task.state for task in shim.tasks.values()]
    counts = {f'state="{each}"': states.count(each) for each in ("created", "running", "paused", "stopped")}
    lines += _metric("kata_lab_containers", "gauge", "Containers of the sandbox.", counts)
    marks = {f'milestone="{_escaped(name)}"': at for name, at in shim.timeline}
    lines += _metric("kata_lab_start_seconds", "gauge", "From the start of the process to a milestone.", marks)
    text: str = "\n".join(lines) + "\n"
    try:
        text += str((await sandbox.agent.call("GetMetrics", AGENT_SECONDS))["metrics"])
    except RpcError:
        # An agent without metrics, or too busy for them.
        return text
    return text


def _process() -> Iterable[str]:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    yield from _metric("kata_shim_threads", "gauge", "Threads of the sandbox's process.", {"": int(status["Threads"])})
    yield from _metric("kata_shim_fds", "gauge", "Open descriptors.", {"": len(os.listdir("/proc/self/fd"))})
    sizes = {f'item="{item}"': int(status[name].split()[0]) * 1024 for name, item in _STATUS.items() if name in status}
    yield from _metric("kata_shim_proc_status", "gauge", "From /proc/self/status, in bytes.", sizes)
    times = os.times()
    spent = {'item="utime"': times.user, 'item="stime"': times.system}
    yield from _metric("kata_shim_proc_stat", "gauge", "Processor time in seconds.", spent)


def _agent_calls(shim: Shim) -> Iterable[str]:
    name = "kata_shim_agent_rpc_durations_histogram_milliseconds"
    seen: dict[str, list[float]] = {}
    for call in tuple(shim.sandbox.agent.calls):
        seen.setdefault(call.method, []).append(call.seconds * 1000)
    yield f"# HELP {name} How long calls to the agent took, of the last ones."
    yield f"# TYPE {name} histogram"
    for method, times in sorted(seen.items()):
        for bound in BUCKETS:
            yield f'{name}_bucket{{action="{method}",le="{bound}"}} {sum(each <= bound for each in times)}'
        yield f'{name}_bucket{{action="{method}",le="+Inf"}} {len(times)}'
        yield f'{name}_sum{{action="{method}"}} {sum(times):g}'
        yield f'{name}_count{{action="{method}"}} {len(times)}'


def _metric(name: str, kind: str, told: str, values: Mapping[str, float]) -> Iterable[str]:
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{{{labels}}} {value:.10g}" if labels else f"{name} {value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
