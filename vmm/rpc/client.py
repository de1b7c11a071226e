"""A VM in a process of its own, used as :class:`vmm.MicroVm` is.

::

    with RemoteVm(VmConfig(kernel="Image", initrd="initrd.cpio")) as vm:
        vm.start()
        vm.console.expect("login")

State, configuration, milestones and console are kept here, as the VMM process tells of them; what changed because of an
action has changed here when its answer comes. A VMM process that dies is a VM that ended: :attr:`RemoteVm.ended` says
so at once, and every request that waits fails.

What needs the machine's inside (``machine``, exits of the trace) is not here. Devices are reached in the ways that they
offer to other processes: :meth:`RemoteVm.dial` and :meth:`RemoteVm.listen` use the unix sockets of the vsock device.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from vmm import actions
from vmm.actions import EndKind, MachineEnd, VmmAction, VmState
from vmm.config import VmConfig
from vmm.console import Console
from vmm.errors import ConfigError, StateError, VmmError
from vmm.hotplug import HotplugRecord
from vmm.metrics import ProcessMemory, VmMetrics
from vmm.microvm import VmTimeout
from vmm.report import CrashReport
from vmm.rpc import wire
from vmm.rpc.connection import Connection
from vmm.rpc.hotplugs import ReadHotplugs
from vmm.rpc.process import ServerProcess
from vmm.rpc.vsock import VsockPorts
from vmm.trace import Milestone

AnswerT = TypeVar("AnswerT")

QUERY_SECONDS: Final = 10.0  #: for what the VMM process answers without the VM
CLOSE_SECONDS: Final = 10.0  #: for an orderly end of the VMM process, before it is killed
_REAP_SECONDS = 0.05  # from the end of the connection until the process has ended too
_TYPED_AT_ONCE = 4096
_WHAT = "the VMM process"


class RemoteTrace:
    """The milestones of a VM in another process."""

    def __init__(self) -> None:
        self._milestones: tuple[Milestone, ...] = ()

    @property
    def milestones(self) -> tuple[Milestone, ...]:
        """In the order in which they were reached; their times count from the start of the VM."""
        return self._milestones

    def add(self, reached: tuple[Milestone, ...]) -> None:
        """Take what the VMM process told."""
        self._milestones += reached


class _Line:
    """The keyboard's way to the guest's serial port (:class:`vmm.console.SerialInput`)."""

    def __init__(self, vm: RemoteVm) -> None:
        self._vm = vm

    def receive(self, data: bytes) -> int:
        try:
            return self._vm.query(wire.TypeOnConsole(data[:_TYPED_AT_ONCE])).count
        except wire.RpcError:
            if self._vm.state is VmState.STOPPED:
                return 0  # the console says that it was closed
            raise

    def wait_for_room(self, timeout: float) -> bool:
        return True  # the VMM process waited before it answered


class RemoteVm:
    """One virtual machine in a process of its own, which ends with this object; a context manager.

    Args:
        config: what the VM is; it can still be changed by actions until the VM starts.
        socket_path: where the VMM process shall listen, in a directory that only this user can enter; by default one in
            a new temporary directory.

    Raises:
        RpcError: the process cannot be started, or is of another version.
        ConfigError: the configuration cannot be carried out.
    """

    def __init__(self, config: VmConfig | None = None, socket_path: Path | None = None) -> None:
        self._config = config if config is not None else VmConfig()
        self._state = VmState.CONFIGURED
        self._console = Console(self._config.console.limit_bytes)
        self._trace = RemoteTrace()
        self._end: concurrent.futures.Future[MachineEnd] = concurrent.futures.Future()
        self._report: CrashReport | None = None
        self._last_metrics = VmMetrics(0.0, (), ProcessMemory(0, 0))
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[str, concurrent.futures.Future[Any]]] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._closing = threading.Lock()
        self._gone: str | None = None
        self._closed = False
        with contextlib.ExitStack() as made:
            if socket_path is None:
                directory = tempfile.mkdtemp(prefix="kata-lab-vmm-")
                made.callback(shutil.rmtree, directory, ignore_errors=True)
                socket_path = Path(directory) / "vmm.sock"
            made.callback(lambda: socket_path.unlink(missing_ok=True))  # of a process that was killed
            self._process = ServerProcess("vmm.rpc", [str(socket_path)], _WHAT)
            made.callback(self._process.close, CLOSE_SECONDS)
            self._connection = made.enter_context(Connection(socket_path, _WHAT, QUERY_SECONDS, self._process.pid))
            self._thread = threading.Thread(target=self._live, name=f"vmm-rpc-{self.pid}", daemon=True)
            self._thread.start()
            made.callback(self._hang_up)
            self._ports = made.enter_context(VsockPorts(lambda: self._config))
            self.query(wire.CreateMicroVm(self._config))
            self._made = made.pop_all()

    # As MicroVm has it.

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
    def trace(self) -> RemoteTrace:
        """The milestones of the VM's boot."""
        return self._trace

    @property
    def hotplugs(self) -> tuple[HotplugRecord, ...]:
        """What was hot-plugged and how that went, as the VMM process tells it; nothing once it has gone."""
        try:
            return tuple(self.query(ReadHotplugs()).records)
        except wire.RpcError:
            return ()

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

    @property
    def pid(self) -> int:
        """The VMM process."""
        return self._process.pid

    @property
    def thread_ids(self) -> dict[str, int]:
        """The threads of the VMM process by name, ``vcpu-0`` and so on; none once it has gone."""
        try:
            return dict(self.query(wire.GetThreadIds()).threads)
        except wire.RpcError:
            return {}

    def request(self, action: VmmAction[AnswerT]) -> concurrent.futures.Future[AnswerT]:
        """Send an action; the future holds its answer or its VmmError. Actions are carried out in the order of sending.

        Raises:
            ConfigError: something that is not an action.
            CodecError: an action whose values cannot travel.
        """
        if not isinstance(action, VmmAction):
            raise ConfigError(f"{action!r} is no action; the actions are the classes of vmm.actions")
        future: concurrent.futures.Future[AnswerT] = concurrent.futures.Future()
        number = next(self._numbers)
        frame = wire.pack(wire.Request(number, action))
        with self._lock:
            gone = self._gone
            if gone is None:
                self._waiting[number] = action.name, future
        if gone is not None:
            future.set_exception(self._unanswered(action.name, gone))
            return future
        # An answer cannot be taken back: whoever cancels only stops waiting for it.
        future.add_done_callback(lambda _: self._waiting.pop(number, None))
        try:
            with self._sending:
                self._connection.send(frame)
        except OSError:
            # Half a message may have gone out. The reading thread finds the end of the connection, and fails the rest.
            self._connection.hang_up()
        return future

    def query(self, action: VmmAction[AnswerT], timeout: float = QUERY_SECONDS) -> AnswerT:
        """Send an action that does not wait for the guest, and wait for its answer.

        Raises:
            RpcError: the VMM process has gone, or has not answered within ``timeout`` seconds.
            VmmError: what it answered.
        """
        self._refuse_own_thread(action.name)
        try:
            return self.request(action).result(timeout)
        except concurrent.futures.TimeoutError:
            raise wire.RpcError(
                f"the VMM process {self.pid} has not answered {action.name} within {timeout:g} s"
            ) from None

    def start(self) -> None:
        """Build the machine, load the kernel, and let the harts run. Raises as :meth:`vmm.MicroVm.start`."""
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
        if (end := self.end) is not None:
            return end
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
        """The VM's counters now, memory being that of the VMM process; of a stopped VM, its last ones."""
        if self._state is not VmState.STOPPED:
            with contextlib.suppress(wire.RpcError):
                self._last_metrics = self.query(wire.ReadMetrics()).metrics
        return self._last_metrics

    def report(self) -> CrashReport:
        """Where every hart stands; of a VM that ended, where it ended and why. A running VM pauses for a moment.

        Raises:
            StateError: the VM has not started, or is closed after an end that nothing is to be said about.
            RpcError: the VMM process has gone without leaving a report.
        """
        if self._report is not None:
            return self._report
        report = self._ask(actions.GetReport()).report
        if self._state is VmState.STOPPED:
            self._report = report
        return report

    def close(self) -> None:
        """Shut down if need be, and leave no process, thread or file. A second call does nothing."""
        self._refuse_own_thread("close")
        with self._closing:
            if self._closed:
                return
            self._closed = True
            try:
                if self._gone is None:
                    with contextlib.suppress(VmmError, concurrent.futures.TimeoutError):
                        self.request(actions.ShutdownMicroVm()).result(CLOSE_SECONDS)
            finally:
                self._made.close()

    def __enter__(self) -> RemoteVm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> RemoteVm:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import asyncio

        await asyncio.to_thread(self.close)

    # The guest's sockets.

    def dial(self, port: int) -> concurrent.futures.Future[socket.socket]:
        """Connect to a vsock port of the guest: a future of a blocking stream socket, or of a VsockError where nobody
        listens there. Cancelling it gives the connection up.

        Raises:
            VsockError: the VM has no vsock device with a unix socket.
        """
        return self._ports.dial(port)

    def listen(self, port: int, accept: Callable[[socket.socket], object]) -> None:
        """Give ``accept``, on a thread of its own, a blocking stream socket for every connection that the guest opens
        to this port of the host.

        Raises:
            VsockError: somebody listens there already, or the VM has no vsock device with a unix socket.
        """
        self._ports.listen(port, accept)

    def unlisten(self, port: int) -> None:
        """Undo :meth:`listen`; connections that are open stay so."""
        self._ports.unlisten(port)

    # The connection.

    def _live(self) -> None:
        """On the reading thread, until the connection ends."""
        reason = ""
        try:
            while (message := self._connection.receive()) is not None:
                self._take(message)
        except OSError:
            pass  # as good as its end
        except VmmError as error:
            reason = f"the VMM process {self.pid} cannot be understood: {error}"
        self._lose(reason)

    def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Answer(number, value):
                self._settle(number, lambda future: future.set_result(value))
            case wire.Failure(None, _, sentence):
                raise wire.RpcError(sentence)
            case wire.Failure(int(number)):
                error = wire.rebuilt(message)
                self._settle(number, lambda future: future.set_exception(error))
            case wire.ConsoleOutput(data):
                self._console.feed(data)
            case wire.StateChanged(state):
                if self._state is VmState.CONFIGURED:
                    self._console.attach(_Line(self))
                self._state = state
            case wire.ConfigurationChanged(config):
                self._config = config
            case wire.MilestonesReached(milestones):
                self._trace.add(milestones)
            case wire.VmEnded(end, metrics):
                self._last_metrics = metrics
                self._stop(end)
            case _:
                raise wire.RpcError(f"a VMM process does not send {type(message).__name__}")

    def _settle(self, number: int, settle: Callable[[concurrent.futures.Future[Any]], object]) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None and waiting[1].set_running_or_notify_cancel():
            settle(waiting[1])

    def _stop(self, end: MachineEnd) -> None:
        self._state = VmState.STOPPED
        self._console.close(end.detail)
        self._end.set_result(end)

    def _lose(self, reason: str) -> None:
        """The connection has ended, and with it the VM."""
        self._connection.hang_up()
        if not reason:
            done, _ = concurrent.futures.wait([ended := self._process.ended], _REAP_SECONDS)
            reason = ended.result() if done else f"the VMM process {self.pid} hung up"
        with self._lock:
            self._gone = reason
            left = list(self._waiting.values())
        if not self._end.done():
            kind = EndKind.HOST if self._closed else EndKind.CRASH
            self._stop(MachineEnd(kind, detail=reason))
        for name, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._unanswered(name, reason))

    def _unanswered(self, name: str, reason: str) -> VmmError:
        if self._closed:
            return StateError(f"{name} came to a VM that is closed; make a new one")
        return wire.RpcError(f"{name} has no answer, since {reason}")

    def _hang_up(self) -> None:
        self._connection.hang_up()
        self._thread.join()

    def _ask(self, action: VmmAction[AnswerT], timeout: float | None = None) -> AnswerT:
        self._refuse_own_thread(action.name)
        try:
            return self.request(action).result(timeout)
        except concurrent.futures.TimeoutError:
            raise VmTimeout(f"{action.name} was not answered within {timeout} s; the VM is {self._state}") from None

    def _refuse_own_thread(self, what: str) -> None:
        if threading.current_thread() is getattr(self, "_thread", None):
            raise StateError(
                f"{what} would wait for the thread it is called on, {self._thread.name}; use request() there"
            )
