"""What QEMU 7.2 does otherwise than the specification says: our hart is held to the text instead.

The Privileged Architecture 20211203 is volume II. Each test asserts the QEMU side too, so that a corrected QEMU shows.
"""

from __future__ import annotations

import pytest

from tests.referee import assembly as asm
from tests.referee.case import CSR, DATA_S, FS_DIRTY, SUM, Case, Entry, Frame, Space
from tests.referee.machines import run_on_engine, run_on_qemu
from tests.referee.paging import A, R, U, V, X, leaf
from tests.referee.sequences import word_bytes

CODE_PAGE, FAR_PAGE = 0x40_0000, 0x10_0000_0000
NOWHERE = 0xFF_FFFF_F000
FETCH_ACCESS_FAULT, LOAD_ACCESS_FAULT, STORE_ACCESS_FAULT = 1, 5, 7
STORE_MISALIGNED, FETCH_PAGE_FAULT, BREAKPOINT = 6, 12, 3
PAGE_FAULTS = {FETCH_ACCESS_FAULT: 12, LOAD_ACCESS_FAULT: 13, STORE_ACCESS_FAULT: 15}


def registers(**named: int) -> tuple[int, ...]:
    return tuple(named.get(f"x{index}", 0) for index in range(32))


@pytest.mark.parametrize(
    ("access", "cause"),
    [
        (asm.ld(5, 8, 0), LOAD_ACCESS_FAULT),
        (asm.sd(5, 8, 0), STORE_ACCESS_FAULT),
        (asm.amo(0, 8, 5, 8, 0), STORE_ACCESS_FAULT),
        (asm.jalr(1, 8), FETCH_ACCESS_FAULT),
    ],
    ids=["load", "store", "amo", "fetch"],
)
def test_a_page_table_outside_memory_is_an_access_fault(access: int, cause: int) -> None:
    # Volume II, 4.3.2, step 2: if accessing pte violates a PMA or PMP check, raise an access-fault exception.
    entries = (Entry(CODE_PAGE, V | X | A, 0), Entry(FAR_PAGE, leaf(NOWHERE, V), level=1, raw=True))
    space = Space(3, (Frame(word_bytes(access)),), entries, CODE_PAGE)
    case = Case((), x=registers(x8=FAR_PAGE), space=space)

    (ours,), (qemu,) = run_on_engine([case]), run_on_qemu([case])

    assert (ours.fields["scause"], ours.fields["stval"]) == (cause, FAR_PAGE)
    assert qemu.fields["scause"] == PAGE_FAULTS[cause]


def test_supervisor_mode_never_executes_a_user_page_not_even_after_loading_from_it() -> None:
    # Volume II, 4.3.1: irrespective of SUM, the supervisor may not execute code on pages with U=1.
    entries = (Entry(CODE_PAGE, V | X | A, 0), Entry(FAR_PAGE, V | R | X | U | A, 1))
    frames = (Frame(word_bytes(asm.ld(5, 8, 0), asm.jalr(1, 8))), Frame(word_bytes(asm.EBREAK)))
    case = Case((), x=registers(x8=FAR_PAGE), sstatus=SUM, space=Space(3, frames, entries, CODE_PAGE))

    (ours,), (qemu,) = run_on_engine([case]), run_on_qemu([case])

    assert (ours.fields["scause"], ours.fields["stval"]) == (FETCH_PAGE_FAULT, FAR_PAGE)
    assert qemu.fields["scause"] == BREAKPOINT


def test_vector_state_cannot_be_turned_on_without_vectors() -> None:
    # Volume II, 3.1.6.6: without the V extension VS is read-only zero.
    vs = 3 << 9
    block = (asm.csrrs(0, CSR["sstatus"], 5), asm.csrrs(6, CSR["sstatus"], 0))
    case = Case((word_bytes(*block),), x=registers(x5=vs))

    (ours,), (qemu,) = run_on_engine([case]), run_on_qemu([case])

    assert ours.fields["x6"] & vs == 0
    assert qemu.fields["x6"] & vs == vs


def test_bit_0_of_sepc_is_always_zero() -> None:
    # Volume II, 4.1.7.
    block = (asm.csrrw(0, CSR["sepc"], 5), asm.csrrs(6, CSR["sepc"], 0))
    case = Case((word_bytes(*block),), x=registers(x5=0x1234_5679))

    (ours,), (qemu,) = run_on_engine([case]), run_on_qemu([case])

    assert ours.fields["x6"] == 0x1234_5678
    assert qemu.fields["x6"] == 0x1234_5679


def test_a_misaligned_store_conditional_traps_even_without_a_reservation() -> None:
    # Volume I, 8.2: an address that is not naturally aligned gives an address-misaligned or an access-fault exception.
    case = Case((word_bytes(asm.amo(3, 8, 7, 8, 5)),), x=registers(x8=DATA_S + 65))

    (ours,), (qemu,) = run_on_engine([case]), run_on_qemu([case])

    assert ours.fields["scause"] in (STORE_MISALIGNED, STORE_ACCESS_FAULT)
    assert ours.fields["stval"] == DATA_S + 65
    assert qemu.fields["x7"] == 1


def test_sv57_is_not_offered() -> None:
    # Volume II, 4.1.11: a write with an unsupported mode has no effect; QEMU 7.2 supports Sv57, we do not.
    mode_57 = 10
    block = (
        asm.csrrs(5, CSR["satp"], 0),
        asm.addi(6, 0, mode_57),
        asm.r_type(0x13, 1, 1, 6, 6, 60 - 32),
        asm.csrrw(0, CSR["satp"], 6),
        asm.csrrs(7, CSR["satp"], 0),
    )
    case = Case((word_bytes(*block),))

    (ours,) = run_on_engine([case])

    assert ours.fields["x7"] == ours.fields["x5"] == ours.fields["satp"]


def test_flags_that_a_comparison_raises_make_the_state_dirty() -> None:
    # Volume II, 3.1.6.6: Dirty whenever the extension's state may have changed, fcsr included; QEMU 7.2 stays Initial.
    signalling = 0x7FF0_0000_0000_0001
    compare = asm.r_type(0x53, 2, 0x51, 5, 1, 1)
    f = tuple(signalling if index == 1 else 0 for index in range(32))
    case = Case((word_bytes(compare),), f=f, sstatus=1 << 13)

    (ours,), (qemu,) = run_on_engine([case]), run_on_qemu([case])

    assert ours.fields["fcsr"] == qemu.fields["fcsr"] == 1 << 4
    assert ours.fields["sstatus"] & FS_DIRTY == FS_DIRTY
    assert qemu.fields["sstatus"] & FS_DIRTY == 1 << 13
