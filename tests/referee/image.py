"""Lays cases and the driver that runs them into one flat supervisor-mode image.

::

    0x8000_0000  machine-mode prelude (QEMU only; our engine is entered in S-mode)
    0x8010_0000  the commons: a page that superpages of paging cases show, since their frames must be aligned
    0x8020_0000  driver, entered with satp = 0
    ...          save page, page tables, blocks of code, source data, case records, result records, frames of cases

The driver turns paging on and moves to `HIGH`, far from every number that a case is likely to compute. For each case it
copies the data page in, loads all registers and executes SRET into the block; the first trap (at the latest the ebreak
after the block) brings it back and the state goes into the result record. After the last case it calls SBI SRST.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.referee import assembly as asm
from tests.referee.assembly import A0, A6, A7, S0, S1, S2, S3, S4, T0, T1, T2, T6, ZERO, Assembler
from tests.referee.case import (
    CASE_FIELDS,
    CASE_STRIDE,
    CODE_S,
    CODE_U,
    CSR,
    DATA_S,
    DATA_U,
    DONE,
    EXEC_S,
    EXEC_U,
    FS_DIRTY,
    FS_MASK,
    PAGE,
    RESULT_FIELDS,
    RESULT_HEADER,
    RESULT_STRIDE,
    SAVED_CSRS,
    SPP,
    Case,
    Outcome,
)
from tests.referee.paging import (
    HIGH,
    KERNEL,
    A,
    Arena,
    D,
    PageTables,
    R,
    U,
    V,
    W,
    X,
    build_space,
    leaf,
    share_high,
)

MEMORY_BASE = 0x8000_0000
MEMORY_SIZE = 64 << 20
#: QEMU leaves its device tree in the last part of memory.
_USABLE = MEMORY_SIZE - (8 << 20)
COMMONS = 0x8010_0000
ENTRY = 0x8020_0000
SRST = 0x5352_5354
#: What an environment call from S-mode other than SRST returns in a0 (SBI_ERR_NOT_SUPPORTED) and a1.
SBI_ANSWER = (-2, 0)
#: What the commons hold: an ebreak for who jumps there, then numbers.
COMMONS_CONTENT = asm.C_EBREAK.to_bytes(2, "little") * 512 + bytes(range(256)) * 12
#: Breakpoints before the first block and after each: whoever jumps astray ends on one of them.
_SLED = asm.C_EBREAK.to_bytes(2, "little") * 32

_X_SLOT = 0
_CASE, _END, _RESULT, _DATA, _RESERVE = (256 + 8 * index for index in range(5))
_DRIVER_SIZE = PAGE


@dataclass(frozen=True, slots=True)
class Image:
    """An image and where its results will lie. ``content`` belongs at `ENTRY`, the commons at `COMMONS`.

    ``starts`` are the virtual addresses of the cases' blocks, ``pages`` the physical ones of each case's own pages.
    """

    content: bytes
    results: int
    starts: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]

    def outcomes(self, read: Callable[[int, int], bytes]) -> list[Outcome]:
        """Collect what the driver wrote, through ``read(physical address, length)``."""
        return [
            Outcome(
                read(self.results + index * RESULT_STRIDE, RESULT_STRIDE),
                tuple(read(page, PAGE) for page in pages),
            )
            for index, pages in enumerate(self.pages)
        ]


def _high(physical: int) -> int:
    return physical - MEMORY_BASE + HIGH


def _driver(boot_satp: int, save: int) -> bytes:
    """The driver's code. T0..T2 and S0.. belong to it between cases; during a case only sscratch is its own."""
    code = Assembler(ENTRY)
    code.load(T0, boot_satp)
    code.load(T1, HIGH - MEMORY_BASE)
    code.load_address(T2, "moved")
    code.emit(asm.add(T2, T2, T1))
    code.emit(asm.csrrw(ZERO, CSR["satp"], T0), asm.SFENCE_VMA_ALL, asm.jalr(ZERO, T2))

    code.label("moved")
    code.load(S0, _high(save))
    code.emit(asm.csrrw(ZERO, CSR["sscratch"], S0))
    code.load_address(T0, "trap")
    code.emit(asm.csrrw(ZERO, CSR["stvec"], T0))

    code.label("next")
    code.emit(asm.csrrs(S0, CSR["sscratch"], ZERO), asm.ld(S1, S0, _CASE), asm.ld(T0, S0, _END))
    code.beq(S1, T0, "finish")
    for name in ("sie", "sip", "senvcfg", "scause", "stval", "sstatus"):
        code.emit(asm.csrrwi(ZERO, CSR[name], 0))
    code.emit(asm.csrrwi(ZERO, CSR["scounteren"], 7))
    code.emit(asm.addi(T0, ZERO, -1), asm.csrrw(ZERO, CSR["stimecmp"], T0))
    # Takes a reservation and uses it up: none is left from the case before.
    code.emit(asm.addi(T0, S0, _RESERVE), asm.amo(2, 8, T1, T0, ZERO), asm.amo(3, 8, T1, T0, T1))

    def at(name: str) -> int:
        return 8 * CASE_FIELDS.index(name)

    code.emit(asm.ld(T0, S1, at("source")))
    code.beq(T0, ZERO, "copied")
    _copy_page(code, source=T0, target_slot=_DATA)
    code.label("copied")
    code.emit(asm.ld(T0, S1, at("satp")), asm.csrrw(ZERO, CSR["satp"], T0), asm.SFENCE_VMA_ALL, asm.FENCE_I)
    code.emit(asm.u_type(0x37, T0, FS_DIRTY >> 12), asm.csrrs(ZERO, CSR["sstatus"], T0))
    code.emit(asm.ld(T0, S1, at("fcsr")), asm.csrrw(ZERO, CSR["fcsr"], T0))
    code.emit(*(asm.fld(index, S1, at(f"f{index}")) for index in range(32)))
    code.emit(asm.ld(T0, S1, at("sstatus")), asm.csrrw(ZERO, CSR["sstatus"], T0))
    code.emit(asm.ld(T0, S1, at("pc")), asm.csrrw(ZERO, CSR["sepc"], T0))
    code.emit(asm.addi(T6, S1, 0))
    code.emit(*(asm.ld(index, T6, at(f"x{index}")) for index in range(1, 32)))
    code.emit(asm.SRET)

    code.align(4)
    code.label("trap")
    code.emit(asm.csrrw(T6, CSR["sscratch"], T6))
    code.emit(*(asm.sd(index, T6, _X_SLOT + 8 * index) for index in range(1, 31)))
    code.emit(asm.addi(S0, T6, 0), asm.csrrw(T0, CSR["sscratch"], S0), asm.sd(T0, S0, _X_SLOT + 8 * 31))
    code.emit(asm.ld(S1, S0, _RESULT))

    def into(name: str) -> int:
        return 8 * RESULT_FIELDS.index(name)

    for index in range(1, 32):
        code.emit(asm.ld(T0, S0, _X_SLOT + 8 * index), asm.sd(T0, S1, into(f"x{index}")))
    for name in SAVED_CSRS[:-1]:
        code.emit(asm.csrrs(T0, CSR[name], ZERO), asm.sd(T0, S1, into(name)))
    code.emit(asm.u_type(0x37, T0, FS_MASK >> 12), asm.csrrs(ZERO, CSR["sstatus"], T0))
    code.emit(asm.csrrs(T0, CSR["fcsr"], ZERO), asm.sd(T0, S1, into("fcsr")))
    code.emit(*(asm.fsd(index, S1, into(f"f{index}")) for index in range(32)))
    code.emit(asm.ld(S2, S0, _CASE), asm.ld(T0, S2, at("source")))
    code.beq(T0, ZERO, "saved")
    code.emit(asm.ld(T0, S0, _DATA), asm.addi(T1, S1, RESULT_HEADER))
    _copy_loop(code, "out")
    code.label("saved")
    code.load(T0, DONE)
    code.emit(asm.sd(T0, S1, into("done")))
    code.load(T0, RESULT_STRIDE)
    code.emit(asm.add(S1, S1, T0), asm.sd(S1, S0, _RESULT))
    code.emit(asm.addi(S2, S2, CASE_STRIDE), asm.sd(S2, S0, _CASE))
    code.jump("next")

    code.label("finish")
    code.load(A7, SRST)
    code.emit(asm.addi(A6, ZERO, 0), asm.addi(A0, ZERO, 0), asm.ECALL)
    code.jump("finish")
    return code.assemble()


def _copy_page(code: Assembler, source: int, target_slot: int) -> None:
    assert source == T0
    code.emit(asm.ld(T1, S0, target_slot))
    _copy_loop(code, "in")


def _copy_loop(code: Assembler, name: str) -> None:
    """Copy a page from T0 to T1, four doublewords a turn."""
    code.emit(asm.u_type(0x37, T2, 1), asm.add(T2, T2, T0))
    code.label(f"copy {name}")
    code.emit(*(asm.ld(register, T0, 8 * index) for index, register in enumerate((S2, S3, S4, T6))))
    code.emit(*(asm.sd(register, T1, 8 * index) for index, register in enumerate((S2, S3, S4, T6))))
    code.emit(asm.addi(T0, T0, 32), asm.addi(T1, T1, 32))
    code.bne(T0, T2, f"copy {name}")
    code.emit(asm.ld(S2, S0, _CASE))


def _shared_tables(arena: Arena, window: int, code: int, code_size: int, data: int) -> PageTables:
    """The address space of all cases that have none of their own."""
    tables = PageTables(arena, 3)
    share_high(tables, window)
    for offset in range(0, code_size, PAGE):
        tables.map(CODE_S + offset, code + offset, V | X | A)
        tables.map(CODE_U + offset, code + offset, V | X | U | A)
    tables.map(DATA_S, data, V | R | W | A | D)
    tables.map(DATA_U, data, V | R | W | U | A | D)
    tables.map(EXEC_S, data, V | R | W | X | A | D)
    tables.map(EXEC_U, data, V | R | W | X | U | A | D)
    return tables


def build_image(cases: Sequence[Case]) -> Image:
    """One image that runs all ``cases`` in order."""
    arena = Arena(ENTRY)
    driver = arena.take(pages=_DRIVER_SIZE // PAGE)
    save = arena.take(pages=1)
    window = arena.take(pages=1)
    for offset in range(0, MEMORY_SIZE, 2 << 20):
        arena.write(window + 8 * (offset >> 21), leaf(MEMORY_BASE + offset, KERNEL))
    boot = PageTables(arena, 3)
    boot.map(MEMORY_BASE, MEMORY_BASE, KERNEL, level=2)
    share_high(boot, window)

    data = arena.take(pages=1)
    blocks = bytearray(_SLED)
    starts = []
    for case in cases:
        starts.append(case.space.pc if case.space else (CODE_U if case.user else CODE_S) + len(blocks))
        if case.space is None:
            blocks += case.code + _SLED
    code = arena.take(bytes(blocks))
    shared = _shared_tables(arena, window, code, len(blocks), data)

    sources: dict[bytes, int] = {}
    records = bytearray()
    pages: list[tuple[int, ...]] = []
    for case, pc in zip(cases, starts, strict=True):
        status = case.sstatus | (0 if case.user else SPP)
        if case.space is None:
            if case.data not in sources:
                sources[case.data] = _high(arena.take(case.data, pages=1))
            source = sources[case.data]
            satp, own = shared.satp, list[int]()
        else:
            satp, own = build_space(case.space, arena, window)
            source = 0
        pages.append(tuple(own))
        records += struct.pack(f"<{len(CASE_FIELDS)}Q", *case.x[1:], *case.f, case.fcsr, status, pc, satp, source, 0)
    table = arena.take(bytes(records))
    results = arena.take(pages=-(-len(cases) * RESULT_STRIDE // PAGE))
    if arena.end > MEMORY_BASE + _USABLE:
        raise asm.AssemblyError(
            f"{len(cases)} cases end at {arena.end:#x}; they must end below {MEMORY_BASE + _USABLE:#x}"
        )

    text = _driver(boot.satp, save)
    if len(text) > _DRIVER_SIZE:
        raise asm.AssemblyError(f"the driver has {len(text)} bytes; at most {_DRIVER_SIZE} fit")
    arena.content[driver - ENTRY : driver - ENTRY + len(text)] = text
    for slot, value in (
        (_CASE, _high(table)),
        (_END, _high(table + CASE_STRIDE * len(cases))),
        (_RESULT, _high(results)),
        (_DATA, _high(data)),
    ):
        arena.write(save + slot, value)
    return Image(bytes(arena.content), results, tuple(starts), tuple(pages))
