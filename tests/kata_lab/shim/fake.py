"""A sandbox without a guest: its containers are processes of the host. What is done with them is the shim's own.

As with a guest, they end with the shim. At the step that ``FAKE_STOP_AT`` names the shim's process stops, once, by
SIGSTOP, so that a test can kill it, or its client, there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from kata_lab.agent.client import Durations
from kata_lab.progress import Progress
from kata_lab.resource.rootfs import RootFs
from kata_lab.runtime.container import Container
from kata_lab.runtime.errors import RuntimeFault
from kata_lab.runtime.sandbox import SandboxConfig, SandboxState
from kata_lab.ttrpc import RpcError, StatusCode

STOP_AT = "FAKE_STOP_AT"

_PR_SET_PDEATHSIG = 1


def reach(step: str) -> None:
    """Stop here, if this is where to stop."""
    if os.environ.get(STOP_AT) == step:
        del os.environ[STOP_AT]
        os.kill(os.getpid(), signal.SIGSTOP)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class FakeProcess:
    """A process of the host with the streams that the agent gives one."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.description = description
        self.child: asyncio.subprocess.Process | None = None
        self.terminal: int | None = None
        self.reader: asyncio.StreamReader | None = None

    async def start(self) -> None:
        environment = dict(each.split("=", 1) for each in self.description.get("env", ()))
        environment["PATH"] = os.environ["PATH"]
        pipe = asyncio.subprocess.PIPE
        streams: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": pipe}
        ours = theirs = -1
        if self.description.get("terminal"):
            ours, theirs = pty.openpty()
            streams = dict.fromkeys(streams, theirs)
            self.terminal = ours
        try:
            self.child = await asyncio.create_subprocess_exec(
                *self.description["args"],
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
                **streams,
            )
        except FileNotFoundError as error:
            raise RpcError(StatusCode.INTERNAL, f"executable file `{error.filename}` not found in $PATH") from error
        finally:
            if theirs >= 0:
                os.close(theirs)

    async def read(self, name: str, limit: int) -> bytes:
        assert self.child is not None
        if self.terminal is not None:
            try:
                return await asyncio.to_thread(os.read, self.terminal, limit)
            except OSError:
                return b""
        stream = getattr(self.child, name)
        return bytes(await stream.read(limit))

    async def write(self, data: bytes) -> None:
        assert self.child is not None
        if self.terminal is not None:
            os.write(self.terminal, data)
            return
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(data)
            await self.child.stdin.drain()
        except OSError as error:
            raise RpcError(StatusCode.FAILED_PRECONDITION, "the process reads no more") from error

    async def wait(self) -> int:
        assert self.child is not None
        # Process.wait() would wait for the ends of its streams, too.
        while (status := self.child.returncode) is None:
            await asyncio.sleep(0.005)
        return 128 - status if status < 0 else status

    def kill(self, number: int) -> None:
        if self.child is None or self.child.returncode is not None:
            raise RpcError(StatusCode.NOT_FOUND, "the process has ended")
        os.killpg(self.child.pid, number)

    async def close(self) -> None:
        """End it and all of its children."""
        if self.child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        await self.child.wait()
        self.child._transport.close()
        # A thread that reads the terminal has seen its end by now.
        if self.terminal is not None:
            os.close(self.terminal)
            self.terminal = None


class FakeAgent:
    """Answers the calls that containers and processes make."""

    def __init__(self) -> None:
        self.lost: RpcError | None = None
        self.processes: dict[str, FakeProcess] = {}
        self.calls: list[Any] = []
        self.updates: list[dict[str, Any]] = []
        self.durations: dict[str, Durations] = {}

    async def call(self, method: str, timeout: float | None = None, /, **request: Any) -> dict[str, Any]:
        process = self.processes.get(request.get("exec_id") or request.get("container_id", ""))
        self.durations.setdefault(method, Durations()).add(1.5)
        reach(method)
        match method:
            case "StartContainer":
                await self.processes[request["container_id"]].start()
            case "ExecProcess":
                description = {key.lower(): value for key, value in request["process"].items()}
                started = self.processes[request["exec_id"]] = FakeProcess(description)
                await started.start()
            case "PauseContainer":
                self.processes[request["container_id"]].kill(signal.SIGSTOP)
            case "ResumeContainer":
                self.processes[request["container_id"]].kill(signal.SIGCONT)
            case "RemoveContainer":
                with contextlib.suppress(RpcError):
                    self.processes[request["container_id"]].kill(signal.SIGKILL)
            case "UpdateContainer":
                self.updates.append(request["resources"])
            case "StatsContainer":
                usage = {"cpu_usage": {"total_usage": 5_000_000}}
                memory = {"usage": {"usage": 1 << 20, "limit": 64 << 20}}
                return {"cgroup_stats": {"cpu_stats": usage, "memory_stats": memory, "pids_stats": {"current": 3}}}
            case "GetMetrics":
                return {"metrics": "kata_guest_load 0.5\n"}
            case _:
                assert process is not None, method
                return await self._stream(method, process, request)
        return {}

    async def _stream(self, method: str, process: FakeProcess, request: dict[str, Any]) -> dict[str, Any]:
        match method:
            case "SignalProcess":
                process.kill(request["signal"])
            case "WaitProcess":
                return {"status": await process.wait()}
            case "ReadStdout" | "ReadStderr":
                return {"data": await process.read(method.removeprefix("Read").lower(), request["len"])}
            case "WriteStdin":
                await process.write(request["data"])
                return {"len": len(request["data"])}
            case "CloseStdin":
                assert process.child is not None
                if process.child.stdin is not None:
                    process.child.stdin.close()
            case "TtyWinResize":
                assert process.terminal is not None
                size = struct.pack("HHHH", request["row"], request["column"], 0, 0)
                fcntl.ioctl(process.terminal, termios.TIOCSWINSZ, size)
                process.kill(signal.SIGWINCH)
            case _:
                raise AssertionError(method)
        return {}


class _FakeHypervisor:
    def get_thread_ids(self) -> dict[str, int]:
        return {"vcpu0": 1}

    def get_hypervisor_metrics(self) -> SimpleNamespace:
        return SimpleNamespace(uptime_seconds=1.0, vcpus=[])


class FakeSandbox:
    """What the shim uses of a sandbox."""

    made: list[FakeSandbox]

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.agent = FakeAgent()
        self.hypervisor = _FakeHypervisor()
        self.containers: dict[str, Container] = {}
        self.stopped = asyncio.Event()
        self.reason = ""
        self.paused = False
        self.timeline = [("VM runs", 0.25), ("sandbox ready", 0.5)]

    @property
    def state(self) -> SandboxState:
        return SandboxState.STOPPED if self.stopped.is_set() else SandboxState.RUNNING

    async def start(self) -> None:
        if os.environ.get("FAKE_BUILD"):
            with Progress("Building the guest"):
                await asyncio.sleep(0)
        reach("sandbox starts")
        if self.config.memory_mib > 65536:
            raise RuntimeFault(f"a guest of {self.config.memory_mib} MiB is too large for this machine")

    async def create_container(self, spec: Mapping[str, Any], rootfs: RootFs, container_id: str) -> Container:
        if spec["process"]["args"][0] == "/no/create":
            raise RpcError(StatusCode.INTERNAL, "the container cannot be created")

        async def release() -> None:
            self.containers.pop(container_id, None)

        reach("CreateContainer")
        self.agent.processes[container_id] = FakeProcess(spec["process"])
        container = Container(self.agent, container_id, spec, release)
        self.containers[container_id] = container
        return container

    async def stop(self) -> None:
        reach("sandbox stops")
        for process in self.agent.processes.values():
            await process.close()
        self.stopped.set()

    def lose(self, reason: str) -> None:
        """As if the guest had died."""
        self.reason = reason
        self.agent.lost = RpcError(StatusCode.UNAVAILABLE, reason)
        for process in self.agent.processes.values():
            with contextlib.suppress(RpcError):
                process.kill(signal.SIGKILL)
        self.stopped.set()


def main() -> int:
    """The shim's process with fake sandboxes: ``python -m tests.kata_lab.shim.fake`` instead of ``kata_lab.shim``."""
    import kata_lab.shim.shim as real
    from kata_lab.shim import __main__ as process

    def make(sandbox_id: str, stay: bool = False) -> real.Shim:
        return real.Shim(sandbox_id, FakeSandbox, stay)

    reach("process runs")
    serve = process.serve
    process.serve = lambda *arguments: serve(*arguments, make_shim=make)
    return process.main()


if __name__ == "__main__":
    sys.exit(main())
