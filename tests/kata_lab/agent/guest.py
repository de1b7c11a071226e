"""A guest with an agent for tests: its calls as plain functions, and containers of the busybox image."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import socket
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kata_lab.agent.client import AgentClient
from kata_lab.hypervisor.base import HypervisorConfig
from kata_lab.hypervisor.fused import FusedHypervisor
from kata_lab.image.build import build_named
from kata_lab.oci import open_image
from kata_lab.oci.agent_message import agent_process, agent_spec
from kata_lab.resource.scratch import SERIAL, make_scratch
from kata_lab.ttrpc import RpcError, StatusCode
from vmm.config import BlockConfig, DeviceConfig, EntropyConfig, FsConfig, NetworkConfig, VsockConfig

ResultT = TypeVar("ResultT")

SHARED = "/run/kata-containers/shared/containers"
SCRATCH = "/run/kata-containers/scratch"
SECONDS = 60.0
STORAGES = [
    {"driver": "virtio-fs", "source": "kataShared", "fstype": "virtiofs", "mount_point": SHARED},
    {"driver": "blk", "source": f"serial={SERIAL}", "fstype": "ext4", "mount_point": SCRATCH},
]
PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
PROC = {"destination": "/proc", "type": "proc", "source": "proc"}


def process(args: Sequence[str], **wishes: Any) -> dict[str, Any]:
    """A process of an OCI configuration."""
    return {"args": list(args), "env": [PATH], "cwd": "/", "user": {"uid": 0, "gid": 0}, **wishes}


def configuration(args: Sequence[str], **wishes: Any) -> dict[str, Any]:
    """An OCI configuration of a container; wishes for the process, ``linux`` and ``mounts`` replace what is here."""
    linux = {"namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts")], **wishes.pop("linux", {})}
    mounts = [PROC, *wishes.pop("mounts", [])]
    root = {"path": "rootfs", "readonly": wishes.pop("readonly", False)}
    top: dict[str, Any] = {name: wishes.pop(name) for name in ("hostname", "annotations") if name in wishes}
    return {
        "ociVersion": "1.0.2",
        "process": process(args, **wishes),
        "root": root,
        "mounts": mounts,
        "linux": linux,
        **top,
    }


class AgentGuest:
    """A guest that runs, and a client of its agent.

    Args:
        runner: of the event loop in which everything happens.
        hypervisor: whose guest it is.
    """

    def __init__(self, runner: asyncio.Runner, hypervisor: FusedHypervisor) -> None:
        self._runner = runner
        self.hypervisor = hypervisor
        self._numbers = itertools.count(1)
        self.agent = self.connect()

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Do it, in bounded time."""
        return self._runner.run(asyncio.wait_for(work, SECONDS))

    def connect(self) -> AgentClient:
        """One more client of the agent."""
        return self.run(AgentClient.connect(lambda: self.hypervisor.dial(1024), SECONDS, self.hypervisor.ended))

    def dial(self, port: int) -> socket.socket:
        """A socket to a port of the guest, with a time limit."""
        connection = self.run(self.hypervisor.dial(port))
        connection.settimeout(SECONDS)
        return connection

    def call(self, method: str, **request: Any) -> dict[str, Any]:
        """Call a method of the agent."""
        return self.run(self.agent.call(method, **request))

    def refused(self, method: str, **request: Any) -> RpcError:
        """Call a method that is to fail; its error."""
        with pytest.raises(RpcError) as failed:
            self.call(method, **request)
        return failed.value

    def name(self) -> str:
        """A name for a container that nobody has used."""
        return f"c{next(self._numbers)}"

    def metric(self, name: str) -> int:
        """A number of GetMetrics."""
        lines = self.call("GetMetrics")["metrics"].splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == name)

    @contextlib.contextmanager
    def container(self, args: Sequence[str], start: bool = True, **wishes: Any) -> Iterator[InGuest]:
        """A container of busybox, removed in the end."""
        request = wishes.pop("request", {})
        made = InGuest(self, self.name())
        made.create(configuration(args, **wishes), **request)
        try:
            if start:
                self.call("StartContainer", container_id=made.id)
            yield made
        finally:
            self.call("RemoveContainer", container_id=made.id)

    def output(self, args: Sequence[str], **wishes: Any) -> tuple[int, str]:
        """Run a container; its exit status and what it wrote to both outputs."""
        with self.container(args, **wishes) as container:
            return container.finish()


class InGuest:
    """A container, and by name its processes.

    Args:
        guest: where it is.
        container_id: its name.
    """

    def __init__(self, guest: AgentGuest, container_id: str) -> None:
        self._guest = guest
        self.id = container_id

    def create(self, config: dict[str, Any], **request: Any) -> None:
        """Have it created with the busybox root: a layer of its own above the shared one."""
        place = f"/run/kata-containers/{self.id}/rootfs"
        written = f"{SCRATCH}/{self._guest.name()}"
        layers = {
            "driver": "overlayfs",
            "mount_point": place,
            "options": [
                f"lowerdir={SHARED}/busybox",
                f"upperdir={written}/upper",
                f"workdir={written}/work",
            ],
        }
        spec = agent_spec(config)
        spec["Root"]["Path"] = place
        storages = [*request.pop("storages", []), layers]
        self._guest.call(
            "CreateContainer", container_id=self.id, exec_id=self.id, OCI=spec, storages=storages, **request
        )

    def ids(self, exec_id: str = "") -> dict[str, str]:
        """Fields that name a process."""
        return {"container_id": self.id, "exec_id": exec_id or self.id}

    def exec(self, exec_id: str, args: Sequence[str], **wishes: Any) -> None:
        """Start one more process."""
        self._guest.call("ExecProcess", **self.ids(exec_id), process=agent_process(process(args, **wishes)))

    def wait(self, exec_id: str = "") -> int:
        """The exit status of a process."""
        return int(self._guest.call("WaitProcess", **self.ids(exec_id))["status"])

    def signal(self, number: int, exec_id: str = "") -> None:
        """Signal a process."""
        self._guest.call("SignalProcess", **self.ids(exec_id), signal=number)

    def write(self, data: bytes, exec_id: str = "", close: bool = False) -> None:
        """Write to its standard input."""
        if data:
            self._guest.call("WriteStdin", **self.ids(exec_id), data=data)
        if close:
            self._guest.call("CloseStdin", **self.ids(exec_id))

    def read(self, exec_id: str = "", method: str = "ReadStdout", until: bytes | None = None) -> bytes:
        """What it writes, to the end or until these bytes come."""

        async def collect() -> bytes:
            data = b""
            while until is None or until not in data:
                chunk = (await self._guest.agent.call(method, **self.ids(exec_id), len=1 << 16))["data"]
                if not chunk:
                    break
                data += chunk
            return data

        return self._guest.run(collect())

    def finish(self, exec_id: str = "") -> tuple[int, str]:
        """Its exit status, and what it wrote to both outputs."""
        said = self.read(exec_id) + self.read(exec_id, "ReadStderr")
        return self.wait(exec_id), said.decode()


@contextlib.contextmanager
def agent_guest(
    directory: Path, append: str = "agent.debug_console", network: NetworkConfig | None = None
) -> Iterator[AgentGuest]:
    """Boot the image of sandboxes and create a sandbox in it."""
    image = build_named("lifsea", progress="off")
    make_scratch(directory / "scratch")
    shutil.copytree(open_image("busybox").layers()[0], directory / "shared" / "busybox", symlinks=True)
    devices: list[DeviceConfig] = [
        VsockConfig(name="agent", socket=directory / "vsock"),
        FsConfig(name="shared", tag="kataShared", path=directory / "shared"),
        BlockConfig(name="scratch", path=directory / "scratch", format="overlay", serial=SERIAL),
        EntropyConfig(name="entropy"),
    ]
    if network is not None:
        devices.append(network)
    with asyncio.Runner() as runner:
        hypervisor = FusedHypervisor()
        try:
            config = HypervisorConfig(
                kernel=image.kernel, initrd=image.root, cmdline=f"{image.append} {append}", devices=devices
            )
            runner.run(hypervisor.prepare_vm(config))
            runner.run(hypervisor.start_vm(SECONDS))
            guest = AgentGuest(runner, hypervisor)
            try:
                guest.call("CreateSandbox", sandbox_id="s1", hostname="s1", storages=STORAGES, sandbox_pidns=True)
                yield guest
            finally:
                runner.run(guest.agent.close())
        finally:
            runner.run(hypervisor.cleanup())


__all__ = ["SHARED", "STORAGES", "AgentGuest", "InGuest", "StatusCode", "agent_guest", "configuration", "process"]
