"""The methods of the agent API, on one sandbox and its containers.

Interface: kata_lab/protocol/agent.proto and health.proto (Kata Containers 3). Left out: AddSwap, GetIPTables,
SetIPTables, MemHotplugByProbe, SetPolicy, GetVolumeStats, ResizeVolume, RemoveStaleVirtiofsShareMounts,
AddARPNeighbors: they answer UNIMPLEMENTED; shared mounts, hooks, guest user namespaces, and users by name.
"""

import asyncio
import json
import os
import time

import cgroup
import linux
import storage
from children import Children
from containers import Container, check_name
from crun import ENVIRONMENT, Crun
from rpc import ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, RpcError
from streams import FileWatch

VERSION = "3.0.0-kata-lab"
LOG_LINES = 200
_RESOLVER = storage.RUN + "/sandbox/resolv.conf"
_SERVING = 1


class Sandbox:
    """The sandbox, once CreateSandbox has made it: ``id`` is None before and after."""

    def __init__(self):
        self.children = Children()
        self.containers = {}
        self.id = None
        self.log_lines = []
        self.log_count = 0
        self.log_added = asyncio.Event()
        self._crun = Crun(self.children)
        self._storages = storage.Storages()
        self._places = []
        self._pid_namespace = None  # of containers that share one: its first process
        self._restarted = False
        self._out_of_memory = []
        self._memory_event = asyncio.Event()
        self._watched = {}

    def begin(self):
        self.children.begin()
        self._files = FileWatch()
        asyncio.create_task(self._watch_memory())
        cgroup.begin()
        self._restarted = linux.exists(storage.RUN)
        if self._restarted:
            self._clear()

    def _clear(self):
        """Take away what an agent before this one has left."""
        for entry in os.ilistdir(cgroup.GROUPS):
            if entry[1] == 0x4000:
                group = cgroup.Group(entry[0])
                group.kill()
                for _ in range(1000):
                    if not group.populated():
                        break
                    time.sleep_ms(1)
                group.remove()
        storage.clear()
        linux.remove_tree("/run/crun")
        self.log("error", "the agent was started again; its sandbox is gone")

    def log(self, level, message, **more):
        line = {"level": level, "msg": message, "ts": time.time(), "sandbox": self.id or ""}
        line.update(more)
        self.log_lines.append(json.dumps(line))
        self.log_count += 1
        del self.log_lines[:-LOG_LINES]
        self.log_added.set()

    def _container(self, request):
        found = self.containers.get(request["container_id"])
        if found is None:
            why = "; the agent was started again, and what it had is gone" if self._restarted and not self.id else ""
            raise RpcError(NOT_FOUND, f"there is no container {request['container_id']!r}{why}")
        return found

    # Health.

    async def check(self, request):
        return {"status": _SERVING}

    async def version(self, request):
        return {"grpc_version": "0.0.1", "agent_version": VERSION}

    # The sandbox.

    async def create_sandbox(self, request):
        if self.id is not None:
            raise RpcError(ALREADY_EXISTS, f"this guest holds sandbox {self.id!r} already")
        for module in request["kernel_modules"]:
            raise RpcError(INVALID_ARGUMENT, f"module {module['name']!r} is to be declared by the image")
        if request["guest_userns"] or request["guest_hook_path"]:
            raise RpcError(INVALID_ARGUMENT, "guest_userns and guest_hook_path are not supported")
        places = self._storages.mount_all(request["storages"])
        try:
            if request["hostname"]:
                linux.set_hostname(request["hostname"])
            linux.make_directories(storage.RUN + "/sandbox")
            with open(_RESOLVER, "w") as file:
                for line in request["dns"]:
                    file.write(line + "\n")
            if request["sandbox_pidns"]:
                self._pid_namespace = self.children.spawn_reaper()
        except BaseException:
            self._storages.undo(places)
            raise
        self._places = places
        self.id = request["sandbox_id"] or "sandbox"
        self.log("info", "sandbox created")

    async def destroy_sandbox(self, request):
        for container in list(self.containers.values()):
            await self._remove(container)
        if self._pid_namespace is not None:
            self._pid_namespace.kill(linux.SIGKILL)
            await self._pid_namespace.wait()
            self._pid_namespace = None
        self._storages.undo(self._places)
        linux.remove_tree(storage.RUN + "/sandbox")
        linux.synchronise()
        self.log("info", "sandbox destroyed")
        self.id = None
        self._memory_event.set()

    async def guest_details(self, request):
        details = {
            "version": VERSION,
            "device_handlers": ["blk"],
            "storage_handlers": list(storage.DRIVERS),
            "supports_seccomp": True,
        }
        return {"agent_details": details}

    async def online_cpu_mem(self, request):
        """Switch on processors that were added: nb_cpus of them, or all."""
        base, switched = "/sys/devices/system/cpu/", 0
        for name in sorted(entry[0] for entry in os.ilistdir(base)):
            path = f"{base}{name}/online"
            if name[:3] == "cpu" and name[3:].isdigit() and linux.exists(path):
                with open(path) as file:
                    off = file.read().strip() == "0"
                if off and (not request["nb_cpus"] or switched < request["nb_cpus"]):
                    with open(path, "w") as switch:
                        switch.write("1")
                    switched += 1

    async def reseed(self, request):
        linux.reseed_random(request["data"])

    async def set_time(self, request):
        if request["Sec"] < 0 or not 0 <= request["Usec"] < 1000000:
            raise RpcError(INVALID_ARGUMENT, f"{request['Sec']} s and {request['Usec']} us are no time")
        linux.set_time(request["Sec"], request["Usec"] * 1000)

    async def copy_file(self, request):
        import files

        files.copy(request)

    async def metrics(self, request):
        import metrics

        return {"metrics": metrics.text(len(self.containers))}

    # Containers.

    async def create_container(self, request):
        name = check_name(request["container_id"])
        if self.id is None:
            raise RpcError(FAILED_PRECONDITION, "there is no sandbox yet")
        if name in self.containers:
            raise RpcError(ALREADY_EXISTS, f"there is a container {name!r} already")
        spec = request["OCI"]
        if spec is None or "process" not in spec or "root" not in spec:
            raise RpcError(INVALID_ARGUMENT, "a container needs a configuration with process and root")
        self._give_devices(spec, request["devices"])
        namespace = None
        if self._pid_namespace is not None and not self._pid_namespace.status and request["sandbox_pidns"]:
            namespace = f"/proc/{self._pid_namespace.number}/ns/pid"
        elif request["sandbox_pidns"]:
            raise RpcError(FAILED_PRECONDITION, "the sandbox was created without a PID namespace to share")
        container = self.containers[name] = Container(name, self._crun, self.children)
        await container.order.acquire()
        try:
            container.places = self._storages.mount_all(request["storages"])
            await container.create(spec, namespace)
            self._watch(container)
        except BaseException:
            await self._take_away(container)
            raise
        finally:
            container.order.release()
        self.log("info", "container created", container=name)

    def _give_devices(self, spec, devices):
        """Devices of the sandbox that a container is to have, with the numbers that they have in this guest."""
        for device in devices:
            if device["type"] != "blk":
                raise RpcError(INVALID_ARGUMENT, f"device type {device['type']!r} is not known; 'blk' is")
            name = storage.find_disk(device["vm_path"]).rpartition("/")[2]
            with open(f"/sys/class/block/{name}/dev") as file:
                major, minor = (int(each) for each in file.read().split(":"))
            place = {"path": device["container_path"], "type": "b", "major": major, "minor": minor, "fileMode": 0o660}
            rule = {"allow": True, "type": "b", "major": major, "minor": minor, "access": "rwm"}
            section = spec.get("linux")
            if section is None:
                raise RpcError(INVALID_ARGUMENT, "a container with devices needs a configuration for Linux")
            kept = [each for each in section.get("devices", ()) if each.get("path") != device["container_path"]]
            section["devices"] = kept + [place]
            if "resources" in section:
                section["resources"].setdefault("devices", []).append(rule)

    async def _take_away(self, container):
        self._unwatch(container)
        await container.remove(self._storages.undo)
        self.containers.pop(container.id, None)
        left, self._storages.left = self._storages.left, []
        if left:
            # Nobody waits for it: the names are not used again.
            self.children.spawn(["/usr/bin/rm", "-rf"] + left, ENVIRONMENT)

    async def _remove(self, container):
        container.removing = True
        await container.order.acquire()
        try:
            if self.containers.get(container.id) is container:
                await self._take_away(container)
                self.log("info", "container removed", container=container.id)
        finally:
            container.order.release()

    async def start_container(self, request):
        container = self._container(request)
        await container.order.acquire()
        try:
            await container.start()
        finally:
            container.order.release()

    async def remove_container(self, request):
        removal = self._remove(self._container(request))
        if request["timeout"]:
            await asyncio.wait_for(removal, request["timeout"])
        else:
            await removal

    async def exec_process(self, request):
        if request["process"] is None:
            raise RpcError(INVALID_ARGUMENT, "a process needs a description")
        await self._container(request).exec(check_name(request["exec_id"]), request["process"])

    async def signal_process(self, request):
        if not 0 <= request["signal"] <= 64:
            raise RpcError(INVALID_ARGUMENT, f"signal {request['signal']} must be from 0 to 64")
        self._container(request).signal(request["exec_id"], request["signal"])

    async def wait_process(self, request):
        return {"status": await self._container(request).wait(request["exec_id"])}

    async def update_container(self, request):
        container = self._container(request)
        if request["resources"] is None:
            return
        await container.order.acquire()
        try:
            await container.update(request["resources"])
        finally:
            container.order.release()

    async def stats_container(self, request):
        import network

        return {"cgroup_stats": self._container(request).group.statistics(), "network_stats": network.statistics()}

    async def pause_container(self, request):
        await self._container(request).freeze(True)

    async def resume_container(self, request):
        await self._container(request).freeze(False)

    async def ephemeral_mounts(self, request):
        for each in request["storages"]:
            storage.remount(each)

    # Streams.

    async def write_stdin(self, request):
        await self._container(request).process(request["exec_id"]).write(request["data"])
        return {"len": len(request["data"])}

    async def read_stdout(self, request):
        return self._container(request).output(request["exec_id"], 1, request["len"])

    async def read_stderr(self, request):
        return self._container(request).output(request["exec_id"], 2, request["len"])

    async def close_stdin(self, request):
        container = self._container(request)
        if request["exec_id"] not in container.statuses:
            container.process(request["exec_id"]).close_input()

    async def resize(self, request):
        self._container(request).process(request["exec_id"]).resize(request["row"], request["column"])

    # Network.

    async def update_interface(self, request):
        import network

        if request["interface"] is None:
            raise RpcError(INVALID_ARGUMENT, "an interface needs a description")
        return await network.update_interface(self.children, request["interface"])

    async def update_routes(self, request):
        import network

        return {"Routes": await network.update_routes(self.children, (request["routes"] or {"Routes": []})["Routes"])}

    async def list_interfaces(self, request):
        import network

        return {"Interfaces": await network.list_interfaces(self.children)}

    async def list_routes(self, request):
        import network

        return {"Routes": await network.list_routes(self.children)}

    # Memory that ran out: memory.events of each container is watched.

    def _watch(self, container):
        try:
            container.oom_watch = self._files.add(container.group.path + "/memory.events")
        except OSError:
            return  # a kernel without the memory controller
        self._watched[container.oom_watch] = container

    def _unwatch(self, container):
        if container.oom_watch >= 0:
            self._look_at_memory(container)
            self._watched.pop(container.oom_watch, None)
            self._files.remove(container.oom_watch)
            container.oom_watch = -1

    async def _watch_memory(self):
        while True:
            for number in await self._files.changed():
                if number in self._watched:
                    self._look_at_memory(self._watched[number])

    def _look_at_memory(self, container):
        kills = container.group.pairs("memory.events").get("oom_kill", 0)
        if kills > container.oom_kills:
            container.oom_kills = kills
            self._out_of_memory.append(container.id)
            del self._out_of_memory[:-LOG_LINES]
            self._memory_event.set()
            self.log("warning", "container ran out of memory", container=container.id)

    async def oom_event(self, request):
        while not self._out_of_memory:
            self._memory_event.clear()
            await self._memory_event.wait()
            if self.id is None:
                raise RpcError(NOT_FOUND, "the sandbox is gone")
        return {"container_id": self._out_of_memory.pop(0)}

    def handlers(self):
        """Full name of a method → what carries it out."""
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
