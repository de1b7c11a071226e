"""The board of a RISC-V guest: which device is where, and the device tree that says so.

The memory map is the one of QEMU's ``virt`` machine, as far as the board has the same devices::

    0x0c00_0000  PLIC              one S-mode context per hart, context n is hart n
    0x1000_0000  UART 16550        interrupt 10
    0x1000_1000  virtio-mmio 0     interrupt 1
    0x1000_2000  virtio-mmio 1     interrupt 2          ... one every 4 KiB; interrupt 10 is skipped
    0x8000_0000  RAM               the kernel at + 2 MiB

There is no machine mode: the VMM is the SBI implementation, so the board has no CLINT, no boot ROM and no power-off
device (SBI SRST is that). Timers are the harts' own (Sstc). Bindings follow the Linux kernel's device tree schemas
(riscv/cpus.yaml, riscv/extensions.yaml, sifive,plic-1.0.0.yaml, 8250.yaml, virtio/mmio.yaml). Left out: PCI, a real
time clock, NUMA.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from vmm.board.fdt import Node, cells64, node, write_fdt
from vmm.bus import Bus
from vmm.console import Console
from vmm.devices.plic import PLIC_SIZE, Plic
from vmm.devices.uart16550 import SEND_AT_ONCE, UART_SIZE, Uart16550
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.mmio import SLOT_SIZE, EmptySlot, VirtioMmio
from vmm.errors import ConfigError
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

PLIC_BASE: Final = 0x0C00_0000
UART_BASE: Final = 0x1000_0000
VIRTIO_BASE: Final = 0x1000_1000
RAM_BASE: Final = 0x8000_0000

UART_INTERRUPT: Final = 10
INTERRUPT_SOURCES: Final = 96
SUPERVISOR_EXTERNAL: Final = 9  # the cause a PLIC context raises at its hart
TIMEBASE_HZ: Final = 10_000_000
UART_CLOCK_HZ: Final = 3_686_400

MAX_BOOTARGS: Final = 1023  # COMMAND_LINE_SIZE of Linux on RISC-V, without the NUL; it cuts longer ones off silently
MAX_HARTS: Final = 64
MAX_SLOTS: Final = 64
MMU_TYPES: Final = ("riscv,sv39", "riscv,sv48")

ISA_EXTENSIONS: Final = ("i", "m", "a", "f", "d", "c", "zicsr", "zifencei", "zihintpause", "zicntr", "sstc")
# The string form: single letters run on, longer names follow after underscores.
ISA_STRING: Final = "rv64" + "".join(name if len(name) == 1 else f"_{name}" for name in ISA_EXTENSIONS)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the kernel is told at this boot.

    Args:
        bootargs: the kernel command line.
        initrd: guest-physical start and end (the byte after the last) of the initial RAM disk.
        seed: makes ``rng-seed`` and ``kaslr-seed`` the same every time; None takes them from the host's entropy.
    """

    bootargs: str = ""
    initrd: tuple[int, int] | None = None
    seed: int | None = None


def virtio_address(slot: int) -> int:
    """Guest-physical base of a virtio-mmio slot."""
    return VIRTIO_BASE + slot * SLOT_SIZE


def virtio_interrupt(slot: int) -> int:
    """Interrupt number of a virtio-mmio slot."""
    return slot + 1 if slot + 1 < UART_INTERRUPT else slot + 2


class RiscvVirtBoard:
    """The devices of one machine, wired up.

    Args:
        memory: RAM, based at 0x8000_0000.
        console: the host's end of the serial line.
        context_outputs: one callable per hart, called with the level of its supervisor external interrupt
            (``hart.set_interrupt(9, level)``); their number is the number of harts.
        slots: virtio-mmio slots to declare.
        mmu: the ``mmu-type`` of the harts, ``riscv,sv39`` or ``riscv,sv48``.

    Raises:
        ConfigError: RAM elsewhere, or a number of harts or slots that the memory map does not hold.
    """

    def __init__(
        self,
        memory: GuestMemory,
        console: Console,
        context_outputs: Sequence[Callable[[bool], None]],
        slots: int = 8,
        mmu: str = "riscv,sv48",
    ) -> None:
        self.harts = len(context_outputs)
        if memory.base != RAM_BASE:
            raise ConfigError(f"memory of this board is based at {RAM_BASE:#x}, not {memory.base:#x}")
        if not 1 <= self.harts <= MAX_HARTS:
            raise ConfigError(f"a board with {self.harts} harts must have 1 to {MAX_HARTS}")
        if not 0 <= slots <= MAX_SLOTS:
            raise ConfigError(f"a board with {slots} virtio-mmio slots must have 0 to {MAX_SLOTS}")
        if mmu not in MMU_TYPES:
            raise ConfigError(f"MMU type {mmu!r} must be one of {', '.join(MMU_TYPES)}")
        self.memory = memory
        self.console = console
        self.mmu = mmu
        self.plic = Plic(INTERRUPT_SOURCES, context_outputs)
        self._lines = {source: self._wire(source) for source in range(1, INTERRUPT_SOURCES + 1)}
        self.uart = Uart16550(console.feed, self.irq_line(UART_INTERRUPT))
        self.slots: list[EmptySlot | VirtioMmio] = [EmptySlot() for _ in range(slots)]
        self.bus = Bus()
        self.bus.attach(self.plic, PLIC_BASE, PLIC_SIZE, "plic")
        self.bus.attach(self.uart, UART_BASE, UART_SIZE, "uart")
        for number, slot in enumerate(self.slots):
            self.bus.attach(slot, virtio_address(number), SLOT_SIZE, f"virtio-mmio {number}")
        console.attach(self.uart)

    def irq_line(self, source: int) -> IrqLine:
        """The wire to PLIC input ``source``.

        Raises:
            ConfigError: there is no such input.
        """
        if source not in self._lines:
            raise ConfigError(f"interrupt {source} does not exist on this board; it has 1 to {INTERRUPT_SOURCES}")
        return self._lines[source]

    def plug(
        self,
        device: VirtioDevice,
        loop: asyncio.AbstractEventLoop,
        crashed: Callable[[BaseException], None],
        avoid: Collection[int] = (),
    ) -> int:
        """Fill the first empty virtio-mmio slot that is not to be avoided; returns its number.

        See :class:`VirtioMmio` for the other arguments.

        Raises:
            ConfigError: there is no such slot.
        """
        free = next((n for n, slot in enumerate(self.slots) if isinstance(slot, EmptySlot) and n not in avoid), None)
        if free is None:
            unfit = ", or not usable now" if avoid else ""
            raise ConfigError(
                f"{device.name} needs a virtio-mmio slot, but all {len(self.slots)} of them are filled{unfit}"
            )
        line = self.irq_line(virtio_interrupt(free))
        slot = VirtioMmio(device, self.memory, line, loop, crashed)
        self._fill(free, slot, device.name)
        return free

    def unplug(self, number: int) -> VirtioDevice:
        """Empty slot ``number``; returns the device that was there, disconnected, for its owner to close.

        Raises:
            ConfigError: there is no device in that slot.
        """
        slot = self.slots[number] if 0 <= number < len(self.slots) else None
        if not isinstance(slot, VirtioMmio):
            raise ConfigError(f"virtio-mmio slot {number} holds no device")
        self._fill(number, EmptySlot(), f"virtio-mmio {number}")
        slot.unplug()
        return slot.device

    def _fill(self, number: int, slot: EmptySlot | VirtioMmio, name: str) -> None:
        self.bus.detach(virtio_address(number))
        self.bus.attach(slot, virtio_address(number), SLOT_SIZE, name)
        self.slots[number] = slot

    def device_tree(self, chosen: Chosen) -> Node:
        """The tree that describes this board, as the kernel will see it."""
        return build_tree(self.harts, self.memory.size, chosen, len(self.slots), self.mmu)

    def build_fdt(self, chosen: Chosen) -> bytes:
        """The flattened form of :meth:`device_tree`."""
        return write_fdt(self.device_tree(chosen))

    def _wire(self, source: int) -> IrqLine:
        return IrqLine(lambda level: self.plic.set_input(source, level), source)


def build_tree(harts: int, memory_size: int, chosen: Chosen, slots: int = 8, mmu: str = "riscv,sv48") -> Node:
    """The device tree of a board with ``harts`` harts and ``memory_size`` bytes of RAM."""
    plic = 1  # phandles: the PLIC, then one interrupt controller per hart
    controllers = [2 + hart for hart in range(harts)]
    return node(
        "",
        {
            "#address-cells": 2,
            "#size-cells": 2,
            "compatible": "riscv-virtio",
            "model": "kata-lab,riscv-virt",
        },
        _chosen_node(chosen),
        node(
            f"memory@{RAM_BASE:x}",
            {"device_type": "memory", "reg": cells64(RAM_BASE, memory_size)},
        ),
        node(
            "cpus",
            {"#address-cells": 1, "#size-cells": 0, "timebase-frequency": TIMEBASE_HZ},
            *(_cpu_node(hart, mmu, controllers[hart]) for hart in range(harts)),
        ),
        node(
            "soc",
            {
                "#address-cells": 2,
                "#size-cells": 2,
                "compatible": "simple-bus",
                "interrupt-parent": plic,
                "ranges": True,
            },
            node(
                f"interrupt-controller@{PLIC_BASE:x}",
                {
                    "compatible": ["sifive,plic-1.0.0", "riscv,plic0"],
                    "reg": cells64(PLIC_BASE, PLIC_SIZE),
                    "interrupts-extended": [cell for each in controllers for cell in (each, SUPERVISOR_EXTERNAL)],
                    "riscv,ndev": INTERRUPT_SOURCES,
                    "interrupt-controller": True,
                    "#address-cells": 0,
                    "#interrupt-cells": 1,
                    "phandle": plic,
                },
            ),
            node(
                f"serial@{UART_BASE:x}",
                {
                    "compatible": "ns16550a",
                    "reg": cells64(UART_BASE, UART_SIZE),
                    "interrupts": UART_INTERRUPT,
                    "clock-frequency": UART_CLOCK_HZ,
                    "reg-shift": 0,
                    "reg-io-width": 1,
                    "fifo-size": SEND_AT_ONCE,
                },
            ),
            *(
                node(
                    f"virtio_mmio@{virtio_address(slot):x}",
                    {
                        "compatible": "virtio,mmio",
                        "reg": cells64(virtio_address(slot), SLOT_SIZE),
                        "interrupts": virtio_interrupt(slot),
                    },
                )
                for slot in range(slots)
            ),
        ),
    )


def _chosen_node(chosen: Chosen) -> Node:
    length = len(chosen.bootargs.encode())
    if length > MAX_BOOTARGS:
        raise ConfigError(f"the kernel command line has {length} bytes; Linux on RISC-V takes at most {MAX_BOOTARGS}")
    entropy = os.urandom(40) if chosen.seed is None else _splitmix64(chosen.seed, 5)
    initrd = {}
    if chosen.initrd is not None:
        initrd = {
            "linux,initrd-start": cells64(chosen.initrd[0]),
            "linux,initrd-end": cells64(chosen.initrd[1]),
        }
    return node(
        "chosen",
        {
            "bootargs": chosen.bootargs,
            "stdout-path": f"/soc/serial@{UART_BASE:x}",
            "rng-seed": entropy[:32],
            "kaslr-seed": entropy[32:],
            **initrd,
        },
    )


def _cpu_node(hart: int, mmu: str, phandle: int) -> Node:
    return node(
        f"cpu@{hart:x}",
        {
            "device_type": "cpu",
            "reg": hart,
            "status": "okay",
            "compatible": "riscv",
            "riscv,isa": ISA_STRING,
            "riscv,isa-base": "rv64i",
            "riscv,isa-extensions": ISA_EXTENSIONS,
            "mmu-type": mmu,
        },
        node(
            "interrupt-controller",
            {
                "compatible": "riscv,cpu-intc",
                "interrupt-controller": True,
                "#address-cells": 0,
                "#interrupt-cells": 1,
                "phandle": phandle,
            },
        ),
    )


def _splitmix64(seed: int, words: int) -> bytes:
    """Steele, Lea and Flood's SplitMix64 (OOPSLA 2014): bytes that differ for every seed. Not for secrets."""
    mask = (1 << 64) - 1
    produced = bytearray()
    for step in range(1, words + 1):
        mixed = seed + step * 0x9E37_79B9_7F4A_7C15 & mask
        mixed = (mixed ^ mixed >> 30) * 0xBF58_476D_1CE4_E5B9 & mask
        mixed = (mixed ^ mixed >> 27) * 0x94D0_49BB_1331_11EB & mask
        produced += (mixed ^ mixed >> 31).to_bytes(8, "big")
    return bytes(produced)
