"""Invents page-table cases: address spaces of their own, accesses to them, and changes made while they are in use.

Follows The RISC-V Instruction Set Manual, volume II (20211203), 4.3.2 to 4.5. Each case has its own tables and
frames, whose contents are compared afterwards: accessed and dirty bits, and no stray write. Superpages show the
commons, a page at a fixed physical address. Left out: ASIDs other than 0, global mappings across address spaces.
"""

from __future__ import annotations

from random import Random

from tests.referee import assembly as asm
from tests.referee.assembly import T0, T1, T2, ZERO
from tests.referee.case import CSR, FS_DIRTY, MXR, PAGE, SPIE, SUM, Case, Entry, Frame, Space
from tests.referee.image import COMMONS, MEMORY_BASE
from tests.referee.paging import HIGH, TABLES, A, Arena, D, G, PageTables, R, U, V, W, X, build_space, leaf
from tests.referee.sequences import word_bytes

ADDI_T0 = asm.addi(T0, T0, 1)
_PARCEL = asm.C_EBREAK.to_bytes(2, "little")
#: Breakpoints, and across the page's end the first half of `addi t0, t0, 1`; the page after it begins with the other
#: half.
_FETCHED = _PARCEL * (PAGE // 2 - 1) + (ADDI_T0 & 0xFFFF).to_bytes(2, "little")
_FETCHED_NEXT = (ADDI_T0 >> 16).to_bytes(2, "little") + _PARCEL * (PAGE // 2 - 1)

_LOADS = {1: (0, 4), 2: (1, 5), 4: (2, 6), 8: (3,)}
_CODE_FRAME, _FETCH_FRAME, _FETCH_NEXT_FRAME, _DATA_FRAME, _DATA_NEXT_FRAME = range(5)
_ANCHORS = (TABLES, HIGH)


def _page_address(random: Random, levels: int, taken: list[int]) -> int:
    """A canonical page address that shares no entry of the root with those ``taken``, with room for a page after it."""
    bits = 12 + 9 * levels
    top = bits - 9
    while True:
        address = random.getrandbits(bits - 1) & ~(PAGE - 1)
        if random.random() < 0.3:
            address |= ((1 << 64) - 1) >> bits - 1 << bits - 1
        if random.random() < 0.3:
            # The last page of a last-level table: the page after it has another table.
            address = address & ~((1 << 21) - 1) | (1 << 21) - PAGE
        clear = all((address ^ other) >> top & 511 for other in (*taken, *_ANCHORS))
        if clear and address >> top == address + PAGE >> top:
            return address


def _leaf_flags(random: Random, user: bool) -> int:
    """Flags of a leaf: sensible ones with some bits turned, reserved combinations among them."""
    flags = V | random.choice((R, R | W, R | W, R | W | X, R | X, X)) | random.choice((A | D, A | D, A, 0, D))
    flags |= U if user else 0
    for bit, probability in (
        (U, 0.2),
        (V, 0.06),
        (W, 0.05),
        (R, 0.05),
        (X, 0.05),
        (G, 0.1),
        (1 << 8, 0.1),
        (1 << 9, 0.1),
    ):
        if random.random() < probability:
            flags ^= bit
    if random.random() < 0.03:
        flags |= 1 << random.randrange(54, 64)
    return flags


def _access(random: Random, base: int, target: int) -> bytes:
    """A load, store, AMO, LR or jump to what register ``base`` holds; a loaded value goes to ``target``."""
    kind = random.random()
    width = random.choice((1, 2, 4, 8))
    if kind < 0.4:
        return word_bytes(asm.i_type(0x03, random.choice(_LOADS[width]), target, base, 0))
    if kind < 0.75:
        return word_bytes(asm.s_type(0x23, {1: 0, 2: 1, 4: 2, 8: 3}[width], base, T1, 0))
    if kind < 0.83:
        return word_bytes(asm.amo(random.choice((0, 1)), random.choice((4, 8)), target, base, T1))
    if kind < 0.87:
        return word_bytes(asm.amo(2, random.choice((4, 8)), target, base, ZERO))
    return word_bytes(asm.jalr(asm.RA, base))


def _is_jump(step: bytes) -> bool:
    return step[0] & 0x7F == 0x67


def _status(random: Random, *, fetches: bool) -> int:
    """SUM is left out where S-mode jumps to these pages: QEMU 7.2 lets it execute a U page that a load has reached."""
    permissions = (0, MXR) if fetches else (0, SUM, MXR, SUM | MXR)
    return FS_DIRTY | random.choice(permissions) | random.choice((0, SPIE))


def _offset(random: Random) -> int:
    """Where in its page an access goes: aligned, or across the end."""
    if random.random() < 0.25:
        return PAGE - random.choice((1, 2, 2, 2, 3, 4, 6, 7))
    return random.randrange(0, PAGE, 16)


def _damage(random: Random, address: int, levels: int) -> tuple[Entry, ...]:
    """Now and then an entry on the way to ``address`` that is invalid, reserved, a superpage or outside memory."""
    kind = random.random()
    level = random.randrange(1, levels)
    if kind < 0.08:
        return (Entry(address, random.getrandbits(54) & ~V, level=random.randrange(levels), raw=True),)
    if kind < 0.14:
        # A pointer with one of D, A, U is reserved; a pointer in the last level leads nowhere.
        if random.random() < 0.5:
            return (Entry(address, leaf(COMMONS, V | random.choice((A, D, U))), level=level, raw=True),)
        return (Entry(address, leaf(COMMONS, V), level=0, raw=True),)
    if kind < 0.24:
        misaligned = leaf(COMMONS & ~(PAGE - 1) | PAGE << random.randrange(9 * level), V | R | W | X | A | D)
        return (Entry(address, misaligned, level=level, raw=True),)
    return ()


def random_page_case(random: Random, number: int) -> Case:
    """Four pages with random flags and up to four accesses to them, the first fault being the end."""
    levels = random.choice((3, 4))
    user = random.random() < 0.4
    taken: list[int] = []
    for _ in range(3):
        taken.append(_page_address(random, levels, taken))
    code_page, fetch_page, data_page = taken
    entries = [Entry(code_page, V | X | A | (U if user else 0), _CODE_FRAME)]
    for page, first, second in (
        (fetch_page, _FETCH_FRAME, _FETCH_NEXT_FRAME),
        (data_page, _DATA_FRAME, _DATA_NEXT_FRAME),
    ):
        extra = X if first == _FETCH_FRAME else 0
        entries.append(Entry(page, _leaf_flags(random, user) | extra, first))
        entries.append(Entry(page + PAGE, _leaf_flags(random, user) | extra, second))
        entries += _damage(random, page, levels)
    x = [0] * 32
    x[T1] = random.getrandbits(64)
    steps = []
    for index in range(random.randrange(1, 5)):
        base, target = 8 + index, 18 + index
        page = random.choice((fetch_page, data_page, data_page))
        x[base] = page + random.choice((0, 0, PAGE)) + _offset(random)
        if random.random() < 0.04:
            # Not canonical.
            x[base] ^= 1 << random.randrange(12 + 9 * levels, 64)
        step = _access(random, base, target)
        if _is_jump(step):
            x[base] = fetch_page + random.choice((0, PAGE - 2, PAGE - 2, PAGE - 4, PAGE + 2))
        steps.append(step)
    frames = (
        Frame(b"".join(steps) + _PARCEL),
        Frame(_FETCHED),
        Frame(_FETCHED_NEXT),
        Frame(random.randbytes(PAGE)),
        Frame(random.randbytes(PAGE)),
    )
    status = _status(random, fetches=not user and any(_is_jump(step) for step in steps))
    space = Space(levels, frames, tuple(entries), code_page)
    return Case((), x=tuple(x), sstatus=status, user=user, space=space, title=f"page case {number}")


def superpage_case(random: Random, number: int) -> Case:
    """Accesses through a leaf above the last level, which shows the commons."""
    levels = random.choice((3, 4))
    level = random.randrange(1, levels)
    user = random.random() < 0.4
    code_page = _page_address(random, levels, [])
    shown = _page_address(random, levels, [code_page]) >> 12 + 9 * level << 12 + 9 * level
    start = MEMORY_BASE if level < 3 else 0
    window = shown + COMMONS - start
    flags = _leaf_flags(random, user) | random.choice((0, X))
    if not flags & (R | W | X):
        # It would be a pointer, to what no two machines have in common.
        flags |= R
    entries = (
        Entry(code_page, V | X | A | (U if user else 0), _CODE_FRAME),
        Entry(shown, leaf(start, flags), level=level, raw=True),
    )
    x = [0] * 32
    x[T1] = random.getrandbits(64)
    steps = []
    for index in range(3):
        base = 8 + index
        x[base] = window + 1024 + random.randrange(0, 3000, random.choice((1, 16)))
        step = _access(random, base, 18 + index)
        if _is_jump(step):
            x[base] = window + random.randrange(0, 1024, 2)
        elif random.random() < 0.3:
            # To the same byte of the next superpage, where nothing is mapped.
            x[base] = x[base] + (1 << 12 + 9 * level) & (1 << 64) - 1
        steps.append(step)
    status = _status(random, fetches=not user and any(_is_jump(step) for step in steps))
    space = Space(levels, (Frame(b"".join(steps) + _PARCEL),), entries, code_page)
    return Case((), x=tuple(x), sstatus=status, user=user, space=space, title=f"superpage case {number}")


def _sfence(address: int, asid: int) -> int:
    return asm.r_type(0x73, 0, 9, 0, address, asid)


def entry_view(space: Space, address: int, level: int = 0) -> int:
    """The virtual address at which S-mode sees the entry for ``address``."""
    arena = Arena(0)
    window = arena.take(pages=1)
    _, owned = build_space(space, arena, window)
    tables = owned[len(space.frames) :]
    walker = object.__new__(PageTables)
    walker.arena, walker.levels, walker.tables = arena, space.levels, tables
    slot = walker.slot(address, level)
    return TABLES + tables.index(slot & ~(PAGE - 1)) * PAGE + (slot & PAGE - 1)


def changed_entry_case(random: Random, number: int) -> Case:
    """Use a mapping, change its entry, SFENCE.VMA (everything, or this address), use it again."""
    levels = random.choice((3, 4))
    code_page = _page_address(random, levels, [])
    page = _page_address(random, levels, [code_page])
    flags = V | R | W | X | A | D | random.choice((0, 0, U))
    entries = (
        Entry(code_page, V | X | A, _CODE_FRAME),
        Entry(page, flags, 1),
        Entry(page + PAGE, flags, 2),
    )
    frames = (Frame(), Frame(_PARCEL * 512 + random.randbytes(3072)), Frame(_PARCEL * 512 + random.randbytes(3072)))
    blank = Space(levels, frames, entries, code_page)
    x = [0] * 32
    x[8], x[9] = page + random.randrange(1024, PAGE, 8), page + random.randrange(0, 1024, 2)
    x[10], x[11] = entry_view(blank, page), entry_view(blank, page + PAGE)
    x[12] = random.choice((V, R, W, R | W, X, U, A, D, A | D, R | W | X))
    x[T1] = random.getrandbits(64)
    first = asm.ld(18, 8, 0) if random.random() < 0.5 else asm.sd(T1, 8, 0)
    change: tuple[int, ...]
    if random.random() < 0.5:
        change = (asm.ld(T0, 10, 0), asm.ld(T2, 11, 0), asm.sd(T0, 11, 0), asm.sd(T2, 10, 0))
    else:
        change = (asm.ld(T0, 10, 0), asm.r_type(0x33, 4, 0, T0, T0, 12), asm.sd(T0, 10, 0))
    fence = random.choice((asm.SFENCE_VMA_ALL, _sfence(8, ZERO), _sfence(9, ZERO), _sfence(8, 20)))
    again = random.choice(
        ((asm.ld(19, 8, 0),), (asm.sd(T1, 8, 0),), (asm.jalr(asm.RA, 9),), (asm.ld(19, 8, 0), asm.sd(T1, 8, 0)))
    )
    code = word_bytes(first, *change, fence, *again) + _PARCEL
    space = Space(levels, (Frame(code), *frames[1:]), entries, code_page)
    status = _status(random, fetches=asm.jalr(asm.RA, 9) in again)
    return Case((), x=tuple(x), sstatus=status, space=space, title=f"changed entry case {number}")


def changed_root_case(random: Random, number: int) -> Case:
    """Copy the root table to another page, change it there, load satp with that page, and see the change."""
    levels = random.choice((3, 4))
    code_page = _page_address(random, levels, [])
    page = _page_address(random, levels, [code_page])
    copy = _page_address(random, levels, [code_page, page])
    top = 12 + 9 * (levels - 1)
    used = {address >> top & 511 for address in (code_page, page, copy, *_ANCHORS)}
    # Both pages have the same place below the root, so that one root entry does for the other.
    index = random.choice([index for index in range(1, 256) if index not in used])
    other = page & (1 << top) - 1 | index << top
    entries = (
        Entry(code_page, V | X | A, _CODE_FRAME),
        Entry(page, V | R | W | A | D, 1),
        Entry(other, V | R | W | A | D, 2),
        Entry(copy, V | R | W | A | D, 3),
    )
    frames = (Frame(), Frame(random.randbytes(PAGE)), Frame(random.randbytes(PAGE)), Frame())
    blank = Space(levels, frames, entries, code_page)
    x = [0] * 32
    x[8] = page + random.randrange(0, PAGE, 8)
    x[9], x[10], x[11] = TABLES, copy, entry_view(blank, copy)
    x[12], x[13] = copy + 8 * (page >> top & 511), copy + 8 * (other >> top & 511)
    x[14] = (1 << 44) - 1
    x[15] = TABLES + PAGE
    code = word_bytes(
        asm.ld(18, 8, 0),
        asm.ld(T0, 9, 0),
        asm.sd(T0, 10, 0),
        asm.addi(9, 9, 8),
        asm.addi(10, 10, 8),
        asm.b_type(1, 9, 15, -16),
        # The first page's root entry becomes the other's, or none.
        asm.ld(T0, 13, 0) if random.random() < 0.5 else asm.addi(T0, ZERO, 0),
        asm.sd(T0, 12, 0),
        # satp = mode of the present satp, PPN from the entry that maps the copy.
        asm.csrrs(T0, CSR["satp"], ZERO),
        asm.r_type(0x13, 5, 1, T0, T0, 28),
        asm.r_type(0x13, 1, 1, T0, T0, 28),
        asm.ld(T2, 11, 0),
        asm.r_type(0x13, 1, 0, T2, T2, 10),
        asm.r_type(0x13, 5, 0, T2, T2, 20),
        asm.r_type(0x33, 7, 0, T2, T2, 14),
        asm.r_type(0x33, 6, 0, T0, T0, T2),
        asm.csrrw(19, CSR["satp"], T0),
        asm.SFENCE_VMA_ALL,
        asm.ld(20, 8, 0),
    )
    space = Space(levels, (Frame(code + _PARCEL), *frames[1:]), entries, code_page)
    return Case((), x=tuple(x), space=space, title=f"changed root case {number}")


def page_cases(seed: int, count: int) -> list[Case]:
    """A mixture of all kinds, named by ``seed``."""
    random = Random(seed)
    kinds = (random_page_case,) * 6 + (superpage_case,) * 3 + (changed_entry_case,) * 3 + (changed_root_case,)
    return [random.choice(kinds)(random, number) for number in range(count)]
