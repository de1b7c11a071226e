"""containerd's Task API, version 2 (containerd, runtime/v2/task; ``kata_lab/protocol/task.proto``).

Process numbers are those of the shim, as Kata's shim tells them: what runs in the guest has no number on the host. A
bundle's root file system is the one in its ``config.json``, where the mounts in the request (containerd's snapshots)
are carried out before (:mod:`kata_lab.resource.snapshot_mounts`). Checkpoints are refused. An exec's description is the
JSON of an OCI process, or the one of :data:`request.EXEC_WISH`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kata_lab.errors import KataLabError
from kata_lab.protocol.proto import load
from kata_lab.protocol.wire import encode
from kata_lab.shim.request import EXEC_WISH, Bundle
from kata_lab.shim.stdio import StdioPaths
from kata_lab.shim.task import TaskProcess
from kata_lab.ttrpc import RpcError, StatusCode
from kata_lab.ttrpc.server import Call, Handler

if TYPE_CHECKING:
    from kata_lab.shim.shim import Shim

SERVICE: Final = "containerd.task.v2.Task"
VERSION: Final = "2"
METRICS: Final = "io.containerd.cgroups.v2.Metrics"
STATUS: Final = load("task.proto").enums["containerd.v1.types.Status"]

_STATES = {
    "created": STATUS["CREATED"],
    "running": STATUS["RUNNING"],
    "paused": STATUS["PAUSED"],
    "stopped": STATUS["STOPPED"],
    "restarting": STATUS["STOPPED"],
}


class TaskService:
    """The methods of the API.

    Args:
        shim: who carries them out.
    """

    def __init__(self, shim: Shim) -> None:
        self._shim = shim

    @property
    def handlers(self) -> dict[str, Handler]:
        """By the names of the methods."""
        return {
            "State": self._state,
            "Create": self._create,
            "Start": self._start,
            "Delete": self._delete,
            "Pids": self._pids,
            "Pause": self._pause,
            "Resume": self._resume,
            "Checkpoint": self._checkpoint,
            "Kill": self._kill,
            "Exec": self._exec,
            "ResizePty": self._resize,
            "CloseIO": self._close,
            "Update": self._update,
            "Wait": self._wait,
            "Stats": self._stats,
            "Connect": self._connect,
            "Shutdown": self._shutdown,
        }

    async def _state(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        task = self._shim.find(request["id"])
        process = task.find(request["exec_id"])
        return {
            "id": task.id,
            "exec_id": process.exec_id,
            "bundle": task.bundle,
            "pid": os.getpid(),
            "status": _STATES[_state_of(process)] if process.exec_id else _STATES[task.state],
            "stdin": process.paths.stdin,
            "stdout": process.paths.stdout,
            "stderr": process.paths.stderr,
            "terminal": process.terminal,
            **_exit(process),
        }

    async def _create(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        for name in ("checkpoint", "parent_checkpoint"):
            if request[name]:
                raise _no_checkpoints(f"{name} is {request[name]!r}")
        paths = StdioPaths(request["stdin"], request["stdout"], request["stderr"])
        bundle = Bundle(Path(request["bundle"]), tuple(request["rootfs"]))
        await self._shim.create_bundle(request["id"], bundle, request["terminal"], paths)
        return {"pid": os.getpid()}

    async def _start(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        await self._shim.start_task(request["id"], request["exec_id"])
        return {"pid": os.getpid()}

    async def _delete(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        return {"pid": os.getpid(), **_exit(await self._shim.delete(request["id"], request["exec_id"]))}

    async def _pids(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        task = self._shim.find(request["id"])
        return {"processes": [{"pid": os.getpid()}] if task.state in ("created", "running", "paused") else []}

    async def _pause(self, request: dict[str, Any], call: Call) -> None:
        await self._shim.pause(request["id"])

    async def _resume(self, request: dict[str, Any], call: Call) -> None:
        await self._shim.resume(request["id"])

    async def _checkpoint(self, request: dict[str, Any], call: Call) -> None:
        raise _no_checkpoints(f"a checkpoint of container {request['id']!r} was asked for")

    async def _kill(self, request: dict[str, Any], call: Call) -> None:
        await self._shim.kill(request["id"], request["exec_id"], request["signal"], request["all"])

    async def _exec(self, request: dict[str, Any], call: Call) -> None:
        spec = request["spec"] or {"type_url": "", "value": b""}
        description = _json(spec, "spec")
        if spec["type_url"] == EXEC_WISH:
            description = self._shim.exec_wish(request["id"], description)
        description["terminal"] = request["terminal"]
        paths = StdioPaths(request["stdin"], request["stdout"], request["stderr"])
        await self._shim.exec(request["id"], request["exec_id"], description, paths)

    async def _resize(self, request: dict[str, Any], call: Call) -> None:
        process = self._shim.find(request["id"]).find(request["exec_id"])
        await process.resize(request["height"], request["width"])

    async def _close(self, request: dict[str, Any], call: Call) -> None:
        if request["stdin"]:
            await self._shim.find(request["id"]).find(request["exec_id"]).end_input()

    async def _update(self, request: dict[str, Any], call: Call) -> None:
        await self._shim.update(request["id"], _json(request["resources"] or {"value": b""}, "resources"))

    async def _wait(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        process = self._shim.find(request["id"]).find(request["exec_id"])
        await process.ended.wait()
        return _exit(process)

    async def _stats(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        container = self._shim.find(request["id"]).require("measured", "created", "running", "paused")
        stats = (await container.stats())["cgroup_stats"] or {}
        return {
            "stats": {
                "type_url": METRICS,
                "value": encode(load("cgroup_metrics.proto").messages, METRICS, _metrics(stats)),
            }
        }

    async def _connect(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        return {"shim_pid": os.getpid(), "task_pid": os.getpid(), "version": VERSION}

    async def _shutdown(self, request: dict[str, Any], call: Call) -> None:
        # containerd asks after every container; the last one's counts.
        if request["now"] or not self._shim.tasks:
            self._shim.over.set()


def _state_of(process: TaskProcess) -> str:
    if process.status is not None:
        return "stopped"
    return "running" if process.started.is_set() else "created"


def _exit(process: TaskProcess) -> dict[str, Any]:
    if process.status is None:
        return {}
    seconds, fraction = divmod(process.exited_at, 1)
    return {
        "exit_status": process.status,
        "exited_at": {"seconds": int(seconds), "nanos": int(fraction * 1e9)},
    }


def _json(value: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        found = json.loads(value["value"])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"{name} must be the JSON of an object of the OCI configuration")
    return found


def _metrics(stats: dict[str, Any]) -> dict[str, Any]:
    """The agent's statistics, whose times are nanoseconds, as containerd has them."""
    cpu = stats.get("cpu_stats") or {}
    usage, throttling = cpu.get("cpu_usage") or {}, cpu.get("throttling_data") or {}
    memory = stats.get("memory_stats") or {}
    used, swap = memory.get("usage") or {}, memory.get("swap_usage") or {}
    details = memory.get("stats") or {}
    return {
        "pids": {name: (stats.get("pids_stats") or {}).get(name, 0) for name in ("current", "limit")},
        "cpu": {
            "usage_usec": usage.get("total_usage", 0) // 1000,
            "user_usec": usage.get("usage_in_usermode", 0) // 1000,
            "system_usec": usage.get("usage_in_kernelmode", 0) // 1000,
            "nr_periods": throttling.get("periods", 0),
            "nr_throttled": throttling.get("throttled_periods", 0),
            "throttled_usec": throttling.get("throttled_time", 0) // 1000,
        },
        "memory": {
            "anon": details.get("anon", 0),
            "file": details.get("file", memory.get("cache", 0)),
            "usage": used.get("usage", 0),
            "usage_limit": used.get("limit", 0),
            "max_usage": used.get("max_usage", 0),
            "swap_usage": swap.get("usage", 0),
            "swap_limit": swap.get("limit", 0),
        },
    }


def _no_checkpoints(what: str) -> KataLabError:
    return RpcError(StatusCode.UNIMPLEMENTED, f"{what}: this shim makes no checkpoints of containers")
