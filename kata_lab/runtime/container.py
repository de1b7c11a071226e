"""A container in a sandbox: created → running ⇄ paused → stopped (OCI runtime-spec 1.0, runtime.md, "State")."""

from __future__ import annotations

import asyncio
import enum
import itertools
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from kata_lab.agent.client import AgentClient
from kata_lab.runtime.errors import RuntimeFault
from kata_lab.runtime.process import Process

_REMOVE_TIMEOUT = 10  # seconds that the agent may take to kill what is left


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
    """

    def __init__(
        self, agent: AgentClient, container_id: str, spec: Mapping[str, Any], release: Callable[[], Awaitable[None]]
    ) -> None:
        self._agent = agent
        self.id = container_id
        self.spec = spec
        self._release = release
        self._state = ContainerState.CREATED
        self._exec_numbers = itertools.count(1)
        self._removed = False
        #: Whether the guest's kernel killed one of its processes for want of memory.
        self.out_of_memory = False
        terminal = bool(spec.get("process", {}).get("terminal", False))
        #: The first process.
        self.process = Process(agent, container_id, container_id, terminal)
        #: Those that were started with :meth:`exec` and have not been forgotten, by name.
        self.execs: dict[str, Process] = {}

    @property
    def state(self) -> ContainerState:
        """Where it is in its life."""
        if self._state is not ContainerState.CREATED and self.process.status is not None:
            return ContainerState.STOPPED
        return self._state

    async def start(self) -> Process:
        """Let its first process run.

        Raises:
            RuntimeFault: it runs already, or did.
            RpcError: the process cannot be started.
        """
        self._require("started", ContainerState.CREATED)
        await self._agent.call("StartContainer", container_id=self.id)
        self._state = ContainerState.RUNNING
        # Its end is learnt as it happens.
        self._watch = asyncio.create_task(self._ended(), name=f"watch-{self.id}")
        return self.process

    async def _ended(self) -> None:
        try:
            await self.process.wait()
        except Exception:
            # With the connection goes the sandbox, which says so.
            return

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
        try:
            await self._agent.call("ExecProcess", container_id=self.id, exec_id=name, process=agent_process(described))
        except BaseException:
            del self.execs[name]
            raise
        return started

    async def kill(self, number: int = signal.SIGTERM, everyone: bool = False) -> None:
        """Send a signal to its first process, or to all of its processes."""
        self._require("signalled", *ContainerState)
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
        self._require("paused", ContainerState.RUNNING)
        await self._agent.call("PauseContainer", container_id=self.id)
        self._state = ContainerState.PAUSED

    async def resume(self) -> None:
        """Undo :meth:`pause`."""
        self._require("resumed", ContainerState.PAUSED)
        await self._agent.call("ResumeContainer", container_id=self.id)
        self._state = ContainerState.RUNNING

    async def update(self, resources: Mapping[str, Any]) -> None:
        """Change its limits: the OCI configuration's ``linux.resources``."""
        from kata_lab.oci import agent_resources, check_resources

        self._require("updated", ContainerState.CREATED, ContainerState.RUNNING, ContainerState.PAUSED)
        described = dict(resources)
        check_resources(described)
        await self._agent.call("UpdateContainer", container_id=self.id, resources=agent_resources(described))

    async def stats(self) -> dict[str, Any]:
        """What it uses: the agent's ``StatsContainerResponse``."""
        self._require("measured", *ContainerState)
        return await self._agent.call("StatsContainer", container_id=self.id)

    async def remove(self) -> None:
        """Kill what is left of it and take it away. A second time is nothing."""
        if self._removed:
            return
        self._removed = True
        try:
            if self._agent.lost is None:
                if self.state is ContainerState.PAUSED:
                    await self._agent.call("ResumeContainer", container_id=self.id)
                await self._agent.call("RemoveContainer", container_id=self.id, timeout=_REMOVE_TIMEOUT)
        finally:
            await self._release()

    async def abandon(self) -> None:
        """Its sandbox is gone, and it with it: give back what the host holds for it."""
        if not self._removed:
            self._removed = True
            await self._release()

    def _require(self, what: str, *states: ContainerState) -> None:
        if self._removed:
            raise RuntimeFault(f"container {self.id} is removed and cannot be {what}")
        if self.state not in states:
            wanted = " or ".join(map(str, states))
            raise RuntimeFault(f"container {self.id} is {self.state}; to be {what} it must be {wanted}")
