"""What other threads ask of a hart while it runs: bits set atomically, as the hart's own code does."""

from __future__ import annotations

from vmm.engine.rv64.layout import Hart, Machine
from vmm.engine.rv64.mmu import in_ram, overwrite_code
from vmm.engine.rv64.native import atomic_and_i64, atomic_or_i64, native, publish_i64

S_LIMIT, M_RAM_BASE, M_RAM_SIZE = Hart.LIMIT, Machine.RAM_BASE, Machine.RAM_SIZE


@native
def post(s: int, field: int, set_bits: int, clear_bits: int) -> int:
    """Set and clear bits of a field of a hart's state, then make the hart look around."""
    if set_bits:
        atomic_or_i64(s + field, set_bits)
    if clear_bits:
        atomic_and_i64(s + field, ~clear_bits)
    publish_i64(s + S_LIMIT, 0)
    return 0


@native
def overwrite_range(machine: int, address: int, length: int) -> int:
    """The host wrote to RAM: forget instructions decoded from there. What is not RAM is left out."""
    if length <= 0 or not in_ram(machine, address, length):
        return 0
    end = address + length
    while address < end:
        part = 4096 - (address & 4095)
        if part > end - address:
            part = end - address
        overwrite_code(machine, address, part)
        address += part
    return 0
