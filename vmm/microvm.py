"""One virtual machine: configured → running ⇄ paused → stopped.

::

    with MicroVm(VmConfig(kernel="Image", initrd="initrd.cpio")) as vm:
        vm.start()
        vm.console.expect("login")

Actions enter as messages and are answered through futures (:meth:`MicroVm.request`); an event loop on a thread of the
VM's own carries them out, one after the other, but for hotplugs, which wait for the guest and have an order of their
own (:mod:`vmm.hotplug`). The methods put the message and wait for the answer; from asyncio, await
``asyncio.wrap_future(vm.request(PauseMicroVm()))``. Each hart runs on a thread of its own (:mod:`vmm.vcpu`).

A micro-VM does not reboot: a guest that asks for it has ended, and :attr:`MicroVm.end` says so. The VM's memory and
harts can be looked at until :meth:`MicroVm.close`, which leaves no thread, file or mapping.

Guest time stands still while the VM is paused, with either clock, so that no timer of the guest is late afterwards and
no watchdog of its kernel barks; its wall clock is behind by as much until it is set anew.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vmm import actions
from vmm.actions import EndKind, MachineEnd, VmmAction, VmState
from vmm.config import VmConfig
from vmm.console import Console
from vmm.errors import ConfigError, EngineError, StateError, VmmError
from vmm.hotplug import Hotplug, HotplugRecord, amend
from vmm.loop_thread import LoopThread
from vmm.machine import Machine
from vmm.metrics import ProcessMemory, VmMetrics
from vmm.report import CrashReport, find_panic
from vmm.trace import Trace
from vmm.vcpu import VcpuState

if TYPE_CHECKING:
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.upcall import UpcallClient

AnswerT = TypeVar("AnswerT")

PANIC_SEARCH_LINES = 500


class VmTimeout(VmmError, TimeoutError):
    """The VM did not get there in the given time; it goes on as it was."""


class MicroVm:
    """One virtual machine; a context manager.

    Args:
        config: what the VM is; it can still be changed by actions until the VM starts.
        devices: virtio devices of the caller's own making, plugged behind those of the configuration when the VM
            starts. From then on they belong to the VM, which closes them.
    """

    def __init__(self, config: VmConfig | None = None, devices: Sequence[VirtioDevice] = ()) -> None:
        self._config = config if config is not None else VmConfig()
        self._custom = tuple(devices)
        self._trace = Trace(self._config.trace, self._config.console.milestones)
        self._console = Console(self._config.console.limit_bytes)
        self._console.subscribe(lambda data: self._trace.console_output(data))
        self._state = VmState.CONFIGURED
        self._machine: Machine | None = None
        self._hotplug: Hotplug | None = None
        self._cause: tuple[int | None, MachineEnd, str] | None = None
        self._end: concurrent.futures.Future[MachineEnd] = concurrent.futures.Future()
        self._report: CrashReport | None = None
        self._started_at = self._stopped_at = 0.0
        self._last_metrics: VmMetrics | None = None
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # More than one only if Ctrl-C came while the first one started.
        self._loop_threads: list[LoopThread] = []
        self._order = asyncio.Lock()
        self._vcpus_changed = asyncio.Event()
        self._handlers: dict[type[Any], Callable[[Any], Awaitable[object]]] = {
            actions.ConfigureBootSource: self._configure_boot_source,
            actions.SetVmConfiguration: self._set_configuration,
            actions.StartMicroVm: self._start,
            actions.PauseMicroVm: self._pause,
            actions.ResumeMicroVm: self._resume,
            actions.ShutdownMicroVm: self._shutdown,
            actions.GetReport: self._get_report,
        }
        # What only looks, and may be answered on any thread.
        self._reads: dict[type[Any], Callable[[], Any]] = {
            actions.GetVmConfiguration: lambda: actions.VmConfiguration(self._config),
            actions.GetState: lambda: actions.MachineState(self._state, self.end),
            actions.GetHypervisorMetrics: lambda: actions.HypervisorMetrics(self.metrics()),
            actions.GetUpcallState: lambda: actions.UpcallState("" if self.upcall is None else self.upcall.state.value),
        }
        self._under_way = 0  # actions that were sent and not answered yet
        _OPEN.add(self)

    @property
    def config(self) -> VmConfig:
        """The configuration as it stands."""
        return self._config

    @property
    def state(self) -> VmState:
        """Where the VM is in its life."""
        return self._state

    @property
    def console(self) -> Console:
        """The guest's console; it can be expected from and subscribed to before the VM starts."""
        return self._console

    @property
    def trace(self) -> Trace:
        """What the VM did."""
        return self._trace

    @property
    def machine(self) -> Machine:
        """Memory, engine, board and vCPUs; who changes them pauses the VM first.

        Raises:
            StateError: the VM has not started, or is closed.
        """
        if self._machine is None:
            raise StateError(f"a VM that is {self._word()} has no machine; start it first")
        return self._machine

    @property
    def upcall(self) -> UpcallClient | None:
        """The client of the guest's device manager; None until there was something to ask of it."""
        return None if self._hotplug is None else self._hotplug.upcall

    @property
    def hotplugs(self) -> tuple[HotplugRecord, ...]:
        """What was hot-plugged and how that went, oldest first; the last 256."""
        return () if self._hotplug is None else self._hotplug.records

    @property
    def thread_ids(self) -> dict[str, int]:
        """The host's thread of each vCPU by name (``vcpu-0``), and that of the VM's event loop (``vm-loop``)."""
        threads = [each.thread for each in self._loop_threads]
        if self._machine is not None:
            threads += [vcpu.thread for vcpu in self._machine.vcpus]
        return {each.name: each.native_id for each in threads if each.native_id is not None and each.is_alive()}

    @property
    def end(self) -> MachineEnd | None:
        """How the VM ended; None while it has not."""
        return self._end.result() if self._end.done() else None

    @property
    def ended(self) -> concurrent.futures.Future[MachineEnd]:
        """A future of :attr:`end`, a new one each time: ``await asyncio.wrap_future(vm.ended)``."""
        given: concurrent.futures.Future[MachineEnd] = concurrent.futures.Future()

        def pass_on(source: concurrent.futures.Future[MachineEnd]) -> None:
            if given.set_running_or_notify_cancel():
                given.set_result(source.result())

        self._end.add_done_callback(pass_on)
        return given

    def request(self, action: VmmAction[AnswerT]) -> concurrent.futures.Future[AnswerT]:
        """Send an action; the future holds its answer or its VmmError. Actions are carried out in the order of sending,
        but no other action waits for a hotplug: a pause or shutdown that is sent after one ends it with an error.

        Raises:
            ConfigError: something that is not an action.
        """
        if not any(type(action) in each for each in (self._reads, self._handlers, Hotplug.ACTIONS)):
            known = ", ".join(each.__name__ for each in (*self._handlers, *self._reads, *Hotplug.ACTIONS))
            raise ConfigError(f"{action!r} is no action; the actions are {known}")
        at_once: concurrent.futures.Future[AnswerT] = concurrent.futures.Future()
        with self._lock:
            read = self._reads.get(type(action))
            if self._closed:
                at_once.set_exception(StateError(f"{action.name} came to a VM that is closed; make a new one"))
            elif read is not None and not self._under_way:
                # Nothing is before it, and it changes nothing: a function call, without a change of threads.
                at_once.set_result(read())
            else:
                loop = self._running_loop()
                self._under_way += 1
                future = asyncio.run_coroutine_threadsafe(self._carry_out(action), loop)
        if not at_once.done():
            future.add_done_callback(self._answered)
            return future
        return at_once

    def start(self) -> None:
        """Build the machine, load the kernel, and let the harts run.

        Raises:
            StateError: the VM is not configured any more.
            ConfigError: no kernel is configured, or the host cannot map that much memory.
            BootError: kernel or initrd cannot be loaded. The VM stays configured and may be configured anew.
            EngineError: the engine cannot be built, or the host has no thread for each vCPU; likewise.
        """
        if self._state is VmState.CONFIGURED and self._config.kernel is not None:
            # On this thread, since the first time it compiles for seconds, and Ctrl-C reaches no other thread.
            from vmm.engine.rv64.hart import Rv64Engine

            Rv64Engine.prepare()
        self._ask(actions.StartMicroVm())

    def pause(self) -> None:
        """Return when every vCPU thread is out of guest code. StateError unless the VM is running."""
        self._ask(actions.PauseMicroVm())

    def resume(self) -> None:
        """Let a paused VM run on. StateError unless the VM is paused."""
        self._ask(actions.ResumeMicroVm())

    def shutdown(self, timeout: float | None = None) -> MachineEnd:
        """End the VM as pulling the plug does, and say how it ended: if the guest was first, that counts.

        Raises:
            VmTimeout: a vCPU thread has not come out of a device within ``timeout`` seconds.
        """
        return self._ask(actions.ShutdownMicroVm(), timeout)

    def wait(self, timeout: float | None = None) -> MachineEnd:
        """Wait for the end of the VM.

        Raises:
            VmTimeout: it has not ended within ``timeout`` seconds; :meth:`report` tells where it stands.
            StateError: it was never started.
        """
        if self._state is VmState.CONFIGURED:
            raise StateError("a VM that is configured cannot be waited for; start it first")
        self._refuse_own_thread("wait")
        try:
            return self._end.result(timeout)
        except concurrent.futures.TimeoutError:
            raise VmTimeout(
                f"the VM is still {self._state} after {timeout:g} s; wait longer, or look at report()"
            ) from None

    def metrics(self) -> VmMetrics:
        """The VM's counters now; of a stopped VM, its last ones."""
        machine = self._machine
        if machine is None:
            return self._last_metrics or VmMetrics(0.0, (), ProcessMemory.now())
        until = self._stopped_at or time.monotonic()
        return VmMetrics(
            uptime_seconds=until - self._started_at,
            vcpus=machine.metrics(),
            memory=ProcessMemory.now(),
        )

    def report(self) -> CrashReport:
        """Where every hart stands; of a VM that ended, where it ended and why. A running VM pauses for a moment.

        Raises:
            StateError: the VM has not started, or is closed after an end that nothing is to be said about.
        """
        return self._report if self._report is not None else self._ask(actions.GetReport()).report

    def close(self) -> None:
        """Shut down if need be and leave no thread, file or mapping. A second call does nothing."""
        self._refuse_own_thread("close")
        with self._closing:
            if self._closed:
                return
            try:
                if not self._end.done():
                    self.request(actions.ShutdownMicroVm()).result()
                self._last_metrics = self.metrics()
            finally:
                with self._lock:
                    self._closed = True
                for each in self._loop_threads:
                    each.stop()
                machine, self._machine = self._machine, None
                if machine is not None:
                    machine.close()
                _OPEN.discard(self)

    def __enter__(self) -> MicroVm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> MicroVm:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _ask(self, action: VmmAction[AnswerT], timeout: float | None = None) -> AnswerT:
        self._refuse_own_thread(action.name)
        try:
            return self.request(action).result(timeout)
        except concurrent.futures.TimeoutError:
            raise VmTimeout(f"{action.name} was not answered within {timeout} s; the VM is {self._state}") from None

    def _refuse_own_thread(self, what: str) -> None:
        machine, current = self._machine, threading.current_thread()
        if any(current is each.thread for each in self._loop_threads) or (
            machine is not None and any(each.runs_here for each in machine.vcpus)
        ):
            raise StateError(f"{what} would wait for the thread it is called on, {current.name}; use request() there")

    def _word(self) -> str:
        return "closed" if self._closed else str(self._state)

    # The loop: made with the first action, ended by close().

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop_threads.append(LoopThread())
            self._loop = self._loop_threads[-1].start()
        return self._loop

    def _answered(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._under_way -= 1

    async def _carry_out(self, action: VmmAction[AnswerT]) -> AnswerT:
        async with self._order:
            read, handler = self._reads.get(type(action)), self._handlers.get(type(action))
            if read is not None:
                return cast(AnswerT, read())
            if handler is not None:
                return cast(AnswerT, await handler(action))
            if self._state is VmState.CONFIGURED:
                self._config, amended = amend(self._config, action)
                return cast(AnswerT, amended)
            self._require(action, VmState.CONFIGURED, VmState.RUNNING)
            assert self._hotplug is not None
            hotplug = self._hotplug
        return await hotplug.carry_out(action)

    def _call_soon(self, callback: Callable[[], object]) -> None:
        # A vCPU that ends after the loop did has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            cast(asyncio.AbstractEventLoop, self._loop).call_soon_threadsafe(callback)

    def _require(self, action: VmmAction[Any], *allowed: VmState) -> None:
        if self._state not in allowed:
            wanted = " or ".join(str(state) for state in allowed)
            raise StateError(f"{action.name} came to a VM that is {self._state}; it needs one that is {wanted}")

    # What follows runs on the loop's thread.

    async def _configure_boot_source(self, action: actions.ConfigureBootSource) -> actions.Empty:
        self._require(action, VmState.CONFIGURED)
        cmdline = self._config.cmdline if action.cmdline is None else action.cmdline
        self._config = self._config.replace(kernel=action.kernel, initrd=action.initrd, cmdline=cmdline)
        return actions.Empty()

    async def _set_configuration(self, action: actions.SetVmConfiguration) -> actions.Empty:
        self._require(action, VmState.CONFIGURED)
        config = self._config.replace(**action.changes)
        if config.console.limit_bytes != self._config.console.limit_bytes:
            raise ConfigError("console limit_bytes is decided when the VM is made; make a new VM to change it")
        self._trace = Trace(config.trace, config.console.milestones)
        self._config = config
        return actions.Empty()

    async def _start(self, action: actions.StartMicroVm) -> actions.Empty:
        self._require(action, VmState.CONFIGURED)
        machine = Machine(
            self._config,
            self._console,
            self._trace,
            self._custom,
            changed=lambda: self._call_soon(self._vcpus_changed.set),
            ended=self._on_ended,
        )
        try:
            machine.start()
        except RuntimeError as error:  # threading's word for a host that gives no more threads
            machine.close()
            raise EngineError(f"the host gives no thread for each of {self._config.vcpus} vCPUs: {error}") from error
        self._machine = machine
        self._hotplug = Hotplug(machine, lambda: self._config, self._keep, self._vcpus_changed)
        self._started_at = time.monotonic()
        self._trace.start(lambda: machine.instructions)
        self._state = VmState.RUNNING
        machine.run()
        return actions.Empty()

    def _keep(self, config: VmConfig) -> None:
        self._config = config

    async def _pause(self, action: actions.PauseMicroVm) -> actions.Empty:
        self._require(action, VmState.RUNNING)
        assert self._hotplug is not None
        self._hotplug.suspend("the VM was paused")
        await self._stand_still(action)
        self._state = VmState.PAUSED
        return actions.Empty()

    async def _resume(self, action: actions.ResumeMicroVm) -> actions.Empty:
        self._require(action, VmState.PAUSED)
        assert self._hotplug is not None
        self._run_on()
        self._hotplug.resume()
        return actions.Empty()

    async def _shutdown(self, action: actions.ShutdownMicroVm) -> MachineEnd:
        if not self._end.done():
            self._claim_end(None, MachineEnd(EndKind.HOST, detail="the host shut the VM down"), "")
            await self._finish()
        return self._end.result()

    async def _get_report(self, action: actions.GetReport) -> actions.MachineReport:
        self._require(action, VmState.RUNNING, VmState.PAUSED, VmState.STOPPED)
        if self._report is not None:
            return actions.MachineReport(self._report)
        was_running = self._state is VmState.RUNNING
        if was_running:
            await self._stand_still(action)
        try:
            reason = f"the VM was {self._state} when the report was asked for"
            if (end := self.end) is not None:
                reason = end.detail
            return actions.MachineReport(self.machine.report(reason, None, self._last_lines()))
        finally:
            if was_running:
                self._run_on()

    async def _stand_still(self, action: VmmAction[Any]) -> None:
        self.machine.pause()
        await self._until(VcpuState.PAUSED, VcpuState.EXITED)
        if self._cause is not None:
            await self._finish()
            raise StateError(f"{action.name} came too late, since {self._cause[1].detail}")
        self.machine.hold()

    def _run_on(self) -> None:
        self._state = VmState.RUNNING
        self.machine.release()

    async def _until(self, *states: VcpuState) -> None:
        while True:
            self._vcpus_changed.clear()
            if all(vcpu.state in states for vcpu in self.machine.vcpus):
                return
            await self._vcpus_changed.wait()

    def _claim_end(self, hart: int | None, end: MachineEnd, trace: str) -> None:
        """The first end counts; whoever comes with one, the others' vCPUs end too."""
        with self._lock:
            if self._cause is None:
                self._cause = (hart, end, trace)
        if self._machine is not None:
            self._machine.stop()

    def _on_ended(self, hart: int | None, end: MachineEnd, trace: str) -> None:
        """On a vCPU's thread, or on one of a device."""
        self._claim_end(hart, end, trace)
        self._call_soon(lambda: self._spawn(self._finish_in_order()))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        # The loop keeps only a weak reference to a task.
        self._finishing = asyncio.ensure_future(coroutine)

    async def _finish_in_order(self) -> None:
        async with self._order:
            await self._finish()

    async def _finish(self) -> None:
        if self._end.done() or self._cause is None:
            return
        hart, end, trace = self._cause
        if self._machine is not None and self._hotplug is not None:
            self._hotplug.close()
            await self._until(VcpuState.EXITED)
            await self._hotplug.idle()
            for vcpu in self._machine.vcpus:
                vcpu.join()
            self._machine.close_devices()
            self._stopped_at = time.monotonic()
            panic = find_panic(self._console.lines(PANIC_SEARCH_LINES))
            if end.kind in (EndKind.REBOOT, EndKind.HANG) and panic is not None:
                end = MachineEnd(
                    EndKind.PANIC, end.reset_type, end.reset_reason, f"the guest's kernel panicked: {panic}"
                )
            if end.kind in (EndKind.PANIC, EndKind.HANG, EndKind.CRASH, EndKind.FAILURE):
                self._report = self._machine.report(end.detail, hart, self._last_lines(), trace)
        self._state = VmState.STOPPED
        self._console.close(end.detail)
        self._end.set_result(end)

    def _last_lines(self) -> tuple[str, ...]:
        return tuple(self._console.lines(self._config.console.report_lines))


_OPEN: weakref.WeakSet[MicroVm] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A VM that nobody closed must not run into the interpreter's end."""
    for vm in list(_OPEN):
        vm.close()
