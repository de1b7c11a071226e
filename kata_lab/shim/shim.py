"""A sandbox and its containers as the services of the shim see them.

Containers come in two ways. Those of ``kata-lab`` have a record on disk, which follows their life; they leave the guest
when they end, are started again if their policy says so, and when the last one has ended so does the shim. Those of
containerd's Task API have a bundle; they stay until they are deleted, and the shim until it is told to shut down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.resource.rootfs import LayeredRoot
from kata_lab.resource.sizing import size_for
from kata_lab.runtime import Sandbox, SandboxConfig
from kata_lab.runtime.state import ProcessIdentity
from kata_lab.shim.hub import Hub
from kata_lab.shim.output_log import OutputLog
from kata_lab.shim.records import UNKNOWN_STATUS, ContainerDirectory, ContainerRecord
from kata_lab.shim.request import Bundle, Prepared, exec_process, merged, prepare, prepare_bundle
from kata_lab.shim.stdio import StdioPaths
from kata_lab.shim.task import ExecTask, Task, TaskProcess
from kata_lab.ttrpc import RpcError, StatusCode
from vmm.config import NetworkConfig

LONGEST_DELAY: Final = 60.0  #: seconds before a container is started again; doubles from one
STEADY_SECONDS: Final = 600.0  #: after running so long a container starts again without delay
LONGEST_HOST_NAME: Final = 63  #: as in DNS, RFC 1035, 2.3.4
MOST_MARKS: Final = 100  #: of the time line
MOST_EXECS: Final = 512  #: of one container that are known at once

_log = logging.getLogger(__name__)

MakeSandbox = Callable[[SandboxConfig], Sandbox]


class Shim:
    """One sandbox and what runs in it; a context manager.

    Args:
        sandbox_id: its name.
        make_sandbox: makes the runtime's sandbox.
        stay: it stays when the last container has ended.
    """

    def __init__(self, sandbox_id: str, make_sandbox: MakeSandbox = Sandbox, stay: bool = False) -> None:
        self.id = sandbox_id
        self.tasks: dict[str, Task] = {}
        self.over = asyncio.Event()
        self.stay = stay
        self._make_sandbox = make_sandbox
        self._sandbox: Sandbox | None = None
        self._order = asyncio.Lock()
        self._prepared: dict[str, Prepared] = {}
        self._failures: dict[str, int] = {}
        self._again: dict[str, asyncio.Task[None]] = {}
        self._wanted_to_end: set[str] = set()
        self._watch: asyncio.Task[None] | None = None
        self._marks = [("process", _process_began()), ("shim runs", time.monotonic())]
        self._sandbox_began = 0.0
        #: Why the sandbox is no more, once it is not.
        self._reason = ""

    @property
    def timeline(self) -> list[tuple[str, float]]:
        """What happened when: name and seconds since the process began, in order."""
        steps = [*self._marks]
        steps += [(name, self._sandbox_began + at) for name, at in self.sandbox.timeline]
        for task in self.tasks.values():
            if task.process.hub.first_output:
                steps.append((f"first output of {task.id}", task.process.hub.first_output))
        return sorted(((name, at - self._marks[0][1]) for name, at in steps), key=lambda each: each[1])

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox.

        Raises:
            RpcError: there is none yet.
        """
        if self._sandbox is None:
            raise RpcError(StatusCode.FAILED_PRECONDITION, f"sandbox {self.id} has no container yet: create one")
        return self._sandbox

    def _mark(self, name: str) -> None:
        self._marks.append((name, time.monotonic()))
        del self._marks[MOST_MARKS:]

    # The sandbox.

    async def start(self, container_ids: Sequence[str]) -> None:
        """Start the sandbox with containers that have records, sized by their limits.

        Raises:
            KataLabError or VmmError: something of it cannot be; nothing is left running.
        """
        try:
            directories = [ContainerDirectory(each) for each in container_ids]
            records = [each.read() for each in directories]
            prepared = []
            for record in records:
                prepared.append(await self._prepare(record))
            self._mark("root file systems ready")
            hostname = records[0].pod or records[0].name if records else ""
            network = next((each.request["network"] for each in records if each.request.get("network")), None)
            own = next((each for each in records if each.id == self.id and keeps_writes(each)), None)
            scratch = None if own is None else ContainerDirectory(own.id).scratch
            room = records[0].request.get("room", {}) if records else {}
            await self._start_sandbox([each.spec for each in prepared], hostname, network, scratch, room)
            for record in records:
                await self.create_recorded(record.id)
        except BaseException:
            await self.stop()
            raise

    async def _prepare(self, record: ContainerRecord) -> Prepared:
        """What a container is made of; kept until it is removed."""
        if record.id not in self._prepared:
            found = await asyncio.to_thread(prepare, _request(record))
            if isinstance(found.rootfs, LayeredRoot):
                found = replace(found, rootfs=replace(found.rootfs, writes="kept" if keeps_writes(record) else "own"))
            self._prepared[record.id] = found
        return self._prepared[record.id]

    async def _start_sandbox(
        self,
        specs: Sequence[dict[str, Any]],
        hostname: str,
        network: dict[str, Any] | None = None,
        scratch: Path | None = None,
        room: Mapping[str, int] | None = None,
    ) -> None:
        size = size_for(specs)
        room = room or {}
        config = SandboxConfig(
            id=self.id,
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            max_vcpus=max(room.get("max_vcpus", 0), size.vcpus),
            max_memory_mib=max(room.get("max_memory_mib", 0), size.memory_mib),
            hostname=_host_name(hostname or self.id),
            network=None if network is None else NetworkConfig(**network),
            scratch=scratch,
        )
        sandbox = self._make_sandbox(config)
        self._sandbox_began = time.monotonic()
        await sandbox.start()
        self._sandbox = sandbox
        self._watch = asyncio.create_task(self._watch_sandbox(sandbox), name="watch-sandbox")

    async def _watch_sandbox(self, sandbox: Sandbox) -> None:
        await sandbox.stopped.wait()
        self._reason = sandbox.reason
        for task in tuple(self.tasks.values()):
            # Those that run learn it from the end of their connection.
            if task.state == "created":
                task.process.status = UNKNOWN_STATUS
                await self._ended(task)
                await task.process.abandon()
        self.over.set()

    async def stop(self) -> None:
        """Stop the sandbox and everything in it. A second time is nothing."""
        for again in self._again.values():
            again.cancel()
        await asyncio.gather(*self._again.values(), return_exceptions=True)
        self._again.clear()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        self._wanted_to_end.update(self.tasks)
        self._reason = self._reason or "its sandbox was stopped"
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await sandbox.stop()
        for task in tuple(self.tasks.values()):
            if task.state in ("running", "paused") and not task.process.ended.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(task.process.ended.wait(), 2.0)
            for each in task.execs.values():
                await each.process.abandon()
            await task.process.abandon()
            if task.state != "stopped":
                await self._ended(task)
            task.release()
        self.tasks.clear()
        for prepared in self._prepared.values():
            prepared.release()
        self._prepared.clear()
        self.over.set()

    # Containers.

    def find(self, task_id: str) -> Task:
        """A container by its name.

        Raises:
            RpcError: there is none (NOT_FOUND).
        """
        if task_id not in self.tasks:
            raise RpcError(StatusCode.NOT_FOUND, f"sandbox {self.id} has no container {task_id!r}")
        return self.tasks[task_id]

    async def create_recorded(self, container_id: str) -> Task:
        """Create a container that has a record; one of the same name that has ended makes room.

        Raises:
            KataLabError: it cannot be, and the record says so.
        """
        directory = ContainerDirectory(container_id)
        record = directory.read()
        async with self._order:
            before = self.tasks.get(container_id)
            if before is not None and before.state != "stopped":
                raise RpcError(StatusCode.ALREADY_EXISTS, f"container {container_id} is {before.state} already")
            if before is not None:
                before.release()
                del self.tasks[container_id]
            prepared = await self._prepare(record)
            container = await self.sandbox.create_container(prepared.spec, prepared.rootfs, container_id)
            log = OutputLog(directory.log)
            record.terminal = bool(prepared.spec["process"].get("terminal", False))
            process = TaskProcess("", record.terminal, record.stdin, Hub(log))
            task = Task(container_id, container, process, directory=directory, record=record, release=log.close)
            self.tasks[container_id] = task
            record.stop_signal = prepared.stop_signal
            record.reason, record.status, record.out_of_memory = "", None, False
            record.started = record.finished = 0.0
            self._mark(f"{container_id} created")
            await self._note(task)
        return task

    async def create_bundle(self, task_id: str, bundle: Bundle, terminal: bool, paths: StdioPaths) -> Task:
        """Create a container of an OCI bundle, and the sandbox with the first one.

        Raises:
            KataLabError: it cannot be; nothing is left behind.
        """
        process = TaskProcess("", terminal, bool(paths.stdin), Hub(), paths)
        async with self._order:
            if task_id in self.tasks:
                raise RpcError(StatusCode.ALREADY_EXISTS, f"container {task_id} is {self.tasks[task_id].state} already")
            # The loop's own thread is the one whose mounts the VM's threads see.
            prepared = prepare_bundle(bundle)
            try:
                prepared.spec["process"]["terminal"] = terminal
                if self._sandbox is None:
                    await self._start_sandbox([prepared.spec], prepared.spec.get("hostname", ""))
                container = await self.sandbox.create_container(prepared.spec, prepared.rootfs, task_id)
            except BaseException:
                prepared.release()
                raise
            self._prepared[task_id] = prepared
            task = self.tasks[task_id] = Task(task_id, container, process, bundle=str(bundle.path))
        return task

    async def start_task(self, task_id: str, exec_id: str = "") -> None:
        """Start the first process of a container, or an exec of it.

        Raises:
            KataLabError: it runs already, or cannot be started.
        """
        task = self.find(task_id)
        if exec_id:
            await self._start_exec(task, exec_id)
            return
        async with task.order:
            container = task.require("started", "created")
            try:
                await task.process.start(container.start, lambda: self._ended(task))
            except KataLabError as error:
                task.process.status = 127
                await self._ended(task, str(error))
                await task.process.abandon()
                raise
            self._mark(f"{task_id} started")
            # It may have ended by now.
            if task.state == "created":
                task.state = "running"
                if task.record is not None:
                    task.record.started = time.time()
                    await self._note(task)

    async def exec(self, task_id: str, exec_id: str, description: dict[str, Any], paths: StdioPaths) -> None:
        """Note a process that is started later.

        Args:
            task_id: its container.
            exec_id: its name.
            description: as the OCI configuration's ``process``.
            paths: where its streams go; without any it has a standard input for whoever attaches.

        Raises:
            RpcError: the container does not run, or has a process of that name, or too many.
        """
        task = self.find(task_id)
        task.require("entered", "running")
        if not exec_id or exec_id == task.id or exec_id in task.execs:
            text = f"container {task.id} has a process {exec_id!r} already: choose another name"
            raise RpcError(StatusCode.ALREADY_EXISTS, text)
        if len(task.execs) >= MOST_EXECS:
            text = f"container {task.id} has {MOST_EXECS} processes beside its first: delete those that have ended"
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, text)
        terminal = bool(description.get("terminal", False))
        stdin = bool(paths.stdin) or not (paths.stdout or paths.stderr)
        task.execs[exec_id] = ExecTask(TaskProcess(exec_id, terminal, stdin, Hub(), paths), description)

    def exec_wish(self, task_id: str, wish: dict[str, Any]) -> dict[str, Any]:
        """The description of an exec that says only how it differs from its container."""
        task = self.find(task_id)
        container = task.require("entered", "running")
        prepared = self._prepared.get(task_id)
        return exec_process(container.spec, prepared.tree if prepared is not None else None, wish)

    async def _start_exec(self, task: Task, exec_id: str) -> None:
        task.find(exec_id)
        each = task.execs[exec_id]
        container = task.require("entered", "running")
        if each.process.started.is_set():
            raise RpcError(StatusCode.FAILED_PRECONDITION, f"the process {exec_id!r} was started already")

        async def ended() -> None:
            container.execs.pop(exec_id, None)
            if each.process.paths == StdioPaths():
                # Nobody but those who are attached waits for it.
                task.execs.pop(exec_id, None)

        await each.process.start(lambda: container.exec(each.description, exec_id), ended)

    async def kill(self, task_id: str, exec_id: str, number: int, everyone: bool = False) -> None:
        """Send a signal to a process.

        Raises:
            RpcError: it is not there to be signalled.
        """
        task = self.find(task_id)
        if task.record is not None and not exec_id and number in (signal.SIGKILL, signal.SIGTERM, _stop(task.record)):
            self._wanted_to_end.add(task_id)
        if (again := self._again.pop(task_id, None)) is not None:
            again.cancel()
            await asyncio.gather(again, return_exceptions=True)
            await self._rest(task)
            return
        process = task.find(exec_id)
        if process.status is not None:
            raise RpcError(StatusCode.NOT_FOUND, f"the process of container {task_id} has ended already")
        if exec_id:
            if process.process is None:
                raise RpcError(StatusCode.FAILED_PRECONDITION, f"the process {exec_id!r} was not started yet")
            await process.process.kill(number)
        elif task.state == "created" and number in (signal.SIGKILL, signal.SIGTERM):
            await self.delete(task_id)
        else:
            await task.require("signalled", "running", "paused").kill(number, everyone)

    async def pause(self, task_id: str) -> None:
        """Freeze a container."""
        task = self.find(task_id)
        async with task.order:
            await task.require("paused", "running").pause()
            task.state = "paused"
            await self._note(task)

    async def resume(self, task_id: str) -> None:
        """Undo :meth:`pause`."""
        task = self.find(task_id)
        async with task.order:
            await task.require("resumed", "paused").resume()
            task.state = "running"
            await self._note(task)

    async def update(self, task_id: str, resources: dict[str, Any]) -> None:
        """Change a container's limits."""
        task = self.find(task_id)
        async with task.order:
            await task.require("updated", "created", "running", "paused").update(resources)
            if task.record is not None:
                # For when it is started again.
                linux = self._prepared[task_id].spec.setdefault("linux", {})
                linux["resources"] = merged(linux.get("resources") or {}, resources)
                task.record.request["resources"] = merged(task.record.request.get("resources", {}), resources)
                await self._note(task)

    async def delete(self, task_id: str, exec_id: str = "") -> TaskProcess:
        """Forget a process that has ended, or was never started; the first one takes its container with it.

        Raises:
            RpcError: it runs (FAILED_PRECONDITION).
        """
        task = self.find(task_id)
        if exec_id:
            process = task.find(exec_id)
            if process.started.is_set() and process.status is None:
                raise RpcError(StatusCode.FAILED_PRECONDITION, f"the process {exec_id!r} runs: kill it first")
            del task.execs[exec_id]
            await process.abandon()
            return process
        async with task.order:
            if task.state in ("running", "paused") or task_id in self._again:
                text = f"container {task_id} is {task.state}: kill it first"
                raise RpcError(StatusCode.FAILED_PRECONDITION, text)
            if task.state == "created":
                await self._ended(task, "it was never started")
            if task.container is not None:
                container, task.container = task.container, None
                await container.remove()
            await task.process.abandon()
            task.release()
            self.tasks.pop(task_id, None)
            prepared = self._prepared.pop(task_id, None)
            if prepared is not None:
                try:
                    await self._discard(task, prepared)
                finally:
                    prepared.release()
        self._end_if_idle()
        return task.process

    async def _discard(self, task: Task, prepared: Prepared) -> None:
        """Remove what a container wrote and kept, where that is on the disk of a sandbox that stays."""
        root = prepared.rootfs
        if self._sandbox is None or task.id == self.id or not isinstance(root, LayeredRoot) or root.writes != "kept":
            return
        with contextlib.suppress(KataLabError):
            # Only the guest can: a container that keeps nothing takes it along.
            last = await self._sandbox.create_container(prepared.spec, replace(root, writes="last"), task.id)
            await last.remove()

    # The end of a container.

    async def _ended(self, task: Task, reason: str = "") -> None:
        """The first process of a container has ended, or never will run."""
        if task.state == "stopped":
            return
        task.state = "stopped"
        for each in tuple(task.execs.values()):
            if not each.process.started.is_set():
                await each.process.abandon()
        if task.record is None or task.directory is None:
            return
        container, task.container = task.container, None
        record = task.record
        record.status = task.process.status if task.process.status is not None else UNKNOWN_STATUS
        record.finished = time.time()
        record.reason = reason or self._reason
        record.out_of_memory = container is not None and container.out_of_memory
        again = self._starts_again(task, record)
        if again:
            task.state = "restarting"
            # From the moment that anybody can see it, it can be ended.
            self._again[task.id] = asyncio.create_task(self._start_again(task, record), name=f"restart-{task.id}")
        if record.auto_remove and not again:
            await asyncio.to_thread(task.directory.remove)
        else:
            await self._note(task)
        if container is not None:
            try:
                await container.remove()
            except KataLabError as error:
                _log.warning("container %s was not removed in the guest: %s", task.id, error)
        if not again:
            self._end_if_idle()

    def _starts_again(self, task: Task, record: ContainerRecord) -> bool:
        policy = record.request.get("restart", "never")
        wanted = policy == "always" or (policy == "on-failure" and record.status != 0)
        alive = self._sandbox is not None and not self._sandbox.stopped.is_set()
        return wanted and alive and bool(record.started) and task.id not in self._wanted_to_end

    async def _start_again(self, task: Task, record: ContainerRecord) -> None:
        failures = 0 if record.finished - record.started > STEADY_SECONDS else self._failures.get(task.id, 0)
        self._failures[task.id] = failures + 1
        await task.process.ended.wait()
        await asyncio.sleep(min(2.0 ** (failures - 1), LONGEST_DELAY) if failures else 0.0)
        task.state = "stopped"
        try:
            record.restarts += 1
            await self._note(task)
            await self.create_recorded(task.id)
            self._again.pop(task.id, None)
            await self.start_task(task.id)
        except KataLabError as error:
            _log.warning("container %s was not started again: %s", task.id, error)
            self._again.pop(task.id, None)
            record.reason = f"it was not started again: {error}"
            await self._rest(task)

    async def _rest(self, task: Task) -> None:
        """It is not started again after all."""
        task.state = "stopped"
        await self._note(task)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        """The shim of ``kata-lab``'s containers ends with the last of them."""
        idle = not any(task.state != "stopped" or task.id in self._again for task in self.tasks.values())
        if idle and not self.stay:
            self.over.set()

    async def _note(self, task: Task) -> None:
        if task.record is None or task.directory is None:
            return
        async with task.noting:
            # What is true now, so that of several writes the last one is right.
            task.record.state = task.state
            task.record.creator = None
            await asyncio.to_thread(task.directory.write, replace(task.record))


def _process_began() -> float:
    """When this process was started, on the clock of time.monotonic(), to a hundredth of a second."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - identity.started / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def keeps_writes(record: ContainerRecord) -> bool:
    """Whether a container that is started again sees what it wrote; in a pod it begins anew, as in Kubernetes."""
    return not record.auto_remove and not record.pod


def _request(record: ContainerRecord) -> dict[str, Any]:
    """With the name that a container's host has if nobody wished for one."""
    wishes = {"hostname": _host_name(record.pod or record.id), **record.request.get("wishes", {})}
    return {**record.request, "wishes": wishes}


def _stop(record: ContainerRecord) -> int:
    try:
        return int(signal.Signals[record.stop_signal])
    except KeyError:
        return signal.SIGTERM


def _host_name(name: str) -> str:
    """As a guest's kernel takes it."""
    return name.replace("_", "-")[:LONGEST_HOST_NAME]
