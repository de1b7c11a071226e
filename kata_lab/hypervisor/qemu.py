"""The foreign arrangement: QEMU as the VMM, driven over QMP, with our image and our agent (Kata's classic way).

::

    runtime (this process) ──QMP──────► qemu-system-riscv64      the VM, its vCPUs and devices (or -x86_64)
                           ──shares───► python -m vmm.vhost.fs   virtio-fs, over the VM's memory (vhost-user)

Either process that dies ends the VM; both end with this one. What a guest has here is in
:mod:`kata_lab.hypervisor.qemu_machine`; nothing is plugged in or out while it runs but memory, by a balloon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kata_lab.hypervisor import qemu_machine
from kata_lab.hypervisor.acting import SHARE, told
from kata_lab.hypervisor.base import Hypervisor, HypervisorConfig, HypervisorError
from kata_lab.hypervisor.qemu_control import DRAIN_SECONDS, Event, QemuControl, require_library
from kata_lab.hypervisor.qemu_machine import UNPLUGGED
from kata_lab.hypervisor.qemu_process import SHUT_DOWN, QemuProcess, find_program
from kata_lab.hypervisor.vm_end import end_of_vm
from vmm.actions import ManipulateFsBackend
from vmm.config import BlockConfig, DeviceConfig, FsConfig, NetworkConfig
from vmm.console import Console
from vmm.metrics import ProcessMemory, VcpuMetrics, VmMetrics
from vmm.report import find_panic
from vmm.trace import Trace
from vmm.vhost.control import control_path

if TYPE_CHECKING:
    from vmm.network.passt import PasstPort
    from vmm.vhost.process import FsProcess

T = TypeVar("T")

STALL_SECONDS: Final = 10.0  #: without a page more or less, a change of memory is given up
SHARE_SECONDS: Final = 30.0  #: that the file system process may take to add or remove a share
_READ: Final = 1 << 16
_PANIC_SEARCH_LINES: Final = 200
_ENDS: Final = {
    "guest-shutdown": SHUT_DOWN,
    "guest-reset": "the guest asked for a reboot",
    "host-signal": "QEMU was ended by a signal",
    "host-qmp-quit": "QEMU was told to end",
}
"""What a reason (``ShutdownCause``, qapi/run-state.json) means."""


@dataclass(slots=True)
class _Port:
    """A port of the guest's console.

    Attributes:
        open: the guest has opened it, and nobody was given it since.
        connection: what was given.
    """

    open: bool = False
    connection: weakref.ref[socket.socket] | None = None


@dataclass(frozen=True, slots=True)
class _Vm:
    """What was made for a VM, and our ends."""

    config: HypervisorConfig
    directory: Path
    process: QemuProcess
    files: FsProcess | None
    control: socket.socket
    console: socket.socket


class QemuHypervisor(Hypervisor):
    """A QEMU process and a file system process."""

    name = "qemu"
    disk_format = "raw"

    def __init__(self) -> None:
        self._made: _Vm | None = None
        self._making: asyncio.Future[_Vm] | None = None
        self._undo = contextlib.ExitStack()
        self._control: QemuControl | None = None
        self._console = Console()
        self._trace = Trace()
        self._followers: set[asyncio.Task[Any]] = set()
        self._ports = {number: _Port() for number in qemu_machine.AGENT_PORTS}
        self._threads: dict[str, int] = {}
        self._memory_mib = 0
        self._moved = asyncio.Event()
        self._end: asyncio.Future[str] | None = None
        self._ending: Event | None = None  # QEMU's own word of it
        self._stopped_by_us = False
        self._started_at = self._ended_at = 0.0

    @property
    def _vm(self) -> _Vm:
        if self._made is None:
            raise HypervisorError("the sandbox has no VM: it is not prepared, or cleaned up already")
        return self._made

    async def load(self) -> None:
        require_library()

    # The life of the VM.

    async def prepare_vm(self, config: HypervisorConfig) -> None:
        with told():
            self._trace = Trace(milestones=config.milestones)
        self._end = asyncio.get_running_loop().create_future()
        # A thread is not cancelled: cleanup waits for what it makes.
        self._making = asyncio.ensure_future(asyncio.to_thread(self._make, config))
        try:
            self._made = await asyncio.shield(self._making)
            self._follow(self._follow_console(self._made.console), "console")
            await self._connect(self._made)
        except BaseException:
            await self.cleanup()
            raise

    def _make(self, config: HypervisorConfig) -> _Vm:
        machine = qemu_machine.machine_of(config)
        program = find_program(machine.program, machine.package)
        with told(), contextlib.ExitStack() as made:
            directory = config.directory
            for port in qemu_machine.AGENT_PORTS:
                made.callback(qemu_machine.port_socket(directory, port).unlink, missing_ok=True)
            devices, files, networks = self._helpers(config, directory, made)
            control, its_control = _pair(made)
            console, its_console = _pair(made)
            wiring = qemu_machine.Wiring(its_control.fileno(), its_console.fileno(), directory, networks)
            line = qemu_machine.command(program, machine, replace(config, devices=devices), wiring)
            process = QemuProcess(line, wiring.descriptors)
            made.callback(process.close)
            its_control.close()
            its_console.close()
            self._undo = made.pop_all()
            return _Vm(config, directory, process, files, control, console)

    @staticmethod
    def _helpers(
        config: HypervisorConfig, directory: Path, made: contextlib.ExitStack
    ) -> tuple[list[DeviceConfig], FsProcess | None, dict[str, int]]:
        """The processes that serve devices, and the devices with what is known now."""
        from vmm.network.passt import start_passt
        from vmm.vhost.process import FsProcess

        devices: list[DeviceConfig] = []
        files: FsProcess | None = None
        networks: dict[str, int] = {}
        for device in config.devices:
            if isinstance(device, FsConfig) and device.name == SHARE:
                files = FsProcess(directory / "fs", cache=device.cache, queues=device.queues)
                made.callback(files.close)
                devices.append(files.device(device.tag, device.name))
            elif isinstance(device, NetworkConfig) and device.backend == "passt":
                passt: PasstPort = start_passt(device)
                made.callback(passt.close)
                networks[device.name] = passt.inboxes[0].descriptor
                devices.append(replace(device, mtu=passt.mtu))
            else:
                devices.append(device)
        return devices, files, networks

    async def _connect(self, vm: _Vm) -> None:
        """Greet QEMU, which waits with its guest."""
        ended = asyncio.wrap_future(vm.process.ended)
        try:
            self._control = await QemuControl.connect(vm.control, self._noted)
        except HypervisorError as error:
            # A moment after its connection ended.
            await asyncio.wait({ended}, timeout=DRAIN_SECONDS)
            why = ended.result() if ended.done() else error
            raise HypervisorError(f"the VM cannot be made: {why}") from error
        qemu = self._follow(self._follow_qemu(ended), "QEMU")
        self._follow(self._follow_end(qemu, vm.files), "end")
        for cpu in await self._control.execute("query-cpus-fast"):
            self._threads[f"vcpu-{cpu['cpu-index']}"] = int(cpu["thread-id"])
        self._memory_mib = vm.config.memory_mib
        if (vm.config.max_memory_mib or 0) > vm.config.memory_mib:
            await self._aim(vm.config.memory_mib)

    async def start_vm(self, timeout: float) -> None:
        self._started_at = time.monotonic()
        self._trace.start(lambda: 0)
        try:
            async with asyncio.timeout(timeout):
                await self._ask("cont")
        except TimeoutError:
            raise HypervisorError(f"the VM did not start within {timeout:g} s") from None

    async def stop_vm(self) -> None:
        if self._made is not None:
            self._stopped_by_us = True
            self._made.process.kill()
            await self.wait_vm()

    async def wait_vm(self) -> str:
        _ = self._vm
        assert self._end is not None
        return await asyncio.shield(self._end)

    async def pause_vm(self) -> None:
        await self._ask("stop")

    async def resume_vm(self) -> None:
        await self._ask("cont")

    def ended(self) -> str | None:
        return self._end.result() if self._end is not None and self._end.done() else None

    async def cleanup(self) -> None:
        making, self._making, self._made = self._making, None, None
        if making is None:
            return
        await asyncio.wait((making,))
        if making.exception() is None:
            process = making.result().process
            self._stopped_by_us = self._stopped_by_us or not process.ended.done()
            process.kill()
            await asyncio.wrap_future(process.ended)
        control, self._control = self._control, None
        if control is not None:
            await control.drained()
            await control.close()
        if self._followers:
            await asyncio.wait(self._followers, timeout=DRAIN_SECONDS)
        for follower in tuple(self._followers):
            await _given_up(follower)
        await asyncio.to_thread(self._undo.close)

    # Connections.

    async def dial(self, port: int) -> socket.socket:
        found = self._ports.get(port)
        if found is None:
            known = ", ".join(map(str, self._ports))
            raise HypervisorError(f"a guest in QEMU has no port {port} that can be dialled: it has {known}")
        vm = self._vm
        if not found.open:
            raise HypervisorError(f"nobody listens at port {port} of the guest, or somebody is connected already")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(os.fspath(qemu_machine.port_socket(vm.directory, port)))
        except OSError as error:
            connection.close()
            raise HypervisorError(f"port {port} of the guest cannot be reached: {error.strerror or error}") from error
        found.open, found.connection = False, weakref.ref(connection)
        return connection

    def listen(self, port: int, accept: Callable[[socket.socket], object]) -> None:
        raise HypervisorError(f"a guest in QEMU cannot open a connection to port {port} of the host: it has no vsock")

    async def add_share(self, name: str, path: Path, read_only: bool, override_stat: bool) -> None:
        await self._share("add", name, path, read_only=read_only, override_stat=override_stat)

    async def remove_share(self, name: str) -> None:
        # With the process went everything that it shared.
        files = self._vm.files
        if files is not None and not files.ended.done():
            await self._share("remove", name)

    # Size and devices.

    async def resize_vcpu(self, vcpus: int) -> int:
        now = self._vm.config.vcpus
        if vcpus != now:
            raise HypervisorError(f"{UNPLUGGED} vCPUs: the sandbox has {now} and cannot have {vcpus}")
        return now

    async def resize_memory(self, memory_mib: int) -> int:
        config = self._vm.config
        most = config.max_memory_mib or config.memory_mib
        if not 1 <= memory_mib <= most:
            raise HypervisorError(f"memory_mib is {memory_mib!r}, it must be from 1 to {most}, the VM's max_memory_mib")
        if memory_mib != self._memory_mib:
            try:
                await self._aim(memory_mib)
                await self._arrive(memory_mib)
            except BaseException:
                await self._aim(self._memory_mib)
                raise
            self._memory_mib = memory_mib
        return memory_mib

    async def _aim(self, memory_mib: int) -> None:
        self._moved.clear()
        await self._ask("balloon", value=memory_mib << 20)

    async def _arrive(self, memory_mib: int) -> None:
        """Wait for the guest's balloon, as long as it gets on."""
        while (now := await self._memory()) != memory_mib << 20:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self._moved.wait()  # QEMU tells once a second at most
            except TimeoutError:
                if await self._memory() == now:
                    raise HypervisorError(
                        f"the guest stays at {now >> 20} MiB of memory and does not go to {memory_mib}"
                    ) from None
            self._moved.clear()

    async def _memory(self) -> int:
        return int((await self._ask("query-balloon"))["actual"])

    async def add_device(self, device: DeviceConfig) -> str:
        raise HypervisorError(f"{UNPLUGGED} devices: name {device.name!r} when the sandbox is made")

    async def update_device(self, name: str) -> None:
        devices = self._vm.config.devices
        number = qemu_machine.number_of(devices, name)
        device = devices[number]
        if not isinstance(device, BlockConfig) or device.path is None:
            raise HypervisorError(f"device {name!r} is of kind {device.KIND!r}; only a disk can have another size")
        node, size = qemu_machine.back_end(number), await asyncio.to_thread(_size, device.path)
        await self._ask("block_resize", **{"node-name": node, "size": size})

    async def remove_device(self, name: str) -> None:
        qemu_machine.number_of(self._vm.config.devices, name)
        raise HypervisorError(f"{UNPLUGGED} devices: {name!r} stays for as long as the guest runs")

    # What can be seen of it.

    def get_pids(self) -> list[int]:
        vm = self._vm
        return [os.getpid(), vm.process.pid, *([] if vm.files is None else [vm.files.pid])]

    def get_thread_ids(self) -> dict[str, int]:
        return dict(self._threads)

    def get_hypervisor_metrics(self) -> VmMetrics:
        """What QEMU and the kernel count: it has no number of instructions, nor of exits."""
        process = Path("/proc") / str(self._vm.process.pid)
        until = self._ended_at or time.monotonic()
        state = "exited" if self._ended_at else "running"
        vcpus = tuple(
            VcpuMetrics(number, state, 0, {}, _seconds_of(process / "task" / str(thread)), 0.0)
            for number, thread in enumerate(self._threads.values())
        )
        uptime = until - self._started_at if self._started_at else 0.0
        return VmMetrics(uptime, vcpus, ProcessMemory.now(process / "smaps_rollup"))

    def timeline(self) -> list[tuple[str, float]]:
        return [(each.name, self._started_at + each.seconds) for each in self._trace.milestones]

    def console_lines(self, count: int) -> list[str]:
        return self._console.lines(count)

    # What QEMU says.

    async def _ask(self, command: str, /, **arguments: Any) -> Any:
        if self._control is None:
            raise HypervisorError("the sandbox has no VM: it is not prepared, or cleaned up already")
        return await self._control.execute(command, arguments)

    async def _share(self, what: str, name: str, path: Path | None = None, **flags: bool) -> None:
        files = self._vm.files
        if files is None:
            raise HypervisorError(f"the sandbox has no shared directory, to which {name!r} could belong")
        action = ManipulateFsBackend(SHARE, what, name, path, **flags)
        with told():
            await asyncio.to_thread(_manipulate, control_path(files.socket), action)

    def _noted(self, event: Event) -> None:
        match event["event"]:
            case "SHUTDOWN":
                self._ending = event["data"]
            case "BALLOON_CHANGE":
                self._moved.set()
            case "VSERPORT_CHANGE":
                self._changed(event["data"])

    def _changed(self, data: Event) -> None:
        """The guest has opened or closed a port: either way, who was connected is no longer."""
        for number, port in self._ports.items():
            if data["id"] == qemu_machine.port_name(number):
                port.open = bool(data["open"])
                connection = port.connection() if port.connection is not None else None
                port.connection = None
                if connection is not None:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def _follow(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=f"follow-{name}")
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)
        return task

    async def _follow_console(self, console: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(console, _READ):
                self._trace.console_output(data)
                self._console.feed(data)

    async def _follow_qemu(self, ended: asyncio.Future[str]) -> str:
        how = await ended
        self._ended_at = time.monotonic()
        assert self._control is not None
        await self._control.drained()
        return self._sentence(how)

    async def _follow_end(self, qemu: asyncio.Future[str], files: FsProcess | None) -> None:
        how = await end_of_vm(qemu, files)
        assert self._end is not None
        self._end.set_result(how)

    def _sentence(self, how: str) -> str:
        """Why there is no guest any more, of a QEMU that ended in the way that ``how`` says."""
        if self._stopped_by_us:
            return "the host shut the VM down"
        reason = "" if self._ending is None else self._ending["reason"]
        panic = find_panic(self._console.lines(_PANIC_SEARCH_LINES))
        if panic is not None and reason == "guest-reset":
            return f"the guest's kernel panicked: {panic}"
        return _ENDS.get(reason, how)


def _pair(made: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        made.callback(each.close)
    ours.setblocking(False)
    return ours, theirs


async def _given_up(task: asyncio.Future[Any]) -> None:
    """Cancel a task, and wait for its end; what it came to is nobody's any more."""
    task.cancel()
    await asyncio.wait((task,))
    _ = task.cancelled() or task.exception()


def _manipulate(path: Path, action: ManipulateFsBackend) -> None:
    from vmm.rpc.connection import Connection

    with Connection(path, "the file system process", SHARE_SECONDS) as connection:
        connection.ask(action, SHARE_SECONDS)


def _size(path: Path) -> int:
    return path.stat().st_size


def _seconds_of(thread: Path) -> float:
    """CPU time of a thread (proc(5), ``stat`` fields 14 and 15), 0 of one that is gone."""
    try:
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
