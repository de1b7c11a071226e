"""What a referee is asked (`Case`) and what it answers (`Outcome`).

The layout of both records in guest memory is declared here once; the driver in `image.py` is written from it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PAGE = 4096

# Where the shared address space shows things to a case. All lie above 4 GiB, so that no 32-bit result points there by
# chance.
CODE_S = 0x11_4000_0000
CODE_U = 0x11_8000_0000
DATA_S = 0x11_C000_0000
DATA_U = 0x12_0000_0000
EXEC_S = 0x12_4000_0000
EXEC_U = 0x12_8000_0000

# sstatus (Privileged Architecture 20211203, 4.1.1)
SIE, SPIE, SPP, SUM, MXR, SD = 1 << 1, 1 << 5, 1 << 8, 1 << 18, 1 << 19, 1 << 63
FS_SHIFT = 13
FS_OFF, FS_INITIAL, FS_CLEAN, FS_DIRTY = (state << FS_SHIFT for state in range(4))
FS_MASK = 3 << FS_SHIFT
UXL_64 = 2 << 32

CSR = {
    "fflags": 0x001,
    "frm": 0x002,
    "fcsr": 0x003,
    "sstatus": 0x100,
    "sie": 0x104,
    "stvec": 0x105,
    "scounteren": 0x106,
    "senvcfg": 0x10A,
    "sscratch": 0x140,
    "sepc": 0x141,
    "scause": 0x142,
    "stval": 0x143,
    "sip": 0x144,
    "stimecmp": 0x14D,
    "satp": 0x180,
    "cycle": 0xC00,
    "time": 0xC01,
    "instret": 0xC02,
}

#: What the driver writes down beside x1..x31 and f0..f31, in this order.
SAVED_CSRS = ("sstatus", "scause", "stval", "sepc", "satp", "sie", "sip", "scounteren", "senvcfg", "fcsr")
RESULT_FIELDS = (
    tuple(f"x{index}" for index in range(1, 32)) + tuple(f"f{index}" for index in range(32)) + SAVED_CSRS + ("done",)
)
RESULT_HEADER = 1024
RESULT_STRIDE = RESULT_HEADER + PAGE
DONE = 0x600D

#: One case in memory: doublewords in this order.
CASE_FIELDS = (
    tuple(f"x{index}" for index in range(1, 32))
    + tuple(f"f{index}" for index in range(32))
    + ("fcsr", "sstatus", "pc", "satp", "source", "spare")
)
CASE_STRIDE = 8 * len(CASE_FIELDS)


class RefereeError(Exception):
    """A referee that could not do its work."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A page of guest memory of a case's own; ``content`` is padded with zeros to 4096 bytes."""

    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Entry:
    """A page table entry at ``level`` (0 is the last) on the way to ``address``.

    ``target`` is an index into `Space.frames`, or, with ``raw`` set, the whole entry is ``flags`` as they are.
    """

    address: int
    flags: int
    target: int | None = None
    level: int = 0
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Space:
    """An address space of a case's own: its pages and tables are read back after the run.

    The tables themselves are shown to supervisor mode at `TABLES`, in the order of their creation, the root first.
    """

    levels: int
    frames: tuple[Frame, ...]
    entries: tuple[Entry, ...]
    pc: int


@dataclass(frozen=True, slots=True)
class Case:
    """A state, a block of instructions and where it runs. x[0] is ignored.

    ``units`` are pieces of the block that can be replaced by no-operations of the same length, one without the other.
    """

    units: tuple[bytes, ...]
    x: tuple[int, ...] = (0,) * 32
    f: tuple[int, ...] = (0,) * 32
    fcsr: int = 0
    sstatus: int = FS_DIRTY
    user: bool = False
    data: bytes = field(default=b"", repr=False)
    space: Space | None = None
    title: str = ""

    @property
    def code(self) -> bytes:
        """The whole block."""
        return b"".join(self.units)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state at the first trap of a case (the ebreak at its end is one), its data page, its own pages and tables."""

    record: bytes = field(repr=False)
    pages: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def fields(self) -> dict[str, int]:
        """Registers and CSRs by name, as the driver wrote them down."""
        words = struct.unpack_from(f"<{len(RESULT_FIELDS)}Q", self.record)
        return dict(zip(RESULT_FIELDS, words, strict=True))

    @property
    def data(self) -> bytes:
        """The data page."""
        return self.record[RESULT_HEADER:RESULT_STRIDE]
