"""What ``kata-lab`` asks of a shim beside the Task API (``kata_lab/protocol/lab.proto``)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.shim.hub import Stream, Viewer
from kata_lab.shim.metrics import metrics_text
from kata_lab.shim.output_log import LogFollower, Piece
from kata_lab.shim.task import TaskProcess
from kata_lab.ttrpc import RpcError, StatusCode
from kata_lab.ttrpc.server import Call, Handler
from vmm.config import BlockConfig, DeviceConfig, FsConfig, NetworkConfig
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from kata_lab.shim.shim import Shim

SERVICE: Final = "katalab.v1.Lab"
FOLLOW_SECONDS: Final = 0.05  #: between two looks at a log


class LabService:
    """The methods of the service.

    Args:
        shim: who carries them out.
    """

    def __init__(self, shim: Shim) -> None:
        self._shim = shim

    @property
    def handlers(self) -> dict[str, Handler]:
        """By the names of the methods."""
        return {
            "Create": self._create,
            "Attach": self._attach,
            "Logs": self._logs,
            "List": self._list,
            "Timeline": self._timeline,
            "Metrics": self._metrics,
            "Resize": self._resize,
            "AddDevice": self._add_device,
            "RemoveDevice": self._remove_device,
            "Devices": self._devices,
        }

    async def _create(self, request: dict[str, Any], call: Call) -> None:
        await self._shim.create_recorded(request["id"])

    async def _attach(self, request: dict[str, Any], call: Call) -> None:
        messages = call.messages()
        first = await anext(messages, None)
        if first is None:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "the first message must name the container to attach to")
        process = self._shim.find(first["id"]).find(first["exec_id"])
        if process.ended.is_set():
            text = f"the process of container {first['id']} has ended with status {process.status}: start it first"
            raise RpcError(StatusCode.FAILED_PRECONDITION, text)
        viewer = process.hub.view()
        typing = asyncio.create_task(_take(process, first, messages), name="attached-input")
        try:
            await call.send({"attached": True})
            await _show(viewer, call)
            await process.ended.wait()
            await call.send({"ended": True, "exit_status": process.status})
        finally:
            viewer.close()
            typing.cancel()
            await asyncio.gather(typing, return_exceptions=True)

    async def _logs(self, request: dict[str, Any], call: Call) -> None:
        task = self._shim.find(request["id"])
        if task.directory is None:
            text = f"the output of container {task.id} goes where its client wanted it, and is not kept here"
            raise RpcError(StatusCode.FAILED_PRECONDITION, text)
        path = task.directory.log
        with LogFollower(path) as follower:
            for piece in await asyncio.to_thread(follower.begin, request["tail"]):
                await call.send(_message(piece))
            while request["follow"]:
                ended = task.process.ended.is_set()
                for piece in follower.read():
                    await call.send(_message(piece))
                if ended:
                    return
                await asyncio.sleep(FOLLOW_SECONDS)

    async def _list(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        return {
            "containers": [
                {
                    "id": task.id,
                    "name": task.record.name if task.record is not None else task.id,
                    "state": task.state,
                    "exec_ids": list(task.execs),
                }
                for task in self._shim.tasks.values()
            ]
        }

    async def _timeline(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        steps = self._shim.timeline
        return {"milestones": [{"name": name, "at_us": max(round(at * 1e6), 0)} for name, at in steps]}

    async def _metrics(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        return {"text": await metrics_text(self._shim)}

    async def _resize(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        await self._shim.sandbox.resize(request["vcpus"], request["memory_mib"])
        return self._size()

    async def _add_device(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        try:
            device = _device(request)
        except ConfigError as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, str(error)) from error
        return {"name": await self._shim.sandbox.add_device(device)}

    async def _remove_device(self, request: dict[str, Any], call: Call) -> None:
        await self._shim.sandbox.remove_device(request["name"])

    async def _devices(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        plugged = self._shim.sandbox.plugged.items()
        devices = [
            {"name": name, "kind": device.KIND, "path": str(getattr(device, "path", None) or "")}
            for name, device in plugged
        ]
        return {"size": self._size(), "devices": devices}

    def _size(self) -> dict[str, int]:
        sandbox = self._shim.sandbox
        return {
            "vcpus": sandbox.size.vcpus,
            "memory_mib": sandbox.size.memory_mib,
            "max_vcpus": sandbox.most.vcpus,
            "max_memory_mib": sandbox.most.memory_mib,
        }


def _device(request: dict[str, Any]) -> DeviceConfig:
    """The device that a client wishes for.

    Raises:
        ConfigError: there is none like that.
    """
    name, path, read_only = request["name"], request["path"], request["read_only"]
    match request["kind"]:
        case "blk":
            return BlockConfig(name=name, path=Path(path), read_only=read_only, serial=request["serial"])
        case "fs":
            return FsConfig(name=name, path=Path(path), read_only=read_only, tag=request["tag"])
        case "net":
            return NetworkConfig(name=name, backend="passt")
    raise ConfigError(f"a device of kind {request['kind']!r} cannot be added, it must be blk, fs or net")


async def _take(process: TaskProcess, first: dict[str, Any], messages: AsyncIterator[dict[str, Any]]) -> None:
    """Give the process what somebody types; one that reads no more is not wrong."""
    message: dict[str, Any] | None = first
    while message is not None:
        with contextlib.suppress(KataLabError):
            if message["rows"] and message["columns"]:
                await process.resize(message["rows"], message["columns"])
            if message["stdin"]:
                await process.write(message["stdin"])
            if message["close_stdin"]:
                await process.close_stdin()
        message = await anext(messages, None)


async def _show(viewer: Viewer, call: Call) -> None:
    async for stream, data in viewer:
        await call.send({"stdout" if stream is Stream.STDOUT else "stderr": data})


def _message(piece: Piece) -> dict[str, Any]:
    return {"time_us": round(piece.time * 1e6), "stream": piece.stream, "data": piece.data}
