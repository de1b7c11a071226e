"""What a started VM consists of: guest memory, engine, board, devices, and a vCPU per hart.

:class:`vmm.microvm.MicroVm` decides when it is built, held and given back; this module knows how. Start-up follows the
boot protocol of Linux on RISC-V (Documentation/arch/riscv/boot.rst): hart 0 starts at the kernel's entry, all others
wait for SBI's hart_start.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vmm.actions import EndKind, MachineEnd
from vmm.config import DeviceConfig, VmConfig
from vmm.console import Console
from vmm.errors import ConfigError
from vmm.memory import GuestMemory
from vmm.report import CrashReport, find_panic, report_hart
from vmm.sbi import Entry, HartStates, ResetReason, ResetType, Sbi
from vmm.trace import Trace
from vmm.vcpu import Vcpu

if TYPE_CHECKING:
    from vmm.board.riscv_virt import RiscvVirtBoard
    from vmm.devices.virtio.device import VirtioDevice

DETERMINISTIC_SEED = 0
DEFAULT_SLOTS = 8  #: virtio-mmio slots that are declared at least


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
    """What starting a VM builds: memory, engine, board, and a paused vCPU per hart, hart 0 at the kernel's entry.

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
        with contextlib.ExitStack() as built:
            self.memory = built.enter_context(GuestMemory(RAM_BASE, config.memory_bytes))
            self.engine = built.enter_context(Rv64Engine(self.memory, config.vcpus, config.clock))
            outputs = [partial(hart.set_interrupt, SUPERVISOR_EXTERNAL) for hart in self.engine.harts]
            slots = max(DEFAULT_SLOTS, len(config.devices) + len(custom))
            self.board = RiscvVirtBoard(self.memory, console, outputs, slots)
            self.devices = self._plug(config, custom, built, ended)
            self.boot_entry = load_boot_source(
                self.memory,
                config.kernel,
                config.initrd,
                lambda initrd: self.board.build_fdt(Chosen(config.cmdline, initrd, seed)),
            )
            self.states = HartStates(config.vcpus, wake=lambda hart: self.vcpus[hart].kick())
            firmware = FirmwareConsole(self.board, self._early_panic)
            sbi = Sbi(self.engine, self.states, self.memory, firmware, self._reset)
            self.vcpus = tuple(
                Vcpu(hart, self.board.bus, sbi, self.states, trace, changed=changed, ended=ended)
                for hart in self.engine.harts
            )
            self._held_at = 0
            entry = Entry(self.boot_entry.pc, self.boot_entry.fdt_address)
            self.engine.harts[0].reset(entry.address, 0, entry.opaque)
            self._built = built.pop_all()

    def _plug(
        self,
        config: VmConfig,
        custom: Sequence[VirtioDevice],
        built: contextlib.ExitStack,
        ended: Callable[[int | None, MachineEnd, str], None],
    ) -> dict[str, VirtioDevice]:
        from vmm.devices.virtio import build_device

        loop = asyncio.get_running_loop()
        devices: dict[str, VirtioDevice] = {}

        def crashed(name: str, error: BaseException) -> None:
            detail = f"device {name} raised {type(error).__name__}: {error}"
            text = "".join(traceback.format_exception(error))
            ended(None, MachineEnd(EndKind.CRASH, detail=detail), text)

        for device in custom:
            built.callback(device.close)
        described: list[DeviceConfig | VirtioDevice] = [*config.devices, *custom]
        for each in described:
            if isinstance(each, DeviceConfig):
                device = build_device(each)
                built.callback(device.close)
            else:
                device = each
            if device.name in devices:
                raise ConfigError(f"two devices are called {device.name!r}; give each a name of its own")
            number = self.board.plug(device, loop, partial(crashed, device.name))
            built.callback(self.board.unplug, number)
            devices[device.name] = device
        return devices

    def device(self, name: str) -> VirtioDevice:
        """The device of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.devices:
            known = ", ".join(self.devices) or "none at all"
            raise ConfigError(f"the VM has no device {name!r}; it has {known}")
        return self.devices[name]

    def close_devices(self) -> None:
        """On the event loop's thread, once no vCPU runs: give back what the devices hold of the host."""
        for device in self.devices.values():
            device.close()

    @property
    def instructions(self) -> int:
        """Retired by all harts together."""
        return sum(vcpu.instructions for vcpu in self.vcpus)

    def _reset(self, hart: int, reset_type: ResetType, reason: ResetReason) -> None:
        match reset_type, reason:
            case ResetType.SHUTDOWN, ResetReason.NONE:
                kind, detail = EndKind.SHUTDOWN, "the guest shut down"
            case ResetType.SHUTDOWN, _:
                kind, detail = EndKind.FAILURE, "the guest shut down because of a system failure"
            case _:
                kind, detail = EndKind.REBOOT, "the guest asked for a reboot"
        self.vcpus[hart].end(MachineEnd(kind, int(reset_type), int(reason), detail))

    def _early_panic(self) -> None:
        self.vcpus[0].end(MachineEnd(EndKind.HANG, detail="the guest's kernel panicked before it could reset"))

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
                report_hart(each, self.memory, self.states[each.id].name.lower()) for each in self.engine.harts
            ),
            console=console,
            bus_faults=tuple(fault for vcpu in self.vcpus for fault in vcpu.bus_faults),
            trace=trace,
        )

    def hold(self) -> None:
        """Every vCPU is paused: guest time and the devices stand still from now on."""
        for device in self.devices.values():
            with device.lock:
                device.pause()
        self._held_at = self.engine.nanoseconds()

    def release(self) -> None:
        """Guest time goes on where it was held, and so do the devices."""
        if not self.engine.deterministic:
            self.engine.skip(self._held_at - self.engine.nanoseconds())
        for device in self.devices.values():
            with device.lock:
                device.resume()

    def close(self) -> None:
        """Stop the vCPUs' threads and give everything back."""
        for vcpu in self.vcpus:
            vcpu.stop()
        for vcpu in self.vcpus:
            vcpu.join()
        self._built.close()
