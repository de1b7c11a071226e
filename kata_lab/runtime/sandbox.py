"""A sandbox: one VM with an agent, in which containers run. Init → Running → Stopped (runtime-rs, virt_container).

Starting it goes through steps that are undone in the opposite order if a later one fails: its directory, its disks,
the VM, the connection to the agent, the agent's sandbox, and the watches over its health.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kata_lab.agent.client import RPC_PORT, AgentClient
from kata_lab.hypervisor.base import Hypervisor, HypervisorConfig
from kata_lab.resource.network import GuestNetwork, network_behind_passt
from kata_lab.resource.rootfs import SCRATCH, SHARED, DirectoryRoot, LayeredRoot, RootFs
from kata_lab.resource.scratch import SERIAL, make_scratch
from kata_lab.runtime.container import Container, ContainerState
from kata_lab.runtime.errors import RuntimeFault
from kata_lab.runtime.state import ProcessIdentity, SandboxRecord, StateDirectory, check_name
from kata_lab.ttrpc import RpcError
from vmm.config import BlockConfig, DeviceConfig, EntropyConfig, FsConfig, NetworkConfig, VsockConfig

if TYPE_CHECKING:
    from kata_lab.oci import ImageHandle

START_VM_SECONDS: Final = 10.0
CONNECT_AGENT_SECONDS: Final = 60.0  #: from the VM's start; a guest on a slow or busy machine boots in some seconds
HEALTH_SECONDS: Final = 5.0  #: between two checks, each of which may take as long
DESTROY_SECONDS: Final = 5.0  #: that the agent may take to end its sandbox before the plug is pulled
MAX_SOCKET_PATH: Final = 107
NAMES: Final = "/run/kata-containers/sandbox"  #: where the guest keeps hosts, hostname and resolv.conf
_BOUND: Final = {"options": ["bind", "rprivate"]}
ROOTFS_KINDS: Final = ("split", "fs")


class SandboxState(enum.Enum):
    """Where a sandbox is in its life."""

    INIT = "init"
    RUNNING = "running"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """What a sandbox is.

    Attributes:
        id: its name; made up if empty.
        image: the guest's image, by the name of its description.
        vcpus: 1 to 32.
        memory_mib: the guest's memory.
        rootfs: how root file systems of OCI images get into the guest, ``"split"`` or ``"fs"``
            (:mod:`kata_lab.resource.rootfs`).
        network: its network interface, or None for loopback alone.
        hostname: the guest's; the sandbox's name if empty.
        append: words to add to the kernel's command line.
        trace: count the VM's exits.
    """

    id: str = ""
    image: str = "lifsea"
    vcpus: int = 1
    memory_mib: int = 256
    rootfs: str = "split"
    network: NetworkConfig | None = None
    hostname: str = ""
    append: str = ""
    trace: bool = False

    def __post_init__(self) -> None:
        if self.id:
            check_name("the sandbox's name", self.id)
        if self.rootfs not in ROOTFS_KINDS:
            raise RuntimeFault(f"rootfs is {self.rootfs!r}, it must be one of {', '.join(map(repr, ROOTFS_KINDS))}")


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a container that was run to its end ended.

    Attributes:
        status: exit status, 128 + n after signal n.
        stdout: what it wrote.
        stderr: what it wrote to standard error; nothing if it had a terminal.
    """

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def output(self) -> str:
        """Standard output as text."""
        return self.stdout.decode(errors="replace")


@dataclass(slots=True)
class _Shared:
    """What is in the shared directory, and how many need it."""

    name: str
    path: Path
    users: int = 0


class Sandbox:
    """One sandbox; an asynchronous context manager that starts it, and stops it.

    Args:
        config: what it is.
        hypervisor: who runs its VM; the fused VMM if None.
    """

    def __init__(self, config: SandboxConfig | None = None, hypervisor: Hypervisor | None = None) -> None:
        self.config = config if config is not None else SandboxConfig()
        self.id = self.config.id or secrets.token_hex(6)
        if hypervisor is None:
            from kata_lab.hypervisor.fused import FusedHypervisor

            hypervisor = FusedHypervisor()
        self.hypervisor = hypervisor
        self.containers: dict[str, Container] = {}
        self._state = SandboxState.INIT
        self._directory = StateDirectory(self.id)
        self._agent: AgentClient | None = None
        self._undo = contextlib.AsyncExitStack()
        self._order = asyncio.Lock()
        self._shares: dict[str, _Shared] = {}
        self._share_numbers = itertools.count(1)
        self._shared_lock = asyncio.Lock()
        self._watches: list[asyncio.Task[None]] = []
        self._began = time.monotonic()
        self._steps: list[tuple[str, float]] = []
        self._created = time.time()
        #: Why it stopped, once it has.
        self.reason = ""
        self.stopped = asyncio.Event()

    @classmethod
    def create(cls, *, hypervisor: Hypervisor | None = None, **config: Any) -> Sandbox:
        """A sandbox with these fields of :class:`SandboxConfig`; entering it as a context starts it.

        Raises:
            RuntimeFault: an unknown field, or a bad value.
        """
        try:
            return cls(SandboxConfig(**config), hypervisor)
        except TypeError as error:
            known = ", ".join(SandboxConfig.__slots__)
            unknown = ", ".join(name for name in config if name not in SandboxConfig.__slots__)
            raise RuntimeFault(f"a sandbox has no {unknown or error}; it has {known}") from None

    @property
    def state(self) -> SandboxState:
        """Where it is in its life."""
        return self._state

    @property
    def directory(self) -> Path:
        """Its directory of state and sockets."""
        return self._directory.path

    @property
    def agent(self) -> AgentClient:
        """Its agent.

        Raises:
            RuntimeFault: it does not run.
        """
        self._require_running("asked")
        assert self._agent is not None
        return self._agent

    @property
    def timeline(self) -> list[tuple[str, float]]:
        """What happened when: name and seconds since :meth:`start` was called, in order."""
        steps = [*self._steps]
        with contextlib.suppress(Exception):
            steps += self.hypervisor.timeline()
        return sorted(((name, at - self._began) for name, at in steps), key=lambda each: each[1])

    def mark(self, name: str) -> None:
        """Put a moment into the time line."""
        self._steps.append((name, time.monotonic()))

    async def start(self) -> None:
        """Start it.

        Raises:
            RuntimeFault: it was started before, or the guest did not come up; nothing is left behind.
            KataLabError: the image cannot be built, or a program is missing.
            VmmError: the VM cannot be made.
        """
        async with self._order:
            if self._state is not SandboxState.INIT:
                raise RuntimeFault(f"sandbox {self.id} is {self._state} and cannot be started again; make a new one")
            self._began = time.monotonic()
            self._steps.clear()
            try:
                await self._start()
            except BaseException as error:
                await self._stop(f"its start failed: {error}", orderly=False)
                raise

    async def _start(self) -> None:
        await asyncio.to_thread(self._directory.make)
        self._undo.callback(self._directory.remove)
        config = await asyncio.to_thread(self._prepare)
        self.mark("prepared")
        self._undo.push_async_callback(self.hypervisor.cleanup)
        await self.hypervisor.prepare_vm(config)
        await self.hypervisor.start_vm(START_VM_SECONDS)
        self.mark("VM runs")
        self._agent = await AgentClient.connect(
            lambda: self.hypervisor.dial(RPC_PORT), CONNECT_AGENT_SECONDS, self.hypervisor.ended
        )
        self._undo.push_async_callback(self._agent.close)
        self.mark("agent answers")
        network = network_behind_passt() if self._behind_passt else None
        await self._agent.call("CreateSandbox", CONNECT_AGENT_SECONDS, **self._agent_sandbox(network))
        now = time.time_ns()
        await self._agent.call("SetGuestDateTime", Sec=now // 10**9, Usec=now // 1000 % 10**6)
        await self._write_names(self._agent, network)
        if network is not None:
            await self._agent.call("UpdateInterface", interface=network.interface("eth0"))
            await self._agent.call("UpdateRoutes", routes={"Routes": network.routes("eth0")})
        self.mark("sandbox ready")
        self._state = SandboxState.RUNNING
        await self._record()
        for watch in (self._watch_vm(), self._watch_health(), self._watch_memory()):
            self._watches.append(asyncio.create_task(watch, name=f"sandbox-{self.id}"))

    def _prepare(self) -> HypervisorConfig:
        from kata_lab.image.build import build_named

        socket_path = self.directory / "vsock"
        if len(os.fsencode(socket_path)) + 6 > MAX_SOCKET_PATH:
            raise RuntimeFault(
                f"the path {socket_path} is too long for a socket; set KATA_LAB_HOME to a shorter directory"
            )
        image = build_named(self.config.image)
        make_scratch(self.directory / "scratch")
        devices: list[DeviceConfig] = [
            VsockConfig(name="agent", socket=socket_path),
            FsConfig(name="shared", tag="kataShared", cache="auto"),
            BlockConfig(name="scratch", path=self.directory / "scratch", format="overlay", serial=SERIAL),
            EntropyConfig(name="entropy"),
        ]
        if self.config.network is not None:
            devices.append(self.config.network)
        return HypervisorConfig(
            kernel=image.kernel,
            initrd=image.root,
            cmdline=f"{image.append} {self.config.append}".strip(),
            vcpus=self.config.vcpus,
            memory_mib=self.config.memory_mib,
            devices=devices,
            trace=self.config.trace,
        )

    @property
    def _behind_passt(self) -> bool:
        return self.config.network is not None and self.config.network.backend == "passt"

    @property
    def hostname(self) -> str:
        """The guest's, and by default that of its containers."""
        return self.config.hostname or self.id

    async def _write_names(self, agent: AgentClient, network: GuestNetwork | None) -> None:
        """The files that containers see in place of their images': hosts(5) and hostname(5)."""
        address = network.address if network is not None else "127.0.1.1"
        hosts = f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{address} {self.hostname}\n"
        for name, text in (("hosts", hosts), ("hostname", f"{self.hostname}\n")):
            data = text.encode()
            await agent.call("CopyFile", path=f"{NAMES}/{name}", file_size=len(data), file_mode=0o644, data=data)

    def _agent_sandbox(self, network: GuestNetwork | None) -> dict[str, Any]:
        return {
            "hostname": self.hostname,
            "dns": network.resolver if network is not None else [],
            "sandbox_id": self.id,
            "storages": [
                {"driver": "virtio-fs", "source": "kataShared", "fstype": "virtiofs", "mount_point": SHARED},
                {
                    "driver": "blk",
                    "source": f"serial={SERIAL}",
                    "fstype": "ext4",
                    "options": ["noatime"],
                    "mount_point": SCRATCH,
                },
            ],
        }

    # Containers.

    async def create_container(
        self,
        spec: Mapping[str, Any],
        rootfs: RootFs,
        container_id: str | None = None,
        held: contextlib.AsyncExitStack | None = None,
    ) -> Container:
        """Create a container; its first process waits to be started.

        Args:
            spec: an OCI runtime configuration; its ``root.path`` does not count, and bind mounts name paths of the
                host.
            rootfs: its root file system.
            container_id: its name; made up if None.
            held: what the container needs for as long as it is there; taken over if it can be created.

        Raises:
            RuntimeFault: the sandbox does not run, or has a container of that name.
            SpecError: the configuration is refused.
            RpcError: the agent cannot create it; nothing is left behind.
        """
        from kata_lab.oci import agent_spec, check_spec

        name = check_name("the container's name", container_id or secrets.token_hex(6))
        check_spec(dict(spec))
        async with self._order:
            self._require_running("given a container")
            if name in self.containers:
                raise RuntimeFault(f"sandbox {self.id} has a container {name!r} already; choose another name")
            async with contextlib.AsyncExitStack() as undo:
                attached = await rootfs.attach(name, self)
                for shared in attached.shares:
                    undo.push_async_callback(self.unshare, shared)
                guest_spec = await self._inside(dict(spec), name, attached.path, undo)
                await self.agent.call(
                    "CreateContainer",
                    container_id=name,
                    exec_id=name,
                    OCI=agent_spec(guest_spec),
                    storages=attached.storages,
                )
                if held is not None:
                    undo.push_async_callback(held.pop_all().aclose)
                kept = undo.pop_all()
            container = Container(self.agent, name, spec, lambda: self._forget(name, kept))
            self.containers[name] = container
            await self._record()
        return container

    async def _inside(
        self, spec: dict[str, Any], name: str, root: str, undo: contextlib.AsyncExitStack
    ) -> dict[str, Any]:
        """The configuration as the guest needs it: its own paths for root and volumes."""
        mounts = []
        for number, mount in enumerate(spec.get("mounts", ())):
            options = mount.get("options", ())
            if mount.get("type") == "bind" or "bind" in options or "rbind" in options:
                source = Path(mount["source"])
                if not source.exists():
                    raise RuntimeFault(f"the volume {str(source)!r} does not exist on the host; make it first")
                volume = f"{name}-vol{number}"
                inside = await self.share(volume, source, "ro" in options)
                undo.push_async_callback(self.unshare, volume)
                mounts.append({**mount, "source": inside})
            else:
                mounts.append(mount)
        taken = {mount["destination"] for mount in mounts}
        for file in ("hosts", "hostname", "resolv.conf"):
            if f"/etc/{file}" not in taken:
                mounts.append({"destination": f"/etc/{file}", "type": "bind", "source": f"{NAMES}/{file}", **_BOUND})
        return {**spec, "mounts": mounts, "root": {**spec.get("root", {}), "path": root}}

    async def _forget(self, name: str, kept: contextlib.AsyncExitStack) -> None:
        self.containers.pop(name, None)
        await kept.aclose()
        if self._state is SandboxState.RUNNING:
            await self._record()

    async def run(
        self,
        args: Sequence[str] = (),
        image: str | ImageHandle = "busybox",
        *,
        stdin: bytes = b"",
        limit: int | None = None,
        **wishes: Any,
    ) -> RunResult:
        """Run a container to its end and remove it.

        Args:
            args: its command; that of the image if there is none.
            image: an OCI image (:func:`kata_lab.oci.open_image`).
            stdin: its standard input.
            limit: bytes of each output that are allowed.
            wishes: as of :func:`kata_lab.oci.make_spec`: env, user, cwd, tty …

        Raises:
            RuntimeFault: the sandbox does not run, or there is more output than allowed.
            KataLabError: the image or a wish is refused, or the agent cannot run it.
        """
        container = await self.new_container(args, image, **wishes)
        try:
            process = await container.start()
            self.mark(f"{container.id} started")
            status, output, errors = await process.communicate(stdin, limit)
            self.mark(f"{container.id} ended")
        finally:
            await container.remove()
        return RunResult(status, output, errors)

    async def new_container(
        self,
        args: Sequence[str] = (),
        image: str | ImageHandle = "busybox",
        *,
        container_id: str | None = None,
        **wishes: Any,
    ) -> Container:
        """Create a container of an OCI image; see :meth:`run` for the arguments and errors."""
        from kata_lab.oci import make_spec, open_image

        async with contextlib.AsyncExitStack() as held:
            handle = image
            if isinstance(handle, str):
                handle = await asyncio.to_thread(open_image, handle)
                # Its layers stay in the store for as long as the container is there.
                held.callback(handle.close)
            spec = await asyncio.to_thread(lambda: make_spec(handle, args, **wishes))
            root = LayeredRoot(handle.layers(), handle.override_stat, handle.overlay_options)
            return await self.create_container(spec, root, container_id, held)

    # What the root file systems need (resource.rootfs.Shares).

    async def share(self, name: str, path: Path, read_only: bool, override_stat: bool = False) -> str:
        """Make a directory or file of the host appear in the guest's shared directory; returns its path there."""
        async with self._shared_lock:
            shared = self._shares.get(name)
            if shared is None:
                # The guest may still remember a name that was used before, and what it led to.
                shared = _Shared(f"{name}.{next(self._share_numbers)}", path)
                await self.hypervisor.add_share(shared.name, path, read_only, override_stat)
                self._shares[name] = shared
            elif shared.path != path:
                raise RuntimeFault(f"sandbox {self.id} shares {str(shared.path)!r} as {name!r} already")
            shared.users += 1
        return f"{SHARED}/{shared.name}"

    async def unshare(self, name: str) -> None:
        """Undo one :meth:`share`."""
        async with self._shared_lock:
            shared = self._shares[name]
            shared.users -= 1
            if not shared.users:
                del self._shares[name]
                if self._state is SandboxState.RUNNING:
                    await self.hypervisor.remove_share(shared.name)

    # Pause, and the end.

    async def pause(self) -> None:
        """Stop the whole guest until :meth:`resume`."""
        async with self._order:
            self._require_running("paused")
            await self.hypervisor.pause_vm()

    async def resume(self) -> None:
        """Undo :meth:`pause`."""
        async with self._order:
            self._require_running("resumed")
            await self.hypervisor.resume_vm()

    async def stop(self) -> None:
        """Stop it and give everything back. A second time is nothing."""
        async with self._order:
            await self._stop("it was stopped", orderly=True)

    async def _stop(self, reason: str, orderly: bool) -> None:
        if self._state is SandboxState.STOPPED:
            return
        running, self._state = self._state is SandboxState.RUNNING, SandboxState.STOPPED
        self.reason = reason
        current = asyncio.current_task()
        for watch in self._watches:
            if watch is not current:
                watch.cancel()
        if running and orderly and self._agent is not None and self._agent.lost is None:
            with contextlib.suppress(RpcError):
                await self._agent.call("DestroySandbox", DESTROY_SECONDS)
        for container in tuple(self.containers.values()):
            await container.abandon()
        try:
            await self._undo.aclose()
        finally:
            await asyncio.gather(*(each for each in self._watches if each is not current), return_exceptions=True)
            self.stopped.set()

    async def __aenter__(self) -> Sandbox:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Watches.

    async def _watch_vm(self) -> None:
        detail = await self.hypervisor.wait_vm()
        async with self._order:
            await self._stop(detail, orderly=False)

    async def _watch_health(self) -> None:
        assert self._agent is not None
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            try:
                await self._agent.check(HEALTH_SECONDS)
            except RpcError as error:
                if self._agent.lost is not None:
                    async with self._order:
                        await self._stop(f"the connection to its agent is lost: {error}", orderly=False)
                    return

    async def _watch_memory(self) -> None:
        assert self._agent is not None
        with contextlib.suppress(RpcError):
            while True:
                event = await self._agent.call("GetOOMEvent")
                container = self.containers.get(event["container_id"])
                if container is not None:
                    container.out_of_memory = True

    def _require_running(self, what: str) -> None:
        if self._state is not SandboxState.RUNNING:
            why = f" ({self.reason})" if self.reason else ""
            raise RuntimeFault(f"sandbox {self.id} is {self._state}{why} and cannot be {what}")

    async def _record(self) -> None:
        owner = ProcessIdentity.of(os.getpid())
        assert owner is not None
        record = SandboxRecord(
            self.id,
            str(self._state),
            owner,
            self._created,
            {"image": self.config.image, "vcpus": self.config.vcpus, "memory_mib": self.config.memory_mib},
            {name: {"args": each.spec.get("process", {}).get("args", [])} for name, each in self.containers.items()},
        )
        await asyncio.to_thread(self._directory.write, record)


__all__ = ["ContainerState", "DirectoryRoot", "LayeredRoot", "RunResult", "Sandbox", "SandboxConfig", "SandboxState"]
