"""Several harts in parallel threads: what RVWMO forbids never shows, atomics lose nothing, fences reach.

Only forbidden outcomes are asserted. Whether an allowed one, such as store buffering without fences, shows up is the
host's affair.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.referee import assembly as asm
from tests.referee.assembly import A0, A1, A7, RA, S0, S1, S2, S3, S4, S5, S6, T2, T3, T4, T5, ZERO, Assembler
from tests.referee.case import CSR
from tests.referee.effort import SCALE
from tests.referee.litmus import MEMORY_BASE, RESULTS, Program, location, meet, repeat, run_program
from tests.referee.paging import A, Arena, D, PageTables, R, V, W, X, leaf
from vmm.engine.rv64.hart import Rv64Engine

READS, WRITES = 2, 1
BOTH = READS | WRITES
SSIP = 1
PATIENCE = 2000
#: Iterations of programs that run freely, and of those that meet at a barrier.
MANY = 1_000_000 * SCALE
ROUNDS = min(4000 * SCALE, 40_000)
#: Calls that the tests' own firmware answers.
CALL_IPI, CALL_FENCE_I, CALL_SFENCE = 1, 2, 3


def fence(before: int, after: int) -> int:
    return before << 24 | after << 20 | 0x0F


def add_immediate(code: Assembler, register: int, amount: int) -> None:
    code.emit(asm.addi(register, register, amount))


def firmware(engine: Rv64Engine, hart: int, args: tuple[int, ...]) -> tuple[int, int]:
    other = 1 - hart
    if args[7] == CALL_IPI:
        engine.harts[other].set_interrupt(SSIP, True)
    elif args[7] == CALL_FENCE_I:
        engine.remote_fence_i([other], hart)
    else:
        engine.remote_sfence_vma([other], args[0], args[1], hart)
    return 0, 0


# Message passing, free-running: the writer counts up in x, then in y; a reader that sees y = n must see x >= n.


def message_passing(write_flag: Callable[[Assembler], None], read_flag: Callable[[Assembler], None]) -> Program:
    """S0 = x, S1 = y; the value travels in T2, the flag is read into T3."""
    program = Program()
    with program.hart() as code:
        code.load(S0, location(0))
        code.load(S1, location(1))
        code.emit(asm.addi(T2, ZERO, 0))

        def write() -> None:
            code.emit(asm.addi(T2, T2, 1), asm.sd(T2, S0, 0))
            write_flag(code)

        repeat(code, "write", S2, MANY, write)
    with program.hart() as code:
        code.load(S0, location(0))
        code.load(S1, location(1))
        code.load(S3, RESULTS)

        def read() -> None:
            read_flag(code)
            code.emit(asm.ld(T4, S0, 0))
            code.branch(7, T4, T3, "in order")
            code.emit(asm.sd(T3, S3, 0), asm.sd(T4, S3, 8))
            code.label("in order")

        repeat(code, "read", S2, MANY, read)
    return program


def test_message_passing_with_fences_is_never_seen_out_of_order() -> None:
    words = run_program(
        message_passing(
            lambda code: code.emit(fence(WRITES, WRITES), asm.sd(T2, S1, 0)),
            lambda code: code.emit(asm.ld(T3, S1, 0), fence(READS, READS)),
        )
    )

    assert words(RESULTS, 2) == [0, 0]


def test_message_passing_with_release_and_acquire_is_never_seen_out_of_order() -> None:
    words = run_program(
        message_passing(
            lambda code: code.emit(asm.amo(1, 8, ZERO, S1, T2, release=True)),
            lambda code: code.emit(asm.amo(8, 8, T3, S1, ZERO, acquire=True)),
        )
    )

    assert words(RESULTS, 2) == [0, 0]


def test_two_reads_of_one_location_are_coherent() -> None:
    program = Program()
    with program.hart() as code:
        code.load(S0, location(0))
        code.emit(asm.addi(T2, ZERO, 0))
        repeat(code, "write", S2, MANY, lambda: code.emit(asm.addi(T2, T2, 1), asm.sd(T2, S0, 0)))
    for reader in range(2):
        with program.hart() as code:
            code.load(S0, location(0))
            code.load(S3, RESULTS + 8 * reader)

            def read(code: Assembler = code, reader: int = reader) -> None:
                code.emit(asm.ld(T3, S0, 0), asm.ld(T4, S0, 0))
                code.branch(7, T4, T3, f"coherent {reader}")
                code.emit(asm.sd(T3, S3, 0))
                code.label(f"coherent {reader}")

            repeat(code, f"read {reader}", S2, MANY, read)

    words = run_program(program)

    assert words(RESULTS, 2) == [0, 0]


# Shapes in rounds: each round has locations x and y of its own, in separate cache lines; results go to a row per hart.

STEP = 256
X0, Y0 = location(0), location(0) + STEP // 2
BARRIER = location(0) - 4096

Body = Callable[[Assembler], None]


def in_rounds(*bodies: Body) -> list[list[tuple[int, int]]]:
    """Run the bodies against each other; S0 = x, S1 = y, results in T2 and T3. One row of results per hart."""
    program = Program()
    for number, body in enumerate(bodies):
        with program.hart() as code:
            code.load(S0, X0)
            code.load(S1, Y0)
            code.load(S3, RESULTS + 16 * ROUNDS * number)
            code.load(S4, BARRIER)
            code.emit(asm.addi(S5, ZERO, 0), asm.addi(S6, ZERO, 1))

            def one_round(code: Assembler = code, number: int = number, body: Body = body) -> None:
                add_immediate(code, S5, len(bodies))
                meet(code, f"barrier {number}", S4, S5, PATIENCE)
                body(code)
                code.emit(asm.sd(T2, S3, 0), asm.sd(T3, S3, 8))
                add_immediate(code, S3, 16)
                add_immediate(code, S0, STEP)
                add_immediate(code, S1, STEP)

            repeat(code, f"round {number}", S2, ROUNDS, one_round)
    words = run_program(program)
    rows = [words(RESULTS + 16 * ROUNDS * number, 2 * ROUNDS) for number in range(len(bodies))]
    return [list(zip(row[::2], row[1::2], strict=True)) for row in rows]


def test_store_buffering_with_fences_never_lets_both_loads_miss_both_stores() -> None:
    left, right = in_rounds(
        lambda code: code.emit(asm.sd(S6, S0, 0), fence(BOTH, BOTH), asm.ld(T2, S1, 0)),
        lambda code: code.emit(asm.sd(S6, S1, 0), fence(BOTH, BOTH), asm.ld(T2, S0, 0)),
    )

    assert not [index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a[0] == 0 and b[0] == 0]


def test_store_buffering_with_sequentially_consistent_atomics_never_lets_both_miss() -> None:
    swap, read = 1, 8

    def body(mine: int, theirs: int) -> Body:
        return lambda code: code.emit(
            asm.amo(swap, 8, ZERO, mine, S6, acquire=True, release=True),
            asm.amo(read, 8, T2, theirs, ZERO, acquire=True, release=True),
        )

    left, right = in_rounds(body(S0, S1), body(S1, S0))

    assert not [index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a[0] == 0 and b[0] == 0]


def test_load_buffering_with_fences_never_reads_the_future() -> None:
    left, right = in_rounds(
        lambda code: code.emit(asm.ld(T2, S0, 0), fence(READS, WRITES), asm.sd(S6, S1, 0)),
        lambda code: code.emit(asm.ld(T2, S1, 0), fence(READS, WRITES), asm.sd(S6, S0, 0)),
    )

    assert not [index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a[0] == 1 and b[0] == 1]


def test_two_readers_with_fences_agree_on_the_order_of_independent_writes() -> None:
    _, _, first, second = in_rounds(
        lambda code: code.emit(asm.sd(S6, S0, 0)),
        lambda code: code.emit(asm.sd(S6, S1, 0)),
        lambda code: code.emit(asm.ld(T2, S0, 0), fence(READS, READS), asm.ld(T3, S1, 0)),
        lambda code: code.emit(asm.ld(T2, S1, 0), fence(READS, READS), asm.ld(T3, S0, 0)),
    )

    assert not [index for index, (a, b) in enumerate(zip(first, second, strict=True)) if a == (1, 0) and b == (1, 0)]


# Atomicity


def test_amoadd_by_four_harts_loses_no_count() -> None:
    count = MANY // 10
    program = Program()
    for number in range(4):
        with program.hart() as code:
            code.load(S0, location(0))
            code.emit(asm.addi(S6, ZERO, 1))

            def add(code: Assembler = code, number: int = number) -> None:
                # A doubleword that all share, and words of it whose neighbour belongs to others.
                code.emit(asm.amo(0, 8, ZERO, S0, S6), asm.addi(T2, S0, 64 + 4 * (number & 1)))
                code.emit(asm.amo(0, 4, ZERO, T2, S6))

            repeat(code, f"add {number}", S2, count, add)

    words = run_program(program)

    assert words(location(0), 1) == [4 * count]
    assert words(location(0) + 64, 1) == [2 * count << 32 | 2 * count]


@pytest.mark.parametrize("width", [4, 8])
def test_load_reserved_and_store_conditional_by_four_harts_lose_no_count(width: int) -> None:
    count = MANY // 10
    program = Program()
    for number in range(4):
        with program.hart() as code:
            code.load(S0, location(0))

            def add(code: Assembler = code, number: int = number) -> None:
                code.label(f"again {number}")
                code.emit(asm.amo(2, width, T2, S0, ZERO), asm.addi(T2, T2, 1), asm.amo(3, width, T3, S0, T2))
                code.bne(T3, ZERO, f"again {number}")

            repeat(code, f"add {number}", S2, count, add)

    words = run_program(program)

    assert words(location(0), 1) == [4 * count]


def test_store_conditional_never_overwrites_a_store_that_came_after_its_load() -> None:
    program = Program()
    with program.hart() as code:
        code.load(S0, location(0))
        code.load(S3, RESULTS)
        code.emit(asm.addi(T2, ZERO, 0))

        def store() -> None:
            # Ever greater even numbers; the other hart may only add 1 to the latest.
            code.emit(asm.addi(T2, T2, 2), asm.sd(T2, S0, 0), asm.ld(T3, S0, 0), asm.i_type(0x13, 7, T3, T3, -2))
            code.beq(T2, T3, "kept")
            code.emit(asm.sd(T2, S3, 0))
            code.label("kept")

        repeat(code, "store", S2, MANY, store)
    with program.hart() as code:
        code.load(S0, location(0))

        def increment() -> None:
            code.emit(asm.amo(2, 8, T2, S0, ZERO), asm.i_type(0x13, 6, T2, T2, 1), asm.amo(3, 8, T3, S0, T2))

        repeat(code, "increment", S2, MANY, increment)

    words = run_program(program)

    assert words(RESULTS, 1) == [0]


def test_a_spinlock_of_four_harts_admits_one_at_a_time() -> None:
    count = MANY // 100
    program = Program()
    for number in range(4):
        with program.hart() as code:
            code.load(S0, location(0))
            code.load(S1, location(1))
            code.emit(asm.addi(S6, ZERO, 1))

            def enter(code: Assembler = code, number: int = number) -> None:
                code.label(f"try {number}")
                code.emit(asm.amo(1, 4, T2, S0, S6, acquire=True))
                code.bne(T2, ZERO, f"try {number}")
                # Two plain counters, which must stay equal.
                code.emit(asm.ld(T3, S1, 0), asm.ld(T4, S1, 512), asm.addi(T3, T3, 1), asm.addi(T4, T4, 1))
                code.emit(asm.sd(T3, S1, 0), asm.sd(T4, S1, 512))
                code.emit(asm.amo(1, 4, ZERO, S0, ZERO, release=True))

            repeat(code, f"enter {number}", S2, count, enter)

    words = run_program(program)

    assert words(location(1), 1) == words(location(1) + 512, 1) == [4 * count]


def test_each_hart_owns_its_bits_of_a_doubleword() -> None:
    program = Program()
    for number in range(4):
        with program.hart() as code:
            code.load(S0, location(0))
            code.load(S3, RESULTS + 8 * number)
            code.load(S4, 0x1001 << 13 * number)
            code.emit(asm.addi(S5, ZERO, 0))

            def toggle(code: Assembler = code, number: int = number) -> None:
                # AMOXOR toggles; what it returns must show the state that this hart left.
                code.emit(asm.amo(4, 8, T2, S0, S4), asm.r_type(0x33, 7, 0, T2, T2, S4))
                code.beq(T2, S5, f"own {number}")
                code.emit(asm.sd(T2, S3, 0))
                code.label(f"own {number}")
                code.emit(asm.r_type(0x33, 4, 0, S5, S5, S4))

            repeat(code, f"toggle {number}", S2, MANY // 10, toggle)

    words = run_program(program)

    assert words(RESULTS, 4) == [0] * 4
    assert words(location(0), 1) == [0]


def test_byte_stores_of_four_harts_side_by_side_disturb_no_neighbour() -> None:
    program = Program()
    for number in range(4):
        with program.hart() as code:
            code.load(S0, location(0))
            code.load(S3, RESULTS + 8 * number)
            code.emit(asm.addi(T2, ZERO, 0))

            def store(code: Assembler = code, number: int = number) -> None:
                code.emit(asm.addi(T2, T2, 1), asm.i_type(0x13, 7, T2, T2, 0xFF))
                code.emit(asm.s_type(0x23, 0, S0, T2, number), asm.i_type(0x03, 4, T3, S0, number))
                code.beq(T2, T3, f"kept {number}")
                code.emit(asm.sd(T3, S3, 0))
                code.label(f"kept {number}")

            repeat(code, f"store {number}", S2, MANY, store)

    words = run_program(program)

    assert words(RESULTS, 4) == [0] * 4


# Code and translations changed by another hart


def _returning(number: int) -> int:
    """`addi a1, zero, number` and `jalr zero, 0(ra)`."""
    return asm.addi(A1, ZERO, number) | asm.jalr(ZERO, RA) << 32


def rewriting(*, remote: bool) -> Program:
    """Hart 0 rewrites a function that hart 1 calls; they take turns through two flags, at S0 and S1."""
    program = Program()
    with program.hart() as code:
        code.load(S0, location(0))
        code.load(S1, location(1))
        code.load(S4, location(2))
        code.load(S5, _returning(1))
        code.load(S6, 1 << 20)
        code.emit(asm.addi(T5, ZERO, 0))

        def write() -> None:
            code.emit(asm.sd(S5, S4, 0), asm.addi(T5, T5, 1))
            # The immediate of the first instruction counts on, within 10 bits.
            code.emit(asm.add(S5, S5, S6), fence(BOTH, BOTH))
            if remote:
                code.emit(asm.addi(A7, ZERO, CALL_FENCE_I), asm.ECALL)
            code.emit(asm.sd(T5, S0, 0))
            code.label("answered")
            code.emit(asm.ld(T2, S1, 0))
            code.bne(T2, T5, "answered")

        repeat(code, "write", S2, 1000, write)
    with program.hart() as code:
        code.load(S0, location(0))
        code.load(S1, location(1))
        code.load(S3, RESULTS)
        code.load(S4, location(2))
        code.emit(asm.addi(T5, ZERO, 0))

        def call() -> None:
            code.emit(asm.addi(T5, T5, 1))
            code.label("asked")
            code.emit(asm.ld(T2, S0, 0))
            code.bne(T2, T5, "asked")
            code.emit(fence(BOTH, BOTH))
            if not remote:
                code.emit(asm.FENCE_I)
            code.emit(asm.jalr(RA, S4))
            code.beq(A1, T5, "as written")
            code.emit(asm.sd(T5, S3, 0), asm.sd(A1, S3, 8))
            code.label("as written")
            code.emit(asm.sd(T5, S1, 0))

        repeat(code, "call", S2, 1000, call)
    return program


@pytest.mark.parametrize("remote", [False, True], ids=["own fence.i", "remote fence.i"])
def test_code_that_another_hart_rewrote_runs_as_rewritten(remote: bool) -> None:
    words = run_program(rewriting(remote=remote), firmware)

    assert words(location(1), 1) == [1000]
    assert words(RESULTS, 2) == [0, 0]


def test_a_remote_sfence_makes_a_changed_translation_seen() -> None:
    shown = 0x40_0000
    arena = Arena(RESULTS + (1 << 20))
    tables = PageTables(arena, 3)
    tables.map(MEMORY_BASE, MEMORY_BASE, V | R | W | X | A | D, level=2)
    frames = [location(8), location(9)]
    tables.map(shown, frames[0], V | R | A)
    entry = tables.slot(shown, 0)
    program = Program()
    with program.hart() as code:
        code.load(S0, location(0))
        code.load(S1, location(1))
        code.load(S3, entry)
        code.load(S5, leaf(frames[0], V | R | A) ^ leaf(frames[1], V | R | A))
        code.emit(asm.addi(T5, ZERO, 0))

        def remap() -> None:
            code.emit(asm.ld(T2, S3, 0), asm.r_type(0x33, 4, 0, T2, T2, S5), asm.sd(T2, S3, 0), asm.addi(T5, T5, 1))
            code.load(A0, shown)
            code.load(A1, 4096)
            code.emit(asm.addi(A7, ZERO, CALL_SFENCE), asm.ECALL, asm.sd(T5, S0, 0))
            code.label("answered")
            code.emit(asm.ld(T2, S1, 0))
            code.bne(T2, T5, "answered")

        repeat(code, "remap", S2, 1000, remap)
    with program.hart() as code:
        code.load(S0, location(0))
        code.load(S1, location(1))
        code.load(S3, RESULTS)
        code.load(S4, shown)
        code.load(T2, tables.satp)
        code.emit(asm.csrrw(ZERO, CSR["satp"], T2), asm.SFENCE_VMA_ALL, asm.addi(T5, ZERO, 0))

        def look() -> None:
            code.emit(asm.addi(T5, T5, 1))
            code.label("asked")
            # It keeps using the translation while it waits.
            code.emit(asm.ld(T4, S4, 0), asm.ld(T2, S0, 0))
            code.bne(T2, T5, "asked")
            code.emit(fence(READS, READS), asm.ld(T3, S4, 0), asm.i_type(0x13, 7, T4, T5, 1))
            code.beq(T3, T4, "as mapped")
            code.emit(asm.sd(T5, S3, 0), asm.sd(T3, S3, 8))
            code.label("as mapped")
            code.emit(asm.sd(T5, S1, 0))

        repeat(code, "look", S2, 1000, look)
    contents = {arena.base: bytes(arena.content), frames[1]: (1).to_bytes(8, "little")}

    words = run_program(program, firmware, contents)

    assert words(location(1), 1) == [1000]
    assert words(RESULTS, 2) == [0, 0]


def test_interrupts_between_two_sleeping_harts_are_never_lost() -> None:
    program = Program()
    for number in range(2):
        with program.hart() as code:
            code.load(S0, location(number))
            code.emit(asm.csrrwi(ZERO, CSR["sie"], 2), asm.addi(T5, ZERO, 0))

            def play(code: Assembler = code, number: int = number) -> None:
                if number == 0:
                    code.emit(asm.addi(A7, ZERO, CALL_IPI), asm.ECALL)
                code.label(f"sleep {number}")
                code.emit(asm.WFI, asm.csrrs(T2, CSR["sip"], ZERO), asm.i_type(0x13, 7, T2, T2, 2))
                code.beq(T2, ZERO, f"sleep {number}")
                code.emit(asm.addi(T3, ZERO, 2), asm.csrrc(ZERO, CSR["sip"], T3))
                if number == 1:
                    code.emit(asm.addi(A7, ZERO, CALL_IPI), asm.ECALL)
                code.emit(asm.addi(T5, T5, 1), asm.sd(T5, S0, 0))

            repeat(code, f"play {number}", S2, 2000, play)

    words = run_program(program, firmware)

    assert words(location(0), 1) == words(location(1), 1) == [2000]
