"""A container in a sandbox: created → running ⇄ paused → stopped (OCI runtime-spec 1.0, runtime.md, "State")."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from kata_lab.agent.client import AgentClient
from kata_lab.runtime.completion import completed, ended
from kata_lab.runtime.errors import RuntimeFault
from kata_lab.runtime.process import Process
from kata_lab.ttrpc import RpcError, StatusCode

CALL_SECONDS: Final = 30.0  #: that the agent may take to start, enter, freeze or change a container
REMOVE_SECONDS: Final = 10.0  #: that it may take to kill what is left of one


class ContainerState(enum.Enum):
    """Where a container is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


class Container:
    """One container; made by :meth:`Sandbox.create_container`.

    Args:
        agent: who carries it out.
        container_id: its name.
        spec: its OCI runtime configuration.
        release: gives back what the host holds for it, once it is removed.
        changed: called when its limits have changed.
    """

    def __init__(
        self,
        agent: AgentClient,
        container_id: str,
        spec: Mapping[str, Any],
        release: Callable[[], Awaitable[None]],
        changed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._agent = agent
        self.id = container_id
        self.spec = spec
        self._release = release
        self._changed = changed
        self._state = ContainerState.CREATED
        self._exec_numbers = itertools.count(1)
        self._order = asyncio.Lock()
        self._removing: asyncio.Task[None] | None = None
        self._removed = False
        self._gone = False
        self._watches: set[asyncio.Task[None]] = set()
        #: Whether the guest's kernel killed one of its processes for want of memory.
        self.out_of_memory = False
        terminal = bool(spec.get("process", {}).get("terminal", False))
        #: The first process.
        self.process = Process(agent, container_id, container_id, terminal)
        #: Those that :meth:`exec` started and that are not known to have ended, by name.
        self.execs: dict[str, Process] = {}

    @property
    def state(self) -> ContainerState:
        """Where it is in its life."""
        if self._gone or (self._state is not ContainerState.CREATED and self.process.status is not None):
            return ContainerState.STOPPED
        return self._state

    async def start(self) -> Process:
        """Let its first process run.

        Raises:
            RuntimeFault: it runs already, or did.
            RpcError: the process cannot be started.
        """
        await completed(self._start())
        return self.process

    async def _start(self) -> None:
        async with self._order:
            self._require("started", ContainerState.CREATED)
            await self._agent.call("StartContainer", CALL_SECONDS, container_id=self.id)
            self._state = ContainerState.RUNNING
            self._watch(self.process)

    def _watch(self, process: Process) -> None:
        """Its end is learnt as it happens."""
        watch = asyncio.create_task(self._ended(process), name=f"watch-{process.exec_id}")
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _ended(self, process: Process) -> None:
        # With the connection goes the sandbox, which says so.
        with contextlib.suppress(RpcError):
            await process.wait()
        self.execs.pop(process.exec_id, None)

    async def exec(self, process: Mapping[str, Any], exec_id: str | None = None) -> Process:
        """Start one more process in it.

        Args:
            process: its description as in the OCI configuration's ``process``: args, env, cwd, user, terminal …
            exec_id: its name; made up if None.

        Raises:
            RuntimeFault: the container does not run, or has a process of that name.
            RpcError: the process cannot be started.
        """
        from kata_lab.oci import agent_process, check_process

        self._require("entered", ContainerState.RUNNING)
        described = dict(process)
        check_process(described)
        name = exec_id or f"{self.id}-exec{next(self._exec_numbers)}"
        if name in self.execs or name == self.id:
            raise RuntimeFault(f"container {self.id} has a process {name!r} already; choose another name")
        started = self.execs[name] = Process(self._agent, self.id, name, bool(process.get("terminal", False)))
        entering = asyncio.create_task(self._exec(started, agent_process(described)))
        try:
            await ended(entering)
        except asyncio.CancelledError:
            # Nobody has it now.
            if entering.exception() is None:
                with contextlib.suppress(RpcError):
                    await completed(started.kill(signal.SIGKILL))
            raise
        entering.result()
        return started

    async def _exec(self, process: Process, description: Mapping[str, Any]) -> None:
        request = {"container_id": self.id, "exec_id": process.exec_id, "process": description}
        try:
            await self._agent.call("ExecProcess", CALL_SECONDS, **request)
        except BaseException:
            self.execs.pop(process.exec_id, None)
            raise
        self._watch(process)

    async def kill(self, number: int = signal.SIGTERM, everyone: bool = False) -> None:
        """Send a signal to its first process, or to all of its processes."""
        self._require("signalled", *ContainerState)
        if not 0 <= int(number) <= 64:
            raise RuntimeFault(f"there is no signal {int(number)}, it must be from 0 to 64")
        if everyone:
            await self._agent.call("SignalProcess", container_id=self.id, exec_id="", signal=int(number))
        else:
            await self.process.kill(number)

    async def wait(self) -> int:
        """Wait for the end of its first process; the exit status."""
        self._require("waited for", *ContainerState)
        return await self.process.wait()

    async def pause(self) -> None:
        """Freeze all its processes."""
        await completed(self._freeze("paused", "PauseContainer", ContainerState.RUNNING, ContainerState.PAUSED))

    async def resume(self) -> None:
        """Undo :meth:`pause`."""
        await completed(self._freeze("resumed", "ResumeContainer", ContainerState.PAUSED, ContainerState.RUNNING))

    async def _freeze(self, what: str, method: str, before: ContainerState, after: ContainerState) -> None:
        async with self._order:
            self._require(what, before)
            await self._agent.call(method, CALL_SECONDS, container_id=self.id)
            self._state = after

    async def update(self, resources: Mapping[str, Any]) -> None:
        """Change its limits: the OCI configuration's ``linux.resources``."""
        from kata_lab.oci import agent_resources, check_resources

        described = dict(resources)
        check_resources(described)
        await completed(self._update(described, agent_resources(described)))

    async def _update(self, described: Mapping[str, Any], resources: Mapping[str, Any]) -> None:
        async with self._order:
            self._require("updated", ContainerState.CREATED, ContainerState.RUNNING, ContainerState.PAUSED)
            await self._agent.call("UpdateContainer", CALL_SECONDS, container_id=self.id, resources=resources)
            linux = self.spec.get("linux") or {}
            merged = {**(linux.get("resources") or {})}
            for name, value in described.items():
                merged[name] = {**(merged.get(name) or {}), **value} if isinstance(value, Mapping) else value
            self.spec = {**self.spec, "linux": {**linux, "resources": merged}}
        if self._changed is not None:
            await self._changed()

    async def stats(self) -> dict[str, Any]:
        """What it uses: the agent's ``StatsContainerResponse``."""
        self._require("measured", *ContainerState)
        return await self._agent.call("StatsContainer", container_id=self.id)

    async def remove(self) -> None:
        """Kill what is left of it and take it away. A second time is nothing, but for waiting for the first."""
        if self._removing is None:
            self._removing = asyncio.create_task(self._remove(), name=f"remove-{self.id}")
        await ended(self._removing)
        self._removing.result()

    async def _remove(self) -> None:
        async with self._order:
            self._removed = True
            try:
                if not self._gone and self._agent.lost is None:
                    await self._ask_to_remove()
            finally:
                await self._give_back()

    async def _ask_to_remove(self) -> None:
        request = {"container_id": self.id, "timeout": int(REMOVE_SECONDS)}
        try:
            await self._agent.call("RemoveContainer", REMOVE_SECONDS + 1, **request)
        except RpcError as error:
            # The agent has none, or the guest went away meanwhile: then so did the container.
            if error.code is not StatusCode.NOT_FOUND and self._agent.lost is None:
                raise

    async def abandon(self) -> None:
        """Its sandbox is gone, and it with it: give back what the host holds for it."""
        self._gone = True
        await self.remove()

    async def _give_back(self) -> None:
        self._gone = True
        watches = tuple(self._watches)
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        self.execs.clear()
        await self._release()

    def _require(self, what: str, *states: ContainerState) -> None:
        if self._removed:
            raise RuntimeFault(f"container {self.id} is removed and cannot be {what}")
        if self.state not in states:
            wanted = " or ".join(map(str, states))
            raise RuntimeFault(f"container {self.id} is {self.state}; to be {what} it must be {wanted}")
