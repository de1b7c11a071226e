"""A vCPU: the thread that runs one hart and serves its exits.

The thread's states, after Dragonball's vCPU state machine::

    UNPLUGGED ──start()──► PAUSED ──resume()──► RUNNING ──pause()──► PAUSED
        ▲                     └────────stop()──────┴──► EXITING ──► EXITED
        └──────────────────────────────unplug()────────────────────────┘

UNPLUGGED, there is no thread; the vCPU's counters go on when it gets the next one. A PAUSED thread is out of guest code
and sleeps; a hart that the guest has stopped (SBI HSM) belongs to a RUNNING thread that sleeps until hart_start.
Requests come from other threads as a flag, which the thread looks at after every exit, and a kick that makes the hart
exit. A fault in a device or in the VMM ends the VM with its traceback, never the process.
"""

from __future__ import annotations

import enum
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.actions import EndKind, MachineEnd
from vmm.bus import Bus
from vmm.engine.base import Exit, ExitReason
from vmm.errors import BusError
from vmm.metrics import VcpuMetrics
from vmm.sbi import HartState, HartStates, Sbi, SbiError, call_name
from vmm.trace import Trace

if TYPE_CHECKING:
    from vmm.engine.rv64.hart import Hart

KINDS: dict[ExitReason, str] = {reason: reason.name.lower().replace("_", " ") for reason in ExitReason}
"""What the trace and the metrics call each exit reason."""

_MMIO_WRITE = ExitReason.MMIO_WRITE
_LAST_MMIO = int(_MMIO_WRITE)
REMEMBERED_FAULTS = 8
ENDLESS_PAUSE = 0.01  #: seconds that a hart rests which only another hart's change of its code could release


class VcpuState(enum.Enum):
    """The state of a vCPU's thread."""

    UNPLUGGED = "unplugged"
    PAUSED = "paused"
    RUNNING = "running"
    EXITING = "exiting"
    EXITED = "exited"

    def __str__(self) -> str:
        return self.value


class Vcpu:
    """One hart and the thread that runs it.

    Args:
        hart: the hart; nobody else may run it.
        bus: where its MMIO accesses go.
        sbi: who carries out its SBI calls.
        states: the HSM states of all harts.
        trace: where exits are counted.
        changed: called, on any thread, after the vCPU's state changed.
        ended: called on the vCPU's thread with how the VM ended and a host traceback or "", when this vCPU ends it.
    """

    def __init__(
        self,
        hart: Hart,
        bus: Bus,
        sbi: Sbi,
        states: HartStates,
        trace: Trace,
        *,
        changed: Callable[[], None],
        ended: Callable[[int, MachineEnd, str], None],
    ) -> None:
        self.hart = hart
        hart.watch()
        self.bus_faults: deque[str] = deque(maxlen=REMEMBERED_FAULTS)
        self._bus = bus
        self._sbi = sbi
        self._states = states
        self._trace = trace
        self._recorder = trace.recorder()
        self._changed = changed
        self._ended = ended
        self._condition = threading.Condition()
        self._state = VcpuState.UNPLUGGED
        self._pause_requested = True
        self._stop_requested = False
        # Read without the lock after every exit; set together with what it announces.
        self._attention = True
        self._exits = [0] * (max(ExitReason) + 1)
        self._halted = False
        self._slept_ns = 0
        self._cpu_seconds = 0.0
        self._instructions: int | None = 0
        self._device_names: dict[int, str] = {}
        self._named_of = bus.attachments
        self._thread = self._new_thread()

    @property
    def state(self) -> VcpuState:
        """The state of the thread."""
        return self._state

    @property
    def thread(self) -> threading.Thread:
        """The host's thread; of an unplugged vCPU, the one that it had or will have."""
        return self._thread

    @property
    def was_plugged(self) -> bool:
        """Whether it is plugged in, or was once."""
        return self._state is not VcpuState.UNPLUGGED or self._thread.ident is not None

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._live, name=f"vcpu-{self.hart.id}", daemon=True)

    @property
    def instructions(self) -> int:
        """Retired by the guest on this hart."""
        return self.hart.instructions if self._instructions is None else self._instructions

    def start(self) -> None:
        """Start a thread, in state PAUSED.

        Raises:
            RuntimeError: the host gives no more threads; the vCPU stays UNPLUGGED.
        """
        if self._thread.ident is not None:
            self._thread = self._new_thread()
        self._pause_requested = self._attention = True
        self._stop_requested = self._halted = False
        self._instructions, before = None, self._instructions
        self._state = VcpuState.PAUSED
        try:
            self._thread.start()
        except BaseException:
            self._state, self._instructions = VcpuState.UNPLUGGED, before
            raise

    def unplug(self) -> None:
        """End the thread and wait for its end; the hart is stopped, or will never run again."""
        self.stop()
        self.join()
        self._state = VcpuState.UNPLUGGED

    def resume(self) -> None:
        """Let the hart run, from PAUSED."""
        with self._condition:
            self._pause_requested = False
            self._condition.notify_all()

    def pause(self) -> None:
        """Ask the thread to come out of guest code; it is PAUSED a moment later."""
        with self._condition:
            self._pause_requested = True
        self.kick()

    def stop(self) -> None:
        """Ask the thread to end; it is EXITED a moment later."""
        with self._condition:
            self._stop_requested = True
        self.kick()

    def kick(self) -> None:
        """Make the thread look at what was asked of it, and at the hart's HSM state."""
        self._attention = True
        if self._state is not VcpuState.EXITED:
            self.hart.interrupt()
        with self._condition:
            self._condition.notify_all()

    @property
    def wanted(self) -> bool:
        """Whether the thread is asked to come out of guest code; what keeps it waiting in a device lets it go then."""
        return self._attention

    @property
    def runs_here(self) -> bool:
        """Whether the caller is on this vCPU's thread."""
        return threading.current_thread() is self._thread

    def join(self) -> None:
        """Wait for the end of the thread, if it was started."""
        if self._thread.ident is not None:
            self._thread.join()

    def metrics(self) -> VcpuMetrics:
        """The vCPU's counters now."""
        exits = {KINDS[reason]: self._exits[reason] for reason in ExitReason if self._exits[reason]}
        return VcpuMetrics(
            vcpu=self.hart.id,
            state=str(self._state),
            instructions=self.instructions,
            exits=exits,
            run_seconds=self._thread_seconds(),
            wait_seconds=self._slept_ns / 1e9,
        )

    def _thread_seconds(self) -> float:
        with self._condition:
            if self._state in (VcpuState.EXITED, VcpuState.UNPLUGGED) or self._thread.ident is None:
                return self._cpu_seconds
            return self._cpu_seconds + time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    # What follows runs on the vCPU's own thread.

    def _live(self) -> None:
        try:
            while self._admitted():
                if self._awake():
                    self._guest()
        except Exception as error:
            detail = f"serving hart {self.hart.id} raised {type(error).__name__}: {error}"
            self.end(MachineEnd(EndKind.CRASH, detail=detail), traceback.format_exc())
        with self._condition:
            self._instructions = self.hart.instructions
            self._cpu_seconds += time.thread_time()
            self._state = VcpuState.EXITED
        self._changed()

    def _admitted(self) -> bool:
        """Sleep while the thread must not enter guest code; False when it shall end."""
        hart_id = self.hart.id
        with self._condition:
            while True:
                self._attention = False
                if self._stop_requested:
                    self._state = VcpuState.EXITING
                    return False
                if self._pause_requested:
                    self._enter(VcpuState.PAUSED)
                elif self._states[hart_id] is HartState.STOPPED:
                    self._enter(VcpuState.RUNNING)
                else:
                    break
                self._condition.wait()
            self._enter(VcpuState.RUNNING)
        return True

    def _enter(self, state: VcpuState) -> None:
        if self._state is not state:
            self._state = state
            self._changed()

    def _awake(self) -> bool:
        """Bring a hart that is halted, suspended or about to start to where it can run; False if it still sleeps."""
        state = self._states[self.hart.id]
        if (self._halted or state is HartState.SUSPENDED) and not self._woken():
            return False
        self._halted = False
        if state is HartState.STARTED:
            return True
        entry = self._states.take_up(self.hart.id)
        if entry is not None:
            self.hart.reset(entry.address, self.hart.id, entry.opaque)
        return True

    def _woken(self) -> bool:
        """Sleep as WFI does; True once an enabled interrupt is pending, False if somebody asks for the thread.

        A request wakes the thread but not the hart: it sleeps on afterwards, so that being paused changes nothing in
        the guest.
        """
        hart = self.hart
        while not self._attention:
            if hart.interrupt_waiting:
                return True
            began = time.monotonic_ns()
            hart.wait()
            self._slept_ns += time.monotonic_ns() - began
        return False

    def _guest(self) -> None:
        """Run guest code and serve its exits until somebody asks for the thread."""
        run, trace, counts = self.hart.run, self._trace, self._exits
        read, write, complete_read = self._bus.read, self._bus.write, self.hart.complete_read
        while not self._attention:
            ended = run()
            reason = ended[0]
            counts[reason] += 1
            # Accesses to devices by the shortest way: a request takes several of them.
            if not trace.enabled and reason <= _LAST_MMIO:
                try:
                    if reason is _MMIO_WRITE:
                        write(ended[1], ended[2], ended[3])
                    else:
                        complete_read(read(ended[1], ended[2]))
                except BusError as error:
                    self._bus_fault(error)
                continue
            if trace.enabled:
                began = time.monotonic_ns()
                kind, name = KINDS[reason], self._exit_name(ended)
                self._recorder.remember(self.hart.id, *self._stopped_at(reason), kind, name, began)
                self._serve(ended)
                self._recorder.record(kind, name, began)
            else:
                self._serve(ended)

    def _stopped_at(self, reason: ExitReason) -> tuple[int, int | None]:
        """Address and word of the instruction that an exit came from. A WFI is over when it is looked at."""
        pc = self.hart.pc - 4 if reason is ExitReason.HALTED else self.hart.pc
        return pc, self.hart.instruction_at(pc)

    def _serve(self, ended: Exit) -> None:
        match ended.reason:
            case ExitReason.MMIO_WRITE:
                try:
                    self._bus.write(ended.address, ended.width, ended.value)
                except BusError as error:
                    self._bus_fault(error)
            case ExitReason.MMIO_READ:
                try:
                    value = self._bus.read(ended.address, ended.width)
                except BusError as error:
                    self._bus_fault(error)
                else:
                    self.hart.complete_read(value)
            case ExitReason.SBI_CALL:
                answer = self._sbi.call(self.hart.id, ended.args)
                if answer is not None:
                    self.hart.complete_sbi(answer.error, answer.value)
                else:
                    self._attention = True
                    if self._states[self.hart.id] is HartState.SUSPENDED:
                        # What a retentive suspend answers when it is over; a non-retentive one is reset by then.
                        self.hart.complete_sbi(SbiError.SUCCESS, 0)
                    else:
                        # Who unplugs the vCPU waits for its hart to stop.
                        self._changed()
                    if self._states.all_stopped:
                        self.end(MachineEnd(EndKind.CRASH, detail="every hart has stopped itself, none is left to run"))
            case ExitReason.HALTED:
                self._halted = not self._woken()
            case ExitReason.INTERRUPTED | ExitReason.BUDGET:
                pass
            case ExitReason.SHUTDOWN:
                self.end(MachineEnd(EndKind.SHUTDOWN, detail="the guest shut down"))
            case ExitReason.STUCK:
                detail = (
                    f"hart {self.hart.id} finds no code at its trap vector {self.hart.pc:#x} and would trap for ever"
                )
                self.end(MachineEnd(EndKind.CRASH, detail=detail))
            case ExitReason.ENDLESS:
                self._endless()
            case ExitReason.INTERNAL_ERROR:
                detail = f"the engine of hart {self.hart.id} reached an impossible state at pc {self.hart.pc:#x}"
                self.end(MachineEnd(EndKind.CRASH, detail=detail))

    def _endless(self) -> None:
        """A kernel that gave up: nothing can happen any more, unless another hart changes the code."""
        if self._states.alone(self.hart.id):
            detail = (
                f"hart {self.hart.id} jumps to itself at {self.hart.pc:#x} with interrupts off, and no other hart runs"
            )
            self.end(MachineEnd(EndKind.HANG, detail=detail))
        else:
            self.hart.wait(ENDLESS_PAUSE)

    def _bus_fault(self, error: BusError) -> None:
        self.bus_faults.append(f"hart {self.hart.id} at pc {self.hart.pc:#x}: {error}")
        self.hart.bus_fault()

    def end(self, end: MachineEnd, trace: str = "") -> None:
        """End the VM, from an exit of this hart."""
        with self._condition:
            self._stop_requested = self._attention = True
        self._ended(self.hart.id, end, trace)

    def _exit_name(self, ended: Exit) -> str:
        if ended.reason is ExitReason.SBI_CALL:
            return call_name(ended.args)
        if ended.reason is not ExitReason.MMIO_READ and ended.reason is not ExitReason.MMIO_WRITE:
            return ""
        if self._named_of is not self._bus.attachments:
            self._named_of = self._bus.attachments
            self._device_names.clear()
        name = self._device_names.get(ended.address)
        if name is None:
            found = (each.name for each in self._bus.attachments if each.base <= ended.address < each.end)
            name = self._device_names[ended.address] = next(found, "no device")
        return name
