"""A probe between the bus and a virtio-mmio slot: it writes down what the driver does, and can stop it at a request.

The driver's half of virtio is register accesses (virtio 1.2, 4.2.2) and memory. The probe sees the first, in order, and
passes them on; at a write to QueueNotify it can keep the vCPU's thread waiting, before the device has done anything
and again when it is done. With one vCPU the whole guest stands still then, in the middle of a store instruction, and
its memory can be looked at. Guest time is put back afterwards, as if it had stood still.

Whoever wants to pause or end the VM meanwhile gets it: the probe lets go.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from kata_lab.lab.machines import LabError
from kata_lab.lab.virtqueue_view import Frame, Walk, take_frame
from vmm.actions import VmState

if TYPE_CHECKING:
    from vmm.devices.virtio.mmio import VirtioMmio
    from vmm.microvm import MicroVm

T = TypeVar("T")

QUEUE_NOTIFY: Final = 0x050
INTERRUPT_ACK: Final = 0x064
KEPT_ACCESSES: Final = 4096
_POLL: Final = 0.05  # seconds; the end of a VM wakes nobody
_PATIENCE: Final = 60.0  # seconds for a step of the guest


@dataclass(frozen=True, slots=True)
class Access:
    """The driver's access to a register.

    Attributes:
        write: whether it wrote.
        offset: of the register in the slot.
        width: bytes.
        value: what was written, or what was read.
    """

    write: bool
    offset: int
    width: int
    value: int


class _Phase(IntEnum):
    """How far a stopped request is, and how far it may go."""

    OFFERED = 0
    SERVED = 1
    GONE = 2


class Stopped(Generic[T]):
    """A guest that stands still at a request; a context manager, which lets it go.

    Attributes:
        before: the queue as the driver left it.
        slot: of the device.
    """

    def __init__(self, probe: SlotProbe, slot: VirtioMmio, before: Frame, working: Future[T]) -> None:
        self.before = before
        self.slot = slot
        self._probe = probe
        self._working = working
        self._after: Frame | None = None

    @property
    def walk(self) -> Walk:
        """The chain of the request.

        Raises:
            LabError: the driver notified without any.
        """
        if not self.before.waiting:
            raise LabError("the driver notified although no buffer waits: there is nothing to follow")
        return self.before.waiting[0]

    @property
    def still(self) -> bool:
        """Whether the guest still stands still."""
        return self._probe.stopped is self

    @property
    def served(self) -> bool:
        """Whether the device has done its work."""
        return self._after is not None or not self.still

    def serve(self) -> Frame:
        """Let the device do its work; the queue afterwards, at which the guest stands still once more. A second call
        gives the same.

        Raises:
            LabError: the guest went on meanwhile, since somebody paused or ended the VM.
        """
        if self._after is None:
            self._after = self._probe.serve(self)
        return self._after

    def go_on(self, timeout: float = _PATIENCE) -> T:
        """Let the guest go on, and wait for what :meth:`SlotProbe.stop` was given; a second call gives the same."""
        self.close()
        return self._working.result(timeout)

    def close(self) -> None:
        """Let the guest go on; a second call does nothing."""
        self._probe.let_go(self)

    def __enter__(self) -> Stopped[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SlotProbe:
    """Listens to one device of a running VM; a context manager.

    Args:
        vm: a VM that has been started.
        name: of the device.

    A probe that listens to the device already is closed.

    Raises:
        LabError: the VM has no device of that name.
        StateError: the VM does not run.
    """

    def __init__(self, vm: MicroVm, name: str) -> None:
        self._vm = vm
        self._machine = vm.machine
        self._base, self.slot = _find(vm, name)
        for each in self._machine.board.bus.attachments:
            if each.base == self._base and isinstance(each.device, SlotProbe):
                each.device.close()
        self._name = name
        self.accesses: deque[Access] = deque(maxlen=KEPT_ACCESSES)
        self._listeners: tuple[Callable[[Access], None], ...] = ()
        #: The request at which the guest stands still, if it does.
        self.stopped: Stopped[Any] | None = None
        self._changed = threading.Condition()
        self._wish: Callable[[Frame], bool] | None = None
        self._wish_failed: Exception | None = None
        self._working: Future[Any] | None = None
        self._reached = self._allowed = _Phase.GONE
        with self._standing_still():
            before = self._machine.board.bus.detach(self._base)
            self._machine.board.bus.attach(self, self._base, before.size, before.name)

    # What the bus calls.

    def read(self, offset: int, width: int) -> int:
        """Pass a read on, and note it."""
        value = self.slot.read(offset, width)
        self._note(Access(False, offset, width, value))
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        """Note a write and pass it on; a notification may be made to wait."""
        self._note(Access(True, offset, width, value & (1 << 8 * width) - 1))
        if offset == QUEUE_NOTIFY and self._wish is not None:
            self._notification(offset, width, value)
        else:
            self.slot.write(offset, width, value)

    def _note(self, access: Access) -> None:
        self.accesses.append(access)
        for listener in self._listeners:
            listener(access)

    def _notification(self, offset: int, width: int, value: int) -> None:
        frame = take_frame(self.slot, value) if value < len(self.slot.device.queues) else None
        with self._changed:
            wish, working = self._wish, self._working
            stops = False
            if wish is not None and working is not None and frame is not None:
                try:
                    stops = wish(frame)
                except Exception as error:
                    self._wish, self._wish_failed = None, error
            if stops and frame is not None and working is not None:
                self._wish = None
                self.stopped = Stopped(self, self.slot, frame, working)
                self._reached = self._allowed = _Phase.OFFERED
        if not stops:
            self.slot.write(offset, width, value)
            return
        engine = self._machine.engine
        held = engine.nanoseconds()
        try:
            self._reach(_Phase.OFFERED)
            self.slot.write(offset, width, value)
            self._reach(_Phase.SERVED)
        finally:
            with self._changed:
                self.stopped = None
                self._reached = _Phase.GONE
                self._changed.notify_all()
            if not engine.deterministic and len(engine.harts) == 1:
                engine.skip(held - engine.nanoseconds())

    def _reach(self, phase: _Phase) -> None:
        """On the vCPU's thread: stay at ``phase`` until more is allowed, or somebody asks for the thread."""
        vcpu = next((each for each in self._machine.vcpus if each.runs_here), None)
        with self._changed:
            self._reached = phase
            self._changed.notify_all()
            while self._allowed <= phase and not (vcpu is not None and vcpu.wanted):
                self._changed.wait(_POLL)

    # What the notebook calls.

    def subscribe(self, listener: Callable[[Access], None]) -> None:
        """Call ``listener`` with every access, on the vCPU's thread: with a write before the device has it."""
        self._listeners = (*self._listeners, listener)

    def unsubscribe(self, listener: Callable[[Access], None]) -> None:
        """Undo :meth:`subscribe`; nothing if it did not listen."""
        self._listeners = tuple(each for each in self._listeners if each != listener)

    def frame(self, number: int = 0) -> Frame:
        """Queue ``number`` as it is now; of a guest that runs, a moment ago."""
        return take_frame(self.slot, number)

    def stop(self, work: Callable[[], T], when: Callable[[Frame], bool] = lambda frame: True) -> Stopped[T]:
        """Do ``work``, which makes the guest do something, on a thread of its own, until the driver notifies.

        Args:
            work: such as ``lambda: shell.run("cat /mnt/file")``.
            when: whether to stop at this notification, told by the queue as the driver left it.

        A guest that stands still already, at whichever device, is let go first.

        Raises:
            LabError: ``work`` was over before, or ``when`` raised something.
        """
        for each in self._machine.board.bus.attachments:
            standing = each.device.stopped if isinstance(each.device, SlotProbe) else None
            if standing is not None:
                standing.close()
        with self._changed:
            self._wish_failed = None
            working: Future[T] = Future()
            self._working = working
            self._wish = when
        thread = threading.Thread(target=_carry_out, args=(working, work), name="lab-request", daemon=True)
        thread.start()
        with self._changed:
            try:
                while self.stopped is None and not working.done():
                    self._changed.wait(_POLL)
            finally:
                self._wish = None  # also when the wait is interrupted
            found, failed = self.stopped, self._wish_failed
        if failed is not None:
            raise LabError(f"`when` raised {type(failed).__name__} instead of saying whether to stop: {failed}")
        if found is None:
            working.result()  # raises what it raised
            raise LabError(f"it was done without any such request to {self._name!r}: the guest had no need to ask")
        return found

    def serve(self, request: Stopped[Any]) -> Frame:
        """See :meth:`Stopped.serve`."""
        number = request.before.number
        with self._changed:
            if self.stopped is request:
                self._allowed = max(self._allowed, _Phase.SERVED)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._reached >= _Phase.SERVED, _PATIENCE)
                if self.stopped is request:
                    return take_frame(self.slot, number)
        raise LabError("the guest has gone on already: stop it at another request, with the cell that did it")

    def let_go(self, request: Stopped[Any]) -> None:
        """See :meth:`Stopped.close`."""
        with self._changed:
            if self.stopped is request:
                self._allowed = _Phase.GONE
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.stopped is not request, _PATIENCE)

    def close(self) -> None:
        """Let the guest go on, and leave its slot as it was; a second call does nothing."""
        with self._changed:
            self._wish = None
            stopped = self.stopped
        if stopped is not None:
            stopped.close()
        bus = self._machine.board.bus
        there = next((each for each in bus.attachments if each.base == self._base), None)
        if there is not None and there.device is self:
            with self._standing_still():
                bus.detach(self._base)
                bus.attach(self.slot, self._base, there.size, there.name)

    def __enter__(self) -> SlotProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _standing_still(self) -> Iterator[None]:
        """While the slot changes hands no vCPU may look for it."""
        if self._vm.state is not VmState.RUNNING:
            yield
            return
        self._vm.pause()
        try:
            yield
        finally:
            self._vm.resume()


def _find(vm: MicroVm, name: str) -> tuple[int, VirtioMmio]:
    """Base and slot of a device."""
    from vmm.board.riscv_virt import virtio_address
    from vmm.devices.virtio.mmio import VirtioMmio

    names = []
    for number, slot in enumerate(vm.machine.board.slots):
        if isinstance(slot, VirtioMmio):
            names.append(slot.device.name)
            if slot.device.name == name:
                return virtio_address(number), slot
    raise LabError(f"the VM has no device {name!r}; it has {', '.join(names) or 'none at all'}")


def _carry_out(working: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:
        working.set_exception(error)
    else:
        working.set_result(result)


@contextlib.contextmanager
def traced(slot: VirtioMmio) -> Iterator[None]:
    """Keep the requests of a slot's device in ``queue.recent`` meanwhile; what was there is forgotten."""
    for queue in slot.device.queues:
        queue.recent.clear()
        queue.tracing = True
    try:
        yield
    finally:
        for queue in slot.device.queues:
            queue.tracing = False
