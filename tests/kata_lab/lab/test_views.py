"""The lab's views: what they say in words, and that what they draw says it too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from kata_lab import lab
from kata_lab.lab.bare import run_bare
from kata_lab.lab.bits import runs_of
from kata_lab.lab.exercise import not_right, not_yet, solved
from kata_lab.lab.machines import LabError
from vmm import Bus, Console, GuestMemory
from vmm.board.riscv_virt import Chosen, RiscvVirtBoard
from vmm.engine.rv64.assembler import assemble
from vmm.engine.rv64.hart import Rv64Engine
from vmm.engine.rv64.instructions import INSTRUCTIONS, Instruction
from vmm.trace import Trace

RAM = 0x8000_0000


def words(view: lab.Picture | lab.Table) -> str:
    return view._repr_mimebundle_()["text/plain"]


def markup(view: lab.Picture | lab.Table) -> str:
    return view._repr_mimebundle_()["text/html"]


@pytest.fixture
def engine() -> Iterator[Rv64Engine]:
    with GuestMemory(RAM, 1 << 22) as memory, Rv64Engine(memory, clock="deterministic") as made:
        yield made


def load(engine: Rv64Engine, source: str) -> None:
    engine.memory.write(RAM, assemble(source))
    engine.harts[0].reset(RAM)


def test_steps_tell_what_each_instruction_changed(engine: Rv64Engine) -> None:
    load(engine, "li a0, 5\nnop\necall\nnop")

    steps = lab.take_steps(engine, 10)

    assert [step.text for step in steps] == ["addi a0, zero, 5", "addi zero, zero, 0", "ecall"]
    assert [step.changes for step in steps] == [{"a0": 5}, {}, {}]
    assert "exit: sbi call" in steps[-1].event
    assert "> 0x80000008  00000073  ecall" in words(lab.step_table(steps))


def test_a_trap_is_a_step_of_its_own(engine: Rv64Engine) -> None:
    load(engine, "la t0, fell\ncsrw stvec, t0\n.word 0xffffffff\nfell: csrr a0, scause")

    trapped, handled = lab.take_steps(engine, 4)[3:]

    assert trapped.event == "trap: illegal instruction"
    assert trapped.changes["sepc"] == RAM + 12
    assert handled.text == "csrrs a0, scause, zero"
    assert handled.changes == {"a0": 2}


def test_a_jump_into_nothing_ends_the_steps(engine: Rv64Engine) -> None:
    load(engine, "li t0, 0x1000\njr t0")

    steps = lab.take_steps(engine, 10)

    assert "instruction access fault" in steps[2].event
    assert steps[2].word is None
    assert "exit: stuck" in steps[-1].event


def test_steps_of_a_closed_machine_are_refused() -> None:
    with GuestMemory(RAM, 4096) as memory, Rv64Engine(memory) as engine:
        pass

    with pytest.raises(LabError, match="closed; run the cells that build it again"):
        lab.take_steps(engine, 1)


def test_the_register_table_shows_all_registers(engine: Rv64Engine) -> None:
    load(engine, "li t6, 0x7b")
    engine.harts[0].step()

    shown = words(lab.register_table(engine.harts[0]))

    assert "t6 0x7b" in shown
    assert "pc = 0x80000004" in shown
    assert len(re.findall(r" 0x", shown)) == 32 + 1


def test_the_code_table_stops_where_no_instruction_is() -> None:
    table = lab.code_table(assemble("nop\nc.li a0, 1\n.align 2\n.word 0xffffffff"), RAM)

    assert [row[2] for row in table.rows] == ["addi zero, zero, 0", "c.li a0, 1"]


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=lambda row: row.name)
def test_the_bits_of_every_instruction_are_drawn_once(row: Instruction) -> None:
    runs = runs_of(row, row.match)

    assert sum(run.width for run in runs) == 8 * row.length
    assert [run.high for run in runs[1:]] == [run.low - 1 for run in runs[:-1]]
    rebuilt = 0
    for run in runs:
        rebuilt = rebuilt << run.width | run.value
    assert rebuilt == row.match
    ElementTree.fromstring(lab.draw_instruction(row.match).markup)


def test_an_instruction_is_told_in_words() -> None:
    said = words(lab.draw_instruction(int.from_bytes(assemble("addi a0, t0, -3"), "little")))

    assert said.startswith("addi a0, t0, -3 = 0xffd28513.")
    assert "bits 31 to 20: 111111111101, imm[11:0]" in said
    assert "rs1 = t0" in said
    assert "imm = -3" in said


def test_a_word_that_is_no_instruction_is_told_so() -> None:
    assert "0xffffffff is no instruction" in words(lab.draw_instruction(0xFFFFFFFF))


def test_memory_is_given_when_it_is_touched() -> None:
    with GuestMemory(RAM, 64 << 20) as memory:
        before = lab.touched_bytes(memory)
        memory.write(RAM + (40 << 20), b"x")
        after = lab.touched_bytes(memory)
        here, elsewhere = lab.touched_bytes(memory, RAM + (40 << 20), 4096), lab.touched_bytes(memory, RAM, 32 << 20)
        picture = lab.draw_touched(memory, cells=16)

    assert before == 0
    assert 4096 <= after <= 2 << 20
    assert here == 4096
    assert elsewhere == 0
    assert "in 1 of 16 equal parts" in words(picture)
    ElementTree.fromstring(picture.markup)


def test_addresses_are_listed_in_order() -> None:
    with GuestMemory(RAM, 1 << 20) as memory:
        board = RiscvVirtBoard(memory, Console(), [lambda level: None], slots=1)
        table = lab.address_table(board.bus, memory)
        alone = lab.address_table(Bus(), memory)

    assert [row[3] for row in table.rows] == ["plic", "uart", "virtio-mmio 0", "RAM"]
    assert [row[1] for row in alone.rows] == ["0x0800fffff"]


def test_the_tree_shows_every_node_and_is_its_source_in_words() -> None:
    with GuestMemory(RAM, 1 << 20) as memory:
        tree = RiscvVirtBoard(memory, Console(), [lambda level: None]).device_tree(Chosen("a=1 <b>", seed=1))

    picture = lab.draw_tree(tree)

    assert words(picture) == str(tree).rstrip()
    ElementTree.fromstring(picture.markup.replace(" open ", " "))
    assert picture.markup.count("<details") == str(tree).count(" {")
    assert "bootargs = &quot;a=1 &lt;b&gt;&quot;" in picture.markup


def traced() -> Trace:
    trace = Trace(enabled=True)
    trace.start(lambda: 1_000_000)
    recorder = trace.recorder()
    for kind, name in (("mmio write", "uart"), ("mmio write", "uart"), ("sbi call", "time.set_timer"), ("odd", "")):
        recorder.record(kind, name, trace._epoch_ns)
    trace.console_output(b"Linux version 6\n")
    return trace


def test_the_time_line_tells_milestones_and_exits_in_words() -> None:
    picture = lab.boot_timeline(traced())

    assert "kernel banner after 0.0" in words(picture)
    assert "4 exits were counted" in words(picture)
    assert "alt='Time line of the boot" in picture.markup
    assert "kernel banner" in words(lab.milestone_table(traced()))


def test_a_time_line_without_traced_exits_is_drawn_too() -> None:
    trace = Trace()
    trace.start(lambda: 0)

    assert "first instruction" in words(lab.boot_timeline(trace))


def test_the_exits_chart_counts_by_cause_most_often_first() -> None:
    picture = lab.exits_chart(traced())

    assert "most often first: mmio write uart 2 times; " in words(picture)
    assert "<img alt='Exits by cause" in picture.markup


def test_nothing_to_draw_says_what_to_do() -> None:
    with pytest.raises(LabError, match="trace=True"):
        lab.exits_chart(Trace())
    with pytest.raises(LabError, match="start the VM first"):
        lab.boot_timeline(Trace())


def test_feedback_says_its_verdict_without_colour() -> None:
    for feedback, verdict in ((solved("a"), "solved"), (not_yet("b"), "not yet"), (not_right("<c>"), "not right")):
        bundle = feedback._repr_mimebundle_()
        assert verdict in bundle["text/html"]
        assert verdict in bundle["text/plain"]
    assert "&lt;c&gt;" in not_right("<c>")._repr_mimebundle_()["text/html"]


def test_texts_of_a_table_are_escaped() -> None:
    table = lab.Table(("a",), [("<script>",)], "x & y", frozenset({0}))

    assert "<script>" not in markup(table)
    assert words(table) == "x & y\n  a\n> <script>"


def test_a_bare_program_that_waits_for_ever_ends_with_its_reason() -> None:
    assert run_bare(assemble("wfi")).ended == "halted"
    assert run_bare(assemble("here: j here"), budget=1000).ended == "budget"
    assert run_bare(assemble("ebreak")).trap == "breakpoint"
    assert run_bare(assemble("li a7, 1\necall\nmv s0, a0\nebreak")).ended == "trapped"


def test_machines_close_what_they_keep_the_latest_first() -> None:
    closed: list[str] = []

    class Thing:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    with lab.Machines() as machines:
        machines.keep(Thing("memory"))
        machines.keep(Thing("engine"))
        machines.replace("vm", Thing("first vm"))
        again = machines.replace("vm", Thing("second vm"))
        machines.replace("vm", again)
        assert closed == ["first vm"]

    assert closed == ["first vm", "second vm", "engine", "memory"]
