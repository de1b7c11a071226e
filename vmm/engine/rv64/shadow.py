"""The shadow's records: made when their instruction is met for the first time, one alone when the hart is stepped."""

from __future__ import annotations

from vmm.engine.rv64.decoder import decode_word
from vmm.engine.rv64.fused import FIRST_FUSED
from vmm.engine.rv64.fusion import fused_at, record_at
from vmm.engine.rv64.layout import SHADOW_STRIDE, Hart, Machine
from vmm.engine.rv64.mmu import fetch_word, note_code
from vmm.engine.rv64.native import load_i64, load_u16, native, publish_i64, store_i64

S_MACHINE, S_SCRATCH, S_SCRATCH_USED = Hart.MACHINE, Hart.SCRATCH, Hart.SCRATCH_USED
M_RAM_HOST, M_SHADOW, M_HARTS = Machine.RAM_HOST, Machine.SHADOW, Machine.HARTS


@native
def put_in_scratch(s: int, offset: int, word: int) -> int:
    """Make a record the only one in this hart's scratch page."""
    used = load_i64(s + S_SCRATCH_USED)
    if used:
        store_i64(used, 0)
    store_i64(s + S_SCRATCH + offset, word)
    return store_i64(s + S_SCRATCH_USED, s + S_SCRATCH + offset)


@native
def page_number(s: int, page: int) -> int:
    """Which page of RAM a shadow page stands for."""
    return (page - load_i64(load_i64(s + S_MACHINE) + M_SHADOW)) // SHADOW_STRIDE


@native
def host_page(s: int, page: int) -> int:
    """Host address of the page of RAM that a shadow page stands for."""
    return load_i64(load_i64(s + S_MACHINE) + M_RAM_HOST) + (page_number(s, page) << 12)


@native
def decode(s: int, record: int, page: int, pc: int) -> int:
    """Fill in the record at ``record`` of shadow page ``page``; ``pc`` is its instruction's address.

    Returns the record, 0 with the exception noted, or -1 if the instruction straddles two pages: what its second
    half is depends on the mapping in force, so it is put into this hart's scratch page instead.
    """
    host, offset = host_page(s, page), (record - page) >> 2
    if offset == 4094 and load_u16(host + offset) & 3 == 3:
        word = fetch_word(s, pc)
        if word == -1:
            return 0
        put_in_scratch(s, record - page, decode_word(word))
        return -1
    decoded = fused_at(host, offset)
    publish_i64(record, decoded)
    note_code(s, page_number(s, page))
    if load_i64(load_i64(s + S_MACHINE) + M_HARTS) > 1 and fused_at(host, offset) != decoded:
        # Another hart stored here after it was read, and dropped the record before it was written.
        publish_i64(record, 0)
    return decoded


@native
def prepare_step(s: int, record: int, page: int, pc: int) -> int:
    """Put the record of one instruction into the otherwise empty scratch page. 0 with the exception noted, else 1."""
    word = load_i64(record)
    if word == 0:
        word = decode(s, record, page, pc)
        if word == 0:
            return 0
        if word == -1:
            return 1
    if word & 255 >= FIRST_FUSED:
        word = record_at(host_page(s, page), (record - page) >> 2)
    put_in_scratch(s, record - page, word)
    return 1


#: Functions that are called, never made part of their callers.
CALLED = [decode, prepare_step]
