"""The agent: it serves Kata's agent API on vsock port 1024 and carries it out in this guest.

Interface: kata_lab/protocol/agent.proto and health.proto (Kata Containers 3). Left out: AddSwap, GetIPTables,
SetIPTables, MemHotplugByProbe, SetPolicy, ResizeVolume, RemoveStaleVirtiofsShareMounts, AddARPNeighbors, shared mounts,
hooks, guest user namespaces: they answer UNIMPLEMENTED.
"""

import asyncio
import gc
import json
import os
import time

import containers
import linux
import network
import storage
from rpc import ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, Raw, RpcError, serve

VERSION = "3.0.0-kata-lab"
RPC_PORT, LOG_PORT, CONSOLE_PORT = 1024, 1025, 1026
LOG_LINES = 200


class Agent:
    """One sandbox and its containers."""

    def __init__(self):
        self.children = linux.Children()
        self.containers = {}
        self.sandbox_id = None
        self.places = []
        self.log_lines = []
        self.log_count = 0
        self.log_added = asyncio.Event()
        self._out_of_memory = []
        self._memory_event = asyncio.Event()
        self._watched = {}

    def begin(self):
        self.children.begin()
        self._files = linux.FileWatch()
        asyncio.create_task(self._watch_files())
        for controller in ("cpu", "memory", "pids", "io"):
            for place in ("/sys/fs/cgroup", "/sys/fs/cgroup/kata"):
                try:
                    linux.make_directories(place)
                    with open(place + "/cgroup.subtree_control", "w") as file:
                        file.write("+" + controller)
                except OSError:
                    pass  # a kernel without this controller

    def log(self, level, message):
        line = {"level": level, "msg": message, "ts": time.time(), "sandbox": self.sandbox_id or ""}
        self.log_lines.append(json.dumps(line))
        self.log_count += 1
        del self.log_lines[:-LOG_LINES]
        self.log_added.set()

    def container(self, request):
        found = self.containers.get(request["container_id"])
        if found is None:
            raise RpcError(NOT_FOUND, f"there is no container {request['container_id']!r}")
        return found

    # Health.

    async def check(self, request):
        return {"status": 1}

    async def version(self, request):
        return {"grpc_version": "0.0.1", "agent_version": VERSION}

    # The sandbox.

    async def create_sandbox(self, request):
        if self.sandbox_id is not None:
            raise RpcError(ALREADY_EXISTS, f"this guest holds sandbox {self.sandbox_id!r} already")
        if request["hostname"]:
            linux.set_hostname(request["hostname"])
        for module in request["kernel_modules"]:
            raise RpcError(INVALID_ARGUMENT, f"module {module['name']!r} is to be declared by the image")
        self.places = storage.mount_all(request["storages"])
        linux.make_directories("/run/kata-containers/sandbox")
        with open("/run/kata-containers/sandbox/resolv.conf", "w") as file:
            for line in request["dns"]:
                file.write(line + "\n")
        self.sandbox_id = request["sandbox_id"]
        self.log("info", "sandbox created")

    async def destroy_sandbox(self, request):
        for container in list(self.containers.values()):
            del self.containers[container.id]
            await container.remove()
        storage.undo(self.places)
        os.sync() if hasattr(os, "sync") else None
        self.sandbox_id = None
        self._memory_event.set()

    async def guest_details(self, request):
        return {
            "agent_details": {
                "version": VERSION,
                "init_daemon": False,
                "storage_handlers": ["virtio-fs", "blk", "overlayfs", "ephemeral", "local", "bind"],
                "supports_seccomp": True,
            }
        }

    async def online_cpu_mem(self, request):
        base, online = "/sys/devices/system/cpu/", 0
        wanted = request["nb_cpus"]
        for name in sorted(entry[0] for entry in os.ilistdir(base)):
            if not (name[:3] == "cpu" and name[3:].isdigit()):
                continue
            path = f"{base}{name}/online"
            if linux.exists(path):
                with open(path) as file:
                    if file.read().strip() == "0" and (not wanted or online < wanted):
                        with open(path, "w") as switch:
                            switch.write("1")
            online += 1

    async def reseed(self, request):
        with open("/dev/urandom", "wb") as file:
            file.write(request["data"])

    async def set_time(self, request):
        linux.set_time(request["Sec"], request["Usec"] * 1000)

    async def copy_file(self, request):
        path = request["path"]
        if not path.startswith("/run/") or "/../" in path + "/" or "//" in path:
            raise RpcError(INVALID_ARGUMENT, f"path {path!r} must be absolute, plain and below /run")
        if request["file_size"] < 0 or not 0 <= request["offset"] <= request["file_size"]:
            raise RpcError(INVALID_ARGUMENT, f"offset {request['offset']} is not inside the file")
        linux.make_directories(path.rpartition("/")[0], request["dir_mode"] & 0o7777 or 0o755)
        partial = path + ".partial"
        flags = linux.O_WRONLY | linux.O_CREAT | (linux.O_TRUNC if request["offset"] == 0 else 0)
        descriptor = linux.open_file(partial, flags, 0o600)
        try:
            linux.write_at(descriptor, request["offset"], request["data"])
        finally:
            linux.close(descriptor)
        if request["offset"] + len(request["data"]) == request["file_size"]:
            linux.set_owner(partial, request["uid"] & 0xFFFFFFFF, request["gid"] & 0xFFFFFFFF)
            linux.set_mode(partial, request["file_mode"] & 0o7777 or 0o644)
            os.rename(partial, path)

    async def metrics(self, request):
        lines = []
        with open("/proc/meminfo") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in ("MemTotal", "MemFree", "MemAvailable", "Cached"):
                    lines.append(f'kata_guest_meminfo{{item="{name}"}} {int(rest.split()[0]) * 1024}')
        with open("/proc/loadavg") as file:
            for name, value in zip(("load1", "load5", "load15"), file.read().split()):
                lines.append(f'kata_guest_load{{item="{name}"}} {value}')
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    lines.append(f"kata_agent_process_resident_memory_bytes {int(line.split()[1]) * 1024}")
        lines.append(f"kata_agent_heap_bytes {gc.mem_alloc()}")
        lines.append(f"kata_agent_containers {len(self.containers)}")
        return {"metrics": "\n".join(lines) + "\n"}

    # Containers.

    async def create_container(self, request):
        name = containers.check_name(request["container_id"])
        if self.sandbox_id is None:
            raise RpcError(FAILED_PRECONDITION, "there is no sandbox yet")
        if name in self.containers:
            raise RpcError(ALREADY_EXISTS, f"there is a container {name!r} already")
        if request["OCI"] is None or request["OCI"]["Process"] is None or request["OCI"]["Root"] is None:
            raise RpcError(INVALID_ARGUMENT, "a container needs a configuration with process and root")
        container = containers.Container(name, storage.mount_all(request["storages"]), self)
        self.containers[name] = container
        try:
            await container.create(request["OCI"])
        except BaseException:
            del self.containers[name]
            await container.remove()
            raise
        self.log("info", f"container {name} created")

    async def start_container(self, request):
        await self.container(request).start()

    async def remove_container(self, request):
        container = self.container(request)
        del self.containers[container.id]
        if request["timeout"]:
            await asyncio.wait_for(container.remove(), request["timeout"])
        else:
            await container.remove()
        self.log("info", f"container {container.id} removed")

    async def exec_process(self, request):
        if request["process"] is None:
            raise RpcError(INVALID_ARGUMENT, "a process needs a description")
        await self.container(request).exec(containers.check_name(request["exec_id"]), request["process"])

    async def signal_process(self, request):
        if not 0 <= request["signal"] <= 64:
            raise RpcError(INVALID_ARGUMENT, f"signal {request['signal']} must be from 0 to 64")
        self.container(request).signal(request["exec_id"], request["signal"])

    async def wait_process(self, request):
        container = self.container(request)
        process = container.process(request["exec_id"])
        return {"status": await self.children.wait(process.pid)}

    async def update_container(self, request):
        await self.container(request).update(request["resources"] or {})

    async def stats_container(self, request):
        container = self.container(request)
        return {"cgroup_stats": container.statistics(), "network_stats": network.statistics()}

    async def pause_container(self, request):
        await self.container(request).freeze(True)

    async def resume_container(self, request):
        await self.container(request).freeze(False)

    async def ephemeral_mounts(self, request):
        for each in request["storages"]:
            options = list(each["options"]) + ["remount"]
            linux.mount(each["source"], each["mount_point"], each["fstype"], options)

    # Streams.

    async def write_stdin(self, request):
        await self.container(request).write_input(request["exec_id"], request["data"])
        return {"len": len(request["data"])}

    async def read_stdout(self, request):
        return Raw(await self.container(request).read_output(request["exec_id"], 1, request["len"]))

    async def read_stderr(self, request):
        return Raw(await self.container(request).read_output(request["exec_id"], 2, request["len"]))

    async def close_stdin(self, request):
        self.container(request).close_input(request["exec_id"])

    async def resize(self, request):
        process = self.container(request).process(request["exec_id"])
        if not process.terminal:
            raise RpcError(FAILED_PRECONDITION, f"process {process.exec_id!r} has no terminal")
        linux.set_window(process.stdout, request["row"] & 0xFFFF, request["column"] & 0xFFFF)

    # Network.

    async def update_interface(self, request):
        return await network.update_interface(self, request["interface"] or {})

    async def update_routes(self, request):
        return {"Routes": await network.update_routes(self, (request["routes"] or {"Routes": []})["Routes"])}

    async def list_interfaces(self, request):
        return {"Interfaces": await network.list_interfaces(self)}

    async def list_routes(self, request):
        return {"Routes": await network.list_routes(self)}

    # Memory that ran out: memory.events of each container is watched.

    def watch_memory(self, container):
        try:
            number = self._files.add(container.cgroup + "/memory.events")
        except OSError:
            return -1
        self._watched[number] = container
        return number

    def unwatch_memory(self, container):
        self._watched.pop(container.oom_watch, None)
        self._files.remove(container.oom_watch)

    async def _watch_files(self):
        while True:
            for number in await self._files.changed():
                container = self._watched.get(number)
                kills = container.pairs("memory.events").get("oom_kill", 0) if container is not None else 0
                if container is not None and kills > container.oom_kills:
                    container.oom_kills = kills
                    self._out_of_memory.append(container.id)
                    self.log("warning", f"container {container.id} ran out of memory")
                    self._memory_event.set()

    async def oom_event(self, request):
        while not self._out_of_memory:
            self._memory_event.clear()
            await self._memory_event.wait()
            if self.sandbox_id is None:
                raise RpcError(NOT_FOUND, "the sandbox is gone")
        return {"container_id": self._out_of_memory.pop(0)}

    def handlers(self):
        agent = {
            "CreateSandbox": self.create_sandbox,
            "DestroySandbox": self.destroy_sandbox,
            "CreateContainer": self.create_container,
            "StartContainer": self.start_container,
            "RemoveContainer": self.remove_container,
            "ExecProcess": self.exec_process,
            "SignalProcess": self.signal_process,
            "WaitProcess": self.wait_process,
            "UpdateContainer": self.update_container,
            "UpdateEphemeralMounts": self.ephemeral_mounts,
            "StatsContainer": self.stats_container,
            "PauseContainer": self.pause_container,
            "ResumeContainer": self.resume_container,
            "WriteStdin": self.write_stdin,
            "ReadStdout": self.read_stdout,
            "ReadStderr": self.read_stderr,
            "CloseStdin": self.close_stdin,
            "TtyWinResize": self.resize,
            "UpdateInterface": self.update_interface,
            "UpdateRoutes": self.update_routes,
            "ListInterfaces": self.list_interfaces,
            "ListRoutes": self.list_routes,
            "OnlineCPUMem": self.online_cpu_mem,
            "GetGuestDetails": self.guest_details,
            "GetMetrics": self.metrics,
            "ReseedRandomDev": self.reseed,
            "SetGuestDateTime": self.set_time,
            "CopyFile": self.copy_file,
            "GetOOMEvent": self.oom_event,
        }
        found = {"grpc.AgentService/" + name: handler for name, handler in agent.items()}
        found["grpc.Health/Check"] = self.check
        found["grpc.Health/Version"] = self.version
        return found


async def serve_log(agent):
    """Log lines, one JSON object each, to whoever connects: the last ones, then new ones as they come."""

    async def tell(connection):
        try:
            told = 0
            while True:
                new = agent.log_count - told
                told = agent.log_count
                for line in agent.log_lines[-new:] if new else ():
                    await linux.write_all(connection, line.encode() + b"\n")
                if told == agent.log_count:
                    agent.log_added.clear()
                    await agent.log_added.wait()
        except OSError:
            linux.close(connection)

    listener = linux.listen_vsock(LOG_PORT)
    while True:
        asyncio.create_task(tell(await linux.accept(listener)))


async def serve_console(agent):
    """A shell for whoever connects, if the kernel command line says ``agent.debug_console``."""
    listener = linux.listen_vsock(CONSOLE_PORT)
    environment = containers.ENVIRONMENT + ("HOME=/root", "TERM=vt100")
    while True:
        connection = await linux.accept(listener)
        process = linux.spawn(["/bin/sh", "-i"], environment, (connection, connection, connection), True)
        linux.close(connection)
        agent.log("info", f"debug console is process {process}")


async def main():
    agent = Agent()
    agent.begin()
    asyncio.create_task(serve_log(agent))
    with open("/proc/cmdline") as file:
        if " agent.debug_console" in " " + file.read():
            asyncio.create_task(serve_console(agent))
    await serve(RPC_PORT, agent.handlers())


asyncio.run(main())
