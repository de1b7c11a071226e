"""What a started VM consists of: guest memory, engine, board, devices, and a vCPU per hart.

:class:`vmm.microvm.MicroVm` decides when it is built, held and given back; this module knows how. Start-up follows the
boot protocol of Linux on RISC-V (Documentation/arch/riscv/boot.rst): hart 0 starts at the kernel's entry, all others
wait for SBI's hart_start.

Harts and slots that are for later exist from the start, since the kernel learns of them from the device tree: a hart
that is not plugged in has no thread and cannot be started, a slot without a device is a placeholder. What plugging
means for the guest is for :mod:`vmm.hotplug`; here is the host's half of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vmm.actions import EndKind, MachineEnd
from vmm.config import MIN_SLOTS, BalloonConfig, VmConfig
from vmm.console import Console
from vmm.errors import ConfigError, EngineError
from vmm.memory import GuestMemory
from vmm.metrics import VcpuMetrics
from vmm.report import CrashReport, find_panic, report_hart
from vmm.sbi import Entry, HartStates, ResetReason, ResetType, Sbi
from vmm.trace import Trace
from vmm.vcpu import Vcpu

if TYPE_CHECKING:
    from vmm.board.riscv_virt import RiscvVirtBoard
    from vmm.devices.virtio.device import VirtioDevice

DETERMINISTIC_SEED = 0


class FirmwareConsole:
    """What SBI DBCN prints to and reads from: the serial line, read through the port's registers as firmware would."""

    _DIVISOR_LATCH = 0x80
    _DATA_READY = 0x01
    _END_OF_PANIC = b"---[ end Kernel panic"

    def __init__(self, board: RiscvVirtBoard, panicked: Callable[[], None]) -> None:
        self._console = board.console
        self._uart = board.uart
        self._panicked = panicked

    def write(self, data: bytes) -> None:
        """Print ``data``.

        Linux prints here (``earlycon=sbi``) before it has a console of its own. A panic at that time ends in a loop
        with interrupts off: ``panic=`` is not read yet, and SRST is not found yet.
        """
        self._console.feed(data)
        if self._END_OF_PANIC in data:
            self._panicked()

    def read(self, limit: int) -> bytes:
        """At most ``limit`` bytes that were typed and not read yet; none while the guest sets the divisor."""
        data = bytearray()
        if not self._uart.read(3, 1) & self._DIVISOR_LATCH:
            while len(data) < limit and self._uart.read(5, 1) & self._DATA_READY:
                data.append(self._uart.read(0, 1))
        return bytes(data)


class Machine:
    """What starting a VM builds: memory, engine, board, and a vCPU per hart, hart 0 at the kernel's entry.

    Attributes:
        vcpus: those that are plugged in, by number; a new tuple whenever that changes.
        devices: those in a slot, by name; a new dictionary whenever that changes.

    Args:
        config: a configuration with a kernel.
        console: the host's end of the serial line.
        trace: where exits are counted.
        custom: devices that the configuration does not describe; they belong to the machine from now on.
        changed: called, on any thread, after the state of a vCPU changed.
        ended: called when a vCPU, or a device (then hart is None), ends the VM: hart, how, host traceback or "".

    It is made on the thread of a running event loop, which its devices use.

    Raises:
        VmmError: no kernel that can be loaded, no memory to map, no engine, or a device whose host side is missing;
            nothing is left behind.
    """

    def __init__(
        self,
        config: VmConfig,
        console: Console,
        trace: Trace,
        custom: Sequence[VirtioDevice],
        *,
        changed: Callable[[], None],
        ended: Callable[[int | None, MachineEnd, str], None],
    ) -> None:
        if config.kernel is None:
            raise ConfigError("the VM has no kernel: name one in the configuration, or with ConfigureBootSource")
        # The compiled engine and the board are loaded when a machine is built, so that imports stay light.
        from vmm.board.loader import load_boot_source
        from vmm.board.riscv_virt import RAM_BASE, SUPERVISOR_EXTERNAL, Chosen, RiscvVirtBoard
        from vmm.engine.rv64.hart import Rv64Engine

        deterministic = config.clock == "deterministic"
        seed = DETERMINISTIC_SEED if deterministic else None
        self.changed = changed
        self._ended = ended
        self.devices: dict[str, VirtioDevice] = {}
        self._slots: dict[str, int] = {}
        self._stopping = self._still = self._held = False
        with contextlib.ExitStack() as built:
            shared = any(each.SHARES_MEMORY for each in config.devices)
            self.memory = built.enter_context(GuestMemory(RAM_BASE, config.memory_bytes, shared))
            self.engine = built.enter_context(Rv64Engine(self.memory, config.harts, config.clock))
            outputs = [partial(hart.set_interrupt, SUPERVISOR_EXTERNAL) for hart in self.engine.harts]
            slots = max(MIN_SLOTS, len(config.devices) + len(custom) + config.hotplug_slots)
            self.board = RiscvVirtBoard(self.memory, console, outputs, slots)
            for device in custom:
                built.callback(device.close)
            built.callback(self._remove_devices)
            self._plug(config, custom)
            self.boot_entry = load_boot_source(
                self.memory,
                config.kernel,
                config.initrd,
                lambda initrd: self.board.build_fdt(Chosen(config.boot_cmdline, initrd, seed)),
            )
            self.states = HartStates(config.harts, lambda hart: self._every_vcpu[hart].kick(), config.vcpus)
            firmware = FirmwareConsole(self.board, self._early_panic)
            sbi = Sbi(self.engine, self.states, self.memory, firmware, self._reset)
            self._every_vcpu = tuple(
                Vcpu(hart, self.board.bus, sbi, self.states, trace, changed=changed, ended=ended)
                for hart in self.engine.harts
            )
            self.vcpus = self._every_vcpu[: config.vcpus]
            entry = Entry(self.boot_entry.pc, self.boot_entry.fdt_address)
            self.engine.harts[0].reset(entry.address, 0, entry.opaque)
            self._built = built.pop_all()

    def _plug(self, config: VmConfig, custom: Sequence[VirtioDevice]) -> None:
        from vmm.devices.virtio import build_device

        spare = config.spare_memory_mib
        for each in config.devices:
            described = each
            if spare and isinstance(each, BalloonConfig):
                described, spare = dataclasses.replace(each, target_mib=each.target_mib + spare), 0
            device = build_device(described)
            try:
                self.add_device(device)
            except BaseException:
                device.close()
                raise
        for device in custom:
            self.add_device(device)

    def device(self, name: str) -> VirtioDevice:
        """The device of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.devices:
            known = ", ".join(self.devices) or "none at all"
            raise ConfigError(f"the VM has no device {name!r}; it has {known}")
        return self.devices[name]

    # Plugging, on the event loop's thread.

    def add_device(self, device: VirtioDevice, avoid: Collection[int] = ()) -> int:
        """Put a device into the first free slot, but for those to ``avoid``; returns the slot's number.

        Raises:
            ConfigError: the name is taken, or no slot is free; the device is still the caller's to close.
        """
        if device.name in self.devices:
            raise ConfigError(f"two devices are called {device.name!r}; give each a name of its own")
        number = self.board.plug(device, asyncio.get_running_loop(), partial(self._crashed, device.name), avoid)
        self._slots[device.name] = number
        self.devices = {**self.devices, device.name: device}
        if self._held:
            with device.lock:
                device.pause()
        return number

    def remove_device(self, name: str) -> VirtioDevice:
        """Empty the slot of a device, which is the caller's to close.

        Raises:
            ConfigError: there is none of that name.
        """
        device = self.device(name)
        self.board.unplug(self._slots.pop(name))
        self.devices = {other: each for other, each in self.devices.items() if other != name}
        return device

    def slot(self, name: str) -> int:
        """The number of the slot in which a device is; ConfigError if there is none of that name."""
        self.device(name)
        return self._slots[name]

    def plug_vcpu(self) -> None:
        """Plug the next vCPU in: it gets a thread, and the guest may start its hart.

        Raises:
            EngineError: the host gives no more threads.
        """
        vcpu = self._every_vcpu[len(self.vcpus)]
        try:
            vcpu.start()
        except RuntimeError as error:  # threading's word for a host that gives no more threads
            raise EngineError(f"the host gives no thread for vCPU {vcpu.hart.id}: {error}") from error
        self.vcpus = self._every_vcpu[: len(self.vcpus) + 1]
        self.states.plug(vcpu.hart.id)
        if self._stopping:
            vcpu.stop()
        elif not self._still:
            vcpu.resume()

    def unplug_vcpu(self) -> bool:
        """Unplug the last vCPU, whose thread ends; False, and nothing changes, while its hart is not stopped."""
        vcpu = self.vcpus[-1]
        if not self.states.unplug(vcpu.hart.id):
            return False
        self.vcpus = self.vcpus[:-1]
        vcpu.unplug()
        return True

    def _crashed(self, name: str, error: BaseException) -> None:
        detail = f"device {name} raised {type(error).__name__}: {error}"
        self._ended(None, MachineEnd(EndKind.CRASH, detail=detail), "".join(traceback.format_exception(error)))

    def _remove_devices(self) -> None:
        for name, device in self.devices.items():
            self.board.unplug(self._slots[name])
            device.close()

    def close_devices(self) -> None:
        """On the event loop's thread, once no vCPU runs: give back what the devices hold of the host."""
        for device in self.devices.values():
            device.close()

    @property
    def instructions(self) -> int:
        """Retired by all harts together."""
        return sum(vcpu.instructions for vcpu in self._every_vcpu)

    def metrics(self) -> tuple[VcpuMetrics, ...]:
        """The counters of every vCPU that is plugged in, or was once."""
        return tuple(vcpu.metrics() for vcpu in self._every_vcpu if vcpu.was_plugged)

    def _reset(self, hart: int, reset_type: ResetType, reason: ResetReason) -> None:
        match reset_type, reason:
            case ResetType.SHUTDOWN, ResetReason.NONE:
                kind, detail = EndKind.SHUTDOWN, "the guest shut down"
            case ResetType.SHUTDOWN, _:
                kind, detail = EndKind.FAILURE, "the guest shut down because of a system failure"
            case _:
                kind, detail = EndKind.REBOOT, "the guest asked for a reboot"
        self._every_vcpu[hart].end(MachineEnd(kind, int(reset_type), int(reason), detail))

    def _early_panic(self) -> None:
        self._every_vcpu[0].end(MachineEnd(EndKind.HANG, detail="the guest's kernel panicked before it could reset"))

    def start(self) -> None:
        """Start the vCPUs' threads, all PAUSED.

        Raises:
            RuntimeError: the host gives no more threads; those that were started are for :meth:`close` to end.
        """
        for vcpu in self.vcpus:
            vcpu.start()

    def report(self, reason: str, hart: int | None, console: tuple[str, ...], trace: str = "") -> CrashReport:
        """Read every hart; all of them must be out of guest code."""
        return CrashReport(
            reason=reason,
            panic=find_panic(console),
            hart=hart,
            harts=tuple(
                report_hart(each.hart, self.memory, self.states[each.hart.id].name.lower()) for each in self.vcpus
            ),
            console=console,
            bus_faults=tuple(fault for vcpu in self._every_vcpu for fault in vcpu.bus_faults),
            trace=trace,
        )

    def run(self) -> None:
        """Let the vCPUs run guest code, from :meth:`start` on."""
        for vcpu in self.vcpus:
            vcpu.resume()

    def pause(self) -> None:
        """Ask every vCPU to come out of guest code; one that is plugged in meanwhile stays out of it."""
        self._still = True
        for vcpu in self.vcpus:
            vcpu.pause()

    def hold(self) -> None:
        """Every vCPU is paused: guest time and the devices stand still from now on."""
        for device in self.devices.values():
            with device.lock:
                device.pause()
        self._held = True
        self.engine.hold_clock()

    def release(self) -> None:
        """Guest time goes on where it was held, and so do the devices and the vCPUs."""
        self.engine.release_clock()
        self._held = self._still = False
        for device in self.devices.values():
            with device.lock:
                device.resume()
        self.run()

    def stop(self) -> None:
        """Ask every vCPU's thread to end, also of one that is plugged in from now on. From any thread."""
        self._stopping = True
        for vcpu in self.vcpus:
            vcpu.stop()

    def close(self) -> None:
        """Stop the vCPUs' threads and give everything back."""
        self.stop()
        for vcpu in self.vcpus:
            vcpu.join()
        self._built.close()
