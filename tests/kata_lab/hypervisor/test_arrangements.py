"""The same sandbox over every arrangement: what it does, what it is made of, and what becomes of it if a part dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kata_lab.hypervisor import HYPERVISORS
from kata_lab.resource.rootfs import DirectoryRoot
from kata_lab.resource.sizing import SandboxSize
from kata_lab.runtime import RuntimeFault, Sandbox, SandboxConfig, SandboxState
from tests.kata_lab.runtime.conftest import SECONDS, Guest, Loop, loop
from vmm.config import MIB, NetworkConfig

__all__ = ["loop"]

PROCESSES = {
    "fused": [],
    "rpc": ["vmm.rpc", "vmm.vhost.fs"],
    "qemu": ["qemu-system-riscv64", "vmm.vhost.fs"],
}
"""What each arrangement starts beside the runtime's process."""

MEMORY_MIB, MOST_MEMORY_MIB = 256, 320  # a container without a limit needs no more

RUNTIME = """
import asyncio, sys
from kata_lab.runtime import Sandbox

async def run():
    sandbox = Sandbox.create(hypervisor=sys.argv[1])
    start_vm = sandbox.hypervisor.start_vm

    async def started(timeout):
        await start_vm(timeout)
        print(*sandbox.hypervisor.get_pids(), flush=True)

    sandbox.hypervisor.start_vm = started
    await sandbox.start()
    await asyncio.Event().wait()

asyncio.run(run())
"""
"""A runtime that says of what processes its sandbox is."""


@dataclass(frozen=True)
class Arranged:
    """A sandbox in an arrangement.

    Attributes:
        guest: the sandbox.
        children: processes that are ours since it was started.
    """

    guest: Guest
    children: set[int]

    @property
    def name(self) -> str:
        return self.guest.sandbox.hypervisor.name


def children() -> set[int]:
    return {each.pid for each in psutil.Process().children(recursive=True)}


def sizes(name: str) -> dict[str, int]:
    more = {} if name == "qemu" else {"max_vcpus": 2}
    return {"memory_mib": MEMORY_MIB, "max_memory_mib": MOST_MEMORY_MIB, **more}


@pytest.fixture(scope="module", params=HYPERVISORS)
def arranged(request: pytest.FixtureRequest, loop: Loop) -> Iterator[Arranged]:
    before = children()
    sandbox = Sandbox.create(hypervisor=request.param, **sizes(request.param))
    loop(sandbox.start())
    try:
        yield Arranged(Guest(sandbox, loop), children() - before)
    finally:
        loop(sandbox.stop())
        assert not children() - before


@pytest.fixture
def guest(arranged: Arranged) -> Guest:
    return arranged.guest


# What it does.


def test_environment_user_directory_and_status_are_as_asked(guest: Guest) -> None:
    result = guest.run("sh", "-c", "echo $A $(id -u) $(pwd); echo no >&2; exit 7", env=["A=b"], user="33", cwd="/tmp")

    assert (result.status, result.stdout, result.stderr) == (7, b"b 33 /tmp\n", b"no\n")


def test_bytes_pass_through_a_process_unchanged(guest: Guest) -> None:
    data = os.urandom(300_001)

    result = guest.run("cat", stdin=data)

    assert result.status == 0
    assert result.stdout == data


def test_exec_joins_the_container(guest: Guest) -> None:
    container, _ = guest.started("sh", "-c", "echo here > /mark; exec sleep 1000")
    try:
        script = "until test -s /mark; do :; done; cat /mark; exit 3"
        wanted = {"args": ["sh", "-c", script], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin:/usr/bin"]}
        process = guest.wait(container.exec(wanted))
        status, output, _ = guest.wait(process.communicate())
    finally:
        guest.remove(container)

    assert (status, output) == (3, b"here\n")


def test_signal_ends_a_process(guest: Guest) -> None:
    container, process = guest.started("sleep", "1000")
    try:
        guest.wait(process.kill(signal.SIGKILL))
        assert guest.wait(process.wait()) == 128 + signal.SIGKILL
    finally:
        guest.remove(container)


def test_volume_is_read_and_written(guest: Guest, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    (tmp_path / "in").write_bytes(data)

    said = guest.shell("cat /v/in > /v/out; rm /v/in; ls /v", volumes=[f"{tmp_path}:/v"])

    assert said == "out\n"
    assert (tmp_path / "out").read_bytes() == data
    assert not (tmp_path / "in").exists()


def test_what_the_host_writes_later_is_seen(guest: Guest, tmp_path: Path) -> None:
    script = "read _; cat /v/late; touch /v/x"
    container, process = guest.started("sh", "-c", script, volumes=[f"{tmp_path}:/v:ro"])
    try:
        (tmp_path / "late").write_text("seen")
        status, output, errors = guest.wait(process.communicate(b"\n"))
    finally:
        guest.remove(container)

    assert (status, output) == (1, b"seen")
    assert b"Read-only file system" in errors


def test_root_can_be_a_directory_of_the_host(guest: Guest, tmp_path: Path) -> None:
    from kata_lab.oci import make_spec, open_image, unpack_rootfs

    async def run() -> tuple[int, bytes]:
        with contextlib.closing(open_image("busybox")) as image:
            unpack_rootfs(image, tmp_path / "root")
            spec = make_spec(image, ["sh", "-c", "echo made > /made; cat /made"])
            root = DirectoryRoot(tmp_path / "root", override_stat=image.override_stat)
        container = await guest.sandbox.create_container(spec, root)
        try:
            status, output, _ = await (await container.start()).communicate()
        finally:
            await container.remove()
        return status, output

    assert guest.wait(run()) == (0, b"made\n")
    assert (tmp_path / "root" / "made").read_text() == "made\n"


def test_paused_guest_does_nothing_until_it_is_resumed(guest: Guest) -> None:
    sandbox = guest.sandbox

    async def story() -> tuple[bool, int, bytes]:
        container = await sandbox.new_container(["sh", "-c", "while read line; do echo $line; done"])
        process = await container.start()
        try:
            await sandbox.pause()
            talking = asyncio.ensure_future(process.communicate(b"word\n"))
            done, _ = await asyncio.wait((talking,), timeout=0.5)
            await sandbox.resume()
            status, output, _ = await talking
        finally:
            await container.remove()
        return bool(done), status, output

    assert guest.wait(story()) == (False, 0, b"word\n")
    with pytest.raises(RuntimeFault, match="is running and cannot be resumed"):
        guest.wait(sandbox.resume())


def test_memory_comes_and_goes(guest: Guest) -> None:
    available = "awk '/MemAvailable/ {print $2 * 1024}' /proc/meminfo"
    before = int(guest.shell(available))

    grown = guest.wait(guest.sandbox.resize(memory_mib=MOST_MEMORY_MIB))
    more = int(guest.shell(available))
    shrunk = guest.wait(guest.sandbox.resize(memory_mib=MEMORY_MIB))
    after = int(guest.shell(available))

    assert (grown.memory_mib, shrunk.memory_mib) == (MOST_MEMORY_MIB, MEMORY_MIB)
    # The guest uses some itself, now more, now less.
    assert min(more - before, more - after) > (MOST_MEMORY_MIB - MEMORY_MIB) // 2 * MIB


def test_vcpus_come_and_go_where_there_is_hotplug(arranged: Arranged) -> None:
    guest = arranged.guest
    if arranged.name == "qemu":
        with pytest.raises(RuntimeFault, match="must be a whole number from 1 to the sandbox's max_vcpus, 1"):
            guest.wait(guest.sandbox.resize(vcpus=2))
        return

    assert guest.wait(guest.sandbox.resize(vcpus=2)) == SandboxSize(2, MEMORY_MIB)
    assert guest.shell("nproc") == "2\n"
    assert guest.wait(guest.sandbox.resize(vcpus=1)) == SandboxSize(1, MEMORY_MIB)
    assert guest.shell("nproc") == "1\n"


def test_stats_count_what_a_container_uses(guest: Guest) -> None:
    container, _ = guest.started("sleep", "1000", memory="16m")
    try:
        stats = guest.wait(container.stats())["cgroup_stats"]
    finally:
        guest.remove(container)

    assert stats["memory_stats"]["usage"]["limit"] == 16 << 20
    assert stats["pids_stats"]["current"] == 1


# What it is made of.


def test_processes_are_those_of_the_arrangement(arranged: Arranged) -> None:
    runtime, *others = arranged.guest.sandbox.hypervisor.get_pids()

    assert runtime == os.getpid()
    assert set(others) == arranged.children
    commands = [" ".join(psutil.Process(each).cmdline()) for each in others]
    assert len(commands) == len(PROCESSES[arranged.name])
    assert all(part in each for each, part in zip(commands, PROCESSES[arranged.name], strict=True))


def test_vcpus_are_threads_of_these_processes(guest: Guest) -> None:
    hypervisor = guest.sandbox.hypervisor
    threads = {int(each) for pid in hypervisor.get_pids() for each in os.listdir(f"/proc/{pid}/task")}

    found = hypervisor.get_thread_ids()

    assert "vcpu-0" in found
    assert set(found.values()) <= threads


def test_vm_is_measured(guest: Guest) -> None:
    found = guest.sandbox.hypervisor.get_hypervisor_metrics()

    assert found.uptime_seconds > 0
    assert found.memory.pss > 0
    assert found.vcpus[0].run_seconds > 0


def test_start_has_its_milestones_in_order(guest: Guest) -> None:
    names = [name for name, _ in guest.sandbox.timeline]

    marks = ["prepared", "first instruction", "first console byte", "agent answers", "sandbox ready"]
    assert [name for name in names if name in marks] == marks
    assert "kata-lab: services are up" in guest.sandbox.hypervisor.console_lines(1000)


# What becomes of it.


def killed(guest: Guest, pid: int) -> str:
    """Kill a process of a sandbox and wait until it has stopped; why it says that it has."""
    os.kill(pid, signal.SIGKILL)
    guest.wait(guest.sandbox.stopped.wait())
    assert guest.sandbox.state is SandboxState.STOPPED
    with pytest.raises(RuntimeFault, match="is stopped"):
        guest.run("true")
    assert not guest.sandbox.directory.exists()
    return guest.sandbox.reason


def test_parts_that_are_killed_end_the_sandbox_and_the_next_one_starts(arranged: Arranged) -> None:
    """The last test of each sandbox; its successor has the roots and the device that it had not."""
    guest, others = arranged.guest, arranged.guest.sandbox.hypervisor.get_pids()[1:]
    if not others:
        return

    vmm = killed(guest, others[0])
    assert f"(process {others[0]}) was killed by SIGKILL" in vmm

    config = SandboxConfig(
        rootfs="block", images=("busybox",), network=NetworkConfig(), memory_mib=192, hypervisor=arranged.name
    )
    successor = Guest(Sandbox(config), guest.wait)
    try:
        guest.wait(successor.sandbox.start())
        assert successor.shell("echo written > /file; cat /file; ls /sys/class/net") == "written\neth0\nlo\n"
        files = successor.sandbox.hypervisor.get_pids()[2]
        assert killed(successor, files) == f"the file system process (process {files}) was killed by SIGKILL"
    finally:
        guest.wait(successor.sandbox.stop())
    assert not arranged.children & children()


@pytest.mark.parametrize("name", HYPERVISORS)
def test_runtime_that_is_killed_leaves_no_process_and_nothing_but_its_directory(name: str) -> None:
    with contextlib.ExitStack() as opened:
        place = opened.enter_context(tempfile.TemporaryDirectory())  # for its directory, which the next start removes
        elsewhere = opened.enter_context(tempfile.TemporaryDirectory())
        command = [sys.executable, "-c", RUNTIME, name]
        environment = {**os.environ, "XDG_RUNTIME_DIR": place, "TMPDIR": elsewhere}
        runtime = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        opened.callback(runtime.wait)
        opened.callback(runtime.kill)
        assert runtime.stdout is not None
        opened.enter_context(runtime.stdout)
        first, *others = map(int, runtime.stdout.readline().split())
        assert first == runtime.pid
        assert len(others) == len(PROCESSES[name])
        ends = [os.pidfd_open(each) for each in others]
        for each in ends:
            opened.callback(os.close, each)

        runtime.kill()

        assert all(select.select([each], [], [], SECONDS)[0] for each in ends)
        assert os.listdir(elsewhere) == []
