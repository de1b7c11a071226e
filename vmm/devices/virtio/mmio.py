"""The virtio-mmio transport (virtio 1.2, section 4.2), as yet for slots that hold no device.

A slot is declared in the device tree at boot. Section 4.2.2 lets an empty one answer with the magic value and DeviceID
0: a placeholder whose driver probe ends with "no such device" and may be tried again later::

    0x000  MagicValue  "virt", 0x74726976
    0x004  Version     2
    0x008  DeviceID    0, a placeholder
    0x00c  VendorID    "KATA"

Everything else reads 0 and all writes are ignored. Control registers are aligned 32-bit words (4.2.2.2); an access of
another width or alignment reads 0. Left out: the registers of a filled slot.
"""

from __future__ import annotations

from typing import Final

SLOT_SIZE: Final = 0x1000

_PLACEHOLDER: Final = {
    0x000: int.from_bytes(b"virt", "little"),
    0x004: 2,
    0x008: 0,
    0x00C: int.from_bytes(b"KATA", "little"),
}


class EmptySlot:
    """A virtio-mmio slot in which there is no device."""

    def read(self, offset: int, width: int) -> int:
        """The placeholder's identification registers; 0 everywhere else."""
        return _PLACEHOLDER.get(offset, 0) if width == 4 else 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Nothing: a placeholder has no state."""
