"""What every virtio device has: identity, features, queues, configuration space, and its life (virtio 1.2, chapter 2).

A device knows nothing of its transport. Its life::

    made ──connect()──► inactive ──activate()──► active ──reset()──► inactive …            close() from anywhere

Made, it holds what it needs of the host: files, sockets. ``connect`` gives it a :class:`Host`: guest memory, the VM's
event loop, and a way to interrupt. Active, the driver has set DRIVER_OK and the queues may be used.

Three kinds of threads come here: vCPUs (registers and notifications), the VM's event loop (sockets, timers) and workers
of the device's own. Every method below is called with :attr:`VirtioDevice.lock` held; code of the device that runs
because a file descriptor, a timer or a worker called it opens with ``with self.served():``, which takes the lock and
turns a driver's mistake into DEVICE_NEEDS_RESET (2.1.2). A notification is served on the vCPU's own thread, since
handing it to another one costs more than most requests; what may block for long belongs to the loop or to a worker.

A whole device, which gives away the time of day; ``MicroVm(config, devices=[ClockDevice()])`` plugs it in::

    class ClockDevice(VirtioDevice):
        DEVICE_ID = 4      # that of an entropy source, so that Linux's virtio-rng is its driver
        KIND = "clock"

        @property
        def queue_sizes(self) -> tuple[int, ...]:
            return (8,)    # one queue, in which the driver may have 8 buffers

        def notify(self, queue: Queue, index: int) -> None:
            for chain in queue.chains():                       # each buffer that the driver made available
                written = chain.write(time.ctime().encode())   # as much as it has room for
                chain.detail = "the time"                      # for who looks at queue.recent
                queue.push(chain, written)                     # every buffer goes back, once
            queue.signal()                                     # one interrupt for all of them

A device may keep chains and push them later. A mistake in a device's code ends the VM with a report that names the
device: an exception that is no :class:`QueueError`, a buffer given back twice or with more bytes than it has
(:class:`DeviceError`), and a buffer that is neither given back nor kept.

Left out: packed queues, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_RESET.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vmm.devices.virtio.queue import DeviceError, Queue, QueueError, QueueState
from vmm.memory import GuestMemory

INDIRECT_DESC: Final = 1 << 28  #: VIRTIO_F_INDIRECT_DESC (6)
EVENT_IDX: Final = 1 << 29  #: VIRTIO_F_EVENT_IDX
VERSION_1: Final = 1 << 32  #: VIRTIO_F_VERSION_1
COMMON_FEATURES: Final = INDIRECT_DESC | EVENT_IDX | VERSION_1


@dataclass(frozen=True, slots=True)
class Host:
    """What a device is given by the machine that it is plugged into.

    Attributes:
        memory: guest memory.
        loop: the VM's event loop; devices register their file descriptors and timers with it.
        interrupt_queue: tells the driver of used buffers, from any thread.
        interrupt_config: tells the driver that the configuration space or the status changed, from any thread.
        failed: called with the mistake, when the driver broke a rule; the transport asks for a reset.
        crashed: called with an exception that nobody expected; it ends the VM.
    """

    memory: GuestMemory
    loop: asyncio.AbstractEventLoop
    interrupt_queue: Callable[[], None]
    interrupt_config: Callable[[], None]
    failed: Callable[[QueueError], None]
    crashed: Callable[[BaseException], None]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device as a plain value, taken while the VM is paused.

    Attributes:
        device_id: which kind of device it is.
        features: what the driver accepted.
        active: whether the driver had set DRIVER_OK.
        queues: every queue.
        own: what the device itself keeps, plain data.
        config_generation: how often the configuration space has changed.
    """

    device_id: int
    features: int
    active: bool
    queues: tuple[QueueState, ...]
    own: Mapping[str, Any]
    config_generation: int = 0


REQUIRED: Final = ("DEVICE_ID", "KIND", "queue_sizes", "notify")  #: what the class of every device must have


def _lacking(device: VirtioDevice, name: str) -> DeviceError:
    return DeviceError(
        f"the class {type(device).__name__} has no {name}; a virtio device must have {', '.join(REQUIRED)}, as the"
        f" example in {__name__} has"
    )


class VirtioDevice:
    """Base of all virtio devices.

    A device overrides what it needs; :data:`REQUIRED` tells what every one must have.

    Args:
        name: what traces and errors call it.

    Raises:
        DeviceError: the class lacks something that every device must have.
    """

    DEVICE_ID: ClassVar[int]  #: virtio 1.2, section 5
    KIND: ClassVar[str]  #: such as ``blk``

    def __init__(self, name: str = "") -> None:
        for required in REQUIRED:
            if getattr(type(self), required, None) is getattr(VirtioDevice, required, None):
                raise _lacking(self, required)
        self.name = name or self.KIND
        self.lock = threading.RLock()
        self.queues: tuple[Queue, ...] = ()
        self.active = False
        #: What the driver accepted, valid while active.
        self.accepted = 0
        #: The mistake because of which the driver must reset the device, or None.
        self.mistake: QueueError | None = None
        self.config_generation = 0
        self._host: Host | None = None

    # What a device says of itself.

    @property
    def features(self) -> int:
        """Features offered besides :data:`COMMON_FEATURES`."""
        return 0

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        """The largest size of each queue."""
        raise _lacking(self, "queue_sizes")

    @property
    def config_space(self) -> bytes:
        """The device's configuration space as the driver reads it."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration space; ignored unless a device says otherwise."""

    # A device's life.

    def activate(self) -> None:
        """The driver is ready; queues may be used from now on."""

    def notify(self, queue: Queue, index: int) -> None:
        """The driver made buffers available in ``queue``, which is number ``index``. Called only while active.

        Raises:
            QueueError: the driver broke a rule.
        """
        raise _lacking(self, "notify")

    def deactivate(self) -> None:
        """The driver resets the device: forget everything about its requests. When this returns, nothing of the device
        touches guest memory any more."""

    def pause(self) -> None:
        """The VM is paused: touch neither guest memory nor queues until :meth:`resume`. May be called when inactive."""

    def resume(self) -> None:
        """Undo :meth:`pause`."""

    def save_own(self) -> dict[str, Any]:
        """What :meth:`restore_own` needs, as plain data; the device is paused and holds no buffers."""
        return {}

    def restore_own(self, own: Mapping[str, Any]) -> None:
        """Become what :meth:`save_own` saw."""

    def close(self) -> None:
        """Give back what the device holds of the host. Called without the lock, once nothing notifies any more, on the
        event loop's thread if there is one; also for a device that was never connected, and a second time, which does
        nothing."""

    # For devices.

    @property
    def host(self) -> Host:
        """What the device was connected to."""
        assert self._host is not None, f"{self.name} is not connected"
        return self._host

    def has(self, feature: int) -> bool:
        """Whether the driver accepted the feature bit ``1 << n``."""
        return bool(self.accepted & feature)

    def config_changed(self) -> None:
        """Tell the driver that the configuration space reads differently now (2.5, 5.x)."""
        self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
        if self.active:
            self.host.interrupt_config()

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Hold the lock; a driver's mistake makes the device ask for a reset, any other exception ends the VM."""
        with self.lock:
            try:
                yield
            except QueueError as error:
                self.fail(error)
            except Exception as error:
                self._crash(error)
            else:
                for queue in self.queues:
                    if queue.lost:
                        self._miss(queue)

    def fail(self, error: QueueError) -> None:
        """The driver broke a rule: stop, and ask it for a reset (2.1.2). What it waits for does not come any more."""
        if self.mistake is None:
            # What the traceback refers to, such as views of guest memory, must not live as long as the mistake.
            error.__cause__ = error.__context__ = None
            self.mistake = error.with_traceback(None)
            self.active = False
            for queue in self.queues:
                queue.abandon()
            self.host.failed(error)

    def _crash(self, error: Exception) -> None:
        self.active = False
        self.host.crashed(error)

    def _miss(self, queue: Queue) -> None:
        """The device's code let go of buffers that it had to give back; whoever waits for them would wait for ever."""
        lost = sorted(queue.lost)
        queue.lost.clear()
        if self.active:
            number = self.queues.index(queue)
            self._crash(DeviceError(f"queue {number}'s buffers at descriptors {lost} were taken and never given back"))

    # For transports.

    def connect(self, host: Host) -> None:
        """Become part of a machine."""
        self._host = host
        self.queues = tuple(Queue(host.memory, size, host.interrupt_queue) for size in self.queue_sizes)

    def start(self, accepted: int) -> None:
        """The driver set DRIVER_OK, having accepted these features; the lock is held."""
        self.accepted = accepted
        self.active = True
        self.activate()

    def notified(self, index: int) -> None:
        """The driver notified queue ``index``. Nothing before DRIVER_OK, and of queues that are not there or not ready
        (4.2.2.1)."""
        # Without the context manager of served(), which costs as much as a small request.
        with self.lock:
            if self.active and index < len(self.queues) and (queue := self.queues[index]).ready:
                try:
                    self.notify(queue, index)
                except QueueError as error:
                    self.fail(error)
                except Exception as error:
                    self._crash(error)
                if queue.lost:
                    self._miss(queue)

    def reset(self) -> None:
        """The driver wrote 0 to the status."""
        with self.lock:
            self.deactivate()
            self.active = False
            self.accepted = 0
            self.mistake = None
            for queue in self.queues:
                queue.reset()

    def save(self) -> DeviceState:
        """The device as a plain value; the VM is paused.

        Raises:
            DeviceError: it holds buffers of the driver.
        """
        with self.lock:
            queues = tuple(queue.save() for queue in self.queues)
            own, generation = self.save_own(), self.config_generation
            return DeviceState(self.DEVICE_ID, self.accepted, self.active, queues, own, generation)

    def restore(self, state: DeviceState) -> None:
        """Become what :meth:`save` saw; the device is connected and inactive, guest memory is as it was then.

        Raises:
            QueueError: the state is not of this kind of device, or its queues do not fit.
        """
        if state.device_id != self.DEVICE_ID or len(state.queues) != len(self.queues):
            raise QueueError(
                f"a state of virtio device {state.device_id} with {len(state.queues)} queues cannot be put into"
                f" {self.name}, which is {self.DEVICE_ID} with {len(self.queues)}"
            )
        with self.lock:
            for queue, saved in zip(self.queues, state.queues, strict=True):
                queue.restore(saved, bool(state.features & EVENT_IDX), bool(state.features & INDIRECT_DESC))
            self.restore_own(state.own)
            self.config_generation = state.config_generation
            if state.active:
                self.start(state.features)

    def disconnect(self) -> None:
        """Leave the machine: guest memory is let go of."""
        with self.lock:
            # Also one that was stopped by a mistake, whose workers may still be at it.
            self.deactivate()
            self.active = False
            for queue in self.queues:
                queue.release()
