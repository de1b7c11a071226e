"""Metrics of the guest and the agent in Prometheus' text format (exposition format 0.0.4), with Kata's names."""

import gc
import os

_MEMORY = ("MemTotal", "MemFree", "MemAvailable", "Cached")


def text(containers):
    lines = []
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in _MEMORY:
                lines.append(f'kata_guest_meminfo{{item="{name}"}} {int(rest.split()[0]) * 1024}')
    with open("/proc/loadavg") as file:
        for name, value in zip(("load1", "load5", "load15"), file.read().split()):
            lines.append(f'kata_guest_load{{item="{name}"}} {value}')
    with open("/proc/self/status") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name == "VmRSS":
                lines.append(f"kata_agent_process_resident_memory_bytes {int(rest.split()[0]) * 1024}")
    open_files = sum(1 for _ in os.ilistdir("/proc/self/fd"))
    lines.append(f"kata_agent_process_open_fds {open_files}")
    lines.append(f"kata_agent_heap_bytes {gc.mem_alloc()}")
    lines.append(f"kata_agent_containers {containers}")
    return "\n".join(lines) + "\n"
