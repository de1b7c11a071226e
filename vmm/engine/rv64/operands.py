"""Operands of a decoded record, and what ends an instruction: intrinsics and small functions that LLVM inlines.

A row's code gets ``(s, word, record, retired)`` and returns the address of the next record. To leave the page's
straight line it notes its own record and returns the address of the hart's stop record, which ends the loop: with
FAULT set for an exception or exit, else to go on at NEXT_PC.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from vmm.engine.rv64.arithmetic import box
from vmm.engine.rv64.layout import DATA_ENTRY, FETCH_ENTRY, NO_RESERVATION, SHADOW_SPAN, TLB_ENTRIES, Hart
from vmm.engine.rv64.mmu import atomic_address, load_missed, raise_exception, reserve_address, store_missed
from vmm.engine.rv64.native import (
    I8,
    I64,
    Word,
    compare_exchange_i32,
    compare_exchange_i64,
    define,
    less_unsigned,
    load_i8,
    load_i16,
    load_i32,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    native,
    store_i8,
    store_i16,
    store_i32,
    store_i64,
)
from vmm.engine.rv64.system import access_csr, illegal

S_TLB, S_FAULT, S_FS, S_FRM, S_LIMIT = Hart.TLB, Hart.FAULT, Hart.FS, Hart.FRM, Hart.LIMIT
S_PAGE, S_PAGE_PC, S_NEXT_PC, S_RECORD, S_STOP = Hart.PAGE, Hart.PAGE_PC, Hart.NEXT_PC, Hart.RECORD, Hart.STOP
S_FETCH_TLB, S_STEPPING = Hart.FETCH_TLB, Hart.STEPPING
S_SERIALISE, S_RESERVATION, S_RESERVED_VALUE = Hart.SERIALISE, Hart.RESERVATION, Hart.RESERVED_VALUE
TLB_MASK = TLB_ENTRIES - 1


def _place(builder: ir.IRBuilder, s: ir.Value, word: ir.Value, low: int, file: int) -> ir.Value:
    """Pointer to the register whose number is the byte of ``word`` at bit ``low``."""
    index = builder.zext(builder.trunc(builder.lshr(word, ir.Constant(I64, low)), I8), I64)
    base = builder.inttoptr(builder.add(s, ir.Constant(I64, file)), I64.as_pointer())
    return builder.gep(base, [index])


def _read(name: str, low: int, file: int) -> Word:
    return define(
        name,
        lambda b, s, word: b.load(_place(b, s, word, low, file), align=8),
        types.int64,
        (types.int64, types.int64),
        "The value of a register operand.",
    )


rs1 = _read("rs1", 16, Hart.X)
rs2 = _read("rs2", 24, Hart.X)
fs1 = _read("fs1", 16, Hart.F)
fs2 = _read("fs2", 24, Hart.F)
fs3 = _read("fs3", 40, Hart.F)


def _write(name: str, file: int) -> Word:
    def emit(builder: ir.IRBuilder, s: ir.Value, word: ir.Value, value: ir.Value, following: ir.Value) -> ir.Value:
        builder.store(value, _place(builder, s, word, 8, file), align=8)
        return following

    words = "Set the destination register; returns the next record."
    return define(name, emit, types.int64, (types.int64,) * 4, words)


set_rd = _write("set_rd", Hart.X)
set_fd = _write("set_fd", Hart.F)


@native
def stop(s: int, record: int) -> int:
    """Leave the straight line at ``record``."""
    store_i64(s + S_RECORD, record)
    return s + S_STOP


@native
def pc_of(s: int, record: int) -> int:
    """Virtual address of the instruction whose record this is."""
    return load_i64(s + S_PAGE_PC) + ((record - load_i64(s + S_PAGE)) >> 2)


@native
def leave_page(s: int, record: int, target: int, retired: int) -> int:
    """Go on in another page; through NEXT_PC if its translation is not at hand or something waits."""
    entry = load_i64(s + S_FETCH_TLB) + (target >> 12 & TLB_MASK) * FETCH_ENTRY
    if load_i64(entry) == target & -4096 and retired < load_i64(s + S_LIMIT) and load_i64(s + S_STEPPING) == 0:
        page = load_i64(entry + 8)
        store_i64(s + S_PAGE, page)
        store_i64(s + S_PAGE_PC, target & -4096)
        return page + ((target & 4095) << 2)
    store_i64(s + S_NEXT_PC, target)
    return stop(s, record)


@native
def jump_out(s: int, record: int, target: int, retired: int) -> int:
    """Go on at what would be a record if this page went on beyond its ends."""
    return leave_page(s, record, pc_of(s, target), retired)


@native
def jump_near(s: int, record: int, target: int, retired: int) -> int:
    """Go on at a record, or in another page if there is none in this one."""
    if less_unsigned(target - load_i64(s + S_PAGE), SHADOW_SPAN) and retired < load_i64(s + S_LIMIT):
        return target
    return jump_out(s, record, target, retired)


@native
def jump_far(s: int, record: int, target: int, retired: int) -> int:
    """Go on at a virtual address."""
    if target & -4096 == load_i64(s + S_PAGE_PC) and retired < load_i64(s + S_LIMIT):
        return load_i64(s + S_PAGE) + ((target & 4095) << 2)
    return leave_page(s, record, target, retired)


@native
def serialise(s: int, record: int, pc: int) -> int:
    """Go on at ``pc`` after a look at limits and translations."""
    store_i64(s + S_NEXT_PC, pc)
    return stop(s, record)


@native
def floating_off(s: int) -> int:
    """Whether floating-point instructions are illegal now: FS is off (privileged architecture 3.1.6.6)."""
    if load_i64(s + S_FS):
        return 0
    return illegal(s)


@native
def floating_dirty(s: int) -> int:
    """The same for an instruction that changes f registers or flags: FS becomes dirty."""
    if load_i64(s + S_FS):
        store_i64(s + S_FS, 3)
        return 0
    return illegal(s)


@native
def rounding_mode(s: int, word: int) -> int:
    """The rounding mode in force, or -1 with the exception noted (volume I, 21.2: 5 and 6 are reserved)."""
    mode = word >> 32 & 7
    if mode == 7:
        mode = load_i64(s + S_FRM)
    if mode > 4:
        illegal(s)
        return -1
    return mode


@native
def access_csr_of(
    s: int, word: int, record: int, number: int, operation: int, operand: int, writes: int, retired: int
) -> int:
    """A Zicsr instruction: like every row's code, returns the next record or 0."""
    value = access_csr(s, number, operation, operand, writes, retired)
    if load_i64(s + S_FAULT):
        return stop(s, record)
    set_rd(s, word, value, record)
    if load_i64(s + S_SERIALISE):
        store_i64(s + S_SERIALISE, 0)
        return serialise(s, record, pc_of(s, record) + 4)
    return record + 16


def _reservations(load: Word, compare_exchange: Word, width: int) -> tuple[Word, Word]:
    """LR notes address and value, SC stores if the value is still there. A store of the same value in between goes
    unseen, which no sequence that keeps to the manual's rules (volume I, 14.3) can tell. Both return 1 for an
    exception."""

    @native
    def load_reserved(s: int, word: int) -> int:
        host = reserve_address(s, rs1(s, word), width)
        if host == 0:
            return 1
        value = load(host)
        store_i64(s + S_RESERVATION, rs1(s, word))
        store_i64(s + S_RESERVED_VALUE, value)
        set_rd(s, word, value, 1)
        return 0

    @native
    def store_conditional(s: int, word: int) -> int:
        failed = 1
        if rs1(s, word) & (width - 1):
            raise_exception(s, 6, rs1(s, word))
            return 1
        if load_i64(s + S_RESERVATION) == rs1(s, word):
            host = atomic_address(s, rs1(s, word), width)
            if host == 0:
                return 1
            failed = 1 - compare_exchange(host, load_i64(s + S_RESERVED_VALUE), rs2(s, word))
        store_i64(s + S_RESERVATION, NO_RESERVATION)
        set_rd(s, word, failed, 1)
        return 0

    return load_reserved, store_conditional


load_reserved_i32, store_conditional_i32 = _reservations(load_i32, compare_exchange_i32, 4)
load_reserved_i64, store_conditional_i64 = _reservations(load_i64, compare_exchange_i64, 8)


def _loader(load: Word, width: int, spare: int) -> tuple[Word, Word]:
    """Loads of one width into x and f registers; ``spare`` bits above a signed value are copies of its sign."""
    tag_bits = -4096 | width - 1

    @native
    def into_x(s: int, word: int, address: int, record: int, step: int) -> int:
        entry = load_i64(s + S_TLB) + (address >> 12 & TLB_MASK) * DATA_ENTRY
        if load_i64(entry) == address & tag_bits:
            return set_rd(s, word, load(address + load_i64(entry + 16)), record + step)
        value = load_missed(s, address, width) << spare >> spare
        if load_i64(s + S_FAULT):
            return stop(s, record)
        return set_rd(s, word, value, record + step)

    @native
    def into_f(s: int, word: int, address: int, record: int, step: int) -> int:
        entry = load_i64(s + S_TLB) + (address >> 12 & TLB_MASK) * DATA_ENTRY
        if load_i64(entry) == address & tag_bits:
            value = load(address + load_i64(entry + 16))
        else:
            value = load_missed(s, address, width)
            if load_i64(s + S_FAULT):
                return stop(s, record)
        if width == 4:
            value = box(value)
        return set_fd(s, word, value, record + step)

    return into_x, into_f


def _storer(store: Word, width: int) -> Word:
    tag_bits = -4096 | width - 1

    @native
    def access(s: int, address: int, value: int, record: int, step: int) -> int:
        entry = load_i64(s + S_TLB) + (address >> 12 & TLB_MASK) * DATA_ENTRY
        if load_i64(entry + 8) == address & tag_bits:
            store(address + load_i64(entry + 16), value)
            return record + step
        store_missed(s, address, width, value)
        if load_i64(s + S_FAULT):
            return stop(s, record)
        return record + step

    return access


load_x_i8, _ = _loader(load_i8, 1, 56)
load_x_u8, _ = _loader(load_u8, 1, 0)
load_x_i16, _ = _loader(load_i16, 2, 48)
load_x_u16, _ = _loader(load_u16, 2, 0)
load_x_i32, _ = _loader(load_i32, 4, 32)
load_x_u32, load_f_u32 = _loader(load_u32, 4, 0)
load_x_i64, load_f_i64 = _loader(load_i64, 8, 0)
store_to_i8 = _storer(store_i8, 1)
store_to_i16 = _storer(store_i16, 2)
store_to_i32 = _storer(store_i32, 4)
store_to_i64 = _storer(store_i64, 8)

#: Functions that belong into each row's code; whatever is behind them is called.
INLINED = [
    *[stop, pc_of, leave_page, jump_near, jump_far, serialise, floating_off, floating_dirty, rounding_mode],
    *[load_x_i8, load_x_u8, load_x_i16, load_x_u16, load_x_i32, load_x_u32, load_x_i64, load_f_u32, load_f_i64],
    *[store_to_i8, store_to_i16, store_to_i32, store_to_i64],
]

#: Functions that are called, never made part of their callers.
CALLED = [jump_out]
