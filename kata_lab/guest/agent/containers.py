"""Containers and their processes: created, started and entered by ``crun``, watched and signalled by the agent.

A container's things are in ``/run/kata-containers/<id>``: its bundle with config.json, and where its root is mounted.
Its processes become children of the agent, which is their subreaper, once crun has ended.
"""

import asyncio
import json
import os

import linux
import storage
from bundle import to_configuration, to_json, to_process
from rpc import (
    ALREADY_EXISTS,
    FAILED_PRECONDITION,
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RpcError,
)

CRUN = "/usr/bin/crun"
STATE = "/run/crun"
CGROUPS = "/sys/fs/cgroup/kata"
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin",)
CHUNK = 1 << 16
_NAME = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"


def check_name(name):
    if not name or len(name) > 128 or name[0] in ".-" or any(each not in _NAME for each in name):
        raise RpcError(INVALID_ARGUMENT, f"{name!r} is no name of a container or process")
    return name


class Process:
    """A process of a container and the agent's ends of its standard streams, -1 for one that is closed."""

    def __init__(self, exec_id, terminal):
        self.exec_id = exec_id
        self.terminal = terminal
        self.pid = 0
        self.stdin = self.stdout = self.stderr = -1
        self.reading = 0

    def close(self):
        for descriptor in {self.stdin, self.stdout, self.stderr}:
            if descriptor >= 0:
                linux.close(descriptor)
        self.stdin = self.stdout = self.stderr = -1


class Container:
    """A container, and its processes by exec_id."""

    def __init__(self, container_id, places, agent):
        self.id = container_id
        self.places = places
        self.bundle = storage.RUN + container_id
        self.cgroup = CGROUPS + "/" + container_id
        self.processes = {}
        self.started = False
        self.oom_kills = 0
        self.oom_watch = -1
        self._agent = agent

    def process(self, exec_id):
        found = self.processes.get(exec_id)
        if found is None:
            raise RpcError(NOT_FOUND, f"container {self.id} has no process {exec_id!r}")
        return found

    async def _crun(self, arguments, standard=(-1, -1, -1)):
        """Run crun; its own words on failure."""
        log = f"{self.bundle}/crun.log"
        process = linux.spawn([CRUN, "--root", STATE, "--log", log] + arguments, ENVIRONMENT, standard)
        self._agent.children.keep(process)
        status = await self._agent.children.wait(process)
        self._agent.children.release(process)
        if status != 0:
            said = ""
            try:
                with open(log) as file:
                    said = file.read().strip().split("\n")[-1]
                os.remove(log)
            except OSError:
                pass
            for mark in (": ", "Z: "):
                if said[:4].isdigit() and mark in said:
                    said = said.split(mark, 1)[1]
            raise RpcError(INTERNAL, said or f"crun {arguments[0]} ended with status {status}")

    async def _launch(self, process, arguments):
        """Run crun for a new process with its streams; afterwards the process waits or runs, and is our child."""
        pid_file = f"{self.bundle}/{process.exec_id}.pid"
        arguments = arguments[:1] + ["--pid-file", pid_file] + arguments[1:]
        if process.terminal:
            socket = f"{self.bundle}/tty"
            listener = linux.listen_unix(socket)
            try:
                arguments = arguments[:1] + ["--console-socket", socket] + arguments[1:]
                terminal = asyncio.create_task(self._terminal(listener))
                try:
                    await self._crun(arguments)
                    process.stdin = process.stdout = await terminal
                except BaseException:
                    terminal.cancel()
                    raise
            finally:
                linux.close(listener)
                os.remove(socket)
            linux.set_nonblocking(process.stdout)
        else:
            inner = []
            try:
                theirs, process.stdin = linux.pipe()
                inner.append(theirs)
                process.stdout, theirs = linux.pipe()
                inner.append(theirs)
                process.stderr, theirs = linux.pipe()
                inner.append(theirs)
                await self._crun(arguments, inner)
            except BaseException:
                process.close()
                raise
            finally:
                for descriptor in inner:
                    linux.close(descriptor)
            for descriptor in (process.stdin, process.stdout, process.stderr):
                linux.set_nonblocking(descriptor)
        with open(pid_file) as file:
            process.pid = int(file.read())
        os.remove(pid_file)
        self._agent.children.keep(process.pid)

    async def _terminal(self, listener):
        connection = await linux.accept(listener)
        try:
            return await linux.receive_descriptor(connection)
        finally:
            linux.close(connection)

    async def create(self, spec):
        linux.make_directories(self.bundle)
        configuration = to_configuration(spec, self.id)
        with open(self.bundle + "/config.json", "w") as file:
            json.dump(configuration, file)
        process = Process(self.id, bool(configuration["process"].get("terminal")))
        self.processes[self.id] = process
        # Not --no-new-keyring: a keyring costs nothing here.
        await self._launch(process, ["create", "--bundle", self.bundle, self.id])
        self.oom_watch = self._agent.watch_memory(self)

    async def start(self):
        if self.started:
            raise RpcError(FAILED_PRECONDITION, f"container {self.id} was started already")
        await self._crun(["start", self.id])
        self.started = True

    async def exec(self, exec_id, message):
        if exec_id in self.processes:
            raise RpcError(ALREADY_EXISTS, f"container {self.id} has a process {exec_id!r} already")
        description = to_process(message)
        process = Process(exec_id, bool(description.get("terminal")))
        path = f"{self.bundle}/{exec_id}.json"
        with open(path, "w") as file:
            json.dump(description, file)
        self.processes[exec_id] = process
        try:
            await self._launch(process, ["exec", "--detach", "--process", path, self.id])
        except BaseException:
            del self.processes[exec_id]
            raise
        finally:
            os.remove(path)

    def pids(self):
        """Of all processes in the container, below its cgroup."""
        found = []
        pending = [self.cgroup]
        while pending:
            place = pending.pop()
            try:
                with open(place + "/cgroup.procs") as file:
                    found += [int(line) for line in file]
                for entry in os.ilistdir(place):
                    if entry[1] == 0x4000:
                        pending.append(place + "/" + entry[0])
            except OSError:
                continue
        return found

    def signal(self, exec_id, number):
        if exec_id == "":
            if number == linux.SIGKILL:
                self._write("cgroup.kill", "1")
            else:
                for pid in self.pids():
                    linux.kill(pid, number)
            return
        process = self.process(exec_id)
        if self._agent.children.ended(process.pid) or not linux.kill(process.pid, number):
            raise RpcError(NOT_FOUND, f"process {exec_id!r} of container {self.id} has ended")

    async def freeze(self, frozen):
        self._write("cgroup.freeze", "1" if frozen else "0")
        while f"frozen {int(frozen)}" not in self.read("cgroup.events"):
            await asyncio.sleep_ms(1)

    async def update(self, resources):
        path = self.bundle + "/resources.json"
        with open(path, "w") as file:
            json.dump(to_json(resources), file)
        try:
            await self._crun(["update", "--resources", path, self.id])
        finally:
            os.remove(path)

    async def remove(self):
        """Kill what is left, wait for it, and take everything away."""
        if self.oom_watch >= 0:
            self._agent.unwatch_memory(self)
        if linux.exists(self.cgroup):
            self._write("cgroup.freeze", "0")
            self._write("cgroup.kill", "1")
        for process in self.processes.values():
            if process.pid:
                await self._agent.children.wait(process.pid)
        try:
            await self._crun(["delete", "--force", self.id])
        except RpcError:
            pass  # crun's own record may be gone with what failed before
        for process in self.processes.values():
            process.close()
            self._agent.children.release(process.pid)
        self.processes.clear()
        storage.undo(self.places)
        storage.remove_tree(self.bundle)

    # Streams.

    async def read_output(self, exec_id, which, limit):
        process = self.process(exec_id)
        descriptor = process.stdout if which == 1 or process.terminal else process.stderr
        if descriptor < 0 or (process.terminal and which == 2):
            return b""
        buffer = bytearray(min(limit or CHUNK, CHUNK))
        process.reading += 1
        try:
            while True:
                count = linux.read_now(descriptor, buffer, len(buffer))
                if count >= 0:
                    return memoryview(buffer)[:count]
                await linux.readable(descriptor)
                if process.stdout < 0:
                    return b""
        finally:
            process.reading -= 1

    async def write_input(self, exec_id, data):
        process = self.process(exec_id)
        if process.stdin < 0:
            raise RpcError(FAILED_PRECONDITION, f"the input of process {exec_id!r} is closed")
        try:
            await linux.write_all(process.stdin, data)
        except OSError as error:
            if error.args[0] in (linux.EPIPE, linux.EIO):
                raise RpcError(FAILED_PRECONDITION, f"process {exec_id!r} reads no more")
            raise

    def close_input(self, exec_id):
        process = self.process(exec_id)
        if process.terminal:
            # A terminal has one descriptor for both ways; its end of file is a character.
            linux._write(process.stdin, b"\x04", 1)
        elif process.stdin >= 0:
            linux.close(process.stdin)
            process.stdin = -1

    # The control group (Documentation/admin-guide/cgroup-v2.rst).

    def _write(self, name, text):
        try:
            with open(f"{self.cgroup}/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            if error.args[0] != linux.ENOENT:
                raise

    def read(self, name):
        """A file of its control group, empty if there is none."""
        try:
            with open(f"{self.cgroup}/{name}") as file:
                return file.read()
        except OSError:
            return ""

    def pairs(self, name):
        """A flat keyed file: name → number."""
        found = {}
        for line in self.read(name).split("\n"):
            key, _, value = line.partition(" ")
            if value.isdigit():
                found[key] = int(value)
        return found

    def number(self, name):
        """A single value; 0 for none or ``max``."""
        text = self.read(name).strip()
        return int(text) if text.isdigit() else 0

    def statistics(self):
        """As the message CgroupStats."""
        cpu, memory = self.pairs("cpu.stat"), self.pairs("memory.stat")
        blocks = []
        for line in self.read("io.stat").split("\n"):
            words = line.split()
            if len(words) > 1 and ":" in words[0]:
                major, _, minor = words[0].partition(":")
                for word in words[1:]:
                    name, _, value = word.partition("=")
                    if name in ("rbytes", "wbytes"):
                        operation = "Read" if name == "rbytes" else "Write"
                        blocks.append({"major": int(major), "minor": int(minor), "op": operation, "value": int(value)})
        return {
            "cpu_stats": {
                "cpu_usage": {
                    "total_usage": cpu.get("usage_usec", 0) * 1000,
                    "usage_in_kernelmode": cpu.get("system_usec", 0) * 1000,
                    "usage_in_usermode": cpu.get("user_usec", 0) * 1000,
                },
                "throttling_data": {
                    "periods": cpu.get("nr_periods", 0),
                    "throttled_periods": cpu.get("nr_throttled", 0),
                    "throttled_time": cpu.get("throttled_usec", 0) * 1000,
                },
            },
            "memory_stats": {
                "cache": memory.get("file", 0),
                "usage": {
                    "usage": self.number("memory.current"),
                    "max_usage": self.number("memory.peak"),
                    "failcnt": self.pairs("memory.events").get("max", 0),
                    "limit": self.number("memory.max"),
                },
                "stats": memory,
            },
            "pids_stats": {"current": self.number("pids.current"), "limit": self.number("pids.max")},
            "blkio_stats": {"io_service_bytes_recursive": blocks},
        }
