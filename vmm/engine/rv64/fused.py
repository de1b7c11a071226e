"""Fused records: what the executor does for several instructions in a row in one step.

The decoder puts a fused record in place of the first of such instructions (see ``fusion``); the records of the others
stay what they are, for whoever jumps there. What can be seen from outside stays exact: a fused record does all of its
instructions where nothing can stop them in between, and else the first one alone.

A row's code returns the next record, and in its lowest three bits how many instructions were retired besides the first.
Records of loops retire thousands at once and note the number in the hart's state instead.

Fields of a record, by their lowest bit; a distance is from the first access, in units of 8 bytes, plus 8::

    loads, stores   base 8, registers 13 18 23 28, distances 33 37 41, length in slots 45, first is long 49, offset 55
    add twice       target 8, source 13, target 18, source 23, length in slots 28, second constant 40, first 52
    add, branch     target 8, source 13, compared 18, with 23, length in slots 28, distance in slots 36, constant 52
    shift, add      target 8, source 13, target 18, augend 23, addend 28, length in slots 33, bits 36
    add, load       target 8, augend 13, addend 18, base 23, register 28, length in slots 33, add is long 49, offset 52
    call, address   target 8, length in slots 24, distance of the target or address 32
    return          register 16, constant 32
    copy, fill      register of the head 8, source 16, target 21, end 26, the target is compared 31, to the end and no
                    further 32, words 33, instructions 39, head is long 49, until equal 50
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmm.engine.rv64.instructions import INSTRUCTIONS
from vmm.engine.rv64.layout import STOP_OPERATION, Hart
from vmm.engine.rv64.mmu import data_entry, load_missed, store_missed
from vmm.engine.rv64.native import (
    acquire_i64,
    divide_unsigned,
    less_unsigned,
    load_i64,
    native,
    remainder_unsigned,
    store_i64,
)
from vmm.engine.rv64.operands import stop

S_X, S_FAULT, S_LIMIT, S_AHEAD = Hart.X, Hart.FAULT, Hart.LIMIT, Hart.AHEAD
TAG_BITS = -4096 | 7  # of an aligned access to 8 bytes

#: Accesses of one record lie at most so many bytes below and above the first.
BELOW, ABOVE = 64, 56
#: Where in its page the first access must be, minus BELOW, for all of them to be in one page; this is too far.
TOO_FAR = 4096 - ABOVE - 8 - BELOW + 1


@dataclass(frozen=True)
class Fused:
    """A row of the executor that stands for several instructions.

    Attributes:
        operation: its number in decoded records.
        name: for people.
        statements: its code; see the module's text.
        loops: whether the number of instructions retired is in Hart.AHEAD.
    """

    operation: int
    name: str
    statements: tuple[str, ...]
    loops: bool = False


_LEFT, _RIGHT = "load_i64(s + X + (word >> 15 & 248))", "load_i64(s + X + (word >> 20 & 248))"
_CONDITIONS: Final = {
    "beq": f"{_LEFT} == {_RIGHT}",
    "bne": f"{_LEFT} != {_RIGHT}",
    "blt": f"{_LEFT} < {_RIGHT}",
    "bge": f"{_LEFT} >= {_RIGHT}",
    "bltu": f"less_unsigned({_LEFT}, {_RIGHT})",
    "bgeu": f"not less_unsigned({_LEFT}, {_RIGHT})",
}
_STATEMENTS: Final = {
    "two loads": ("return load_several(s, word, record, 2)",),
    "three loads": ("return load_several(s, word, record, 3)",),
    "four loads": ("return load_several(s, word, record, 4)",),
    "two stores": ("return store_several(s, word, record, 2)",),
    "three stores": ("return store_several(s, word, record, 3)",),
    "four stores": ("return store_several(s, word, record, 4)",),
    "add twice": ("return add_twice(s, word, record)",),
    **{
        f"add, {name}": (
            "add_first(s, word)",
            f"if {condition}:",
            "    return jump_near(s, record, record + (word << 15 >> 51 << 3), retired + 1) | 1",
            "return record + (word >> 25 & 56) | 1",
        )
        for name, condition in _CONDITIONS.items()
    },
    "shift, add": ("return shift_and_add(s, word, record)",),
    "add, load": ("return add_and_load(s, word, record)",),
    "call": (
        "target_call = pc_of(s, record) + (word >> 32)",
        "set_rd(s, word, pc_of(s, record) + 8, record)",
        "return jump_far(s, record, target_call, retired + 1) | 1",
    ),
    "address": ("return set_rd(s, word, pc_of(s, record) + (word >> 32), record + (word >> 21 & 120)) | 1",),
    "return": (
        "store_i64(s + X + 16, load_i64(s + X + 16) + (word >> 32))",
        "return jump_far(s, record, rs1(s, word) & -2, retired + 1) | 1",
    ),
    "copy loop": (
        "store_i64(s + AHEAD, copy_ahead(s, word, retired))",
        "return load_head(s, word, record)",
    ),
    "fill loop": (
        "store_i64(s + AHEAD, fill_ahead(s, word, retired))",
        "return store_head(s, word, record)",
    ),
}

FUSED: Final = tuple(
    Fused(INSTRUCTIONS[-1].operation + 1 + number, name, statements, name.endswith("loop"))
    for number, (name, statements) in enumerate(_STATEMENTS.items())
)
OPERATIONS: Final = {row.name: row.operation for row in FUSED}
FIRST_FUSED: Final = FUSED[0].operation
assert FUSED[-1].operation < STOP_OPERATION


@native
def load_one(s: int, place: int, address: int, following: int, record: int) -> int:
    """Load 8 bytes into the register at host address ``place``; the next record."""
    entry = data_entry(s, address)
    if load_i64(entry) == address & TAG_BITS:
        value = load_i64(address + load_i64(entry + 16))
    else:
        value = load_missed(s, address, 8)
        if load_i64(s + S_FAULT):
            return stop(s, record)
    store_i64(place, value)
    return following


@native
def store_one(s: int, value: int, address: int, following: int, record: int) -> int:
    """Store 8 bytes; the next record."""
    entry = data_entry(s, address)
    if load_i64(entry + 8) == address & TAG_BITS:
        store_i64(address + load_i64(entry + 16), value)
        return following
    store_missed(s, address, 8, value)
    if load_i64(s + S_FAULT):
        return stop(s, record)
    return following


@native
def load_several(s: int, word: int, record: int, count: int) -> int:
    """Loads of 8 bytes each from one base."""
    address = load_i64(s + S_X + (word >> 5 & 248)) + (word >> 55 << 3)
    entry = data_entry(s, address)
    if load_i64(entry) == address & TAG_BITS and less_unsigned((address & 4095) - BELOW, TOO_FAR):
        host = address + load_i64(entry + 16)
        low = host - BELOW
        first, second = load_i64(host), load_i64(low + (word >> 30 & 120))
        third = load_i64(low + (word >> 34 & 120)) if count > 2 else 0
        fourth = load_i64(low + (word >> 38 & 120)) if count > 3 else 0
        store_i64(s + S_X + (word >> 10 & 248), first)
        store_i64(s + S_X + (word >> 15 & 248), second)
        if count > 2:
            store_i64(s + S_X + (word >> 20 & 248), third)
        if count > 3:
            store_i64(s + S_X + (word >> 25 & 248), fourth)
        return record + (word >> 42 & 120) | count - 1
    return load_one(s, s + S_X + (word >> 10 & 248), address, record + 8 + (word >> 46 & 8), record)


@native
def store_several(s: int, word: int, record: int, count: int) -> int:
    """Stores of 8 bytes each to one base."""
    address = load_i64(s + S_X + (word >> 5 & 248)) + (word >> 55 << 3)
    entry = data_entry(s, address)
    if load_i64(entry + 8) == address & TAG_BITS and less_unsigned((address & 4095) - BELOW, TOO_FAR):
        host = address + load_i64(entry + 16)
        low = host - BELOW
        store_i64(host, load_i64(s + S_X + (word >> 10 & 248)))
        store_i64(low + (word >> 30 & 120), load_i64(s + S_X + (word >> 15 & 248)))
        if count > 2:
            store_i64(low + (word >> 34 & 120), load_i64(s + S_X + (word >> 20 & 248)))
        if count > 3:
            store_i64(low + (word >> 38 & 120), load_i64(s + S_X + (word >> 25 & 248)))
        return record + (word >> 42 & 120) | count - 1
    value = load_i64(s + S_X + (word >> 10 & 248))
    return store_one(s, value, address, record + 8 + (word >> 46 & 8), record)


@native
def add_first(s: int, word: int) -> int:
    """The addition of a constant that comes first."""
    return store_i64(s + S_X + (word >> 5 & 248), load_i64(s + S_X + (word >> 10 & 248)) + (word >> 52))


@native
def add_twice(s: int, word: int, record: int) -> int:
    """Two additions of a constant; the second may use what the first made."""
    add_first(s, word)
    store_i64(s + S_X + (word >> 15 & 248), load_i64(s + S_X + (word >> 20 & 248)) + (word << 12 >> 52))
    return record + (word >> 25 & 56) | 1


@native
def shift_and_add(s: int, word: int, record: int) -> int:
    """A shift left, and an addition of two registers."""
    store_i64(s + S_X + (word >> 5 & 248), load_i64(s + S_X + (word >> 10 & 248)) << (word >> 36 & 63))
    total = load_i64(s + S_X + (word >> 20 & 248)) + load_i64(s + S_X + (word >> 25 & 248))
    store_i64(s + S_X + (word >> 15 & 248), total)
    return record + (word >> 30 & 56) | 1


@native
def add_and_load(s: int, word: int, record: int) -> int:
    """An addition of two registers, and a load of 8 bytes unless that needs a closer look."""
    total = load_i64(s + S_X + (word >> 10 & 248)) + load_i64(s + S_X + (word >> 15 & 248))
    store_i64(s + S_X + (word >> 5 & 248), total)
    address = load_i64(s + S_X + (word >> 20 & 248)) + (word >> 52)
    entry = data_entry(s, address)
    if load_i64(entry) == address & TAG_BITS:
        store_i64(s + S_X + (word >> 25 & 248), load_i64(address + load_i64(entry + 16)))
        return record + (word >> 30 & 56) | 1
    return record + 8 + (word >> 46 & 8)


@native
def rounds_to_end(s: int, word: int, size: int) -> int:
    """After how many rounds of a loop, each of ``size`` bytes, its branch is still taken."""
    end = load_i64(s + S_X + (word >> 23 & 248))
    compared = load_i64(s + S_X + (word >> 13 & 248))
    if word >> 31 & 1:
        compared = load_i64(s + S_X + (word >> 18 & 248))
    room = end - compared
    if word >> 32 & 1:
        if less_unsigned(end, compared):
            return 0
        return divide_unsigned(room, size)
    if not less_unsigned(compared, end) or (word >> 50 & 1 and remainder_unsigned(room, size)):
        return 0
    return divide_unsigned(room - 1, size)


@native
def rounds_in_page(address: int, size: int) -> int:
    """How many rounds can be done ahead in a page: the last one that fits is left, to be done step by step, since it
    sets the registers."""
    return divide_unsigned(4096 - (address & 4095), size) - 1


@native
def quiet_rounds(s: int, word: int, address: int, retired: int, size: int) -> int:
    """How many rounds can be done ahead: after each of them the branch is taken and there is nothing to look at."""
    quiet = acquire_i64(s + S_LIMIT) - retired
    if quiet <= 0:
        return 0
    rounds = min(rounds_to_end(s, word, size), rounds_in_page(address, size))
    return min(rounds, divide_unsigned(quiet, word >> 39 & 63))


@native
def copy_ahead(s: int, word: int, retired: int) -> int:
    """Do rounds of a loop that copies; how many instructions they have."""
    size = word >> 30 & 504
    source, target = load_i64(s + S_X + (word >> 13 & 248)), load_i64(s + S_X + (word >> 18 & 248))
    entry = data_entry(s, source)
    if load_i64(entry) != source & TAG_BITS:
        return 0
    origin = source + load_i64(entry + 16)
    entry = data_entry(s, target)
    if load_i64(entry + 8) != target & TAG_BITS:
        return 0
    host = target + load_i64(entry + 16)
    rounds = min(quiet_rounds(s, word, source, retired, size), rounds_in_page(target, size))
    length = rounds * size
    if rounds <= 0 or (host - origin < length and origin - host < length):
        return 0
    for offset in range(0, length, 8):
        store_i64(host + offset, load_i64(origin + offset))
    store_i64(s + S_X + (word >> 13 & 248), source + length)
    store_i64(s + S_X + (word >> 18 & 248), target + length)
    return rounds * (word >> 39 & 63)


@native
def fill_ahead(s: int, word: int, retired: int) -> int:
    """Do rounds of a loop that stores one register; how many instructions they have."""
    size = word >> 30 & 504
    target = load_i64(s + S_X + (word >> 18 & 248))
    entry = data_entry(s, target)
    if load_i64(entry + 8) != target & TAG_BITS:
        return 0
    host = target + load_i64(entry + 16)
    rounds = quiet_rounds(s, word, target, retired, size)
    if rounds <= 0:
        return 0
    value = load_i64(s + S_X + (word >> 5 & 248))
    length = rounds * size
    for offset in range(0, length, 8):
        store_i64(host + offset, value)
    store_i64(s + S_X + (word >> 18 & 248), target + length)
    return rounds * (word >> 39 & 63)


@native
def load_head(s: int, word: int, record: int) -> int:
    """The first instruction of a loop that copies: a load without an offset."""
    address = load_i64(s + S_X + (word >> 13 & 248))
    return load_one(s, s + S_X + (word >> 5 & 248), address, record + 8 + (word >> 46 & 8), record)


@native
def store_head(s: int, word: int, record: int) -> int:
    """The first instruction of a loop that fills: a store without an offset."""
    address = load_i64(s + S_X + (word >> 18 & 248))
    return store_one(s, load_i64(s + S_X + (word >> 5 & 248)), address, record + 8 + (word >> 46 & 8), record)


#: Functions that belong into each row's code; whatever is behind them is called.
INLINED = [load_several, store_several, add_first, add_twice, shift_and_add, add_and_load, data_entry]
#: Functions that are called, never made part of their callers.
CALLED = [load_one, store_one, copy_ahead, fill_ahead, load_head, store_head]
