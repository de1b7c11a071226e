"""How a command talks to a shim: both services over one connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Final

from kata_lab.protocol.proto import load
from kata_lab.protocol.wire import decode
from kata_lab.shim.records import ShimDirectory
from kata_lab.ttrpc import Client, RpcError, StatusCode
from kata_lab.ttrpc.client import ClientStream

TASK: Final = "containerd.task.v2.Task"
LAB: Final = "katalab.v1.Lab"
METRICS: Final = "io.containerd.cgroups.v2.Metrics"
EXEC_WISH: Final = "katalab.v1.ExecWish"
RESOURCES: Final = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


class ShimClient:
    """A connection to a shim; made by :meth:`connect`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, sandbox_id: str) -> AsyncIterator[ShimClient]:
        """Connect to the shim of a sandbox.

        Raises:
            RpcError: nobody listens there.
        """
        interface = load("task.proto", "lab.proto")
        try:
            client = await Client.connect(ShimDirectory(sandbox_id).socket, interface)
        except RpcError as error:
            raise RpcError(StatusCode.UNAVAILABLE, f"the sandbox {sandbox_id} does not run") from error
        async with client:
            yield cls(client)

    async def task(self, method: str, timeout: float | None = None, /, **request: Any) -> dict[str, Any]:
        """Call a method of the Task API."""
        return await self._client.call(TASK, method, request, timeout)

    async def lab(self, method: str, timeout: float | None = None, /, **request: Any) -> dict[str, Any]:
        """Call a method of the Lab service."""
        return await self._client.call(LAB, method, request, timeout)

    @contextlib.asynccontextmanager
    async def attach(self, container_id: str, exec_id: str = "") -> AsyncIterator[ClientStream]:
        """Attach to a process; from now on nothing of it is missed."""
        async with self._client.stream(LAB, "Attach") as stream:
            await stream.send({"id": container_id, "exec_id": exec_id})
            if (first := await stream.receive()) is None or not first["attached"]:
                raise RpcError(StatusCode.INTERNAL, f"the shim did not attach to container {container_id}")
            yield stream

    async def exec(self, container_id: str, exec_id: str, wish: dict[str, Any]) -> None:
        """Note a process that says only how it differs from its container (:func:`request.exec_process`)."""
        spec = {"type_url": EXEC_WISH, "value": json.dumps(wish).encode()}
        terminal = bool(wish.get("tty"))
        await self.task("Exec", id=container_id, exec_id=exec_id, terminal=terminal, spec=spec)

    async def update(self, container_id: str, resources: dict[str, Any]) -> None:
        """Change limits: the OCI configuration's ``linux.resources``."""
        value = {"type_url": RESOURCES, "value": json.dumps(resources).encode()}
        await self.task("Update", id=container_id, resources=value)

    async def stats(self, container_id: str) -> dict[str, Any]:
        """What a container uses: containerd's message of control groups of version 2."""
        found = (await self.task("Stats", id=container_id))["stats"]
        return decode(load("cgroup_metrics.proto").messages, METRICS, found["value"])

    async def closed(self, timeout: float) -> bool:
        """Wait until the shim has gone; False if it has not within so many seconds."""
        with contextlib.suppress(TimeoutError, RpcError):
            async with asyncio.timeout(timeout):
                while self._client.lost is None:
                    await asyncio.sleep(0.005)
        return self._client.lost is not None
