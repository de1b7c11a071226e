"""Address translation and what lies behind a TLB miss: Sv39 and Sv48, code pages, accesses that are not memory.

After the RISC-V privileged architecture 1.12, 4.3–4.5. A and D bits are written by the hart (the scheme that Svadu
names). A page that has decoded records never has a store tag, so that a store to it comes here and drops what it
overwrites.

With several harts a page may become code while another hart still has a store tag for it. The page is then noted
under a new *epoch*; each hart drops its store tags, and the records decoded meanwhile, when it next looks around;
``fence.i`` drops the records of pages that some hart has not heard of.
"""

from __future__ import annotations

from vmm.engine.base import ExitReason
from vmm.engine.rv64.layout import (
    ACCESS_FETCH,
    ACCESS_LOAD,
    ACCESS_STORE,
    DATA_ENTRY,
    FETCH_ENTRY,
    LARGE_WORDS,
    MODE_S,
    MODE_S_SUM,
    MODE_U,
    NO_TAG,
    PENDING_DONE,
    PENDING_NONE,
    REACH,
    RECENT_PAGES,
    SHADOW_SPAN,
    SHADOW_STRIDE,
    SSTATUS_MXR,
    SSTATUS_SUM,
    TLB_ENTRIES,
    Hart,
    Machine,
)
from vmm.engine.rv64.native import (
    acquire_i64,
    atomic_add_i64,
    compare_exchange_i64,
    less_unsigned,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    memory_fence,
    native,
    publish_i64,
    shift_right_logical,
    store_i8,
    store_i16,
    store_i32,
    store_i64,
)

# numba reads globals, not class attributes of other modules' classes
S_FAULT, S_CAUSE, S_TVAL, S_STATUS, S_SATP = Hart.FAULT, Hart.CAUSE, Hart.TVAL, Hart.STATUS, Hart.SATP
S_PRIVILEGE, S_MACHINE, S_LEAF_LEVEL = Hart.PRIVILEGE, Hart.MACHINE, Hart.LEAF_LEVEL
S_HUGE, S_LARGE = Hart.HUGE, Hart.LARGE
S_LEAF_GLOBAL, S_LOCAL_USED = Hart.LEAF_GLOBAL, Hart.LOCAL_USED
S_TLB, S_FETCH_TLB, S_DATA_TLBS, S_FETCH_TLBS = Hart.TLB, Hart.FETCH_TLB, Hart.DATA_TLBS, Hart.FETCH_TLBS
S_EXIT, S_EXIT_ADDRESS, S_EXIT_WIDTH, S_EXIT_VALUE = Hart.EXIT, Hart.EXIT_ADDRESS, Hart.EXIT_WIDTH, Hart.EXIT_VALUE
S_PENDING = Hart.PENDING
S_CODE_SEEN, S_INSIDE, S_LIMIT, S_SIZE = Hart.CODE_SEEN, Hart.INSIDE, Hart.LIMIT, Hart.SIZE
M_RAM_BASE, M_RAM_SIZE, M_RAM_HOST, M_SHADOW = Machine.RAM_BASE, Machine.RAM_SIZE, Machine.RAM_HOST, Machine.SHADOW
M_CODE, M_HARTS, M_HART_STATES = Machine.CODE, Machine.HARTS, Machine.HART_STATES
M_CODE_EPOCH, M_RECENT = Machine.CODE_EPOCH, Machine.RECENT
EXIT_READ, EXIT_WRITE = int(ExitReason.MMIO_READ), int(ExitReason.MMIO_WRITE)

DATA_TLB_BYTES = TLB_ENTRIES * DATA_ENTRY
FETCH_TLB_BYTES = TLB_ENTRIES * FETCH_ENTRY

V, R, W, X, U, G, A, D = 1, 2, 4, 8, 16, 32, 64, 128
STORES_TO_DATA = 64
PTE_RESERVED = -1 << 54  # Svnapot, Svpbmt and the rest are not implemented, so these bits must be zero


@native
def page_fault_cause(access: int) -> int:
    """Exception code of a page fault; access faults are 1, 5, 7 (privileged architecture, table 4.2)."""
    if access == ACCESS_FETCH:
        return 12
    if access == ACCESS_STORE:
        return 15
    return 13


@native
def access_fault_cause(access: int) -> int:
    """Exception code of an access to a physical address that cannot be had."""
    if access == ACCESS_FETCH:
        return 1
    if access == ACCESS_STORE:
        return 7
    return 5


@native
def raise_exception(s: int, cause: int, tval: int) -> int:
    """Note an exception for the end of the instruction. Returns -1, which no physical address is."""
    store_i64(s + S_FAULT, 1)
    store_i64(s + S_CAUSE, cause)
    store_i64(s + S_TVAL, tval)
    return -1


@native
def in_ram(machine: int, address: int, length: int) -> int:
    """Whether ``length`` bytes at a physical address are RAM."""
    offset = address - load_i64(machine + M_RAM_BASE)
    return less_unsigned(offset, load_i64(machine + M_RAM_SIZE) - length + 1)


@native
def host_of(machine: int, address: int) -> int:
    """Host address of a physical address in RAM."""
    return load_i64(machine + M_RAM_HOST) + address - load_i64(machine + M_RAM_BASE)


@native
def drop_records(machine: int, address: int, length: int) -> int:
    """Forget decoded instructions that overlap ``length`` bytes of RAM at a physical address."""
    offset = address - load_i64(machine + M_RAM_BASE)
    first = offset - REACH  # where an instruction, or a record of several, may begin that has these bytes in it
    if first < 0:
        first = 0
    first &= -2
    while first < offset + length:
        page = first >> 12
        if load_u8(load_i64(machine + M_CODE) + page):
            store_i64(load_i64(machine + M_SHADOW) + page * SHADOW_STRIDE + ((first & 4095) << 2), 0)
            first += 2
        else:
            first = (page + 1) << 12
    return 0


@native
def drop_page(machine: int, page: int) -> int:
    """Forget all decoded instructions of one page of RAM."""
    shadow = load_i64(machine + M_SHADOW) + page * SHADOW_STRIDE
    for offset in range(0, SHADOW_SPAN, 8):
        store_i64(shadow + offset, 0)
    return 0


@native
def drop_recent(machine: int, seen: int, epoch: int) -> int:
    """Forget the pages that became code after epoch ``seen``, up to ``epoch``."""
    if epoch - seen > RECENT_PAGES - 64:
        for page in range(load_i64(machine + M_RAM_SIZE) >> 12):
            if load_u8(load_i64(machine + M_CODE) + page):
                drop_page(machine, page)
        return 0
    for number in range(seen + 1, epoch + 1):
        drop_page(machine, acquire_i64(machine + M_RECENT + ((number % RECENT_PAGES) << 3)))
    return 0


@native
def forget_store_tags(s: int, host_page: int) -> int:
    """Make stores to one page of RAM miss the TLB (all pages if ``host_page`` is 0)."""
    for index in range(3 * TLB_ENTRIES):
        entry = s + S_DATA_TLBS + index * DATA_ENTRY
        tag = load_i64(entry + 8)
        if tag != NO_TAG and (host_page == 0 or tag + load_i64(entry + 16) == host_page):
            store_i64(entry + 8, NO_TAG)
    return 0


@native
def hear_of_code(s: int) -> int:
    """Act on pages that became code since this hart last looked."""
    machine = load_i64(s + S_MACHINE)
    epoch = acquire_i64(machine + M_CODE_EPOCH)
    seen = load_i64(s + S_CODE_SEEN)
    if epoch != seen:
        forget_store_tags(s, 0)
        memory_fence()
        drop_recent(machine, seen, epoch)
        publish_i64(s + S_CODE_SEEN, epoch)
    return 0


@native
def note_code(s: int, page: int) -> int:
    """A page of RAM is about to have decoded records: from here on stores to it must be seen."""
    machine = load_i64(s + S_MACHINE)
    flag = load_i64(machine + M_CODE) + page
    if load_u8(flag):
        return 0
    store_i8(flag, 1)
    forget_store_tags(s, load_i64(machine + M_RAM_HOST) + (page << 12))
    harts = load_i64(machine + M_HARTS)
    if harts > 1:
        # The ring's slot is written before the epoch that names it; two harts at once get two slots.
        epoch = atomic_add_i64(machine + M_CODE_EPOCH, 1) + 1
        publish_i64(machine + M_RECENT + ((epoch % RECENT_PAGES) << 3), page)
        for index in range(harts):
            other = load_i64(machine + M_HART_STATES) + index * S_SIZE
            if other != s:
                publish_i64(other + S_LIMIT, 0)
    return 0


@native
def fence_instructions(s: int) -> int:
    """FENCE.I: what any hart stored before is fetched after. Stores that were seen have dropped their records
    already."""
    machine = load_i64(s + S_MACHINE)
    harts = load_i64(machine + M_HARTS)
    if harts == 1:
        return 0
    memory_fence()
    epoch = acquire_i64(machine + M_CODE_EPOCH)
    oldest = epoch
    for index in range(harts):
        other = load_i64(machine + M_HART_STATES) + index * S_SIZE
        if acquire_i64(other + S_INSIDE) and acquire_i64(other + S_CODE_SEEN) < oldest:
            oldest = acquire_i64(other + S_CODE_SEEN)
    return drop_recent(machine, oldest, epoch)


@native
def overwrite_code(machine: int, physical: int, length: int) -> int:
    """A store reached a page that may have decoded records. A page stored to often is data again, until it is
    executed."""
    flag = load_i64(machine + M_CODE) + ((physical - load_i64(machine + M_RAM_BASE)) >> 12)
    stores = load_u8(flag)
    if stores == 0:
        return 0
    if stores < STORES_TO_DATA:
        store_i8(flag, stores + 1)
        return drop_records(machine, physical, length)
    # Flag first: a hart that writes a record meanwhile sets it again.
    store_i8(flag, 0)
    memory_fence()
    return drop_page(machine, (physical - load_i64(machine + M_RAM_BASE)) >> 12)


@native
def flush_tlb(s: int) -> int:
    """Drop every translation of this hart."""
    for index in range(3 * TLB_ENTRIES):
        entry = s + S_DATA_TLBS + index * DATA_ENTRY
        store_i64(entry, NO_TAG)
        store_i64(entry + 8, NO_TAG)
    for index in range(2 * TLB_ENTRIES):
        store_i64(s + S_FETCH_TLBS + index * FETCH_ENTRY, NO_TAG)
    for word in range(LARGE_WORDS):
        store_i64(s + S_LARGE + (word << 3), 0)
    store_i64(s + S_HUGE, 0)
    return store_i64(s + S_LOCAL_USED, 0)


@native
def flush_local(s: int) -> int:
    """Drop the translations that hold in one address space only."""
    used = load_i64(s + S_LOCAL_USED)
    for table in range(3):
        if used >> table & 1:
            for index in range(TLB_ENTRIES):
                entry = s + S_DATA_TLBS + table * DATA_TLB_BYTES + index * DATA_ENTRY
                if not load_i64(entry + 24):
                    store_i64(entry, NO_TAG)
                    store_i64(entry + 8, NO_TAG)
    for table in range(2):
        if used >> (3 + table) & 1:
            for index in range(TLB_ENTRIES):
                entry = s + S_FETCH_TLBS + table * FETCH_TLB_BYTES + index * FETCH_ENTRY
                if not load_i64(entry + 16):
                    store_i64(entry, NO_TAG)
    return store_i64(s + S_LOCAL_USED, 0)


@native
def large_bit(address: int) -> int:
    """Number of the bit in Hart.LARGE for the 2 MiB around an address; several ranges share one."""
    return ((address >> 21) ^ (address >> 33)) & (LARGE_WORDS * 64 - 1)


@native
def note_superpage(s: int, address: int) -> int:
    """Remember that a TLB entry of 4 KiB stands for a part of a larger page."""
    level = load_i64(s + S_LEAF_LEVEL)
    if level > 1:
        store_i64(s + S_HUGE, 1)
    elif level == 1:
        bit = large_bit(address)
        word = s + S_LARGE + (bit >> 6 << 3)
        store_i64(word, load_i64(word) | 1 << (bit & 63))
    return 0


@native
def flush_address(s: int, address: int) -> int:
    """Drop the translations of one virtual address: all that a superpage around it gave, if there is one."""
    bit = large_bit(address)
    if load_i64(s + S_HUGE) or load_i64(s + S_LARGE + (bit >> 6 << 3)) >> (bit & 63) & 1:
        return flush_tlb(s)
    index = shift_right_logical(address, 12) & (TLB_ENTRIES - 1)
    for mode in range(3):
        entry = s + S_DATA_TLBS + mode * DATA_TLB_BYTES + index * DATA_ENTRY
        store_i64(entry, NO_TAG)
        store_i64(entry + 8, NO_TAG)
    for mode in range(2):
        store_i64(s + S_FETCH_TLBS + mode * FETCH_TLB_BYTES + index * FETCH_ENTRY, NO_TAG)
    return 0


@native
def select_tlbs(s: int) -> int:
    """Put the TLBs in force that privilege and SUM call for."""
    mode = MODE_U
    if load_i64(s + S_PRIVILEGE):
        mode = MODE_S
        if load_i64(s + S_STATUS) & SSTATUS_SUM:
            mode = MODE_S_SUM
    store_i64(s + S_TLB, s + S_DATA_TLBS + mode * DATA_TLB_BYTES)
    store_i64(s + S_FETCH_TLB, s + S_FETCH_TLBS + load_i64(s + S_PRIVILEGE) * FETCH_TLB_BYTES)
    return 0


@native
def leaf_allows(s: int, pte: int, access: int) -> int:
    """Whether a leaf's permission bits let this privilege make this access (4.3.2, steps 6 to 8)."""
    status = load_i64(s + S_STATUS)
    if load_i64(s + S_PRIVILEGE) == 0:
        if not pte & U:
            return 0
    elif pte & U and (access == ACCESS_FETCH or not status & SSTATUS_SUM):
        return 0
    if access == ACCESS_FETCH:
        return pte & X
    if access == ACCESS_STORE:
        return pte & W
    if status & SSTATUS_MXR:
        return pte & (R | X)
    return pte & R


@native
def translate(s: int, address: int, access: int) -> int:
    """Physical address of a virtual one, or -1 with the exception noted. LEAF_LEVEL tells the size of the page."""
    machine = load_i64(s + S_MACHINE)
    satp = load_i64(s + S_SATP)
    scheme = shift_right_logical(satp, 60)
    store_i64(s + S_LEAF_LEVEL, 0)
    store_i64(s + S_LEAF_GLOBAL, 0)
    if scheme == 0:
        return address & ((1 << 56) - 1)
    bits = 39 if scheme == 8 else 48
    sign = address >> (bits - 1)
    if sign != 0 and sign != -1:
        return raise_exception(s, page_fault_cause(access), address)
    level = 2 if scheme == 8 else 3
    table = (satp & ((1 << 44) - 1)) << 12
    while level >= 0:
        shift = 12 + 9 * level
        entry = table + ((address >> shift & 511) << 3)
        if not in_ram(machine, entry, 8):
            return raise_exception(s, access_fault_cause(access), address)
        host = host_of(machine, entry)
        pte = acquire_i64(host)
        if not pte & V or pte & (R | W) == W or pte & PTE_RESERVED:
            break
        table = (pte >> 10 & ((1 << 44) - 1)) << 12
        if pte & G:
            store_i64(s + S_LEAF_GLOBAL, 1)  # also in a pointer: all below is global then (4.3.1)
        if pte & (R | X):
            span = (1 << shift) - 1
            if not leaf_allows(s, pte, access) or table & span:
                break
            wanted = pte | A | D if access == ACCESS_STORE else pte | A
            if wanted != pte:
                if not compare_exchange_i64(host, pte, wanted):
                    table = entry - ((address >> shift & 511) << 3)  # somebody else changed it: look again
                    continue
                overwrite_code(machine, entry, 8)
            store_i64(s + S_LEAF_LEVEL, level)
            return table | address & span
        if pte & (A | D | U):
            break
        level -= 1
    return raise_exception(s, page_fault_cause(access), address)


@native
def data_entry(s: int, address: int) -> int:
    """The TLB entry in force for a virtual address."""
    return load_i64(s + S_TLB) + (shift_right_logical(address, 12) & (TLB_ENTRIES - 1)) * DATA_ENTRY


@native
def fill_data(s: int, address: int, physical: int, writable: int) -> int:
    """Enter a translation; with a store tag if stores are allowed and the page has no decoded records."""
    machine = load_i64(s + S_MACHINE)
    entry = data_entry(s, address)
    page = address & -4096
    host = host_of(machine, physical & -4096)
    if load_i64(entry) != page:
        store_i64(entry, page)
        store_i64(entry + 8, NO_TAG)
        store_i64(entry + 16, host - page)
        store_i64(entry + 24, load_i64(s + S_LEAF_GLOBAL))
        if not load_i64(s + S_LEAF_GLOBAL):
            table = (load_i64(s + S_TLB) - s - S_DATA_TLBS) // DATA_TLB_BYTES
            store_i64(s + S_LOCAL_USED, load_i64(s + S_LOCAL_USED) | 1 << table)
    if writable and not load_u8(load_i64(machine + M_CODE) + ((physical - load_i64(machine + M_RAM_BASE)) >> 12)):
        store_i64(entry + 8, page)
    return note_superpage(s, address)


@native
def load_bytes(host: int, width: int) -> int:
    """A little-endian integer of 1, 2, 4 or 8 bytes, zero-extended."""
    if width == 8:
        return load_i64(host)
    if width == 4:
        return load_u32(host)
    if width == 2:
        return load_u16(host)
    return load_u8(host)


@native
def store_bytes(host: int, width: int, value: int) -> int:
    """Store 1, 2, 4 or 8 bytes, little-endian."""
    if width == 8:
        return store_i64(host, value)
    if width == 4:
        return store_i32(host, value)
    if width == 2:
        return store_i16(host, value)
    return store_i8(host, value)


@native
def leave_for_device(s: int, reason: int, physical: int, width: int, value: int) -> int:
    """Ask the VMM to carry out an access that is not memory. It is executed again with the answer, EXIT_VALUE."""
    if load_i64(s + S_PENDING) == PENDING_DONE and load_i64(s + S_EXIT_ADDRESS) == physical:
        store_i64(s + S_PENDING, PENDING_NONE)
        return load_i64(s + S_EXIT_VALUE)
    store_i64(s + S_FAULT, 1)
    store_i64(s + S_EXIT, reason)
    store_i64(s + S_EXIT_ADDRESS, physical)
    store_i64(s + S_EXIT_WIDTH, width)
    store_i64(s + S_EXIT_VALUE, value)
    return 0


@native
def load_missed(s: int, address: int, width: int) -> int:
    """A load that the TLB did not serve: a miss, misaligned, or not memory. Zero-extended; FAULT tells of failure."""
    machine = load_i64(s + S_MACHINE)
    room = 4096 - (address & 4095)
    physical = translate(s, address, ACCESS_LOAD)
    if physical == -1:
        return 0
    if width > room:
        level = load_i64(s + S_LEAF_LEVEL)
        second = translate(s, address + room, ACCESS_LOAD)
        if second == -1:
            return 0
        store_i64(s + S_LEAF_LEVEL, level)
        if not in_ram(machine, physical, room) or not in_ram(machine, second, width - room):
            raise_exception(s, 5, address)
            return 0
        value = 0
        for index in range(width):
            place = physical + index if index < room else second + index - room
            value |= load_u8(host_of(machine, place)) << (8 * index)
        return value
    if in_ram(machine, physical, width):
        fill_data(s, address, physical, 0)
        return load_bytes(host_of(machine, physical), width)
    if physical & (width - 1):
        raise_exception(s, 5, address)
        return 0
    store_i64(s + S_TVAL, address)
    return leave_for_device(s, EXIT_READ, physical, width, 0)


@native
def store_missed(s: int, address: int, width: int, value: int) -> int:
    """A store that the TLB did not serve. FAULT tells of failure."""
    machine = load_i64(s + S_MACHINE)
    room = 4096 - (address & 4095)
    physical = translate(s, address, ACCESS_STORE)
    if physical == -1:
        return 0
    if width > room:
        second = translate(s, address + room, ACCESS_STORE)
        if second == -1:
            return 0
        if not in_ram(machine, physical, room) or not in_ram(machine, second, width - room):
            raise_exception(s, 7, address)
            return 0
        for index in range(width):
            place = physical + index if index < room else second + index - room
            store_i8(host_of(machine, place), shift_right_logical(value, 8 * index))
        overwrite_code(machine, physical, room)
        overwrite_code(machine, second, width - room)
        return 0
    if in_ram(machine, physical, width):
        fill_data(s, address, physical, 1)
        store_bytes(host_of(machine, physical), width, value)
        overwrite_code(machine, physical, width)
        return 0
    if physical & (width - 1):
        raise_exception(s, 7, address)
        return 0
    store_i64(s + S_TVAL, address)
    return leave_for_device(s, EXIT_WRITE, physical, width, value)


@native
def reserve_address(s: int, address: int, width: int) -> int:
    """Host address for LR, or 0 with the exception noted."""
    if address & (width - 1):
        raise_exception(s, 4, address)
        return 0
    entry = data_entry(s, address)
    if load_i64(entry) == address & -4096:
        return address + load_i64(entry + 16)
    machine = load_i64(s + S_MACHINE)
    physical = translate(s, address, ACCESS_LOAD)
    if physical == -1:
        return 0
    if not in_ram(machine, physical, width):
        raise_exception(s, 5, address)
        return 0
    fill_data(s, address, physical, 0)
    return host_of(machine, physical)


@native
def atomic_address(s: int, address: int, width: int) -> int:
    """Host address for SC and AMO, or 0 with the exception noted."""
    if address & (width - 1):
        raise_exception(s, 6, address)
        return 0
    entry = data_entry(s, address)
    if load_i64(entry + 8) == address & -4096:
        return address + load_i64(entry + 16)
    machine = load_i64(s + S_MACHINE)
    physical = translate(s, address, ACCESS_STORE)
    if physical == -1:
        return 0
    if not in_ram(machine, physical, width):
        raise_exception(s, 7, address)
        return 0
    fill_data(s, address, physical, 1)
    overwrite_code(machine, physical, width)
    return host_of(machine, physical)


@native
def fetch_missed(s: int, pc: int) -> int:
    """Shadow page of the page that holds ``pc``, or 0 with the exception noted."""
    machine = load_i64(s + S_MACHINE)
    physical = translate(s, pc, ACCESS_FETCH)
    if physical == -1:
        return 0
    if not in_ram(machine, physical, 2):
        raise_exception(s, 1, pc)
        return 0
    page = (physical - load_i64(machine + M_RAM_BASE)) >> 12
    shadow = load_i64(machine + M_SHADOW) + page * SHADOW_STRIDE
    entry = load_i64(s + S_FETCH_TLB) + (shift_right_logical(pc, 12) & (TLB_ENTRIES - 1)) * FETCH_ENTRY
    store_i64(entry, pc & -4096)
    store_i64(entry + 8, shadow)
    store_i64(entry + 16, load_i64(s + S_LEAF_GLOBAL))
    if not load_i64(s + S_LEAF_GLOBAL):
        store_i64(s + S_LOCAL_USED, load_i64(s + S_LOCAL_USED) | 8 << load_i64(s + S_PRIVILEGE))
    note_superpage(s, pc)
    return shadow


@native
def fetch_word(s: int, pc: int) -> int:
    """The instruction word at a virtual address, 2 or 4 bytes, zero-extended; -1 with the exception noted."""
    machine = load_i64(s + S_MACHINE)
    physical = translate(s, pc, ACCESS_FETCH)
    if physical == -1:
        return -1
    if not in_ram(machine, physical, 2):
        return raise_exception(s, 1, pc)
    low = load_u16(host_of(machine, physical))
    if low & 3 != 3:
        return low
    # The two halves are fetched by themselves: the second may lie in another page (stval is then that page's start).
    physical = translate(s, pc + 2, ACCESS_FETCH) if pc & 4095 == 4094 else physical + 2
    if physical == -1:
        return -1
    if not in_ram(machine, physical, 2):
        return raise_exception(s, 1, pc + 2)
    return low | load_u16(host_of(machine, physical)) << 16


#: Functions that are called, never made part of their callers: what they do is rare or long.
CALLED = [
    atomic_address,
    drop_records,
    fetch_missed,
    fetch_word,
    flush_local,
    flush_tlb,
    hear_of_code,
    load_missed,
    overwrite_code,
    raise_exception,
    reserve_address,
    store_missed,
    translate,
]
