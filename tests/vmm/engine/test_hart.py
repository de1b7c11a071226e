"""One hart and several, through the engine's public face: budgets, exits, code that changes, clocks, threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vmm.engine.base import ExitReason
from vmm.engine.rv64.hart import Hart, Rv64Engine
from vmm.engine.rv64.instructions import BY_NAME
from vmm.errors import ConfigError, EngineError
from vmm.memory import GuestMemory

RAM = 0x8000_0000
DATA = RAM + 0x10_0000
DEVICE = 0x1000_0000


def word(name: str, **operands: int) -> bytes:
    row = BY_NAME[name]
    return row.encode(**operands).to_bytes(row.length, "little")


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(RAM, 4 << 20) as memory:
        yield memory


@pytest.fixture
def hart(memory: GuestMemory) -> Iterator[Hart]:
    with Rv64Engine(memory, clock="deterministic") as engine:
        hart = engine.harts[0]
        hart.reset(RAM)
        yield hart


COUNT_FOREVER = word("addi", rd=5, rs1=5, imm=1) + word("c.addi", rd=6, imm=1) + word("c.j", imm=-6)


def test_a_budget_is_kept_to_the_instruction(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, COUNT_FOREVER)

    for budget in (0, 1, 2, 3, 100, 20_000, 1_000_000):
        before = hart.instructions
        assert hart.run(budget).reason is ExitReason.BUDGET
        assert hart.instructions - before == budget


def test_stepping_and_running_end_in_the_same_state(memory: GuestMemory) -> None:
    # The loop straddles two pages, so that one of its instructions lies in both.
    start = RAM + 4094 - 4
    memory.write(start, COUNT_FOREVER.replace(word("c.j", imm=-6), word("jal", rd=0, imm=-6)))
    states = []
    for chunks in ([30_000], [1] * 300 + [29_700], [20_000, 7, 9_993]):
        with Rv64Engine(memory, clock="deterministic") as engine:
            hart = engine.harts[0]
            hart.reset(start)
            for chunk in chunks:
                hart.run(chunk)
            states.append((hart.pc, hart.x[5], hart.x[6], hart.instructions))

    assert states[0] == states[1] == states[2]
    assert states[0][1] == 10_000


def test_a_store_into_code_is_executed_next(memory: GuestMemory, hart: Hart) -> None:
    memory.write(
        RAM, word("sw", rs1=10, rs2=11, imm=8) + word("fence.i") + word("addi", rd=7, rs1=0, imm=1) + word("ecall")
    )
    hart.x[10], hart.x[11] = RAM, BY_NAME["addi"].encode(rd=7, imm=99)
    memory_before = memory.read_int(RAM + 8, 4)

    hart.run(2)
    assert hart.run().reason is ExitReason.SBI_CALL

    assert memory.read_int(RAM + 8, 4) != memory_before
    assert hart.x[7] == 99


def test_a_page_stored_to_a_thousand_times_still_executes_what_it_holds(memory: GuestMemory, hart: Hart) -> None:
    code, patched = RAM, RAM + 0x2000
    memory.write(patched, word("addi", rd=7, rs1=7, imm=1) + word("jalr", rs1=1))
    memory.write(
        code,
        word("sw", rs1=10, rs2=11, imm=0)
        + word("fence.i")
        + word("jalr", rd=1, rs1=10)
        + word("addi", rd=12, rs1=12, imm=-1)
        + word("bne", rs1=12, rs2=0, imm=-16)
        + word("ecall"),
    )
    hart.x[10], hart.x[11], hart.x[12] = patched, BY_NAME["addi"].encode(rd=7, rs1=7, imm=2), 1000

    assert hart.run().reason is ExitReason.SBI_CALL
    assert hart.x[7] == 2000


def test_a_write_from_the_host_into_code_is_executed(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, COUNT_FOREVER)
    hart.run(3000)

    memory.write(RAM + 4, word("c.addi", rd=6, imm=0) + word("c.j", imm=0))
    before = hart.x[6]
    hart.run(3000)

    assert hart.x[6] == before


def test_a_load_where_no_memory_is_asks_the_vmm_and_takes_its_answer(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, word("lb", rd=7, rs1=10, imm=3) + word("lhu", rd=8, rs1=10, imm=2) + word("ecall"))
    hart.x[10] = DEVICE

    found = hart.run()
    assert (found.reason, found.address, found.width) == (ExitReason.MMIO_READ, DEVICE + 3, 1)
    hart.complete_read(0x80)
    found = hart.run()
    assert (found.reason, found.address, found.width) == (ExitReason.MMIO_READ, DEVICE + 2, 2)
    hart.complete_read(0x12345)
    assert hart.run().reason is ExitReason.SBI_CALL

    assert hart.x[7] == (1 << 64) - 0x80
    assert hart.x[8] == 0x2345
    assert hart.instructions == 2


def test_a_store_where_no_memory_is_carries_its_value(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, word("sh", rs1=10, rs2=11, imm=4) + word("ecall"))
    hart.x[10], hart.x[11] = DEVICE, 0xABCDEF

    found = hart.run()

    assert (found.reason, found.address, found.width, found.value & 0xFFFF) == (
        ExitReason.MMIO_WRITE,
        DEVICE + 4,
        2,
        0xCDEF,
    )
    assert hart.run().reason is ExitReason.SBI_CALL


@pytest.mark.parametrize(("access", "cause"), [("lw", 5), ("sw", 7)])
def test_an_access_that_nobody_answers_is_an_access_fault(
    memory: GuestMemory, hart: Hart, access: str, cause: int
) -> None:
    operands = {"rd": 7} if access == "lw" else {"rs2": 7}
    memory.write(RAM, word(access, rs1=10, imm=8, **operands))
    memory.write(RAM + 0x100, word("ecall"))
    hart.x[10] = DEVICE
    hart.csr["stvec"] = RAM + 0x100

    hart.run()
    hart.bus_fault()
    assert hart.run().reason is ExitReason.SBI_CALL

    assert (hart.csr["scause"], hart.csr["stval"], hart.csr["sepc"]) == (cause, DEVICE + 8, RAM)


def test_a_trap_vector_that_cannot_be_fetched_ends_the_run(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, bytes(4))

    assert hart.run(1_000_000).reason is ExitReason.STUCK


def test_idle_time_is_skipped_with_the_deterministic_clock(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, word("wfi") + word("csrrs", rd=7, csr=0xC01) + word("ecall"))
    hart.csr["sie"] = 1 << 5
    hart.set_timer(50_000_000)  # five seconds

    assert hart.run().reason is ExitReason.HALTED
    assert hart.wait(timeout=60)
    assert hart.run().reason is ExitReason.SBI_CALL

    assert 50_000_000 <= hart.x[7] < 50_000_100


def test_a_timer_interrupt_arrives_at_the_same_instruction_every_time(memory: GuestMemory) -> None:
    memory.write(RAM, COUNT_FOREVER)
    memory.write(RAM + 0x100, word("ecall"))
    counts = set()
    for _ in range(3):
        with Rv64Engine(memory, clock="deterministic") as engine:
            hart = engine.harts[0]
            hart.reset(RAM)
            hart.csr["stvec"] = RAM + 0x100
            hart.csr["sie"] = 1 << 5
            hart.csr["sstatus"] = 1 << 1
            hart.set_timer(1234)
            assert hart.run().reason is ExitReason.SBI_CALL
            assert hart.csr["scause"] == 1 << 63 | 5
            counts.add(hart.instructions)

    assert len(counts) == 1
    assert 123_400 <= counts.pop() <= 123_403


def test_interrupt_brings_a_running_hart_back(memory: GuestMemory) -> None:
    memory.write(RAM, COUNT_FOREVER)
    with Rv64Engine(memory) as engine:
        hart = engine.harts[0]
        hart.reset(RAM)
        found = []
        thread = threading.Thread(target=lambda: found.append(hart.run().reason))
        thread.start()
        hart.interrupt()
        thread.join(30)

    assert found == [ExitReason.INTERRUPTED]


def test_eight_harts_add_to_one_word_without_losing_a_count(memory: GuestMemory) -> None:
    rounds, harts = 20_000, 8
    memory.write(
        RAM,
        word("amoadd.d", rd=0, rs1=10, rs2=11)
        + word("lr.w", rd=5, rs1=13)
        + word("addi", rd=5, rs1=5, imm=1)
        + word("sc.w", rd=6, rs1=13, rs2=5)
        + word("bne", rs1=6, rs2=0, imm=-12)
        + word("addi", rd=12, rs1=12, imm=-1)
        + word("bne", rs1=12, rs2=0, imm=-24)
        + word("ecall"),
    )
    with Rv64Engine(memory, harts=harts) as engine:
        threads = []
        for hart in engine.harts:
            hart.reset(RAM, a0=DATA, a1=1)
            hart.x[12], hart.x[13] = rounds, DATA + 64
            threads.append(threading.Thread(target=hart.run))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert all(hart.pc == RAM + 28 for hart in engine.harts)
    assert memory.read_int(DATA, 8) == rounds * harts
    assert memory.read_int(DATA + 64, 4) == rounds * harts


def test_a_remote_fence_returns_when_a_running_hart_has_done_it(memory: GuestMemory) -> None:
    memory.write(RAM, COUNT_FOREVER)
    with Rv64Engine(memory, harts=2) as engine:
        running, other = engine.harts
        running.reset(RAM)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            for _ in range(100):
                engine.remote_sfence_vma([0, 1], caller=1)
                engine.remote_fence_i([0], caller=1)
        finally:
            running.interrupt()
            thread.join(30)
        assert not thread.is_alive()
        assert other.instructions == 0


def test_a_hart_at_a_device_during_a_remote_fence_goes_on_with_the_new_translation(memory: GuestMemory) -> None:
    root, table, mapped = RAM + 0x1_0000, RAM + 0x1_1000, 0xC000_0000
    leaf = 0xCF  # valid, readable, writable, executable, accessed, dirty
    for entry, value in (
        (root, leaf),
        (root + 8 * 2, RAM >> 2 | leaf),
        (root + 8 * 3, table >> 2 | 1),
        (table, RAM >> 2 | leaf),
        (RAM + 0x1000, 1),
        (RAM + 0x20_1000, 2),
    ):
        memory.write_int(entry, 8, value)
    memory.write(RAM, word("ld", rd=6, rs1=10) + word("lw", rd=7, rs1=11) + word("ld", rd=5, rs1=10) + word("ecall"))
    with Rv64Engine(memory, harts=2) as engine:
        hart = engine.harts[1]
        hart.reset(RAM)
        hart.csr["satp"] = 8 << 60 | root >> 12
        hart.x[10], hart.x[11] = mapped + 0x1000, DEVICE
        assert hart.run().reason is ExitReason.MMIO_READ
        hart.complete_read(0)
        assert hart.run().reason is ExitReason.SBI_CALL
        hart.pc = RAM
        assert hart.run().reason is ExitReason.MMIO_READ

        memory.write_int(table, 8, RAM + 0x20_0000 >> 2 | leaf)
        engine.remote_sfence_vma([1], caller=0)
        hart.complete_read(7)

        assert hart.run().reason is ExitReason.SBI_CALL
        assert (hart.x[6], hart.x[7], hart.x[5]) == (1, 7, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"harts": 0}, "0 harts cannot be made; the number must be 1 to 32"),
        ({"harts": 33}, "33 harts cannot be made"),
        ({"clock": "lunar"}, "there is no clock 'lunar'; choose 'real' or 'deterministic'"),
        ({"harts": 2, "clock": "deterministic"}, "the deterministic clock needs 1 hart, not 2"),
        ({"timebase_hz": 3}, "a timebase of 3 Hz is not a whole number of nanoseconds"),
    ],
)
def test_an_impossible_engine_is_refused(memory: GuestMemory, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Rv64Engine(memory, **arguments)


def test_stepping_after_a_reset_is_still_one_instruction_at_a_time(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, COUNT_FOREVER)
    for _ in range(3):
        hart.reset(RAM)
        for count in range(1, 20):
            before = hart.instructions
            hart.step()
            assert hart.instructions - before == 1
            assert hart.x[5] == (count + 2) // 3


def test_a_closed_engine_is_an_error_and_not_a_crash(memory: GuestMemory) -> None:
    engine = Rv64Engine(memory)
    hart = engine.harts[0]
    engine.close()
    engine.close()

    for use in (hart.run, hart.step, lambda: hart.x[1], lambda: hart.reset(RAM), lambda: hart.pc, hart.interrupt):
        with pytest.raises(EngineError, match="the engine is closed"):
            use()
    memory.write(RAM, bytes(8))


@pytest.mark.parametrize("jump", [word("jal", rd=0, imm=0), word("c.j", imm=0)])
@pytest.mark.parametrize("clock", ["real", "deterministic"])
def test_a_watched_hart_that_jumps_to_itself_with_interrupts_off_comes_back(
    memory: GuestMemory, jump: bytes, clock: str
) -> None:
    memory.write(RAM, jump)
    with Rv64Engine(memory, clock=clock) as engine:
        hart = engine.harts[0]
        hart.reset(RAM)
        hart.watch()

        assert hart.run().reason is ExitReason.ENDLESS
        assert hart.pc == RAM


def test_a_jump_to_itself_that_an_interrupt_can_end_is_not_endless(memory: GuestMemory, hart: Hart) -> None:
    memory.write(RAM, word("jal", rd=0, imm=0))
    memory.write(RAM + 0x100, word("ecall"))
    hart.watch()
    hart.csr["stvec"], hart.csr["sie"], hart.csr["sstatus"] = RAM + 0x100, 1 << 5, 1 << 1
    hart.set_timer(1_000_000)

    assert hart.run().reason is ExitReason.SBI_CALL
