"""A runtime with one sandbox, driven over a pipe: ``python -m kata_lab.bench.fused_probe ARRANGEMENT``.

Each line of standard input is an order, each line of standard output its answer, both JSON. Orders are the public
methods of :class:`Probe`: ``{"do": "time", "action": "get_state", "rounds": 100}``. Whatever is timed is timed here, in
the process that asks for it, on the clock ``time.monotonic``, which all processes of a machine have in common. With the
end of standard input the sandbox is stopped and the process ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.bench.measure import BenchError
from kata_lab.errors import KataLabError

if TYPE_CHECKING:
    from kata_lab.hypervisor.acting import ActingHypervisor
    from kata_lab.runtime import Sandbox
    from vmm.actions import VmmAction

ACTIONS: Final = (
    *("get_state", "get_state_awaited", "nothing_to_change"),
    *("pause_resume", "share_add_remove", "vcpu_plus_minus"),
)
ACTING: Final = ("fused", "rpc")  #: arrangements whose VMM is ours, and whose guest can be given a vCPU
NOTICE_SECONDS: Final = 60.0  #: after which a process that was killed has not been noticed
_OURS: Final = ("get_state_awaited", "vcpu_plus_minus")
_SHARE: Final = "bench"

Action = Callable[[], Awaitable[object]]


class Probe:
    """Carries out orders.

    Args:
        arrangement: of the sandboxes.
    """

    def __init__(self, arrangement: str) -> None:
        self._arrangement = arrangement
        self._sandbox: Sandbox | None = None

    @property
    def _running(self) -> Sandbox:
        if self._sandbox is None:
            raise BenchError("there is no sandbox: start one first")
        return self._sandbox

    @property
    def _acting(self) -> ActingHypervisor:
        from kata_lab.hypervisor.acting import ActingHypervisor

        hypervisor = self._running.hypervisor
        if not isinstance(hypervisor, ActingHypervisor):
            raise BenchError(f"the VMM of {self._arrangement!r} has no actions")
        return hypervisor

    async def start(self, **config: Any) -> dict[str, Any]:
        """Start a sandbox with these fields of its configuration, in place of the one before; its time line."""
        from kata_lab.runtime import Sandbox

        if self._sandbox is not None:
            await self._sandbox.stop()
        self._sandbox = Sandbox.create(hypervisor=self._arrangement, **config)
        await self._sandbox.start()
        return {"timeline": self._sandbox.timeline, "directory": str(self._sandbox.directory)}

    async def stop(self) -> dict[str, Any]:
        """Stop the sandbox."""
        if self._sandbox is not None:
            await self._sandbox.stop()
        return {}

    async def time(self, action: str, rounds: int) -> dict[str, Any]:
        """Microseconds of each of so many rounds of an action of :data:`ACTIONS`; one more before them does not count.

        The answer has no ``us`` where the arrangement has no such action.
        """
        if action not in ACTIONS:
            raise BenchError(f"{action!r} is no action of the measurement, it must be one of {', '.join(ACTIONS)}")
        if action == "get_state":
            return self._time_state(rounds)
        step = self._action(action)
        if step is None:
            return {}
        took = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            await step()
            took.append((time.perf_counter() - began) * 1e6)
        return {"us": took[1:]}

    def _time_state(self, rounds: int) -> dict[str, Any]:
        """The call alone: this thread asks and waits, and no event loop is in between."""
        from vmm.actions import GetState

        if self._arrangement not in ACTING:
            return {}
        request, took = self._acting.vm.request, []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            request(GetState()).result()
            took.append((time.perf_counter() - began) * 1e6)
        return {"us": took[1:]}

    def _action(self, name: str) -> Action | None:
        """Through the runtime's interface to its hypervisor, as the runtime awaits it."""
        from vmm.actions import GetState

        hypervisor = self._running.hypervisor

        async def state() -> None:
            await asyncio.wrap_future(self._acting.vm.request(GetState()))

        async def nothing() -> None:
            if self._arrangement in ACTING:
                await hypervisor.resize_vcpu(1)
            else:
                await hypervisor.resume_vm()  # the guest runs already

        async def pause_resume() -> None:
            await hypervisor.pause_vm()
            await hypervisor.resume_vm()

        async def share() -> None:
            await hypervisor.add_share(_SHARE, Path("/"), True, False)
            await hypervisor.remove_share(_SHARE)

        async def vcpu() -> None:
            await hypervisor.resize_vcpu(2)
            await hypervisor.resize_vcpu(1)

        if name in _OURS and self._arrangement not in ACTING:
            return None
        return dict(zip(ACTIONS[1:], (state, nothing, pause_resume, share, vcpu), strict=True))[name]

    async def follow(self, vcpus: int) -> dict[str, Any]:
        """A resize to so many vCPUs, step by step: where, what, and seconds (``time.monotonic``).

        Places are ``runtime`` (its event loop), ``answers`` (the thread on which the answer arrives), ``vmm`` (the VM's
        event loop) and ``guest``.
        """
        from vmm.actions import ResizeVcpu

        vm, arrived = self._acting.vm, []
        action: VmmAction[Any] = ResizeVcpu(vcpus)
        asked = time.monotonic()
        future = vm.request(action)
        sent = time.monotonic()
        future.add_done_callback(lambda _: arrived.append(time.monotonic()))
        await asyncio.wrap_future(future)
        back = time.monotonic()
        record = vm.hotplugs[-1]
        steps = [("runtime", "asks", asked), ("runtime", "has handed over", sent)]
        steps += [("vmm", "begins", record.requested_at)]
        for step in record.steps:
            steps.append(("guest" if step.name.startswith("guest") else "vmm", step.name, step.seconds))
        steps += [("vmm", "has answered", record.answered_at)]
        steps += [("answers", "the answer is here", at) for at in arrived]
        steps += [("runtime", "goes on", back)]
        return {"steps": steps}

    async def threads(self) -> dict[str, Any]:
        """The threads of this process, and the VM's wherever it is: thread id → name."""
        names = {each.native_id: each.name for each in threading.enumerate() if each.native_id is not None}
        names |= {tid: name for name, tid in self._running.hypervisor.get_thread_ids().items()}
        return {"threads": {str(tid): name for tid, name in names.items()}}

    async def crash(self, pid: int) -> dict[str, Any]:
        """Kill a process of the sandbox: milliseconds until the runtime has it as stopped, and until all is cleared."""
        sandbox = self._running
        ended = asyncio.ensure_future(sandbox.hypervisor.wait_vm())
        await asyncio.sleep(0)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(NOTICE_SECONDS):
                await ended
                while str(sandbox.state) != "stopped":
                    await asyncio.sleep(0)
                noticed = time.monotonic()
                await sandbox.stopped.wait()
        except TimeoutError:
            raise BenchError(
                f"process {pid} was killed, and its sandbox has not ended within {NOTICE_SECONDS:g} s"
            ) from None
        cleared = time.monotonic()
        return {
            "notice_ms": (noticed - began) * 1e3,
            "cleanup_ms": (cleared - began) * 1e3,
            "state": str(sandbox.state),
            "reason": sandbox.reason,
            "directory_left": sandbox.directory.exists(),
        }


async def serve(probe: Probe) -> None:
    """Carry out orders until there are no more."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            order = json.loads(line)
            try:
                answer = await getattr(probe, order.pop("do"))(**order)
            except KataLabError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    finally:
        await probe.stop()


def main(arguments: Sequence[str]) -> None:
    """Serve one arrangement."""
    (arrangement,) = arguments
    asyncio.run(serve(Probe(arrangement)))


if __name__ == "__main__":
    main(sys.argv[1:])
