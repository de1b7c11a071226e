"""virtio-mmio slots that hold no device."""

from __future__ import annotations

from vmm.devices.virtio.mmio import SLOT_SIZE, EmptySlot


def test_empty_slot_is_a_placeholder() -> None:
    slot = EmptySlot()

    assert slot.read(0, 4).to_bytes(4, "little") == b"virt"
    assert slot.read(4, 4) == 2
    assert slot.read(8, 4) == 0


def test_everything_else_in_an_empty_slot_reads_zero() -> None:
    slot = EmptySlot()

    assert {slot.read(offset, 4) for offset in range(0x10, SLOT_SIZE, 4)} == {0}
    assert {slot.read(offset, width) for offset in range(0x20) for width in (1, 2, 8)} == {0}


def test_writes_to_an_empty_slot_change_nothing() -> None:
    slot = EmptySlot()

    for offset in range(0, SLOT_SIZE, 4):
        slot.write(offset, 4, 0xFFFF_FFFF)

    assert [slot.read(offset, 4) for offset in (0, 4, 8, 0x70)] == [0x7472_6976, 2, 0, 0]
