"""Containers: created and entered by ``crun``, watched, signalled and taken away by the agent.

A container's files are in ``/run/kata-containers/<id>``: its bundle with config.json, and where its root is mounted.
Its processes become children of the agent, which is their subreaper, once crun has ended. Two things that crun would do
are done here, since they are a few system calls: ``start`` writes to the pipe at which a created container waits, and
``delete`` ends what is left and removes the control group and crun's record.
"""

import asyncio
import json
import os
from collections import OrderedDict

import bundle
import cgroup
import entry
import linux
import storage
from crun import STATE
from processes import Process
from rpc import ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, Output, RpcError

MAX_FINISHED = 64  # processes of a container that have ended and whose streams or status nobody has asked for
MAX_STATUSES = 256  # of processes of which nothing else is left
_NAME = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"


def check_name(name):
    if not name or len(name) > 128 or name[0] in ".-" or name.strip(_NAME):
        raise RpcError(INVALID_ARGUMENT, f"{name!r} is no name of a container or process")
    return name


class Container:
    """A container, and its processes by exec_id; the first process has the container's name."""

    def __init__(self, container_id, crun, children):
        self.id = container_id
        self.places = []
        self.group = cgroup.Group(container_id)
        self.processes = OrderedDict()
        self.statuses = OrderedDict()  # of processes that are forgotten
        self.started = False
        self.removing = False
        self.oom_kills = 0
        self.oom_watch = -1
        self.order = asyncio.Lock()
        self._bundle = f"{storage.RUN}/{container_id}"
        self._crun = crun
        self._children = children
        self._launching = 0
        self._configuration = self._namespaces = None

    def process(self, exec_id):
        found = self.processes.get(exec_id)
        if found is None:
            raise RpcError(NOT_FOUND, f"container {self.id} has no process {exec_id!r}")
        return found

    # Its life.

    async def create(self, spec, pid_namespace):
        linux.make_directories(self._bundle)
        configuration = bundle.to_configuration(spec, self.id, pid_namespace)
        with open(self._bundle + "/config.json", "w") as file:
            file.write(json.dumps(configuration))  # dump() writes every word on its own
        self._configuration = configuration
        self._namespaces = _entered(configuration)
        process = self.processes[self.id] = Process(self.id, configuration["process"])
        await self._launch(process, ["create", "--bundle", self._bundle, self.id])

    async def _launch(self, process, arguments):
        self._launching += 1
        try:
            await process.launch(self._crun, self._children, arguments, self._settle)
        finally:
            self._launching -= 1

    async def start(self):
        if self.started:
            raise RpcError(FAILED_PRECONDITION, f"container {self.id} was started already")
        if self.process(self.id).ended:
            raise RpcError(FAILED_PRECONDITION, f"container {self.id} has ended before it was started")
        fifo = f"{STATE}/{self.id}/exec.fifo"
        try:
            descriptor = linux.open_file(fifo, linux.O_WRONLY | linux.O_NONBLOCK)
        except OSError:
            # It is not where crun 1.21 has it, or nobody waits there: crun knows.
            await self._crun.run(["start", self.id])
        else:
            try:
                os.remove(fifo)
                linux.write(descriptor, b"\0", 1)
            finally:
                linux.close(descriptor)
        self.started = True

    async def exec(self, exec_id, message):
        if exec_id in self.processes:
            raise RpcError(ALREADY_EXISTS, f"container {self.id} has a process {exec_id!r} already")
        if self.removing or self.process(self.id).ended:
            raise RpcError(FAILED_PRECONDITION, f"container {self.id} has ended")
        if self.group.frozen():
            raise RpcError(FAILED_PRECONDITION, f"container {self.id} is paused")
        description = bundle.to_process(message)
        process = self.processes[exec_id] = Process(exec_id, description)
        self.statuses.pop(exec_id, None)
        try:
            program = self._program(description)
            if program is None or not await self._enter(process, program):
                await self._enter_by_crun(process, description)
        except BaseException:
            del self.processes[exec_id]
            raise

    def _program(self, description):
        """What an exec runs, prepared; None if crun is to do it."""
        if self._namespaces is None:
            return None
        try:
            return entry.Program(description, self._configuration["process"])
        except entry.Unfit:
            return None

    async def _enter(self, process, program):
        """False if crun is to do it."""
        first = self.process(self.id).child.number
        group = linux.open_file(self.group.path, linux.O_PATH)

        def make(standard, channel):
            return entry.join(first, self._namespaces, group, program, channel, standard)

        self._launching += 1
        try:
            await process.enter(make, self._children, self._settle)
        except entry.Unfit:
            process.known.clear()
            return False
        finally:
            self._launching -= 1
            linux.close(group)
        return True

    async def _enter_by_crun(self, process, description):
        path = self._crun.path("process")
        try:
            with open(path, "w") as file:
                file.write(json.dumps(description))
            await self._launch(process, ["exec", "--detach", "--process", path, self.id])
        finally:
            os.remove(path)

    async def update(self, resources):
        path = self._crun.path("resources")
        try:
            with open(path, "w") as file:
                file.write(json.dumps(bundle.to_resources(resources)))
            await self._crun.run(["update", "--resources", path, self.id])
        finally:
            os.remove(path)

    async def freeze(self, frozen):
        if self.process(self.id).ended or not await self.group.freeze(frozen):
            raise RpcError(FAILED_PRECONDITION, f"container {self.id} cannot be paused or resumed: it has ended")

    async def remove(self, unmount):
        """End what is left and take everything away; ``unmount`` undoes what was mounted for it."""
        self.removing = True
        while self._launching or self.group.populated():
            self.group.kill()
            await asyncio.sleep_ms(1)
        first = self.processes.get(self.id)
        if first is not None and first.child is not None:
            # It may never have come into its control group.
            first.child.kill(linux.SIGKILL)
            await first.child.wait()
        for process in self.processes.values():
            process.close()
        self.group.remove()
        linux.remove_tree(f"{STATE}/{self.id}")
        unmount(self.places)
        linux.remove_tree(self._bundle)

    # Its processes.

    def signal(self, exec_id, number):
        """Signal one process, or all if ``exec_id`` is empty."""
        if exec_id == "":
            if number == linux.SIGKILL:
                self.group.kill()
            else:
                for pid in self.group.pids():
                    linux.kill(pid, number)
            return
        if exec_id in self.statuses:
            raise RpcError(NOT_FOUND, f"process {exec_id!r} of container {self.id} has ended")
        process = self.process(exec_id)
        if process.child is None:
            raise RpcError(FAILED_PRECONDITION, f"process {exec_id!r} of container {self.id} is being made")
        if number == linux.SIGTERM and exec_id == self.id and _ignores(process.child.number, number):
            number = linux.SIGKILL
        if not process.child.kill(number):
            raise RpcError(NOT_FOUND, f"process {exec_id!r} of container {self.id} has ended")

    async def wait(self, exec_id):
        """The exit status of a process."""
        if exec_id in self.statuses:
            return self.statuses[exec_id]
        process = self.process(exec_id)
        await process.known.wait()
        if process.child is None:
            raise RpcError(NOT_FOUND, f"process {exec_id!r} of container {self.id} was never made")
        status = await process.child.wait()
        process.told = True
        self._settle()
        return status

    def output(self, exec_id, which, limit):
        """What a process wrote: an Output, or None at its end."""
        if exec_id in self.statuses:
            return None
        process = self.process(exec_id)
        stream = process.stdout if which == 1 else process.stderr
        if stream is None or stream.closed:
            return None

        def at_end():
            process.drained(stream)
            self._settle()

        return Output(stream, limit, at_end)

    def _settle(self):
        """Forget processes that have ended and of which all was told, and the oldest of too many others."""
        finished = [each for each in self.processes.values() if each.ended and each.exec_id != self.id]
        excess = len(finished) - MAX_FINISHED
        for process in finished:
            if (process.told and process.unread <= 0) or excess > 0:
                excess -= 1
                process.close()
                del self.processes[process.exec_id]
                self.statuses[process.exec_id] = process.child.status
        while len(self.statuses) > MAX_STATUSES:
            del self.statuses[next(iter(self.statuses))]


def _entered(configuration):
    """The namespaces that an exec enters; None if crun is to do it."""
    section = configuration["linux"]
    kinds = [each["type"] for each in section["namespaces"]]
    if "seccomp" in section or "personality" in section or "mount" not in kinds or "pid" not in kinds:
        return None
    return kinds if all(each in entry.NAMESPACES for each in kinds) else None


def _ignores(pid, number):
    """Whether a process is the first of its PID namespace, and has no handler for a signal.

    The kernel does not give it the signal then (pid_namespaces(7)). From proc(5), status.
    """
    first = handled = False
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    first = line.split()[-1] == "1"
                elif line.startswith("SigCgt:"):
                    handled = int(line.split()[1], 16) >> (number - 1) & 1 == 1
    except OSError:
        return False
    return first and not handled
