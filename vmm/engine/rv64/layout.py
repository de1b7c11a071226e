"""Where everything of a hart lies: one flat buffer a hart, one for what the harts of a machine share.

Compiled code and Python both reach the fields by address, so the layout is declared once, here: name, number of 64-bit
words, meaning. ``Hart.X`` is the byte offset of the x registers in a hart's buffer.

The decoded-instruction shadow
------------------------------
Each page of RAM has a *shadow* page that holds one 8-byte record for every 2-byte slot::

     63            32 31     24 23     16 15      8 7       0
    ┌────────────────┬─────────┬─────────┬─────────┬─────────┐
    │   immediate    │   rs2   │   rs1   │   rd    │operation│
    └────────────────┴─────────┴─────────┴─────────┴─────────┘

A record of zeros is not decoded yet. One may stand for several instructions, from its own on: its fields are then
others (see ``fused``), and those instructions have records of their own for whoever jumps to them. One more slot behind
the last stays zero for ever: running off the page ends up there. The whole shadow is reserved address space that the
host fills in only where code was executed. An rd of 32 is the sink that stands for x0, so that no instruction has to
ask whether its destination is x0.
"""

from __future__ import annotations

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

RECORD_SHIFT = 2  #: a record's offset in its shadow page is the instruction's offset in its page, times 4
SHADOW_SPAN = PAGE_SIZE << RECORD_SHIFT  #: bytes of a shadow page that stand for the page
SHADOW_STRIDE = SHADOW_SPAN + 16  #: bytes from one shadow page to the next
SINK = 32  #: index of the register that takes what is written to x0

#: Operations that stand for no instruction: not decoded yet, none there is, end of the straight line.
UNDECODED, ILLEGAL, FIRST_OPERATION, STOP_OPERATION = 0, 1, 2, 255

TLB_ENTRIES = 256
DATA_ENTRY = 32  #: bytes: load tag, store tag, addend, 1 if the mapping is global
FETCH_ENTRY = 32  #: bytes: tag, address of the shadow page, 1 if the mapping is global, unused
LARGE_WORDS = 64
NO_TAG = -1
NO_RESERVATION = 1  #: no LR reserves an odd address

#: Data TLBs, by what a data access may reach.
MODE_U, MODE_S, MODE_S_SUM = 0, 1, 2

ACCESS_LOAD, ACCESS_STORE, ACCESS_FETCH = 0, 1, 2

#: What Hart.PENDING says of an access that left guest code.
PENDING_NONE, PENDING_DONE, PENDING_FAULT = 0, 1, 2

#: Bits of Hart.REQUESTS, set from other threads.
REQUEST_RETURN, REQUEST_FLUSH = 1, 2

SSIP, STIP, SEIP = 1 << 1, 1 << 5, 1 << 9

SSTATUS_SIE, SSTATUS_SPIE, SSTATUS_SPP = 1 << 1, 1 << 5, 1 << 8
SSTATUS_SUM, SSTATUS_MXR = 1 << 18, 1 << 19
SSTATUS_FS_SHIFT = 13
SSTATUS_UXL_64 = 2 << 32

CLOCK_REAL, CLOCK_DETERMINISTIC = 0, 1
POLL_INSTRUCTIONS = 1 << 15  #: at the most so many instructions between two looks at the real clock
WATCH_INSTRUCTIONS = 1 << 24  #: and so many between two looks around with the deterministic one
REACH = 140  #: bytes before an instruction in which a record may begin that stands for it, too
RECENT_PAGES = 4096  #: how many new code pages are remembered for harts that have not heard of them


class _Fields:
    """Hands out offsets in declaration order."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, words: int = 1) -> int:
        offset = self.size
        self.size += 8 * words
        return offset


_field = _Fields()


class Hart:
    """Byte offsets in a hart's buffer."""

    X = _field(33)  #: x0..x31 and the sink
    F = _field(32)  #: f0..f31
    PC = _field()
    RETIRED = _field()  #: instructions retired
    LIMIT = _field()  #: guest code comes to look around when RETIRED reaches this; others set it to 0
    BUDGET_END = _field()  #: RETIRED at which run() returns
    REQUESTS = _field()  #: REQUEST_* bits
    INSIDE = _field()  #: 1 while the hart executes guest code
    ID = _field()
    MACHINE = _field()  #: address of the machine's buffer
    # Architectural state
    PRIVILEGE = _field()  #: 0 U, 1 S
    STATUS = _field()  #: sstatus without FS, SD and UXL
    FS = _field()  #: sstatus.FS: 0 off, 1 initial, 2 clean, 3 dirty
    FFLAGS = _field()
    FRM = _field()
    SIP = _field()
    SIE = _field()
    STVEC = _field()
    SCOUNTEREN = _field()
    SENVCFG = _field()
    SSCRATCH = _field()
    SEPC = _field()
    SCAUSE = _field()
    STVAL = _field()
    STIMECMP = _field()
    SATP = _field()
    RESERVATION = _field()  #: virtual address that LR reserved, or NO_RESERVATION
    RESERVED_VALUE = _field()
    # A fault or exit on its way out of an instruction
    FAULT = _field()  #: 1: CAUSE and TVAL hold an exception
    CAUSE = _field()
    TVAL = _field()
    SERIALISE = _field()  #: the CSR just written changes fetching or interrupts
    EXIT = _field()  #: ExitReason, 0 while running
    EXIT_KIND = _field()  #: the last EXIT, kept until the next
    EXIT_ADDRESS = _field()
    EXIT_WIDTH = _field()
    EXIT_VALUE = _field()
    PENDING = _field()  #: PENDING_*
    STEPPING = _field()  #: 1: one instruction at a time, through the scratch page
    SCRATCH_USED = _field()  #: address of the record in use in the scratch page, or 0
    WATCHED = _field()  #: 1: leave guest code when it is an endless loop
    LAST_TRAP = _field()  #: pc of the last fetch that trapped to itself, to tell a dead trap vector
    # Where the executor is
    PAGE = _field()  #: shadow page in execution
    PAGE_PC = _field()  #: virtual address of its first instruction
    STRADDLES = _field()  #: 1: the scratch page holds the instruction at NEXT_PC, which straddles two pages
    NEXT_PC = _field()  #: where to go on after leaving a page
    RECORD = _field()  #: record that left the straight line
    AHEAD = _field()  #: instructions that a fused loop retired besides its first
    STOP = _field()  #: a record that ends the straight line: operation STOP_OPERATION
    # Translation
    TLB = _field()  #: address of the data TLB in force
    FETCH_TLB = _field()
    LEAF_LEVEL = _field()  #: level of the last leaf found: 0 is 4 KiB
    LEAF_GLOBAL = _field()  #: 1: the last leaf found maps its address in every address space
    LOCAL_USED = _field()  #: a bit for each TLB that has got an entry which is not global
    HUGE = _field()  #: 1: some TLB entry came out of a page of 1 GiB or more
    LARGE = _field(LARGE_WORDS)  #: a bit for what 2 MiB pages TLB entries came out of, by large_bit()
    CODE_SEEN = _field()  #: Machine.CODE_EPOCH that this hart has acted on
    FLUSHES_ASKED = _field()
    FLUSHES_DONE = _field()
    TRAPS = _field()  #: traps taken
    DATA_TLBS = _field(3 * TLB_ENTRIES * DATA_ENTRY // 8)
    FETCH_TLBS = _field(2 * TLB_ENTRIES * FETCH_ENTRY // 8)
    SCRATCH = _field(SHADOW_STRIDE // 8)  #: a shadow page for single instructions
    SIZE = _field.size


_field = _Fields()


class Machine:
    """Byte offsets in the buffer that the harts of a machine share."""

    RAM_BASE = _field()
    RAM_SIZE = _field()
    RAM_HOST = _field()  #: host address of the first byte of RAM
    SHADOW = _field()  #: host address of the first shadow page
    CODE = _field()  #: host address of one byte per page: 1 if it has records
    HARTS = _field()
    HART_STATES = _field()  #: host address of hart 0's buffer; the others follow, Hart.SIZE apart
    CLOCK = _field()
    ORIGIN = _field()  #: real clock: host nanoseconds at guest time 0; deterministic: minus the nanoseconds skipped
    TICK = _field()  #: nanoseconds a tick of the timebase
    CODE_EPOCH = _field()  #: how many times a page became code
    RECENT = _field(RECENT_PAGES)  #: page numbers, by epoch
    SIZE = _field.size
