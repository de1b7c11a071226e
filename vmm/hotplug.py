"""What adding and removing vCPUs, memory and devices means for a running VM, and how each of them is undone.

There is no ACPI: the guest is asked through its device manager (:mod:`vmm.upcall`). A hotplug has steps on both sides,
and where one fails those before it are undone, so that the VM is as it was and a later request works::

    vCPU comes     its thread starts, its hart is permitted → the guest starts the hart and brings the CPU online
    vCPU goes      the guest takes the CPU offline and stops its hart → the permission is withdrawn, its thread ends
    device comes   what it needs of the host is opened → a slot is filled → the guest's driver takes it
    device goes    the guest's driver lets it go → its slot is emptied → what it had of the host is closed
    memory         the balloon gets a target → the guest's count of pages reaches it

The guest's word is never enough: a CPU is online when its hart runs, a device is used when its driver has set
DRIVER_OK, and gone when it has not. What is to be undone follows from how a request failed. If the guest refused it, or
never saw it, the guest is as before. If it was lost, the guest is reached anew first: a device manager serves one
connection at a time, so that it has done, or not done, what was lost by the time that it answers again.

Requests are carried out one after the other; they have an order of their own, since the guest may take long and neither
a pause nor a shutdown waits for it. Those end the request under way with an error. What of it can only be undone with
the guest's help is undone as soon as the VM runs again.

Memory comes and goes by balloon, with which the guest boots (Debian's kernel for riscv64 has no virtio-mem).
Left out: forcing a guest. A CPU that it does not give up stays; only a device whose driver does not answer is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, cast

from vmm import actions
from vmm.actions import HotplugAction, VmmAction
from vmm.config import MIB, BalloonConfig, DeviceConfig, VmConfig, VsockConfig
from vmm.errors import ConfigError, StateError, VmmError
from vmm.machine import Machine
from vmm.sbi import HartState
from vmm.upcall import PORT, UpcallClient, UpcallLost, UpcallRefused, UpcallUnavailable

if TYPE_CHECKING:
    from vmm.devices.virtio.balloon import BalloonDevice
    from vmm.devices.virtio.device import VirtioDevice
AnswerT = TypeVar("AnswerT")

RECORDS: Final = 256
REPLY_SECONDS: Final = 15.0  #: for the guest to carry a request out
CONNECT_SECONDS: Final = 20.0  #: for its device manager to be there
HART_SECONDS: Final = 5.0  #: for a hart to run or stop, once the guest says that it does
LAG_SECONDS: Final = 1.0  #: the same, where there is another way
UNDO_SECONDS: Final = 10.0  #: for the guest to help undo what failed
MEMORY_SECONDS: Final = 60.0  #: for all of the memory
STALL_SECONDS: Final = 5.0  #: without a page more or less


class HotplugError(VmmError):
    """A running VM that did not change as it was asked to."""


@dataclass(frozen=True, slots=True)
class HotplugStep:
    """What was done, and when it was (:func:`time.monotonic`)."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class HotplugRecord:
    """One hotplug, for time lines; all times are of :func:`time.monotonic`.

    Attributes:
        action: what was asked for.
        requested_at: when.
        answered_at: when it was answered.
        error: why it failed, "" if it did not.
        steps: what happened in between.
    """

    action: VmmAction[Any]
    requested_at: float
    answered_at: float
    error: str
    steps: tuple[HotplugStep, ...]


def amend(config: VmConfig, action: VmmAction[Any]) -> tuple[VmConfig, object]:
    """What an action does before the start: the configuration that it leads to, and its answer.

    Raises:
        ConfigError: the configuration cannot be changed so.
        StateError: the action needs a VM that runs.
    """
    match action:
        case actions.ResizeVcpu():
            return config.replace(vcpus=action.vcpus), actions.VcpusResized(action.vcpus)
        case actions.ResizeMemory():
            return config.replace(memory_mib=action.memory_mib), actions.MemoryResized(action.memory_mib)
        case actions.InsertMemDevice():
            raise _no_memory_device(action)
        case actions.InsertDevice():
            device = _named(action, {each.name for each in config.devices})
            return config.replace(devices=(*config.devices, device)), actions.DeviceInserted(device.name)
        case actions.RemoveDevice():
            known = {each.name: each for each in config.devices}
            if not isinstance(known.get(action.device), action.KIND):
                raise _unknown(action, known)
            return _without(config, action.device), actions.Empty()
    raise StateError(f"{action.name} came to a VM that is configured; it needs one that is running")


def _no_memory_device(action: actions.InsertMemDevice) -> HotplugError:
    return HotplugError(
        f"a memory device of {action.size_mib} MiB is refused, since no kernel of our guests has a driver for it"
        " (virtio-mem): give the VM a max_memory_mib before it starts, and use ResizeMemory"
    )


def _named(action: actions.InsertDevice, taken: set[str]) -> DeviceConfig:
    """The action's device with a name, that of its kind and the first free number if it has none."""
    device = action.device
    if not isinstance(device, action.KIND):
        raise ConfigError(f"{action.name} was given {device!r}, it must be a {action.KIND.__name__}")
    if device.name:
        if device.name in taken:
            raise ConfigError(f"the VM has a device {device.name!r} already; give the new one a name of its own")
        return device
    numbers = (f"{device.KIND}{number}" for number in range(len(taken) + 1))
    return dataclasses.replace(device, name=next(name for name in numbers if name not in taken))


def _without(config: VmConfig, name: str) -> VmConfig:
    return config.replace(devices=tuple(each for each in config.devices if each.name != name))


def _unknown(action: VmmAction[Any], known: Any) -> ConfigError:
    name = cast(Any, action).device
    return ConfigError(
        f"{action.name} names {name!r}, which is no such device; the VM has {', '.join(known) or 'none'}"
    )


class Hotplug:
    """Carries out the hotplug actions of one running VM, on its event loop.

    Args:
        machine: the machine to change.
        config: gives the VM's configuration as it stands.
        keep: takes the configuration as it stands from now on.
        changed: is set whenever something of the machine changed, see :attr:`Machine.changed`.
    """

    def __init__(
        self,
        machine: Machine,
        config: Callable[[], VmConfig],
        keep: Callable[[VmConfig], None],
        changed: asyncio.Event,
    ) -> None:
        self._machine = machine
        self._config = config
        self._keep = keep
        self._changed = changed
        self._order = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refusal = ""
        self._closed = False
        self._prepared: set[str] = set()  # devices that the guest has given up and that are still in their slots
        self._stale: set[int] = set()  # slots whose device was taken from a driver that did not let go
        self._undoing: dict[str, Callable[[], Awaitable[None]]] = {}  # what is still to be undone, by its subject
        self._steps: list[HotplugStep] = []
        self._records: deque[HotplugRecord] = deque(maxlen=RECORDS)
        #: The client of the guest's device manager, once there was something to ask.
        self.upcall: UpcallClient | None = None

    ACTIONS: ClassVar[dict[type[Any], str]] = {
        actions.ResizeVcpu: "_resize_vcpu",
        actions.ResizeMemory: "_resize_memory",
        actions.InsertMemDevice: "_refuse_memory",
        actions.InsertBlockDevice: "_insert",
        actions.InsertNetworkDevice: "_insert",
        actions.InsertFsDevice: "_insert",
        actions.InsertBalloonDevice: "_insert",
        actions.InsertVsockDevice: "_insert",
        actions.PrepareRemoveBlockDevice: "_prepare_remove",
        actions.RemoveBlockDevice: "_remove",
        actions.RemoveNetworkDevice: "_remove",
        actions.RemoveFsDevice: "_remove",
        actions.UpdateBlockDevice: "_update_block",
        actions.UpdateNetworkDevice: "_update_network",
        actions.UpdateBalloonDevice: "_update_balloon",
        actions.ManipulateFsBackend: "_manipulate_fs",
    }
    """The actions, and what carries each out."""

    @property
    def records(self) -> tuple[HotplugRecord, ...]:
        """What was done, oldest first, at most :data:`RECORDS`. From any thread."""
        return tuple(self._records.copy())

    async def carry_out(self, action: VmmAction[AnswerT]) -> AnswerT:
        """Carry an action out once those before it are done. Who gives up waiting does not change what becomes of it.

        Raises:
            StateError: the VM does not run by then.
            ConfigError: it cannot be, whatever the guest does.
            HotplugError: the guest did not do its part, or the VM was paused or ended meanwhile.
        """
        return await asyncio.shield(self._spawn(self._in_order(cast(HotplugAction[AnswerT], action))))

    # The life of the VM.

    def suspend(self, why: str) -> None:
        """The guest stands still: the request under way ends, and so do those that wait for their turn."""
        self._refusal = why
        if self.upcall is not None:
            self.upcall.suspend(why)
        self._changed.set()

    def resume(self) -> None:
        """The guest runs again."""
        self._refusal = ""
        if self.upcall is not None:
            self.upcall.resume()
        if self._undoing:
            self._spawn(self._settle_in_order())

    def close(self) -> None:
        """The VM has ended. :meth:`idle` returns a moment later."""
        self._closed = True
        self.suspend("the VM has ended")
        if self.upcall is not None:
            self.upcall.close()

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # Order.

    def _spawn(self, work: Coroutine[Any, Any, AnswerT]) -> asyncio.Task[AnswerT]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may have waited for it

    async def _in_order(self, action: HotplugAction[AnswerT]) -> AnswerT:
        requested_at = time.monotonic()
        async with self._order:
            self._steps = []
            error = ""
            try:
                self._require_running(action.name)
                await self._settle()
                return cast(AnswerT, await getattr(self, self.ACTIONS[type(action)])(action))
            except VmmError as failure:
                error = str(failure)
                raise
            finally:
                record = HotplugRecord(action, requested_at, time.monotonic(), error, tuple(self._steps))
                self._records.append(record)

    def _require_running(self, what: str) -> None:
        if self._refusal:
            raise StateError(f"{what} came too late, since {self._refusal}; it needs a VM that is running")

    def _step(self, name: str) -> None:
        self._steps.append(HotplugStep(name, time.monotonic()))

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the machine is so; False if it was not in time.

        Raises:
            HotplugError: the VM was paused or ended meanwhile.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    self._changed.clear()
                    if condition():
                        return True
                    if self._refusal:
                        raise HotplugError(f"{self._refusal} meanwhile")
                    await self._changed.wait()
        return condition()

    # The guest.

    def _guest(self) -> UpcallClient:
        """The client of the device manager.

        Raises:
            HotplugError: the VM has no vsock device.
        """
        from vmm.devices.virtio.vsock.device import VsockDevice
        from vmm.devices.virtio.vsock.endpoint import dialled

        if self.upcall is None:
            vsock = next((each for each in self._machine.devices.values() if isinstance(each, VsockDevice)), None)
            if vsock is None:
                raise HotplugError("the guest is asked through a vsock device, and the VM needs one before it starts")
            found = vsock

            async def dial() -> Any:
                return await dialled(found.dial(PORT))

            self.upcall = UpcallClient(dial, reply_seconds=REPLY_SECONDS, connect_seconds=CONNECT_SECONDS)
        return self.upcall

    async def _undo(self, subject: str, how: Callable[[], Awaitable[None]]) -> str:
        """Undo what failed, now or as soon as the guest can help; what the error says of it."""
        self._undoing[subject] = how
        failed = await self._settle_one(subject)
        return f"; {failed}" if failed else ""

    async def _settle_one(self, subject: str) -> str:
        if self._refusal:
            return "" if self._closed else f"what was done of it to the {subject} is undone when the VM runs again"
        try:
            async with asyncio.timeout(UNDO_SECONDS):
                await self._undoing[subject]()
        except TimeoutError:
            return f"what was done of it to the {subject} is undone when the guest answers again"
        except VmmError as error:
            return f"what was done of it to the {subject} is not undone yet: {error}"
        del self._undoing[subject]
        return ""

    async def _settle(self) -> None:
        """Undo what is still to be undone, as far as the guest helps."""
        for subject in list(self._undoing):
            await self._settle_one(subject)

    async def _settle_in_order(self) -> None:
        async with self._order:
            await self._settle()

    # CPUs.

    async def _resize_vcpu(self, action: actions.ResizeVcpu) -> actions.VcpusResized:
        machine, wanted = self._machine, action.vcpus
        most = len(machine.engine.harts)
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= most:
            raise ConfigError(f"vcpus is {wanted!r}, it must be from 1 to {most}, the VM's max_vcpus")
        if "vCPUs" in self._undoing:
            raise HotplugError("vCPUs cannot come or go before the guest has undone what failed earlier; try again")
        before = len(machine.vcpus)
        amended = self._config().replace(vcpus=wanted, max_vcpus=most)
        ran = [hart for hart in range(before) if self._runs(hart)]
        try:
            if wanted > before:
                await self._add_cpus(before, wanted)
            elif wanted < before:
                await self._drop_cpus(before, wanted)
        except VmmError as error:
            undone = await self._undo("vCPUs", partial(self._restore_cpus, before, wanted, ran, error))
            now = self._config().vcpus
            if now == wanted:
                return actions.VcpusResized(wanted)
            raise HotplugError(f"the VM has {now} vCPUs and not {wanted}: {error}{undone}") from error
        self._keep(amended)
        return actions.VcpusResized(wanted)

    def _runs(self, hart: int) -> bool:
        return self._machine.states[hart] is not HartState.STOPPED

    async def _add_cpus(self, before: int, wanted: int) -> None:
        guest = self._guest()
        for _ in range(before, wanted):
            self._machine.plug_vcpu()
        self._step("threads started")
        await guest.add_cpu(wanted - before)
        self._step("guest answered")
        await self._started(range(before, wanted))

    async def _started(self, harts: range | list[int]) -> None:
        if not await self._until(lambda: all(map(self._runs, harts)), HART_SECONDS):
            absent = ", ".join(str(hart) for hart in harts if not self._runs(hart))
            raise HotplugError(f"the guest says that its CPUs are online, but hart {absent} does not run")
        self._step("harts run")

    async def _drop_cpus(self, before: int, wanted: int) -> None:
        await self._guest().del_cpu(before - wanted)
        self._step("guest answered")
        going = range(wanted, before)
        if not await self._until(lambda: not any(map(self._runs, going)), HART_SECONDS) or not self._trim(wanted):
            present = ", ".join(str(hart) for hart in going if self._runs(hart))
            raise HotplugError(f"the guest says that its CPUs are offline, but hart {present} runs")
        self._step("threads ended")

    def _trim(self, wanted: int) -> bool:
        """Unplug the last vCPUs until there are no more than wanted; False if one of them runs."""
        while len(self._machine.vcpus) > wanted:
            if not self._machine.unplug_vcpu():
                return False
        return True

    async def _restore_cpus(self, before: int, wanted: int, ran: list[int], failure: VmmError) -> None:
        machine = self._machine
        if isinstance(failure, UpcallLost):
            # Harts that stand still need not wait for that; and what is not permitted does not come up later.
            self._trim(before)
            await self._guest().connect()
            # The last thing that a CPU does is to stop its hart, after the guest has seen it go.
            going = [hart for hart in ran if hart >= wanted]
            await self._until(lambda: not any(map(self._runs, going)), LAG_SECONDS if going else 0)
        while len(machine.vcpus) < before:
            machine.plug_vcpu()
        if not await self._until(lambda: self._trim(before), LAG_SECONDS):
            extra = sum(map(self._runs, range(before, len(machine.vcpus))))
            with contextlib.suppress(UpcallRefused):  # what it keeps, it has
                if extra:
                    await self._guest().del_cpu(extra)
                await self._until(lambda: self._trim(before), HART_SECONDS)
        if missing := [hart for hart in ran if not self._runs(hart)]:
            try:
                await self._guest().add_cpu(len(missing))
                await self._started(missing)
            except (UpcallRefused, HotplugError):
                if self._refusal:
                    raise
                self._trim(wanted)  # what it does not take back has gone
        if (now := len(machine.vcpus)) != before:
            self._keep(self._config().replace(vcpus=now, max_vcpus=len(machine.engine.harts)))

    # Memory.

    async def _refuse_memory(self, action: actions.InsertMemDevice) -> actions.MemoryResized:
        raise _no_memory_device(action)

    async def _resize_memory(self, action: actions.ResizeMemory) -> actions.MemoryResized:
        wanted, most = action.memory_mib, self._machine.memory.size // MIB
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= most:
            raise ConfigError(f"memory_mib is {wanted!r}, it must be from 1 to {most}, the VM's max_memory_mib")
        config = next((each for each in self._config().devices if isinstance(each, BalloonConfig)), None)
        if config is None:
            raise HotplugError("memory comes and goes by a balloon, and the VM has none; insert one first")
        balloon = self._balloon(action, config.name)
        amended = self._config().replace(memory_mib=wanted, max_memory_mib=most)
        before = balloon.target_mib
        start, target = balloon.actual_mib, min(most - wanted + config.target_mib, most)
        try:
            await self._spare(balloon, target - start)
            balloon.set_target(target)
            self._step("target set")
            if not await self._reaches(balloon, target):
                raise HotplugError(_stalled(balloon, start, target))
        except VmmError as error:
            balloon.set_target(before)
            now = self._config().memory_mib
            raise HotplugError(f"the VM goes back to {now} MiB of memory instead of {wanted}: {error}") from error
        self._step("guest is there")
        self._keep(amended)
        return actions.MemoryResized(wanted)

    async def _spare(self, balloon: BalloonDevice, mib: int) -> None:
        """Refuse to take what the guest cannot do without: its kernel would kill processes, and not refuse.

        Raises:
            HotplugError: it says that it has less than so many MiB available (virtio 1.2, 5.5.6.4).
        """
        if mib <= 0:
            return
        try:
            asked = balloon.request_statistics()
        except StateError:
            return  # a driver that does not say
        asked.add_done_callback(lambda _: self._machine.changed())
        if await self._until(asked.done, STALL_SECONDS) and asked.exception() is None:
            available = asked.result().values.get("available", mib * MIB) // MIB
            if available < mib:
                raise HotplugError(f"the guest is asked for {mib} MiB, and can spare {available} MiB")

    async def _reaches(self, balloon: BalloonDevice, target: int) -> bool:
        """Wait for the guest, as long as it gets on."""
        balloon.changed = self._machine.changed
        deadline = time.monotonic() + MEMORY_SECONDS
        while (seen := balloon.actual_mib) != target:
            patience = min(STALL_SECONDS, deadline - time.monotonic())
            if patience <= 0 or not await self._until(_differs(balloon, seen), patience):
                return False
        return True

    def _balloon(self, action: VmmAction[Any], name: str) -> BalloonDevice:
        from vmm.devices.virtio.balloon import BalloonDevice

        return self._find(action, name, BalloonDevice)

    async def _update_balloon(self, action: actions.UpdateBalloonDevice) -> actions.Empty:
        balloon = self._balloon(action, action.device)
        configs = {each.name: each for each in self._config().devices if isinstance(each, BalloonConfig)}
        if action.device not in configs:
            raise _unknown(action, configs)
        config = dataclasses.replace(configs[action.device], target_mib=action.target_mib)
        # What the balloon holds besides is the memory that the VM has not got.
        balloon.set_target(balloon.target_mib - configs[action.device].target_mib + action.target_mib)
        self._keep_device(config)
        return actions.Empty()

    # Devices.

    def _any(self, action: VmmAction[Any], name: str) -> VirtioDevice:
        """The device of that name; ConfigError if there is none."""
        device = self._machine.devices.get(name)
        if device is None:
            raise _unknown(action, self._machine.devices)
        if name in self._undoing:
            raise HotplugError(f"{name} can change when the guest has undone what failed earlier; try again")
        return device

    def _find(self, action: VmmAction[Any], name: str, kind: type[AnswerT]) -> AnswerT:
        """The device of that name and class; ConfigError if there is none."""
        device = self._any(action, name)
        if not isinstance(device, kind):
            raise _unknown(action, self._machine.devices)
        return device

    def _keep_device(self, config: DeviceConfig) -> None:
        devices = tuple(config if each.name == config.name else each for each in self._config().devices)
        self._keep(self._config().replace(devices=devices))

    def _place(self, name: str) -> tuple[int, int, int]:
        """Of a device's slot: guest-physical address, bytes, interrupt."""
        return _slot_place(self._machine.slot(name))

    async def _insert(self, action: actions.InsertDevice) -> actions.DeviceInserted:
        from vmm.devices.virtio import build_device

        config = _named(action, set(self._machine.devices))
        if isinstance(config, VsockConfig):
            raise HotplugError(f"{config.name} cannot come to a VM that runs: its guest hears of devices through one")
        amended = self._config().replace(devices=(*self._config().devices, config))
        guest = self._guest()
        try:
            await self._clean_slots()
        except VmmError as error:
            raise HotplugError(f"{config.name} was not inserted: {error}") from error
        # In a thread of its own, since a program may have to be started.
        device = await asyncio.to_thread(build_device, config)
        self._step("host side opened")
        try:
            self._require_running(action.name)
            number = self._machine.add_device(device, self._stale)
        except BaseException:
            device.close()
            raise
        self._step("slot filled")
        try:
            await guest.add_mmio(*self._place(config.name))
            if not device.active:
                raise HotplugError("the guest says that it has the device, but no driver of it has started it")
        except VmmError as error:
            undone = await self._eject(config.name, device, error)
            raise HotplugError(f"{config.name} was not inserted: {error}{undone}") from error
        self._step("guest's driver runs")
        self._keep(amended)
        return actions.DeviceInserted(config.name, number)

    async def _eject(self, name: str, device: VirtioDevice, failure: VmmError) -> str:
        """Take a device back that the guest did not take, or may have taken."""
        take_back = partial(self._take_back, name, device, failure)
        if isinstance(failure, UpcallLost) and self._refusal:
            # The driver stands still with the guest, and lets go first when it runs again.
            return await self._undo(name, take_back)
        await take_back()
        return ""

    async def _take_back(self, name: str, device: VirtioDevice, failure: VmmError) -> None:
        number = self._machine.slot(name)
        free = isinstance(failure, UpcallRefused) and failure.errno != errno.EEXIST and not device.active
        try:
            if not (free or isinstance(failure, UpcallUnavailable)):
                async with asyncio.timeout(UNDO_SECONDS / 2):
                    await self._guest().connect()
                    free = await self._let_go(number)
        except (VmmError, TimeoutError):
            if self._refusal and name in self._undoing:
                raise  # once the guest runs
        # Whatever the guest says, it goes.
        if not free and not isinstance(failure, UpcallUnavailable):
            self._stale.add(number)
        self._machine.remove_device(name).close()

    async def _let_go(self, number: int) -> bool:
        """Ask for a slot's driver to let go; False if it does not."""
        try:
            await self._guest().del_mmio(*_slot_place(number))
        except UpcallRefused as refusal:
            return refusal.errno == errno.ENODEV  # none has it
        return True

    async def _clean_slots(self) -> None:
        """Have the guest let go of what was taken from it, so that the slots can be used again."""
        for number in list(self._stale):
            if await self._let_go(number):
                self._stale.discard(number)

    async def _prepare_remove(self, action: actions.PrepareRemoveBlockDevice) -> actions.Empty:
        from vmm.devices.virtio.blk import BlockDevice

        await self._release(self._find(action, action.device, BlockDevice))
        return actions.Empty()

    async def _remove(self, action: actions.RemoveDevice) -> actions.Empty:
        device = self._any(action, action.device)
        if action.KIND.KIND != device.KIND:
            raise _unknown(action, self._machine.devices)
        await self._release(device)
        self._prepared.discard(device.name)
        self._machine.remove_device(device.name).close()
        self._step("host side closed")
        self._keep(_without(self._config(), device.name))
        return actions.Empty()

    async def _release(self, device: VirtioDevice) -> None:
        """Have the guest's driver let go of a device."""
        if device.name in self._prepared:
            return
        was_active = device.active
        try:
            await self._guest().del_mmio(*self._place(device.name))
            if device.active:
                raise HotplugError("the guest says that it has given the device up, but its driver runs it")
        except VmmError as error:
            if isinstance(error, UpcallRefused) and error.errno == errno.ENODEV and not device.active:
                return  # the guest has not got it
            undone = ""
            if was_active and isinstance(error, UpcallLost):
                undone = await self._undo(device.name, partial(self._give_again, device))
            raise HotplugError(f"{device.name} stays: {error}{undone}") from error
        self._prepared.add(device.name)
        self._step("guest's driver let go")

    async def _give_again(self, device: VirtioDevice) -> None:
        await self._guest().connect()
        if not device.active:
            with contextlib.suppress(UpcallRefused):  # it stays without a driver, and can be removed
                await self._guest().add_mmio(*self._place(device.name))

    # What changes a device, of which the guest hears by interrupt.

    async def _update_block(self, action: actions.UpdateBlockDevice) -> actions.BlockDeviceUpdated:
        from vmm.devices.virtio.blk import BlockDevice

        return actions.BlockDeviceUpdated(self._find(action, action.device, BlockDevice).update())

    async def _update_network(self, action: actions.UpdateNetworkDevice) -> actions.Empty:
        from vmm.devices.virtio.net import NetworkDevice

        self._find(action, action.device, NetworkDevice).set_link(action.link_up)
        return actions.Empty()

    async def _manipulate_fs(self, action: actions.ManipulateFsBackend) -> actions.Empty:
        from vmm.devices.virtio.fs.directory import SharedDirectory, manipulate

        share = self._any(action, action.device)
        if not isinstance(share, SharedDirectory):
            raise _unknown(action, self._machine.devices)
        manipulate(share, action)
        return actions.Empty()


def _slot_place(number: int) -> tuple[int, int, int]:
    """Guest-physical address, bytes and interrupt of a slot."""
    from vmm.board.riscv_virt import virtio_address, virtio_interrupt
    from vmm.devices.virtio.mmio import SLOT_SIZE

    return virtio_address(number), SLOT_SIZE, virtio_interrupt(number)


def _differs(balloon: BalloonDevice, seen: int) -> Callable[[], bool]:
    return lambda: balloon.actual_mib != seen


def _stalled(balloon: BalloonDevice, start: int, target: int) -> str:
    if not balloon.active:
        return f"the guest has no driver for {balloon.name}"
    done = abs(balloon.actual_mib - start)
    what = "gave up" if target > start else "took"
    return f"the guest {what} {done} of {abs(target - start)} MiB and then no more for {STALL_SECONDS:g} s"
