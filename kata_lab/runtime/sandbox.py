"""A sandbox: one VM with an agent, in which containers run. Init → Running → Stopped (runtime-rs, virt_container).

Starting it goes through steps that are undone in the opposite order if a later one fails, or if whoever starts it is
cancelled: its directory, its disks, the VM, the connection to the agent, the agent's sandbox, and the watches over its
health. Ending it is one task, whoever asks for it: :meth:`Sandbox.stop`, the VM that ended, or the agent that is lost.
Commands to one sandbox are carried out one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kata_lab.agent.client import LOG_PORT, RPC_PORT, AgentClient
from kata_lab.errors import KataLabError
from kata_lab.hypervisor import Hypervisor, make_hypervisor
from kata_lab.resource.network import network_behind_passt
from kata_lab.resource.rootfs import BlockRoot, DirectoryRoot, LayeredRoot, RootFs
from kata_lab.resource.sizing import SandboxSize
from kata_lab.runtime.capacity import Capacity
from kata_lab.runtime.completion import completed, ended
from kata_lab.runtime.config import RunResult, SandboxConfig, SandboxState
from kata_lab.runtime.container import Container, ContainerState
from kata_lab.runtime.errors import RuntimeFault, first_error
from kata_lab.runtime.greeting import NAME_FILES, NAMES, Greeting, greet
from kata_lab.runtime.logs import follow_agent_log, logger_of
from kata_lab.runtime.preparation import Preparation
from kata_lab.runtime.record_writer import RecordWriter
from kata_lab.runtime.shares import ShareTable
from kata_lab.runtime.state import ProcessIdentity, SandboxRecord, StateDirectory, check_name
from kata_lab.ttrpc import RpcError

if TYPE_CHECKING:
    from kata_lab.oci import ImageHandle
    from vmm.config import DeviceConfig

START_VM_SECONDS: Final = 10.0
CONNECT_AGENT_SECONDS: Final = 60.0  #: from the VM's start; a guest on a slow or busy machine boots in some seconds
CREATE_SECONDS: Final = 60.0  #: that the agent may take to create a container
HEALTH_SECONDS: Final = 5.0  #: between two checks, each of which may take as long
SILENT_SECONDS: Final = 60.0  #: after so long without an answer the agent is given up
DESTROY_SECONDS: Final = 5.0  #: that commands and the agent may take to end before the plug is pulled
FATE_SECONDS: Final = 2.0  #: for the VM to say how it ended, once the agent's connection is lost
REMEMBERED_MARKS: Final = 256
MAX_SOCKET_PATH: Final = 107
_BOUND: Final = {"options": ["bind", "rprivate"]}


class Sandbox:
    """One sandbox; an asynchronous context manager that starts it, and stops it.

    Args:
        config: what it is.
        hypervisor: who runs its VM; what the configuration names if None.
    """

    def __init__(self, config: SandboxConfig | None = None, hypervisor: Hypervisor | None = None) -> None:
        self.config = config if config is not None else SandboxConfig()
        self.id = self.config.id or secrets.token_hex(6)
        hypervisor = make_hypervisor(self.config.hypervisor) if hypervisor is None else hypervisor
        self.hypervisor = hypervisor
        self.containers: dict[str, Container] = {}
        self.log = logger_of(self.id)
        self.paused = False
        self._state = SandboxState.INIT
        self._directory = StateDirectory(self.id)
        self._record = RecordWriter(self._directory, self._make_record, logger_of(self.id))
        self._agent: AgentClient | None = None
        self._undo = contextlib.AsyncExitStack()
        self._order = asyncio.Lock()
        self._shares = ShareTable(hypervisor)
        size = SandboxSize(self.config.vcpus, self.config.memory_mib)
        most = SandboxSize(self.config.max_vcpus or size.vcpus, self.config.max_memory_mib or size.memory_mib)
        self._capacity = Capacity(size, most, hypervisor, self.log)
        self._disks: dict[str, str] = {}  # image → serial number
        self._architecture = ""  # of the guest
        self._watches: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self._steps: deque[tuple[str, float]] = deque(maxlen=REMEMBERED_MARKS)
        self._guest_steps: list[tuple[str, float]] = []
        self._created = time.time()
        #: Why it stopped, once it has.
        self.reason = ""
        self._reason_known = asyncio.Event()
        self.stopped = asyncio.Event()

    @classmethod
    def create(cls, *, hypervisor: Hypervisor | str = "fused", **config: Any) -> Sandbox:
        """A sandbox with these fields of :class:`SandboxConfig`; entering it as a context starts it.

        Args:
            hypervisor: the name of an arrangement, or one that was made.
            config: the other fields.

        Raises:
            RuntimeFault: an unknown field, or a bad value.
        """
        unknown = ", ".join(name for name in config if name not in SandboxConfig.__slots__)
        if unknown:
            raise RuntimeFault(f"a sandbox has no {unknown}; it has {', '.join(SandboxConfig.__slots__)}")
        if isinstance(hypervisor, str):
            return cls(SandboxConfig(hypervisor=hypervisor, **config))
        return cls(SandboxConfig(**config), hypervisor)

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
    def hostname(self) -> str:
        """The guest's, and by default that of its containers."""
        return self.config.hostname or self.id

    @property
    def timeline(self) -> list[tuple[str, float]]:
        """What happened when: name and seconds since :meth:`start` was called, in order."""
        guest = self._guest_steps or self._guest_timeline()
        return sorted(((name, at - self._began) for name, at in (*self._steps, *guest)), key=lambda each: each[1])

    def _guest_timeline(self) -> list[tuple[str, float]]:
        # Before there is a VM, and when it is gone.
        with contextlib.suppress(KataLabError):
            return self.hypervisor.timeline()
        return []

    def mark(self, name: str) -> None:
        """Put a moment into the time line; of many, the last ones are kept."""
        self._steps.append((name, time.monotonic()))
        self.log.debug("reached", extra={"moment": name})

    # Start.

    async def start(self) -> None:
        """Start it. If this is cancelled, what was done is undone before it returns.

        Raises:
            RuntimeFault: it was started before, was stopped meanwhile, or the guest did not come up; nothing is left
                behind.
            KataLabError: the image cannot be built, a program is missing, or the VM cannot be made.
        """
        if self._starting is not None or self._state is not SandboxState.INIT:
            raise RuntimeFault(f"sandbox {self.id} is {self._state} and cannot be started again; make a new one")
        self._began = time.monotonic()
        self._steps.clear()
        starting = self._starting = asyncio.create_task(self._start_or_undo(), name=f"start-{self.id}")
        try:
            await asyncio.wait((starting,))
        except asyncio.CancelledError:
            starting.cancel()
            await ended(starting)
            if not starting.cancelled() and starting.exception() is None:
                await self.stop()
            raise
        if starting.cancelled():
            raise RuntimeFault(f"sandbox {self.id} was stopped while it started")
        starting.result()

    async def _start_or_undo(self) -> None:
        try:
            try:
                await self._start()
            except BaseExceptionGroup as group:
                raise first_error(group) from None
        except BaseException as error:
            why = "it was stopped" if isinstance(error, asyncio.CancelledError) else f"its start failed: {error}"
            self.log.warning("start failed", extra={"reason": why})
            await completed(self._end(why, orderly=False))
            raise

    async def _start(self) -> None:
        self._check_socket_path()
        await completed(self._make_directory())
        form, most = self.hypervisor.disk_format, self._capacity.most
        preparation = Preparation(self.config, self.directory, form, most, self._disks)
        async with contextlib.AsyncExitStack() as held:
            async with asyncio.TaskGroup() as group:
                preparing = group.create_task(preparation.prepare(held))
                group.create_task(self.hypervisor.load())
            self.mark("prepared")
            self._undo.push_async_callback(self.hypervisor.cleanup)
            self._architecture = preparing.result().architecture
            await self.hypervisor.prepare_vm(preparing.result())
            await self.hypervisor.start_vm(START_VM_SECONDS)
        self.mark("VM runs")
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(_import_oci))
            connecting = group.create_task(self._connect())
        agent = connecting.result()
        behind_passt = self.config.network is not None and self.config.network.backend == "passt"
        network = await asyncio.to_thread(network_behind_passt) if behind_passt else None
        images, shared = tuple(self._disks.values()), self.config.shared_pid_namespace
        agent.fate = self._fate_of_start
        await greet(agent, Greeting(self.id, self.hostname, images, network, shared))
        agent.fate = self._fate
        self._state = SandboxState.RUNNING
        self._record.change()
        self.mark("sandbox ready")
        for watch in (self._watch_vm(), self._watch_agent(), self._watch_health(), self._watch_memory()):
            self._watch(watch)
        self._watch(follow_agent_log(functools.partial(self.hypervisor.dial, LOG_PORT), self.log))
        self.log.info("sandbox runs", extra={"seconds": round(time.monotonic() - self._began, 3)})

    async def _make_directory(self) -> None:
        await asyncio.to_thread(self._directory.make, self._make_record())
        self._undo.push_async_callback(asyncio.to_thread, self._directory.remove)

    async def _connect(self) -> AgentClient:
        dial = functools.partial(self.hypervisor.dial, RPC_PORT)
        agent = self._agent = await AgentClient.connect(dial, CONNECT_AGENT_SECONDS, self.hypervisor.ended)
        self._undo.push_async_callback(agent.close)
        self.mark("agent answers")
        return agent

    def _check_socket_path(self) -> None:
        path = self.directory / "vsock"
        if len(os.fsencode(path)) + 6 > MAX_SOCKET_PATH:
            raise RuntimeFault(f"the path {path} is too long for a socket; set KATA_LAB_HOME to a shorter directory")

    # Containers.

    async def create_container(
        self,
        spec: Mapping[str, Any],
        rootfs: RootFs,
        container_id: str | None = None,
        held: contextlib.AsyncExitStack | None = None,
    ) -> Container:
        """Create a container; its first process waits to be started. If this is cancelled, there is none afterwards.

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
        from kata_lab.oci import check_spec

        name = check_name("the container's name", container_id or secrets.token_hex(6))
        check_spec(dict(spec))
        creating = asyncio.create_task(self._create(dict(spec), rootfs, name, held), name=f"create-{name}")
        try:
            await ended(creating)
        except asyncio.CancelledError:
            if creating.exception() is None:
                await creating.result().remove()
            raise
        return creating.result()

    async def _create(
        self, spec: dict[str, Any], rootfs: RootFs, name: str, held: contextlib.AsyncExitStack | None
    ) -> Container:
        from kata_lab.oci import agent_spec

        async with self._order:
            self._require_running("given a container")
            if name in self.containers:
                raise RuntimeFault(f"sandbox {self.id} has a container {name!r} already; choose another name")
            async with contextlib.AsyncExitStack() as undo:
                undo.push_async_callback(self._settle)
                await self._capacity.admit((*self._specs(), spec))
                attached = await rootfs.attach(name, self._shares)
                for shared in attached.shares:
                    undo.push_async_callback(self._shares.unshare, shared)
                bound = await self._bind_volumes(spec, name, undo)
                # In a directory of the host no file is made to mount something over.
                known = None if attached.own or not isinstance(rootfs, DirectoryRoot) else rootfs.path
                mounts = [*bound, *_name_mounts(bound, known)]
                inside = {**spec, "mounts": mounts, "root": {**spec.get("root", {}), "path": attached.path}}
                request = {
                    "container_id": name,
                    "exec_id": name,
                    "OCI": agent_spec(inside),
                    "sandbox_pidns": self.config.shared_pid_namespace,
                }
                await self.agent.call("CreateContainer", CREATE_SECONDS, **request, storages=attached.storages)
                if held is not None:
                    undo.push_async_callback(held.pop_all().aclose)
                kept = undo.pop_all()
            release = functools.partial(self._forget, name, kept)
            container = Container(self.agent, name, spec, release, self._settle)
            self.containers[name] = container
            self._record.change()
        self.log.info("container created", extra={"container": name})
        return container

    async def _bind_volumes(
        self, spec: Mapping[str, Any], name: str, undo: contextlib.AsyncExitStack
    ) -> list[dict[str, Any]]:
        """The mounts of a configuration, those of the host's directories and files by their paths in the guest."""
        mounts = []
        for number, mount in enumerate(spec.get("mounts") or ()):
            options = mount.get("options") or ()
            if mount.get("type") != "bind" and not {"bind", "rbind"} & set(options):
                mounts.append(mount)
                continue
            source = Path(mount["source"])
            if not source.is_dir() and not source.is_file():
                what = "is neither a directory nor a file" if source.exists() else "does not exist on the host"
                raise RuntimeFault(f"the volume {str(source)!r} {what}; it must be one of them")
            volume = f"{name}-vol{number}"
            inside = await self._shares.share(volume, source, "ro" in options)
            undo.push_async_callback(self._shares.unshare, volume)
            mounts.append({**mount, "source": inside})
        return mounts

    async def _forget(self, name: str, kept: contextlib.AsyncExitStack) -> None:
        self.containers.pop(name, None)
        await kept.aclose()
        if self._state is SandboxState.RUNNING:
            self._record.change()
            self.log.info("container removed", extra={"container": name})

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
        from kata_lab.oci import make_spec

        self._require_running("given a container")
        async with contextlib.AsyncExitStack() as held:
            # Its layers stay in the store for as long as the container is there.
            handle = await completed(_opened(image, self._architecture, held)) if isinstance(image, str) else image
            spec = await asyncio.to_thread(lambda: make_spec(handle, args, **wishes))
            return await self.create_container(spec, await self._root_of(handle, held), container_id, held)

    async def _root_of(self, image: ImageHandle, held: contextlib.AsyncExitStack) -> RootFs:
        if self.config.rootfs == "block":
            from kata_lab.resource.image_disk import image_serial

            serial = image_serial(image)
            if serial not in self._disks.values():
                known = ", ".join(map(repr, self._disks))
                raise RuntimeFault(
                    f"sandbox {self.id} has no disk of image {image.reference!r}, only of {known}: name it in images"
                )
            return BlockRoot(serial)
        if self.config.rootfs == "fs":
            from kata_lab.oci import unpack_rootfs

            place = self.directory / "roots" / secrets.token_hex(6)
            held.push_async_callback(asyncio.to_thread, shutil.rmtree, place, ignore_errors=True)
            await completed(asyncio.to_thread(unpack_rootfs, image, place))
            return DirectoryRoot(place, override_stat=image.override_stat)
        layers = await asyncio.to_thread(image.layers)
        return LayeredRoot(layers, image.override_stat, image.overlay_options)

    # Its size, and what is plugged in.

    @property
    def size(self) -> SandboxSize:
        """What it has now."""
        return self._capacity.size

    @property
    def most(self) -> SandboxSize:
        """What it can have while it runs."""
        return self._capacity.most

    @property
    def plugged(self) -> Mapping[str, DeviceConfig]:
        """What :meth:`add_device` has plugged in, by name."""
        return self._capacity.plugged

    async def resize(self, vcpus: int | None = None, memory_mib: int | None = None) -> SandboxSize:
        """Have so many vCPUs and so much memory, or more where the limits of its containers say so.

        Args:
            vcpus: 1 to the configuration's ``max_vcpus``; None for as many as before.
            memory_mib: up to ``max_memory_mib``; None for as much as before.

        Returns:
            What there is now; the guest has it.

        Raises:
            RuntimeFault: it does not run, or cannot have that; it is as before.
        """
        self._require_running("resized")
        return await self._capacity.resize(vcpus, memory_mib, self._specs())

    async def add_device(self, device: DeviceConfig) -> str:
        """Plug in a disk, a network interface or a shared directory.

        Args:
            device: a BlockConfig, NetworkConfig or FsConfig of :mod:`vmm.config`.

        Returns:
            What :meth:`remove_device` calls it; the guest's driver has it.

        Raises:
            RuntimeFault: it does not run.
            HypervisorError: the device cannot come; all is as before.
        """
        self._require_running("given a device")
        return await self._capacity.add_device(device)

    async def remove_device(self, name: str) -> None:
        """Undo :meth:`add_device`.

        Raises:
            RuntimeFault: it does not run.
            HypervisorError: there is none of that name, or the guest uses it; all is as before.
        """
        self._require_running("relieved of a device")
        await self._capacity.remove_device(name)

    def _specs(self) -> list[Mapping[str, Any]]:
        return [each.spec for each in self.containers.values()]

    async def _settle(self) -> None:
        if self._state is SandboxState.RUNNING and not self.paused:
            await self._capacity.settle(self._specs())

    # Pause, and the end.

    async def pause(self) -> None:
        """Stop the whole guest until :meth:`resume`; what is asked of it meanwhile waits."""
        await completed(self._pause())

    async def _pause(self) -> None:
        async with self._order:
            self._require_running("paused")
            await self.hypervisor.pause_vm()
            self.paused = True

    async def resume(self) -> None:
        """Undo :meth:`pause`."""
        await completed(self._resume())

    async def _resume(self) -> None:
        async with self._order:
            if self._state is not SandboxState.RUNNING or not self.paused:
                self._require_running("resumed")
                raise RuntimeFault(f"sandbox {self.id} is running and cannot be resumed")
            await self.hypervisor.resume_vm()
            self.paused = False
            now = time.time_ns()
            # Its clock stood still.
            with contextlib.suppress(RpcError):
                await self.agent.call("SetGuestDateTime", HEALTH_SECONDS, Sec=now // 10**9, Usec=now // 1000 % 10**6)

    async def stop(self) -> None:
        """Stop it and give everything back, also while it starts. Returns when nothing is left, a second time too."""
        starting = self._starting
        if starting is not None and not starting.done():
            starting.cancel()
            await ended(starting)
        await ended(self._end_soon("it was stopped", orderly=True))
        assert self._ending is not None
        self._ending.result()

    def _end_soon(self, reason: str, orderly: bool = False) -> asyncio.Task[None]:
        """Ending is one task, with the first reason."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(reason, orderly), name=f"end-{self.id}")
        return self._ending

    async def _end(self, reason: str, orderly: bool) -> None:
        if self._state is SandboxState.STOPPED:
            return
        running, self._state = self._state is SandboxState.RUNNING, SandboxState.STOPPED
        self._guest_steps = self._guest_timeline()
        self.reason = reason
        self._reason_known.set()
        try:
            if running and orderly and not self.paused:
                await self._destroy()
            for watch in self._watches:
                watch.cancel()
            await asyncio.gather(*self._watches, return_exceptions=True)
            if self._agent is not None:
                # Commands under way fail by this, and undo what they did.
                await self._agent.close()
            self._shares.over = True
            async with self._order:
                for container in tuple(self.containers.values()):
                    with contextlib.suppress(Exception):
                        await container.abandon()
        finally:
            try:
                await self._record.settle()
                await self._undo.aclose()
            finally:
                self.log.info("sandbox stopped", extra={"reason": reason})
                self.stopped.set()

    async def _destroy(self) -> None:
        """Let commands under way end, and then the agent's sandbox; not for long."""
        with contextlib.suppress(TimeoutError, RpcError):
            async with asyncio.timeout(DESTROY_SECONDS), self._order:
                if self._agent is not None and self._agent.lost is None:
                    await self._agent.call("DestroySandbox", DESTROY_SECONDS)

    async def __aenter__(self) -> Sandbox:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Watches.

    def _watch(self, work: Any) -> None:
        task = asyncio.create_task(work, name=f"sandbox-{self.id}")
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _watch_vm(self) -> None:
        self._end_soon(await self.hypervisor.wait_vm())

    async def _watch_agent(self) -> None:
        assert self._agent is not None
        lost = await self._agent.wait_lost()
        # A guest that ends takes its connections along, and has more to say of it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FATE_SECONDS / 2):
                await self._reason_known.wait()
        self._end_soon(f"its agent is lost: {lost}")

    async def _watch_health(self) -> None:
        assert self._agent is not None
        heard = time.monotonic()
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            if self.paused:
                heard = time.monotonic()
                continue
            with contextlib.suppress(RpcError):
                await self._agent.check(HEALTH_SECONDS)
                heard = time.monotonic()
            if time.monotonic() - heard > SILENT_SECONDS:
                self._end_soon(f"its agent has not answered for {SILENT_SECONDS:g} s")
                return

    async def _watch_memory(self) -> None:
        assert self._agent is not None
        with contextlib.suppress(RpcError):
            while True:
                event = await self._agent.call("GetOOMEvent")
                self.log.warning("out of memory", extra={"container": event["container_id"]})
                container = self.containers.get(event["container_id"])
                if container is not None:
                    container.out_of_memory = True

    async def _fate_of_start(self) -> str:
        """Why a call to the agent failed while nobody watches the VM yet."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FATE_SECONDS):
                return f"the guest is gone: {await self.hypervisor.wait_vm()}"
        return "its agent is lost"

    async def _fate(self) -> str:
        """Why a call to the agent failed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FATE_SECONDS):
                await self._reason_known.wait()
        return f"sandbox {self.id} has ended: {self.reason or 'its agent is lost'}"

    def _require_running(self, what: str) -> None:
        if self._state is not SandboxState.RUNNING:
            why = f" ({self.reason})" if self.reason else ""
            raise RuntimeFault(f"sandbox {self.id} is {self._state}{why} and cannot be {what}")
        if self.paused and what != "asked":
            raise RuntimeFault(f"sandbox {self.id} is paused and cannot be {what}; resume it first")

    def _make_record(self) -> SandboxRecord:
        owner = ProcessIdentity.of(os.getpid())
        assert owner is not None
        return SandboxRecord(
            self.id,
            str(self._state),
            owner,
            self._created,
            {"image": self.config.image, "vcpus": self.config.vcpus, "memory_mib": self.config.memory_mib},
            {name: {"args": each.spec.get("process", {}).get("args", [])} for name, each in self.containers.items()},
        )


async def _opened(reference: str, architecture: str, held: contextlib.AsyncExitStack) -> ImageHandle:
    from kata_lab.oci import open_image

    handle = await asyncio.to_thread(open_image, reference, architecture)
    held.callback(handle.close)
    return handle


def _name_mounts(mounts: Sequence[Mapping[str, Any]], directory: Path | None) -> list[dict[str, Any]]:
    """The sandbox's names in place of an image's; in a directory of the host, only where it has such files."""
    taken = {os.path.normpath(mount["destination"]) for mount in mounts}
    return [
        {"destination": f"/etc/{file}", "type": "bind", "source": f"{NAMES}/{file}", **_BOUND}
        for file in NAME_FILES
        if not taken & {f"/etc/{file}", "/etc"}
        and (directory is None or ((directory / "etc").is_dir() and (directory / "etc" / file).is_file()))
    ]


def _import_oci() -> None:
    """While the guest boots, for the first container."""
    importlib.import_module("kata_lab.oci")


__all__ = ["ContainerState", "DirectoryRoot", "LayeredRoot", "RunResult", "Sandbox", "SandboxConfig", "SandboxState"]
