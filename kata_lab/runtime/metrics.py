"""Metrics of a sandbox in Prometheus's text format 0.0.4, with the names of Kata Containers where they fit.

Kata's names (Kata Containers, docs/design/kata-2-0-metrics.md): ``kata_hypervisor_*`` of the VMM,
``kata_shim_agent_rpc_durations_histogram_milliseconds`` of calls to the agent, ``kata_guest_*`` and ``kata_agent_*`` as
the agent tells them. ``kata_lab_*`` are our own. What is the shim's process's alone is in :mod:`kata_lab.shim.metrics`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from kata_lab.agent.client import BUCKETS, AgentClient
from kata_lab.errors import KataLabError
from kata_lab.runtime.config import SandboxState

if TYPE_CHECKING:
    from kata_lab.runtime.sandbox import Sandbox

AGENT_SECONDS: Final = 2.0  #: that the agent may take to tell what it knows
CALLS: Final = "kata_shim_agent_rpc_durations_histogram_milliseconds"


async def sandbox_metrics(sandbox: Sandbox, timeline: Sequence[tuple[str, float]] | None = None) -> str:
    """All metrics of a sandbox and its containers; of one that has stopped, only that it has.

    Args:
        sandbox: the sandbox.
        timeline: milestones of its start, in seconds; if None, :attr:`Sandbox.timeline`.
    """
    states = {f'state="{each}"': float(each is sandbox.state) for each in SandboxState}
    lines = [*metric("kata_lab_sandbox_state", "gauge", "1 for the state that the sandbox is in.", states)]
    steps = sandbox.timeline if timeline is None else timeline
    marks = {f'milestone="{_escaped(name)}"': at for name, at in steps}
    lines += metric("kata_lab_start_seconds", "gauge", "From the beginning to a milestone.", marks)
    if sandbox.state is not SandboxState.RUNNING:
        return _text(lines)
    lines += _machine(sandbox)
    lines += _agent_calls(sandbox.agent)
    if sandbox.paused:
        return _text(lines)
    told = ""
    # An agent that is too busy, or has just ended.
    with contextlib.suppress(KataLabError, TimeoutError):
        async with asyncio.timeout(AGENT_SECONDS):
            lines += await _containers(sandbox)
            told = str((await sandbox.agent.call("GetMetrics"))["metrics"])
    return _text(lines) + told


def _agent_calls(agent: AgentClient) -> Iterator[str]:
    """How long the calls to the agent took since it was connected."""
    yield f"# HELP {CALLS} How long calls to the agent took."
    yield f"# TYPE {CALLS} histogram"
    for method, took in sorted(agent.durations.items()):
        *upto, count = accumulate(took.buckets)
        for bound, number in zip(BUCKETS, upto, strict=True):
            yield f'{CALLS}_bucket{{action="{method}",le="{bound}"}} {number}'
        yield f'{CALLS}_bucket{{action="{method}",le="+Inf"}} {count}'
        yield f'{CALLS}_sum{{action="{method}"}} {took.milliseconds:g}'
        yield f'{CALLS}_count{{action="{method}"}} {count}'


def _machine(sandbox: Sandbox) -> Iterator[str]:
    found = sandbox.hypervisor.get_hypervisor_metrics()
    threads = len(sandbox.hypervisor.get_thread_ids())
    yield from metric("kata_hypervisor_threads", "gauge", "Threads of the VMM.", {"": threads})
    yield from metric("kata_lab_vm_uptime_seconds", "gauge", "Since the VM started.", {"": found.uptime_seconds})
    done = {f'vcpu="{each.vcpu}"': float(each.instructions) for each in found.vcpus}
    yield from metric("kata_lab_vcpu_instructions_total", "counter", "Instructions that a vCPU retired.", done)
    size = {"": float(sandbox.config.memory_mib << 20)}
    yield from metric("kata_lab_vm_memory_bytes", "gauge", "Memory that the guest was given.", size)


async def _containers(sandbox: Sandbox) -> Iterator[str]:
    cpu, used, limit, processes = {}, {}, {}, {}
    for container in tuple(sandbox.containers.values()):
        label = f'container="{container.id}"'
        stats = (await container.stats())["cgroup_stats"] or {}
        cpu[label] = _number(stats, "cpu_stats", "cpu_usage", "total_usage") / 1e9
        used[label] = _number(stats, "memory_stats", "usage", "usage")
        limit[label] = _number(stats, "memory_stats", "usage", "limit")
        processes[label] = _number(stats, "pids_stats", "current")
    killed = {f'container="{each.id}"': float(each.out_of_memory) for each in sandbox.containers.values()}
    families = [
        metric("kata_lab_container_cpu_seconds_total", "counter", "Processor time.", cpu),
        metric("kata_lab_container_memory_bytes", "gauge", "Memory in use.", used),
        metric("kata_lab_container_memory_limit_bytes", "gauge", "Its limit; 0 for none.", limit),
        metric("kata_lab_container_processes", "gauge", "Processes and threads.", processes),
        metric("kata_lab_container_out_of_memory", "gauge", "1 after a process was killed for want of memory.", killed),
    ]
    return (line for family in families for line in family)


def _number(message: Mapping[str, Any], *path: str) -> float:
    """A value inside messages, of which any may be missing."""
    found: Any = message
    for name in path:
        found = (found or {}).get(name)
    return float(found or 0)


def metric(name: str, kind: str, told: str, values: Mapping[str, float]) -> Iterator[str]:
    """One family: label text, such as ``item="a"``, → value."""
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{{{labels}}} {value:.15g}" if labels else f"{name} {value:.15g}"


def _escaped(text: str) -> str:
    """As the value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
