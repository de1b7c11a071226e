"""The hart's loop: find the page, run down its records, see to whatever ended the run.

The inner loop, made in ``executor``, keeps three values in host registers: the address of the hart's state, the address
of the record, and the number of instructions retired. Everything else is done between two of its runs.
"""

from __future__ import annotations

from vmm.engine.rv64.executor import straight
from vmm.engine.rv64.layout import (
    FETCH_ENTRY,
    ILLEGAL,
    PENDING_DONE,
    PENDING_FAULT,
    REQUEST_FLUSH,
    SHADOW_SPAN,
    TLB_ENTRIES,
    Hart,
)
from vmm.engine.rv64.mmu import fetch_missed, hear_of_code
from vmm.engine.rv64.native import acquire_i64, load_i64, native, publish_i64, store_i64
from vmm.engine.rv64.operands import pc_of
from vmm.engine.rv64.shadow import decode, prepare_step
from vmm.engine.rv64.system import flush_as_asked, illegal, look_around, refuse_access, take_fault

S_PC, S_RETIRED, S_LIMIT, S_INSIDE, S_PENDING = Hart.PC, Hart.RETIRED, Hart.LIMIT, Hart.INSIDE, Hart.PENDING
S_EXIT, S_EXIT_KIND, S_FAULT, S_STEPPING = Hart.EXIT, Hart.EXIT_KIND, Hart.FAULT, Hart.STEPPING
S_PAGE, S_PAGE_PC, S_NEXT_PC, S_SCRATCH = Hart.PAGE, Hart.PAGE_PC, Hart.NEXT_PC, Hart.SCRATCH
S_STRADDLES, S_RECORD, S_STOP = Hart.STRADDLES, Hart.RECORD, Hart.STOP
S_FETCH_TLB, S_REQUESTS = Hart.FETCH_TLB, Hart.REQUESTS
TLB_MASK = TLB_ENTRIES - 1


@native
def page_of(s: int, pc: int) -> int:
    """Make the page of ``pc`` the one in execution: its shadow page, or 0 with the exception noted."""
    if load_i64(s + S_STRADDLES):
        store_i64(s + S_STRADDLES, 0)
        return s + S_SCRATCH
    entry = load_i64(s + S_FETCH_TLB) + (pc >> 12 & TLB_MASK) * FETCH_ENTRY
    if load_i64(entry) == pc & -4096:
        page = load_i64(entry + 8)
    else:
        page = fetch_missed(s, pc)
        if page == 0:
            return 0
    if load_i64(s + S_STEPPING):
        if prepare_step(s, page + ((pc & 4095) << 2), page, pc) == 0:
            return 0
        page = s + S_SCRATCH
    store_i64(s + S_PAGE, page)
    store_i64(s + S_PAGE_PC, pc & -4096)
    return page


@native
def not_executable(s: int, record: int) -> int:
    """No row stands for this record: the end of the page, an instruction met for the first time, or an illegal one.
    Returns the pc to go on at."""
    page = load_i64(s + S_PAGE)
    pc = pc_of(s, record)
    if load_i64(record) & 255 == ILLEGAL:
        illegal(s)
        return take_fault(s, pc)
    if record - page >= SHADOW_SPAN or page == s + S_SCRATCH:
        return pc
    decoded = decode(s, record, page, pc)
    if decoded == 0:
        return take_fault(s, pc)
    if decoded == -1:
        store_i64(s + S_PAGE, s + S_SCRATCH)
        store_i64(s + S_STRADDLES, 1)
    return pc


@native
def depart(s: int, pc: int, retired: int) -> int:
    """Write back what the loop held and say why it ended."""
    store_i64(s + S_PC, pc)
    store_i64(s + S_RETIRED, retired)
    store_i64(s + S_EXIT_KIND, load_i64(s + S_EXIT))
    hear_of_code(s)
    publish_i64(s + S_INSIDE, 0)
    return load_i64(s + S_EXIT)


@native
def run(s: int) -> int:
    """Execute guest code until something needs the VMM; returns the ExitReason. ``s`` is the hart's state."""
    pc = load_i64(s + S_PC)
    retired = load_i64(s + S_RETIRED)
    publish_i64(s + S_INSIDE, 1)
    hear_of_code(s)
    if load_i64(s + S_PENDING) == PENDING_FAULT:
        pc = refuse_access(s, pc)
    store_i64(s + S_EXIT, 0)
    # An access that the VMM has answered is finished before any interrupt.
    fresh = load_i64(s + S_PENDING) != PENDING_DONE
    if not fresh and acquire_i64(s + S_REQUESTS) & REQUEST_FLUSH:
        # But not before a fence that took the hart for outside: no look around comes between it and what follows.
        flush_as_asked(s)
    while True:
        if fresh and retired >= acquire_i64(s + S_LIMIT):
            pc = look_around(s, pc, retired)
            if load_i64(s + S_EXIT):
                break
        fresh = True
        page = page_of(s, pc)
        if page == 0:
            pc = take_fault(s, pc)
            if load_i64(s + S_EXIT):
                break
            continue
        record = straight(s, page + ((pc & 4095) << 2), retired)
        retired = load_i64(s + S_RETIRED) - 1  # the last record stands for no instruction
        if record != s + S_STOP:
            pc = not_executable(s, record)
            fresh = load_i64(s + S_STRADDLES) == 0
            if load_i64(s + S_EXIT):
                break
        elif load_i64(s + S_FAULT):
            retired -= 1
            pc = take_fault(s, pc_of(s, load_i64(s + S_RECORD)))
            if load_i64(s + S_EXIT):
                break
        else:
            pc = load_i64(s + S_NEXT_PC)
    return depart(s, pc, retired)
