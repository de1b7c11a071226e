"""Page tables for the referees, built in a private arena of guest-physical pages.

Follows The RISC-V Instruction Set Manual, volume II (20211203), 4.4 (Sv39) and 4.5 (Sv48). Left out: Sv57, Svnapot,
Svpbmt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.referee.case import PAGE, Space

V, R, W, X, U, G, A, D = (1 << bit for bit in range(8))
KERNEL = V | R | W | X | A | D
POINTER = V
SATP_MODE = {3: 8 << 60, 4: 9 << 60}

#: Where a case's own tables are shown to supervisor mode.
TABLES = 0x0C_0000_0000
#: Where all guest memory is shown to the driver. Neither canonical address is a sign-extended 32-bit number.
HIGH = 0xFFFF_FFE5_4000_0000


@dataclass(slots=True)
class Arena:
    """Guest-physical memory that is handed out page by page from ``base``."""

    base: int
    content: bytearray = field(default_factory=bytearray)

    @property
    def end(self) -> int:
        return self.base + len(self.content)

    def take(self, content: bytes = b"", pages: int = 0) -> int:
        """Address of fresh pages: enough for ``content``, and at least ``pages``."""
        size = max(-(-len(content) // PAGE), pages) * PAGE
        address = self.end
        self.content += content + bytes(size - len(content))
        return address

    def read(self, address: int) -> int:
        """The doubleword at ``address``."""
        return int.from_bytes(self.content[address - self.base : address - self.base + 8], "little")

    def write(self, address: int, value: int) -> None:
        """Set the doubleword at ``address``."""
        self.content[address - self.base : address - self.base + 8] = value.to_bytes(8, "little")


def leaf(physical: int, flags: int) -> int:
    """A page table entry: PPN from bit 10, flags below."""
    return physical >> 12 << 10 | flags


@dataclass(slots=True)
class PageTables:
    """A tree of tables in an arena. ``levels`` is 3 for Sv39, 4 for Sv48."""

    arena: Arena
    levels: int
    tables: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tables.append(self.arena.take(pages=1))

    @property
    def satp(self) -> int:
        return SATP_MODE[self.levels] | self.tables[0] >> 12

    def slot(self, address: int, level: int) -> int:
        """Where the entry for ``address`` at ``level`` lies; tables on the way are made where they are missing."""
        table = self.tables[0]
        for depth in range(self.levels - 1, level, -1):
            at = table + 8 * (address >> 12 + 9 * depth & 511)
            entry = self.arena.read(at)
            if not entry & V:
                self.tables.append(self.arena.take(pages=1))
                entry = leaf(self.tables[-1], POINTER)
                self.arena.write(at, entry)
            table = entry >> 10 << 12 & (1 << 56) - 1
        return table + 8 * (address >> 12 + 9 * level & 511)

    def map(self, address: int, physical: int, flags: int, level: int = 0) -> None:
        """Enter a leaf."""
        self.arena.write(self.slot(address, level), leaf(physical, flags))


def share_high(tables: PageTables, window: int) -> None:
    """Hang the table ``window``, which shows all memory from `HIGH` on, into ``tables``."""
    tables.arena.write(tables.slot(HIGH, 2), leaf(window, POINTER))


def build_space(space: Space, arena: Arena, window: int) -> tuple[int, list[int]]:
    """Lay out a case's own address space; returns its satp and the addresses of its frames and tables."""
    frames = [arena.take(frame.content, pages=1) for frame in space.frames]
    tables = PageTables(arena, space.levels)
    share_high(tables, window)
    raw = []
    for entry in space.entries:
        if entry.raw:
            raw.append((tables.slot(entry.address, entry.level), entry.flags))
        elif entry.target is not None:
            tables.map(entry.address, frames[entry.target], entry.flags, entry.level)
    tables.slot(TABLES, 0)
    for index, table in enumerate(tables.tables):
        tables.map(TABLES + index * PAGE, table, V | R | W | A | D)
    # The raw entries come last: they may cut or bend the tree.
    for at, flags in raw:
        arena.write(at, flags)
    return tables.satp, frames + tables.tables
