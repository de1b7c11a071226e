"""A VM without a guest: its agent is a ttrpc server in this process, and any step of its life can fail or hang."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kata_lab.agent.client import AGENT, HEALTH, INTERFACE, RPC_PORT
from kata_lab.hypervisor import Hypervisor, HypervisorConfig, HypervisorError
from kata_lab.ttrpc import RpcError, Server, StatusCode
from vmm.config import DeviceConfig


class Hang:
    """In place of an error: the step never ends."""


Fault = Exception | Hang


async def suffer(fault: Fault | None) -> None:
    """Fail, hang, or take a moment."""
    if isinstance(fault, Hang):
        await asyncio.Event().wait()
    if isinstance(fault, Exception):
        raise fault
    await asyncio.sleep(0)


class FakeAgent:
    """What it was asked, and which containers it has.

    Args:
        faults: method → what becomes of its calls.
    """

    def __init__(self, faults: dict[str, Fault]) -> None:
        self.faults = faults
        self.containers: set[str] = set()
        self.seen: list[str] = []
        self._ended: dict[str, asyncio.Event] = {}

    async def handle(self, method: str, request: dict[str, Any]) -> dict[str, Any] | None:
        self.seen.append(method)
        await suffer(self.faults.get(method))
        name = request.get("container_id", "")
        match method:
            case "Check":
                return {"status": 1}
            case "CreateContainer":
                if name in self.containers:
                    raise RpcError(StatusCode.ALREADY_EXISTS, f"there is a container {name!r} already")
                self.containers.add(name)
                self._ended[name] = asyncio.Event()
            case "RemoveContainer":
                if name not in self.containers:
                    raise RpcError(StatusCode.NOT_FOUND, f"there is no container {name!r}")
                self.containers.discard(name)
                self._ended[name].set()
            case "WaitProcess":
                await self._ended[name].wait()
                return {"status": 137}
            case "GetOOMEvent":
                await asyncio.Event().wait()
        return None


class FakeHypervisor(Hypervisor):
    """Its VM boots at once.

    Args:
        faults: ``load``, ``prepare_vm``, ``start_vm``, ``dial``, ``add_share`` or a method of the agent → what becomes
            of it.
    """

    name = "fake"

    def __init__(self, **faults: Fault) -> None:
        self.faults = faults
        self.agent = FakeAgent(faults)
        self.shares: dict[str, Path] = {}
        self.resizes: list[tuple[str, int]] = []
        self.plugged: list[str] = []
        self.prepared = self.running = self.cleaned = False
        self._end: asyncio.Future[str] | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        await suffer(self.faults.get("load"))

    async def prepare_vm(self, config: HypervisorConfig) -> None:
        await suffer(self.faults.get("prepare_vm"))
        self.prepared = True
        self._end = asyncio.get_running_loop().create_future()

    async def start_vm(self, timeout: float) -> None:
        await suffer(self.faults.get("start_vm"))
        self.running = True

    async def stop_vm(self) -> None:
        self.end("the host shut the VM down")

    def end(self, detail: str) -> None:
        """The guest ends, and with it its connections."""
        self.running = False
        if self._end is not None and not self._end.done():
            self._end.set_result(detail)
        for each in self._serving:
            each.cancel()

    async def wait_vm(self) -> str:
        assert self._end is not None
        return await asyncio.shield(self._end)

    async def pause_vm(self) -> None:
        await suffer(self.faults.get("pause_vm"))

    async def resume_vm(self) -> None:
        await suffer(self.faults.get("resume_vm"))

    async def dial(self, port: int) -> socket.socket:
        await suffer(self.faults.get("dial"))
        if port != RPC_PORT:
            raise HypervisorError("nobody listens there")
        ours, theirs = socket.socketpair()
        server = Server(INTERFACE)
        for service in (AGENT, HEALTH):
            handlers = {name: self._handler(name) for name in INTERFACE.services[service]}
            server.add(service, handlers)
        task = asyncio.create_task(self._serve(server, theirs))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return ours

    def _handler(self, name: str) -> Callable[[dict[str, Any], Any], Any]:
        return lambda request, _: self.agent.handle(name, request)

    @staticmethod
    async def _serve(server: Server, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            await server.serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def listen(self, port: int, accept: Callable[[socket.socket], object]) -> None:
        raise HypervisorError("this guest calls nobody")

    async def add_share(self, name: str, path: Path, read_only: bool, override_stat: bool) -> None:
        await suffer(self.faults.get("add_share"))
        assert name not in self.shares
        self.shares[name] = path

    async def remove_share(self, name: str) -> None:
        del self.shares[name]

    async def resize_vcpu(self, vcpus: int) -> int:
        await suffer(self.faults.get("resize_vcpu"))
        self.resizes.append(("vcpus", vcpus))
        return vcpus

    async def resize_memory(self, memory_mib: int) -> int:
        await suffer(self.faults.get("resize_memory"))
        self.resizes.append(("memory_mib", memory_mib))
        return memory_mib

    async def add_device(self, device: DeviceConfig) -> str:
        await suffer(self.faults.get("add_device"))
        self.plugged.append(device.name)
        return device.name

    async def update_device(self, name: str) -> None:
        assert name in self.plugged

    async def remove_device(self, name: str) -> None:
        await suffer(self.faults.get("remove_device"))
        self.plugged.remove(name)

    def ended(self) -> str | None:
        return self._end.result() if self._end is not None and self._end.done() else None

    def get_pids(self) -> list[int]:
        return []

    def get_thread_ids(self) -> dict[str, int]:
        return {}

    def get_hypervisor_metrics(self) -> Any:
        raise HypervisorError("this VM counts nothing")

    def timeline(self) -> list[tuple[str, float]]:
        return []

    def console_lines(self, count: int) -> list[str]:
        return []

    async def cleanup(self) -> None:
        await asyncio.sleep(0)
        self.end("cleaned up")
        await asyncio.gather(*self._serving, return_exceptions=True)
        self.cleaned = True
