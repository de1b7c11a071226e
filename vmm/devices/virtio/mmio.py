"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).

A slot is 4 KiB that the device tree declares at boot. An empty one answers with DeviceID 0, a placeholder, whose driver
probe ends with "no such device" and may be tried again once the slot is filled (4.2.2). A filled one has these 32-bit
registers, and the device's configuration space behind them::

    000 r  MagicValue "virt"      034 r  QueueNumMax        080 w  QueueDescLow   084 High
    004 r  Version 2              038 w  QueueNum           090 w  QueueDriverLow 094 High
    008 r  DeviceID               044 rw QueueReady         0a0 w  QueueDeviceLow 0a4 High
    00c r  VendorID "KATA"        050 w  QueueNotify        0b0 r  SHMLenLow      0b4 High
    010 r  DeviceFeatures         060 r  InterruptStatus    0b8 r  SHMBaseLow     0bc High
    014 w  DeviceFeaturesSel      064 w  InterruptACK       0fc r  ConfigGeneration
    020 w  DriverFeatures         070 rw Status             100    configuration space
    024 w  DriverFeaturesSel
    030 w  QueueSel

Control registers are aligned 32-bit words (4.2.2.2); an access of another width or alignment reads 0 and writes
nothing. The configuration space takes any; what lies behind its end reads 0.

What a driver writes out of turn does no harm: features after FEATURES_OK, size and addresses of a queue that is ready,
and notifications before DRIVER_OK are ignored; a queue made ready before FEATURES_OK, and DRIVER_OK without it, are
mistakes, after which the device needs a reset.
Left out: shared memory regions (SHMLen reads all ones, 4.2.2), QueueReset, and notification data.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmm.devices.virtio.device import (
    COMMON_FEATURES,
    EVENT_IDX,
    INDIRECT_DESC,
    VERSION_1,
    DeviceState,
    Host,
    VirtioDevice,
)
from vmm.devices.virtio.queue import Queue, QueueError
from vmm.irq import IrqLine
from vmm.memory import GuestMemory

SLOT_SIZE: Final = 0x1000
CONFIG_SPACE: Final = 0x100

MAGIC: Final = int.from_bytes(b"virt", "little")
VERSION: Final = 2
VENDOR: Final = int.from_bytes(b"KATA", "little")
PLACEHOLDER_ID: Final = 0

# Device status (2.1).
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128

# Interrupt status (4.2.2).
USED_BUFFER: Final = 1
CONFIG_CHANGE: Final = 2

_MASK32: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class TransportState:
    """A filled slot as a plain value: what the driver wrote to its registers, and the device."""

    status: int
    accepted: int
    offered_word: int
    accepted_word: int
    queue_number: int
    interrupt_status: int
    device: DeviceState


class VirtioMmio:
    """The registers of a filled slot.

    Args:
        device: what is in the slot; it is connected here.
        memory: guest memory.
        line: the slot's interrupt line.
        loop: the VM's event loop.
        crashed: called with an exception of the device that nobody expected.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        line: IrqLine,
        loop: asyncio.AbstractEventLoop,
        crashed: Callable[[BaseException], None],
    ) -> None:
        self.device = device
        self._line = line
        self._interrupt_lock = threading.Lock()
        self._interrupt_status = 0
        self._plugged = True
        self._offered = device.features | COMMON_FEATURES
        self._forget()
        device.connect(
            Host(
                memory=memory,
                loop=loop,
                interrupt_queue=lambda: self._raise(USED_BUFFER),
                interrupt_config=lambda: self._raise(CONFIG_CHANGE),
                failed=self._failed,
                crashed=crashed,
            )
        )
        self._readers: dict[int, Callable[[], int]] = {
            0x000: lambda: MAGIC,
            0x004: lambda: VERSION,
            0x008: lambda: device.DEVICE_ID,
            0x00C: lambda: VENDOR,
            0x010: lambda: self._offered >> 32 * self._offered_word & _MASK32 if self._offered_word < 2 else 0,
            0x034: lambda: self._queue.max_size if self._queue is not None else 0,
            0x044: lambda: int(self._queue is not None and self._queue.ready),
            0x060: lambda: self._interrupt_status,
            0x070: lambda: self.status,
            0x0B0: lambda: _MASK32,
            0x0B4: lambda: _MASK32,
            0x0B8: lambda: _MASK32,
            0x0BC: lambda: _MASK32,
            0x0FC: lambda: device.config_generation,
        }
        self._writers: dict[int, Callable[[int], None]] = {
            0x014: self._select_offered,
            0x020: self._accept,
            0x024: self._select_accepted,
            0x030: self._select_queue,
            0x038: self._set_queue_size,
            0x044: self._set_queue_ready,
            0x070: self._set_status,
            **{
                offset + 4 * half: self._address_writer(area, 32 * half)
                for offset, area in ((0x080, "descriptors"), (0x090, "available"), (0x0A0, "used"))
                for half in (0, 1)
            },
        }

    def _forget(self) -> None:
        self.status = 0
        self._accepted = 0
        self._offered_word = self._accepted_word = 0
        self._queue_number = 0

    @property
    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_number] if self._queue_number < len(queues) else None

    def read(self, offset: int, width: int) -> int:
        """A register, or ``width`` bytes of the configuration space; 0 where there is nothing."""
        if offset >= CONFIG_SPACE:
            space = b""
            with self.device.served():
                space = self.device.config_space
            offset -= CONFIG_SPACE
            return int.from_bytes(space[offset : offset + width], "little")
        reader = self._readers.get(offset)
        return reader() if reader is not None and width == 4 else 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Write a register, or ``width`` bytes of the configuration space."""
        if offset == 0x050:
            if width == 4:
                self.device.notified(value & _MASK32)
        elif offset == 0x064:
            if width == 4:
                self._acknowledge(value)
        elif offset >= CONFIG_SPACE:
            with self.device.served():
                if self._plugged:
                    data = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
                    self.device.write_config(offset - CONFIG_SPACE, data)
        elif width == 4 and offset in self._writers:
            with self.device.served():
                if self._plugged:
                    self._writers[offset](value & _MASK32)

    # Interrupts: the line is high while a bit of the status is set. Setting a bit and the line, or clearing both, is
    # one step, so that none is lost between a device's thread and a vCPU that acknowledges.

    def _raise(self, bit: int) -> None:
        with self._interrupt_lock:
            if self._plugged:
                self._interrupt_status |= bit
                self._line.set(True)

    def _acknowledge(self, bits: int) -> None:
        with self._interrupt_lock:
            if self._plugged:
                self._interrupt_status &= ~bits
                self._line.set(self._interrupt_status != 0)

    def _failed(self, error: QueueError) -> None:
        # 2.1.2: the driver is told once it has set DRIVER_OK.
        self.status |= NEEDS_RESET
        if self.status & DRIVER_OK:
            self._raise(CONFIG_CHANGE)

    # Registers that the driver writes.

    def _select_offered(self, value: int) -> None:
        self._offered_word = value

    def _select_accepted(self, value: int) -> None:
        self._accepted_word = value

    def _accept(self, value: int) -> None:
        # 2.2: features are final once FEATURES_OK is set.
        if not self.status & FEATURES_OK:
            if self._accepted_word < 2:
                shift = 32 * self._accepted_word
                self._accepted = self._accepted & ~(_MASK32 << shift) | value << shift
            elif value:
                self._accepted |= 1 << 64  # a bit that nobody offered

    def _select_queue(self, value: int) -> None:
        self._queue_number = value

    def _set_queue_size(self, value: int) -> None:
        if self._queue is not None and not self._queue.ready:
            self._queue.size = value

    def _address_writer(self, area: str, shift: int) -> Callable[[int], None]:
        def write(value: int) -> None:
            queue = self._queue
            if queue is not None and not queue.ready:
                kept = getattr(queue, area) & ~(_MASK32 << shift)
                setattr(queue, area, kept | value << shift)

        return write

    def _set_queue_ready(self, value: int) -> None:
        queue = self._queue
        if queue is None:
            return
        if not value & 1:
            queue.release()
        elif not queue.ready:
            # 3.1.1: features first, since they decide how the rings are read.
            if not self.status & FEATURES_OK:
                raise QueueError(
                    f"queue {self._queue_number} was made ready in status {self.status:#x}, before FEATURES_OK"
                )
            queue.enable(bool(self._accepted & EVENT_IDX), bool(self._accepted & INDIRECT_DESC))

    def _set_status(self, value: int) -> None:
        if not value:
            self.reset()
            return
        added = value & ~self.status
        # 3.1.1: the device refuses a set of features by leaving FEATURES_OK off.
        if added & FEATURES_OK and (self._accepted & ~self._offered or not self._accepted & VERSION_1):
            value &= ~FEATURES_OK
        # NEEDS_RESET is the device's own bit, and no bit goes away but by a reset (2.1.1).
        self.status |= value & ~NEEDS_RESET & 0xFF
        if added & DRIVER_OK:
            if self.status & NEEDS_RESET:
                self._raise(CONFIG_CHANGE)
            elif not self.status & FEATURES_OK:
                raise QueueError(f"the driver set DRIVER_OK in status {self.status:#x}, without FEATURES_OK")
            else:
                self.device.start(self._accepted)

    def reset(self) -> None:
        """As after power-on (2.4)."""
        with self.device.lock:
            self.device.reset()
            self._forget()
            self._acknowledge(_MASK32)

    def save(self) -> TransportState:
        """Registers and device as a plain value; the VM is paused."""
        return TransportState(
            self.status,
            self._accepted,
            self._offered_word,
            self._accepted_word,
            self._queue_number,
            self._interrupt_status,
            self.device.save(),
        )

    def restore(self, state: TransportState) -> None:
        """Become what :meth:`save` saw; guest memory is as it was then.

        Raises:
            QueueError: the state is not one of this kind of device, or its queues do not fit.
        """
        self.reset()
        self.status, self._accepted = state.status, state.accepted
        self._offered_word, self._accepted_word = state.offered_word, state.accepted_word
        self._queue_number = state.queue_number
        self.device.restore(state.device)
        if state.interrupt_status:
            self._raise(state.interrupt_status)

    def unplug(self) -> None:
        """The device leaves the slot; what a vCPU still writes here meanwhile does nothing."""
        with self.device.lock:
            self.device.disconnect()
            self._acknowledge(_MASK32)
            self._plugged = False


_PLACEHOLDER: Final = {0x000: MAGIC, 0x004: VERSION, 0x008: PLACEHOLDER_ID, 0x00C: VENDOR}


class EmptySlot:
    """A virtio-mmio slot in which there is no device."""

    def read(self, offset: int, width: int) -> int:
        """The placeholder's identification registers; 0 everywhere else."""
        return _PLACEHOLDER.get(offset, 0) if width == 4 else 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Nothing: a placeholder has no state."""
