"""The process in which a design of the capstone runs: ``python -m kata_lab.lab.capstone_probe ARRANGEMENT``.

It takes the orders of :class:`kata_lab.bench.fused_probe.Probe` and three more, for the pod of the job: ``pod`` makes
its two containers, ``request`` asks it for its first answer, ``containers`` looks into each. Whatever is counted is
counted here or in the guest, and nothing of it is an estimate. Containers that cannot be made are a result, no error.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from kata_lab.bench.fused_probe import Probe, serve
from kata_lab.errors import KataLabError

if TYPE_CHECKING:
    from kata_lab.runtime import Container

JOB_MIB: Final = 24  #: that cook holds at once to answer a request
DOOR, HATCH = 8080, 8081  # where web listens, and where cook does
TRIES: Final = 200  # that a request has until somebody listens, a tenth of a second each
PROGRAMS: Final = {
    "web": f"while :; do nc -l -p {DOOR} -e /bin/sh -c 'read order; echo $order | nc 127.0.0.1 {HATCH}'; done",
    "cook": (
        f"while :; do nc -l -p {HATCH} -e /bin/sh -c 'read order;"
        f" dd if=/dev/zero of=/dev/null bs={JOB_MIB}M count=1 2>/dev/null && echo done: $order'; done"
    ),
}
# What it says when cook could not do it is nothing; so that is an answer as well, and tried again only at first.
_ASK: Final = (
    f"n=0; while [ $n -lt {TRIES} ]; do n=$((n+1));"
    f" a=$(echo $ORDER | timeout 20 nc 127.0.0.1 {DOOR} 2>/dev/null) && break; sleep 0.1; done; echo $a"
)
_LOOK: Final = (
    "echo limit $(cat /sys/fs/cgroup/memory.max); echo used $(cat /sys/fs/cgroup/memory.current);"
    " echo available $(sed -n 's/^MemAvailable: *//p' /proc/meminfo); echo cpus $(grep -c ^processor /proc/cpuinfo)"
)


class PodProbe(Probe):
    """Carries out orders for one design."""

    async def pod(self, **wishes: dict[str, Any]) -> dict[str, Any]:
        """Make and start a container for each program, with these wishes; how many vCPUs there were before."""
        sandbox = self._running
        before = sandbox.size.vcpus
        for name, program in PROGRAMS.items():
            try:
                container = await sandbox.new_container(["sh", "-c", program], container_id=name, **wishes[name])
                await container.start()
            except KataLabError as error:
                return {"vcpus": before, "failed": f"{name}: {error}"}
            sandbox.mark(f"{name} started")
        return {"vcpus": before, "failed": ""}

    async def request(self, dish: str) -> dict[str, Any]:
        """The pod's answer, what it took since the guest's first instruction, and what it took of the host's disk."""
        sandbox = self._running
        began = dict(sandbox.timeline)["first instruction"]
        answer = await _told(sandbox.containers["web"], _ASK, [f"ORDER={dish}"])
        sandbox.mark("first answer")
        seconds = dict(sandbox.timeline)["first answer"] - began
        disk = sum(each.lstat().st_blocks * 512 for each in sandbox.directory.rglob("*") if not each.is_symlink())
        return {"answer": answer.strip(), "seconds": seconds, "instructions": self._instructions(), "disk": disk}

    def _instructions(self) -> int | None:
        """That the guest has retired; None where the VMM does not tell."""
        try:
            return int(self._running.hypervisor.get_hypervisor_metrics().instructions)
        except (KataLabError, AttributeError):
            return None

    async def containers(self) -> dict[str, Any]:
        """Of each container: its limit, what it uses, and what it sees of the guest; and the time line."""
        found: dict[str, Any] = {}
        for name, container in self._running.containers.items():
            told = await _told(container, _LOOK)
            found[name] = dict(line.split(" ", 1) for line in told.splitlines() if " " in line)
            found[name]["out of memory"] = container.out_of_memory
        return {"containers": found, "timeline": self._running.timeline}


async def _told(container: Container, command: str, env: Sequence[str] = ()) -> str:
    """What a shell in a container says."""
    description = container.spec["process"]
    process = await container.exec(
        {**description, "args": ["sh", "-c", command], "env": [*description["env"], *env], "terminal": False}
    )
    _, output, _ = await process.communicate()
    return output.decode(errors="replace")


if __name__ == "__main__":
    asyncio.run(serve(PodProbe(sys.argv[1])))
