"""Control groups of containers: ``/sys/fs/cgroup/kata/<id>`` (Documentation/admin-guide/cgroup-v2.rst)."""

import asyncio
import os

import linux

BASE = "/sys/fs/cgroup"
GROUPS = BASE + "/kata"
CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io")
_FREEZE_MILLISECONDS = 10000


def begin():
    """Make the group of all containers, with the controllers that the kernel has."""
    try:
        os.mkdir(GROUPS)
    except OSError:
        pass  # it is there, after the agent was started again
    with open(BASE + "/cgroup.controllers") as file:
        wanted = " ".join("+" + name for name in file.read().split() if name in CONTROLLERS)
    for place in (BASE, GROUPS):
        with open(place + "/cgroup.subtree_control", "w") as file:
            file.write(wanted)


class Group:
    """The control group of a container, which may not be there."""

    def __init__(self, name):
        self.path = f"{GROUPS}/{name}"

    def write(self, name, text):
        """False if there is no such group or file."""
        try:
            with open(f"{self.path}/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            if error.args[0] != linux.ENOENT:
                raise OSError(error.args[0], f"writing {text} to {name}")
            return False
        return True

    def read(self, name):
        """A file of it, empty if there is none."""
        try:
            with open(f"{self.path}/{name}") as file:
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

    def exists(self):
        return linux.exists(self.path)

    def frozen(self):
        return "frozen 1" in self.read("cgroup.events")

    def populated(self):
        """Whether there is a process in it or below it."""
        return "populated 1" in self.read("cgroup.events")

    def _places(self):
        """It and the groups below it, the inner ones last."""
        found = [self.path]
        for place in found:
            try:
                found += [place + "/" + entry[0] for entry in os.ilistdir(place) if entry[1] == 0x4000]
            except OSError:
                continue
        return found

    def pids(self):
        """Of all processes in it and below it."""
        found = []
        for place in self._places():
            try:
                with open(place + "/cgroup.procs") as file:
                    found += [int(line) for line in file]
            except OSError:
                continue
        return found

    def kill(self):
        """Kill all that is in it, frozen or not."""
        self.write("cgroup.kill", "1")

    async def freeze(self, frozen):
        """False if it did not come to that, since it has no process any more or one that cannot be frozen."""
        if not self.write("cgroup.freeze", "1" if frozen else "0"):
            return False
        for _ in range(_FREEZE_MILLISECONDS):
            if self.frozen() == frozen:
                return True
            await asyncio.sleep_ms(1)
        self.write("cgroup.freeze", "0")
        return False

    def remove(self):
        """Remove it; it has no process any more."""
        for place in reversed(self._places()):
            try:
                os.rmdir(place)
            except OSError:
                pass

    def statistics(self):
        """As the message CgroupStats; times are nanoseconds there."""
        cpu, memory = self.pairs("cpu.stat"), self.pairs("memory.stat")
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
                "usage": self._memory("memory"),
                "swap_usage": self._memory("memory.swap"),
                "kernel_usage": {"usage": memory.get("kernel", 0)},
                "use_hierarchy": True,
                "stats": memory,
            },
            "pids_stats": {"current": self.number("pids.current"), "limit": self.number("pids.max")},
            "blkio_stats": self._blocks(),
        }

    def _memory(self, what):
        return {
            "usage": self.number(what + ".current"),
            "max_usage": self.number(what + ".peak"),
            "failcnt": self.pairs(what + ".events").get("max", 0),
            "limit": self.number(what + ".max"),
        }

    def _blocks(self):
        """io.stat: ``254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0``."""
        names = {"rbytes": (0, "Read"), "wbytes": (0, "Write"), "rios": (1, "Read"), "wios": (1, "Write")}
        found = [], []
        for line in self.read("io.stat").split("\n"):
            device, _, rest = line.partition(" ")
            major, _, minor = device.partition(":")
            for word in rest.split():
                name, _, value = word.partition("=")
                if name in names:
                    what, operation = names[name]
                    entry = {"major": int(major), "minor": int(minor), "op": operation, "value": int(value)}
                    found[what].append(entry)
        return {"io_service_bytes_recursive": found[0], "io_serviced_recursive": found[1]}
