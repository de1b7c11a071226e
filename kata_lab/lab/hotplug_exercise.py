"""Check of the exercise of notebook 5, "Hotplug": a resize that fails half-way, and what became of its halves.

What came up and went down again is what the guest's kernel says: it logs each CPU that goes off. What is so now is
asked from guest, VMM and host's kernel alike.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.lab.exercise import Feedback, checks, not_right, not_yet, solved
from kata_lab.shell import GuestShell

if TYPE_CHECKING:
    from kata_lab.runtime import Sandbox
    from vmm.microvm import MicroVm
    from vmm.upcall import PassedFrame

_OFF: Final = re.compile(r"CPU(\d+): off")
QUESTIONS: Final = ("came up", "online now", "vCPU threads now", "errno")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One resize, and what was so before and after.

    Attributes:
        wanted: vCPUs.
        before: vCPUs that there were.
        error: why it failed; "" if it did not.
        frames: what passed between VMM and guest.
        kernel: what the guest's kernel logged meanwhile.
        online: CPUs that are online in the guest now.
        threads: of the host, that run vCPUs now.
    """

    wanted: int
    before: int
    error: str
    frames: tuple[PassedFrame, ...]
    kernel: tuple[str, ...]
    online: int
    threads: int

    @property
    def refused(self) -> str:
        """The errno's name, if the guest's device manager answered that it could not."""
        for each in reversed(self.frames):
            if each.frame is not None and each.frame.result:
                return each.frame.describe().split()[2].rstrip(",")
        return ""

    @property
    def came_up(self) -> list[int]:
        """CPUs that were online for a moment, and were taken down again."""
        return sorted({int(found[1]) for line in self.kernel if (found := _OFF.search(line))})

    def __repr__(self) -> str:
        outcome = self.error or "it was done"
        return f"{self.before} → {self.wanted} vCPUs: {outcome}"


async def try_resize(sandbox: Sandbox, vcpus: int) -> Attempt:
    """Have that many vCPUs, or see why not."""
    from kata_lab.hypervisor.fused import FusedHypervisor

    assert isinstance(sandbox.hypervisor, FusedHypervisor)
    vm = sandbox.hypervisor.vm
    before, seen = sandbox.size.vcpus, len(await asyncio.to_thread(_kernel_log, vm))
    passed = vm.upcall.frames[-1].seconds if vm.upcall is not None and vm.upcall.frames else 0.0
    error = ""
    try:
        await sandbox.resize(vcpus=vcpus)
    except KataLabError as failure:
        error = str(failure)
    frames = () if vm.upcall is None else tuple(each for each in vm.upcall.frames if each.seconds > passed)
    log = await asyncio.to_thread(_kernel_log, vm)
    online = int(await asyncio.to_thread(_told, vm, "grep -c ^processor /proc/cpuinfo"))
    return Attempt(vcpus, before, error, frames, tuple(log[seen:]), online, _vcpu_threads(vm))


def _vcpu_threads(vm: MicroVm) -> int:
    return sum(name.startswith("vcpu") for name in vm.thread_ids)


def _kernel_log(vm: MicroVm) -> list[str]:
    return _told(vm, "dmesg").splitlines()


def _told(vm: MicroVm, command: str) -> str:
    with GuestShell(vm) as shell:
        return shell.run(command, check=True).output.strip()


@checks("05-half-way")
async def check_half_way(attempt: Attempt | None, explanation: Mapping[str, Any], sandbox: Sandbox) -> Feedback:
    """Whether a resize failed half-way, and the learner knows what is so since.

    Args:
        attempt: the learner's.
        explanation: answers to :data:`QUESTIONS`.
        sandbox: of the attempt; it is grown by one vCPU and shrunk again, to see that it still can be.
    """
    if attempt is None:
        return not_yet("nothing was tried so far: prepare the guest, then run the cell with try_resize.")
    if attempt.wanted <= attempt.before:
        return not_right(f"the resize from {attempt.before} to {attempt.wanted} takes CPUs away: ask for more of them.")
    if not attempt.error:
        return not_yet("the resize was done: every CPU came up. One of them must not be able to.")
    if not attempt.refused:
        return not_right(
            f"the guest's device manager did not answer that it could not: {attempt.error}. Leave it alone; make what"
            " it does fail."
        )
    if not attempt.came_up:
        return not_right(
            "it failed at the first CPU, before anything was done, which is not half-way: let one come up before."
        )
    if missing := [each for each in QUESTIONS if explanation.get(each) is None]:
        return not_yet(f"it failed half-way. Now say what is so: {', '.join(missing)} of the explanation is missing.")
    truth = {
        "came up": len(attempt.came_up),
        "online now": attempt.online,
        "vCPU threads now": attempt.threads,
        "errno": attempt.refused,
    }
    where = {
        "came up": "each CPU that went off again is in attempt.kernel",
        "online now": "ask the guest",
        "vCPU threads now": "count the threads of this process that are called vcpu",
        "errno": "look at the reply in attempt.frames",
    }
    for question in QUESTIONS:
        if str(explanation[question]) != str(truth[question]):
            return not_right(f"{question!r} is not {explanation[question]!r}: {where[question]}.")
    return await _still_works(attempt, sandbox)


async def _still_works(attempt: Attempt, sandbox: Sandbox) -> Feedback:
    now = sandbox.size.vcpus
    if now != attempt.before:
        return not_right(
            f"the sandbox has {now} vCPUs by now, and had {attempt.before}: run the check after the attempt."
        )
    try:
        await sandbox.resize(vcpus=now + 1)
        await sandbox.resize(vcpus=now)
    except KataLabError as error:
        return not_right(f"a smaller resize fails too: {error}. Only a CPU behind the first new one may be in the way.")
    numbers = ", ".join(map(str, attempt.came_up))
    return solved(
        f"CPU {numbers} came up and went down again, since a request is done as a whole or not at all: the guest undid"
        " its half, the VMM ended the threads of its own, and the next request worked."
    )
