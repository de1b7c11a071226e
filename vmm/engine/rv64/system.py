"""The privileged side of the hart: CSRs, traps, interrupts, the clock, and coming back to the VMM.

After the RISC-V privileged architecture 1.12, chapter 4, and Sstc 1.0. There is no M-mode: every trap goes to S, and an
ecall from S leaves guest code, since the VMM is the SBI implementation.
"""

from __future__ import annotations

from vmm.engine.base import ExitReason
from vmm.engine.rv64.instructions import BY_NAME
from vmm.engine.rv64.layout import (
    CLOCK_DETERMINISTIC,
    FETCH_ENTRY,
    NO_RESERVATION,
    PENDING_NONE,
    POLL_INSTRUCTIONS,
    REQUEST_FLUSH,
    REQUEST_RETURN,
    SEIP,
    SSIP,
    SSTATUS_FS_SHIFT,
    SSTATUS_MXR,
    SSTATUS_SIE,
    SSTATUS_SPIE,
    SSTATUS_SPP,
    SSTATUS_SUM,
    SSTATUS_UXL_64,
    STIP,
    TLB_ENTRIES,
    WATCH_INSTRUCTIONS,
    Hart,
    Machine,
)
from vmm.engine.rv64.mmu import (
    fence_instructions,
    fetch_word,
    flush_address,
    flush_local,
    flush_tlb,
    hear_of_code,
    raise_exception,
    select_tlbs,
)
from vmm.engine.rv64.native import (
    acquire_i64,
    atomic_and_i64,
    atomic_or_i64,
    atomic_swap_i64,
    less_unsigned,
    load_i64,
    memory_fence,
    monotonic_ns,
    native,
    publish_i64,
    shift_right_logical,
    store_i64,
)
from vmm.engine.rv64.registers import (
    CYCLE,
    FCSR,
    FFLAGS,
    FRM,
    INSTRET,
    SATP,
    SCAUSE,
    SCOUNTEREN,
    SENVCFG,
    SEPC,
    SIE,
    SIP,
    SSCRATCH,
    SSTATUS,
    STIMECMP,
    STVAL,
    STVEC,
    TIME,
)

S_X, S_PC, S_MACHINE, S_PRIVILEGE, S_STATUS = Hart.X, Hart.PC, Hart.MACHINE, Hart.PRIVILEGE, Hart.STATUS
S_FS, S_FFLAGS, S_FRM, S_SIP, S_SIE = Hart.FS, Hart.FFLAGS, Hart.FRM, Hart.SIP, Hart.SIE
S_STVEC, S_SCOUNTEREN, S_SENVCFG, S_SSCRATCH = Hart.STVEC, Hart.SCOUNTEREN, Hart.SENVCFG, Hart.SSCRATCH
S_SEPC, S_SCAUSE, S_STVAL, S_STIMECMP, S_SATP = Hart.SEPC, Hart.SCAUSE, Hart.STVAL, Hart.STIMECMP, Hart.SATP
S_FAULT, S_CAUSE, S_TVAL, S_SERIALISE = Hart.FAULT, Hart.CAUSE, Hart.TVAL, Hart.SERIALISE
S_EXIT, S_EXIT_VALUE, S_PENDING, S_LIMIT = Hart.EXIT, Hart.EXIT_VALUE, Hart.PENDING, Hart.LIMIT
S_RETIRED, S_WATCHED, S_FETCH_TLB = Hart.RETIRED, Hart.WATCHED, Hart.FETCH_TLB
S_BUDGET_END, S_REQUESTS, S_LAST_TRAP = Hart.BUDGET_END, Hart.REQUESTS, Hart.LAST_TRAP
S_FLUSHES_ASKED, S_FLUSHES_DONE = Hart.FLUSHES_ASKED, Hart.FLUSHES_DONE
S_RESERVATION, S_CODE_SEEN, S_TRAPS = Hart.RESERVATION, Hart.CODE_SEEN, Hart.TRAPS
M_CLOCK, M_ORIGIN, M_TICK, M_CODE_EPOCH = Machine.CLOCK, Machine.ORIGIN, Machine.TICK, Machine.CODE_EPOCH

EXIT_SBI, EXIT_HALTED, EXIT_INTERRUPTED = (
    int(ExitReason.SBI_CALL),
    int(ExitReason.HALTED),
    int(ExitReason.INTERRUPTED),
)
EXIT_BUDGET, EXIT_STUCK, EXIT_ENDLESS = int(ExitReason.BUDGET), int(ExitReason.STUCK), int(ExitReason.ENDLESS)
JAL, C_J = BY_NAME["jal"].operation, BY_NAME["c.j"].operation

INTERRUPT = -1 << 63
STATUS_WRITABLE = SSTATUS_SIE | SSTATUS_SPIE | SSTATUS_SPP | SSTATUS_SUM | SSTATUS_MXR
NEVER = 1 << 55  # ticks: beyond this a deadline cannot be counted in nanoseconds
WRITE, SET, CLEAR = 0, 1, 2


@native
def clock_ns(s: int, retired: int) -> int:
    """Guest time, nanoseconds: the host's clock, or one nanosecond an instruction plus what idling skipped."""
    machine = load_i64(s + S_MACHINE)
    if load_i64(machine + M_CLOCK) == CLOCK_DETERMINISTIC:
        return retired - load_i64(machine + M_ORIGIN)
    return monotonic_ns() - acquire_i64(machine + M_ORIGIN)


@native
def ticks(s: int, retired: int) -> int:
    """The time CSR."""
    return clock_ns(s, retired) // load_i64(load_i64(s + S_MACHINE) + M_TICK)


@native
def update_timer(s: int, retired: int) -> int:
    """Make STIP what Sstc says: time >= stimecmp, unsigned."""
    if less_unsigned(ticks(s, retired), load_i64(s + S_STIMECMP)):
        if load_i64(s + S_SIP) & STIP:
            atomic_and_i64(s + S_SIP, ~STIP)
    elif not load_i64(s + S_SIP) & STIP:
        atomic_or_i64(s + S_SIP, STIP)
    return 0


@native
def deliverable(s: int) -> int:
    """Interrupts that this privilege would take now."""
    if load_i64(s + S_PRIVILEGE) and not load_i64(s + S_STATUS) & SSTATUS_SIE:
        return 0
    return acquire_i64(s + S_SIP) & load_i64(s + S_SIE)


@native
def trap(s: int, pc: int, cause: int, tval: int) -> int:
    """Enter the trap handler; returns its address (4.1.1, 4.1.2)."""
    status = load_i64(s + S_STATUS)
    kept = status & ~(SSTATUS_SIE | SSTATUS_SPIE | SSTATUS_SPP)
    if status & SSTATUS_SIE:
        kept |= SSTATUS_SPIE
    if load_i64(s + S_PRIVILEGE):
        kept |= SSTATUS_SPP
    store_i64(s + S_STATUS, kept)
    store_i64(s + S_SEPC, pc)
    store_i64(s + S_SCAUSE, cause)
    store_i64(s + S_STVAL, tval)
    store_i64(s + S_PRIVILEGE, 1)
    store_i64(s + S_RESERVATION, NO_RESERVATION)
    store_i64(s + S_PENDING, PENDING_NONE)
    store_i64(s + S_TRAPS, load_i64(s + S_TRAPS) + 1)
    select_tlbs(s)
    vector = load_i64(s + S_STVEC)
    base = vector & -4
    if vector & 1 and cause < 0:
        return base + ((cause & 63) << 2)
    return base


@native
def return_from_trap(s: int) -> int:
    """SRET: restore privilege and interrupt enable; returns the address to go on at (4.1.1)."""
    status = load_i64(s + S_STATUS)
    store_i64(s + S_PRIVILEGE, 1 if status & SSTATUS_SPP else 0)
    kept = status & ~(SSTATUS_SIE | SSTATUS_SPP) | SSTATUS_SPIE
    if status & SSTATUS_SPIE:
        kept |= SSTATUS_SIE
    store_i64(s + S_STATUS, kept)
    store_i64(s + S_RESERVATION, NO_RESERVATION)
    select_tlbs(s)
    if deliverable(s):
        store_i64(s + S_LIMIT, 0)
    return load_i64(s + S_SEPC)


@native
def illegal(s: int) -> int:
    """Note an illegal instruction; its bits are fetched when the trap is taken."""
    raise_exception(s, 2, 0)
    return 1


@native
def leave(s: int, reason: int) -> int:
    """Ask to leave guest code at this instruction."""
    store_i64(s + S_FAULT, 1)
    store_i64(s + S_EXIT, reason)
    return 1


@native
def environment_call(s: int) -> int:
    """ECALL: a trap from U-mode, an exit from S-mode."""
    if load_i64(s + S_PRIVILEGE):
        return leave(s, EXIT_SBI)
    raise_exception(s, 8, 0)
    return 1


@native
def wait_for_interrupt(s: int, retired: int) -> int:
    """WFI: 0 to go on (an enabled interrupt is pending), 1 to leave or trap. Illegal in U-mode."""
    if not load_i64(s + S_PRIVILEGE):
        return illegal(s)
    update_timer(s, retired)
    if acquire_i64(s + S_SIP) & load_i64(s + S_SIE):
        return 0
    return leave(s, EXIT_HALTED)


@native
def fence_translations(s: int, rs1: int, rs2: int, address: int) -> int:
    """SFENCE.VMA: 0, or 1 with the exception noted. ``rs1`` and ``rs2`` are register numbers (4.2.1)."""
    if not load_i64(s + S_PRIVILEGE):
        return illegal(s)
    if rs1:
        flush_address(s, address)
    elif rs2:
        flush_local(s)
    else:
        flush_tlb(s)
    return 0


@native
def counter_denied(s: int, number: int) -> int:
    """Whether U-mode may not read a counter that scounteren guards."""
    if load_i64(s + S_PRIVILEGE):
        return 0
    return 0 if load_i64(s + S_SCOUNTEREN) >> (number - CYCLE) & 1 else 1


@native
def read_csr(s: int, number: int, retired: int) -> int:
    """Value of a CSR; FAULT is set where it does not exist or may not be read here."""
    if number <= FCSR:
        if load_i64(s + S_FS) == 0:
            return illegal(s) * 0
        if number == FFLAGS:
            return load_i64(s + S_FFLAGS)
        if number == FRM:
            return load_i64(s + S_FRM)
        if number == FCSR:
            return load_i64(s + S_FFLAGS) | load_i64(s + S_FRM) << 5
        return illegal(s) * 0
    if number >= CYCLE:
        if number > INSTRET or counter_denied(s, number):
            return illegal(s) * 0
        if number == TIME:
            return ticks(s, retired)
        return retired
    if not load_i64(s + S_PRIVILEGE):
        return illegal(s) * 0
    if number == SSTATUS:
        fs = load_i64(s + S_FS)
        status = load_i64(s + S_STATUS) | fs << SSTATUS_FS_SHIFT | SSTATUS_UXL_64
        return status | INTERRUPT if fs == 3 else status
    if number == SIP:
        update_timer(s, retired)
        return acquire_i64(s + S_SIP)
    if number == SIE:
        return load_i64(s + S_SIE)
    if number == STVEC:
        return load_i64(s + S_STVEC)
    if number == SCOUNTEREN:
        return load_i64(s + S_SCOUNTEREN)
    if number == SENVCFG:
        return load_i64(s + S_SENVCFG)
    if number == SSCRATCH:
        return load_i64(s + S_SSCRATCH)
    if number == SEPC:
        return load_i64(s + S_SEPC)
    if number == SCAUSE:
        return load_i64(s + S_SCAUSE)
    if number == STVAL:
        return load_i64(s + S_STVAL)
    if number == STIMECMP:
        return load_i64(s + S_STIMECMP)
    if number == SATP:
        return load_i64(s + S_SATP)
    return illegal(s) * 0


@native
def write_sstatus(s: int, value: int) -> int:
    """sstatus: FS apart, the writable bits; a change of SUM or MXR changes which translations hold."""
    old = load_i64(s + S_STATUS)
    new = old & ~STATUS_WRITABLE | value & STATUS_WRITABLE
    store_i64(s + S_STATUS, new)
    store_i64(s + S_FS, value >> SSTATUS_FS_SHIFT & 3)
    changed = old ^ new
    if changed & SSTATUS_MXR:
        flush_tlb(s)
    if changed & SSTATUS_SUM:
        select_tlbs(s)
    if changed & new & SSTATUS_SIE and deliverable(s):
        store_i64(s + S_LIMIT, 0)
        store_i64(s + S_SERIALISE, 1)
    return 0


@native
def write_satp(s: int, value: int) -> int:
    """satp: a write with a mode other than Bare, Sv39 or Sv48 has no effect (4.1.11).

    The TLBs hold one address space besides what is global, so that a change of space drops the rest.
    """
    scheme = shift_right_logical(value, 60)
    if scheme != 0 and scheme != 8 and scheme != 9:
        return 0
    old = load_i64(s + S_SATP)
    if value != old:
        store_i64(s + S_SATP, value)
        if shift_right_logical(old, 60) == scheme:
            flush_local(s)
        else:
            flush_tlb(s)
    store_i64(s + S_SERIALISE, 1)
    return 0


@native
def write_csr(s: int, number: int, value: int, retired: int) -> int:
    """Set a CSR that ``read_csr`` has found to exist."""
    if number == SSTATUS:
        return write_sstatus(s, value)
    if number == SIP:
        # Only SSIP is the supervisor's to change; the others belong to their devices and to stimecmp.
        if value & SSIP:
            atomic_or_i64(s + S_SIP, SSIP)
        else:
            atomic_and_i64(s + S_SIP, ~SSIP)
        store_i64(s + S_LIMIT, 0)
        return store_i64(s + S_SERIALISE, 1)
    if number == SIE:
        store_i64(s + S_SIE, value & (SSIP | STIP | SEIP))
        store_i64(s + S_LIMIT, 0)
        return store_i64(s + S_SERIALISE, 1)
    if number == STIMECMP:
        store_i64(s + S_STIMECMP, value)
        update_timer(s, retired)
        store_i64(s + S_LIMIT, 0)
        return store_i64(s + S_SERIALISE, 1)
    if number == SATP:
        return write_satp(s, value)
    if number == STVEC:
        return store_i64(s + S_STVEC, value & ~2)
    if number == SCOUNTEREN:
        return store_i64(s + S_SCOUNTEREN, value & 0xFFFFFFFF)
    if number == SENVCFG:
        return store_i64(s + S_SENVCFG, value & 1)
    if number == SSCRATCH:
        return store_i64(s + S_SSCRATCH, value)
    if number == SEPC:
        return store_i64(s + S_SEPC, value & -2)
    if number == SCAUSE:
        return store_i64(s + S_SCAUSE, value)
    if number == STVAL:
        return store_i64(s + S_STVAL, value)
    store_i64(s + S_FS, 3)
    if number == FFLAGS:
        return store_i64(s + S_FFLAGS, value & 31)
    if number == FRM:
        return store_i64(s + S_FRM, value & 7)
    store_i64(s + S_FFLAGS, value & 31)
    return store_i64(s + S_FRM, value >> 5 & 7)


@native
def access_csr(s: int, number: int, operation: int, operand: int, writes: int, retired: int) -> int:
    """One Zicsr instruction: the old value; FAULT is set where it is illegal (volume I, 7.1)."""
    if writes and number >> 10 == 3:
        return illegal(s) * 0
    old = read_csr(s, number, retired)
    if load_i64(s + S_FAULT) or not writes or (operation != WRITE and operand == 0):
        return old  # setting or clearing no bit changes nothing, not even FS
    if operation == WRITE:
        write_csr(s, number, operand, retired)
    elif operation == SET:
        write_csr(s, number, old | operand, retired)
    else:
        write_csr(s, number, old & ~operand, retired)
    return old


@native
def take_fault(s: int, pc: int) -> int:
    """End an instruction that did not retire: the trap handler's address, or ``pc`` with EXIT set."""
    store_i64(s + S_FAULT, 0)
    if load_i64(s + S_EXIT):
        return pc
    cause = load_i64(s + S_CAUSE)
    tval = load_i64(s + S_TVAL)
    if cause == 2:
        tval = fetch_word(s, pc)
        store_i64(s + S_FAULT, 0)
    elif cause == 3:
        tval = pc
    target = trap(s, pc, cause, tval)
    # A trap vector that cannot be fetched would trap to itself for ever.
    if target == pc and (cause == 1 or cause == 12):
        if load_i64(s + S_LAST_TRAP) == pc:
            store_i64(s + S_EXIT, EXIT_STUCK)
        store_i64(s + S_LAST_TRAP, pc)
    else:
        store_i64(s + S_LAST_TRAP, 1)
    return target


@native
def refuse_access(s: int, pc: int) -> int:
    """The VMM found no device for an access, EXIT_VALUE is the exception code: the trap handler's address."""
    store_i64(s + S_PENDING, PENDING_NONE)
    return trap(s, pc, load_i64(s + S_EXIT_VALUE), load_i64(s + S_TVAL))


@native
def update_limit(s: int, retired: int) -> int:
    """Until when guest code may run on without looking around."""
    machine = load_i64(s + S_MACHINE)
    limit = load_i64(s + S_BUDGET_END)
    if load_i64(machine + M_CLOCK) == CLOCK_DETERMINISTIC:
        stimecmp = load_i64(s + S_STIMECMP)
        if 0 <= stimecmp < NEVER and not load_i64(s + S_SIP) & STIP:
            due = stimecmp * load_i64(machine + M_TICK) + load_i64(machine + M_ORIGIN)
            if due < limit:
                limit = due
        if retired + WATCH_INSTRUCTIONS < limit:
            limit = retired + WATCH_INSTRUCTIONS
    elif retired + POLL_INSTRUCTIONS < limit:
        limit = retired + POLL_INSTRUCTIONS
    publish_i64(s + S_LIMIT, limit)
    memory_fence()
    # Whoever asked for something before the limit was published set it to 0 in vain.
    if (
        acquire_i64(s + S_REQUESTS)
        or deliverable(s)
        or acquire_i64(machine + M_CODE_EPOCH) != load_i64(s + S_CODE_SEEN)
    ):
        publish_i64(s + S_LIMIT, 0)
    return 0


@native
def is_endless(s: int, pc: int) -> int:
    """Whether the instruction at ``pc`` is a jump to itself that no interrupt can end."""
    if not load_i64(s + S_WATCHED) or not load_i64(s + S_PRIVILEGE) or load_i64(s + S_STATUS) & SSTATUS_SIE:
        return 0
    entry = load_i64(s + S_FETCH_TLB) + (pc >> 12 & (TLB_ENTRIES - 1)) * FETCH_ENTRY
    if load_i64(entry) != pc & -4096:
        return 0
    record = load_i64(load_i64(entry + 8) + ((pc & 4095) << 2))
    operation = record & 255
    return 1 if operation in (JAL, C_J) and record >> 32 == 0 else 0


@native
def flush_as_asked(s: int) -> int:
    """Carry out another hart's remote fence."""
    asked = acquire_i64(s + S_FLUSHES_ASKED)
    flush_tlb(s)
    fence_instructions(s)
    return publish_i64(s + S_FLUSHES_DONE, asked)


@native
def look_around(s: int, pc: int, retired: int) -> int:
    """What a hart does now and then: requests, code pages, timer, interrupts. Returns the next pc."""
    store_i64(s + S_RETIRED, retired)
    requests = acquire_i64(s + S_REQUESTS)
    if requests:
        requests = atomic_swap_i64(s + S_REQUESTS, 0)
    if requests & REQUEST_FLUSH:
        flush_as_asked(s)
    hear_of_code(s)
    update_timer(s, retired)
    pending = deliverable(s)
    if pending:
        # Priority: external, software, timer (4.1.3).
        cause = 5
        if pending & SEIP:
            cause = 9
        elif pending & SSIP:
            cause = 1
        pc = trap(s, pc, INTERRUPT | cause, 0)
    if requests & REQUEST_RETURN:
        store_i64(s + S_EXIT, EXIT_INTERRUPTED)
    elif retired >= load_i64(s + S_BUDGET_END):
        store_i64(s + S_EXIT, EXIT_BUDGET)
    elif is_endless(s, pc):
        store_i64(s + S_EXIT, EXIT_ENDLESS)
    update_limit(s, retired)
    return pc


#: Functions that are called, never made part of their callers: what they do is rare or long.
CALLED = [
    access_csr,
    environment_call,
    fence_translations,
    flush_as_asked,
    illegal,
    look_around,
    return_from_trap,
    take_fault,
    trap,
    wait_for_interrupt,
]
