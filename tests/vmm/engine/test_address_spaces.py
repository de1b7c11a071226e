"""Address space identifiers and global mappings: what stays and goes when satp changes or SFENCE.VMA names a space.

Privileged architecture 1.12, 4.1.11 (satp), 4.2.1 (SFENCE.VMA) and 4.3.1 (the G bit). A translation may be forgotten
early, so that none is tested to be kept, only to be right.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmm.engine.base import ExitReason
from vmm.engine.rv64.hart import Hart, Rv64Engine
from vmm.engine.rv64.instructions import BY_NAME
from vmm.memory import GuestMemory

RAM = 0x8000_0000
ROOTS = (RAM + 0x1_0000, RAM + 0x1_1000)
TABLES = (RAM + 0x2_0000, RAM + 0x3_0000)
FRAMES = (RAM + 0x10_0000, RAM + 0x10_1000)
OWN, SHARED = 0x1000, 0x2000  # virtual pages: one frame for each space, and one for all
V, R, W, X, G, A, D = 1, 2, 4, 8, 32, 64, 128
SV39 = 8 << 60


def word(name: str, **operands: int) -> bytes:
    row = BY_NAME[name]
    return row.encode(**operands).to_bytes(row.length, "little")


def pointer(address: int) -> int:
    return address >> 12 << 10 | V


def leaf(address: int, flags: int) -> int:
    return address >> 12 << 10 | V | A | D | flags


@pytest.fixture
def hart() -> Iterator[Hart]:
    """A hart in a loop that loads from OWN and SHARED, with two address spaces ready."""
    with GuestMemory(RAM, 4 << 20) as memory, Rv64Engine(memory, clock="deterministic") as engine:
        for space, root in enumerate(ROOTS):
            middle, last = TABLES[space], TABLES[space] + 0x1000
            memory.write_int(root, 8, pointer(middle))
            memory.write_int(root + 8 * (RAM >> 30), 8, leaf(RAM, R | W | X | G))
            memory.write_int(middle, 8, pointer(last))
            memory.write_int(last + 8 * (OWN >> 12), 8, leaf(FRAMES[space], R | W))
            memory.write_int(last + 8 * (SHARED >> 12), 8, leaf(FRAMES[0], R | W | G))
            memory.write_int(FRAMES[space], 8, 100 + space)
        memory.write(RAM, word("ld", rd=5, rs1=10) + word("ld", rd=6, rs1=11) + word("ecall"))
        hart = engine.harts[0]
        hart.reset(RAM)
        yield hart


def look(hart: Hart) -> tuple[int, int]:
    """What the hart loads from its own and the shared page now."""
    hart.pc, hart.x[10], hart.x[11] = RAM, OWN, SHARED
    assert hart.run().reason is ExitReason.SBI_CALL
    return hart.x[5], hart.x[6]


def satp(space: int, asid: int) -> int:
    return SV39 | asid << 44 | ROOTS[space] >> 12


def test_all_sixteen_bits_of_the_identifier_are_implemented(hart: Hart) -> None:
    hart.csr["satp"] = satp(0, 0xFFFF)

    assert hart.csr["satp"] >> 44 & 0xFFFF == 0xFFFF


def test_a_change_of_space_shows_the_new_spaces_page(hart: Hart) -> None:
    for space in (0, 1, 0, 1):
        hart.csr["satp"] = satp(space, 1 + space)
        assert look(hart) == (100 + space, 100)


def test_the_same_identifier_with_another_root_does_not_keep_the_old_page(hart: Hart) -> None:
    for space in (0, 1):
        hart.csr["satp"] = satp(space, 0)
        assert look(hart)[0] == 100 + space


@pytest.mark.parametrize("operands", [{}, {"rs2": 12}, {"rs1": 10}, {"rs1": 10, "rs2": 12}])
def test_a_changed_entry_is_seen_after_every_kind_of_fence(hart: Hart, operands: dict[str, int]) -> None:
    hart.csr["satp"] = satp(0, 7)
    assert look(hart)[0] == 100
    memory = hart.memory
    memory.write_int(TABLES[0] + 0x1000 + 8 * (OWN >> 12), 8, leaf(FRAMES[1], R | W))
    memory.write(RAM + 0x100, word("sfence.vma", **operands) + word("ecall"))

    hart.pc, hart.x[10], hart.x[12] = RAM + 0x100, OWN, 7
    assert hart.run().reason is ExitReason.SBI_CALL

    assert look(hart)[0] == 101


def test_a_changed_global_entry_is_seen_after_a_fence_of_all_spaces(hart: Hart) -> None:
    hart.csr["satp"] = satp(0, 7)
    assert look(hart)[1] == 100
    memory = hart.memory
    memory.write_int(TABLES[0] + 0x1000 + 8 * (SHARED >> 12), 8, leaf(FRAMES[1], R | W | G))
    memory.write(RAM + 0x100, word("sfence.vma") + word("ecall"))

    hart.pc = RAM + 0x100
    assert hart.run().reason is ExitReason.SBI_CALL

    assert look(hart)[1] == 101


def test_translation_off_and_on_again_forgets_nothing_wrongly(hart: Hart) -> None:
    hart.csr["satp"] = satp(0, 1)
    assert look(hart) == (100, 100)
    hart.csr["satp"] = 0
    assert hart.translate(RAM + 8) == RAM + 8
    hart.csr["satp"] = satp(1, 1)

    assert look(hart) == (101, 100)
    assert hart.translate(OWN) == FRAMES[1]
    assert hart.translate(0x5000) is None


@pytest.mark.parametrize("level", [1, 2])
def test_a_changed_superpage_is_seen_everywhere_after_a_fence_of_one_address_in_it(hart: Hart, level: int) -> None:
    """Two 4 KiB parts of one superpage are in use; a fence of one address is a fence of the page."""
    memory, span = hart.memory, 1 << 12 + 9 * level
    entry = TABLES[0] + 8 * 3 if level == 1 else ROOTS[0] + 8 * 5
    base = 3 * span if level == 1 else 5 * span
    first, second = base + 0x1008, base + 0x5008
    old, new = (RAM, RAM + (2 << 20)) if level == 1 else (RAM, 0)
    memory.write_int(entry, 8, leaf(old, R | W))
    memory.write_int(RAM + 0x1008, 8, 11)
    memory.write_int(RAM + 0x5008, 8, 12)
    memory.write_int(RAM + (2 << 20) + 0x1008, 8, 21)
    memory.write_int(RAM + (2 << 20) + 0x5008, 8, 22)
    memory.write(RAM + 0x100, word("sfence.vma", rs1=10) + word("ecall"))
    memory.write(RAM + 0x200, word("ecall"))
    hart.csr["satp"], hart.csr["stvec"] = satp(0, 7), RAM + 0x200

    def load(address: int) -> int | None:
        hart.pc, hart.x[10], hart.x[11], hart.x[5] = RAM, address, SHARED, 0
        assert hart.run().reason in (ExitReason.SBI_CALL, ExitReason.MMIO_READ)
        return hart.x[5]

    assert (load(first), load(second)) == (11, 12)
    memory.write_int(entry, 8, leaf(new, R | W))
    hart.pc, hart.x[10] = RAM + 0x100, first
    assert hart.run().reason is ExitReason.SBI_CALL

    # The 1 GiB page now maps what is no memory: the load asks the VMM.
    assert (load(first), load(second)) == ((21, 22) if level == 1 else (0, 0))
