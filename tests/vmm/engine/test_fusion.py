"""Instructions that the engine does several of at once, against the same ones done one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.engine.base import ExitReason
from vmm.engine.rv64.hart import EXACT_SPAN, Exit, Hart, Rv64Engine
from vmm.engine.rv64.instructions import BY_NAME
from vmm.memory import GuestMemory

RAM = 0x8000_0000
SIZE = 1 << 20
END = RAM + SIZE
CODE = RAM + 0x1000
DATA = RAM + 0x10000
TRAPPED = RAM + 0x800  #: where exceptions lead to
RA, SP, T0, S0, S1, A0, A1, A2, A3, A4, A5, A6, A7 = 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17
SHORT = tuple(range(8, 16))  #: registers that short loads and stores can name
ENOUGH = 100_000  #: instructions for any program here that ends
POINTERS = (SP, A0, A1)
OTHERS = (T0, S0, S1, A2, A3, A4, A5, A6)


def word(name: str, **operands: int) -> bytes:
    row = BY_NAME[name]
    return row.encode(**operands).to_bytes(row.length, "little")


def bump(register: int, constant: int) -> bytes:
    """The short addition of a constant."""
    return word("c.addi", rd=register, rs1=register, imm=constant)


ECALL = word("ecall")


@dataclass
class Seen:
    """What a program left behind."""

    pc: int
    registers: list[int]
    instructions: int
    trap: tuple[int, int, int]
    memory: bytes


Prepare = Callable[[Hart], None]


@pytest.fixture(scope="module")
def engines() -> Iterator[list[tuple[Rv64Engine, GuestMemory]]]:
    """Two machines, each with its memory, which all programs of the module use one after the other."""
    with (
        GuestMemory(RAM, SIZE) as one,
        GuestMemory(RAM, SIZE) as other,
        Rv64Engine(one, clock="deterministic") as first,
        Rv64Engine(other, clock="deterministic") as second,
    ):
        yield [(first, one), (second, other)]


def _to_the_end(hart: Hart, go_on: Callable[[int], Exit]) -> None:
    """Until the ecall, or until there were so many instructions; outside of memory there is nothing."""
    end = hart.instructions + ENOUGH
    while hart.instructions < end and (found := go_on(end - hart.instructions)).reason is not ExitReason.SBI_CALL:
        if found.reason in (ExitReason.MMIO_READ, ExitReason.MMIO_WRITE):
            hart.bus_fault()


class Machines:
    """A program in two machines.

    Args:
        engines: the machines.
        code: of the program, at CODE; it ends with ecall, and so does what an exception leads to.
        prepare: sets registers.
    """

    def __init__(self, engines: list[tuple[Rv64Engine, GuestMemory]], code: bytes, prepare: Prepare) -> None:
        self.harts = [(engine.harts[0], memory) for engine, memory in engines]
        for hart, memory in self.harts:
            memory.write(RAM, bytes(range(1, 251)) * (SIZE // 250) + bytes(SIZE % 250))
            memory.write(TRAPPED, ECALL)
            memory.write(CODE, code)
            hart.reset(CODE)
            hart.csr["stvec"] = TRAPPED
            prepare(hart)
        self._start = [hart.instructions for hart, _ in self.harts]

    def at_once(self) -> Seen:
        """Run the first machine to its end."""
        hart, memory = self.harts[0]
        _to_the_end(hart, hart.run)
        return self._seen(0, hart, memory)

    def one_by_one(self) -> Seen:
        """Step the second machine to its end."""
        hart, memory = self.harts[1]
        _to_the_end(hart, lambda _: hart.step())
        return self._seen(1, hart, memory)

    def in_parts(self, budget: int) -> Iterator[tuple[Seen, Seen]]:
        """Run the first machine for so many instructions at a time, and step the second one as many times."""
        (first, one), (second, other) = self.harts
        while first.run(budget).reason is not ExitReason.SBI_CALL:
            for _ in range(budget):
                second.step()
            yield self._seen(0, first, one), self._seen(1, second, other)

    def _seen(self, number: int, hart: Hart, memory: GuestMemory) -> Seen:
        trap = hart.csr["scause"], hart.csr["sepc"], hart.csr["stval"]
        instructions = hart.instructions - self._start[number]
        return Seen(hart.pc, list(hart.x), instructions, trap, memory.read(RAM, SIZE))


def _access(draw: st.DrawFn, base: int) -> bytes:
    """A load or store of 8 bytes, long or short."""
    name = draw(st.sampled_from(["ld", "sd"]))
    register = draw(st.sampled_from([*OTHERS, *POINTERS]))
    operand = "rd" if name == "ld" else "rs2"
    offset = 8 * draw(st.integers(-12, 12)) + draw(st.sampled_from([0] * 20 + [4]))
    if base == SP and offset >= 0 and offset % 8 == 0 and draw(st.booleans()):
        return word(f"c.{name}sp", **{operand: register}, imm=offset)
    if base in SHORT and register in SHORT and offset >= 0 and offset % 8 == 0 and draw(st.booleans()):
        return word(f"c.{name}", rs1=base, **{operand: register}, imm=offset)
    return word(name, rs1=base, **{operand: register}, imm=offset)


def _addition(draw: st.DrawFn) -> bytes:
    register, other = draw(st.sampled_from(OTHERS)), draw(st.sampled_from([*OTHERS, *POINTERS]))
    kind = draw(st.sampled_from(["addi", "c.addi", "c.mv", "c.li", "nop", "sp"]))
    if kind == "sp":
        return word("c.addi16sp", imm=16 * draw(st.sampled_from([-2, -1, 1, 2])))
    if kind == "nop":
        return word("addi", rd=0, rs1=0, imm=0)
    if kind == "addi":
        return word("addi", rd=register, rs1=other, imm=draw(st.integers(-2048, 2047)))
    if kind == "c.mv":
        return word("c.mv", rd=register, rs2=other)
    constant = draw(st.integers(-32, 31).filter(bool))
    return bump(register, constant) if kind == "c.addi" else word("c.li", rd=register, imm=constant)


def _branch(draw: st.DrawFn) -> bytes:
    """Over a short instruction, or not."""
    left, right = draw(st.sampled_from([0, *OTHERS])), draw(st.sampled_from([0, *OTHERS]))
    name = draw(st.sampled_from(["beq", "bne", "blt", "bge", "bltu", "bgeu", "c.beqz", "c.bnez"]))
    if name.startswith("c."):
        return word(name, rs1=draw(st.sampled_from(SHORT)), imm=4)
    return word(name, rs1=left, rs2=draw(st.sampled_from([right, left])), imm=6)


def _index(draw: st.DrawFn) -> bytes:
    """An element of an array: its number times 8, added to the array's address, loaded; each of them long or short."""
    number, place, register = (draw(st.sampled_from([S0, S1, A2, A3, A4, A5])) for _ in range(3))
    base = draw(st.sampled_from([*POINTERS, A2]))
    code = word("addi", rd=number, rs1=0, imm=draw(st.integers(0, 600)))
    if draw(st.booleans()):
        code += word("slli", rd=number, rs1=number, imm=3)
    else:
        code += word("c.slli", rd=number, rs1=number, imm=draw(st.sampled_from([3, 3, 33])))
    if draw(st.booleans()):
        code += word("add", rd=place, rs1=number, rs2=base)
    else:
        place = number
        code += word("c.add", rd=place, rs1=place, rs2=base)
    if draw(st.booleans()):
        return code + word("ld", rd=register, rs1=place, imm=8 * draw(st.integers(-8, 8)))
    return code + word("c.ld", rd=register, rs1=place, imm=8)


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """Sequences that compilers write, cut and mixed."""
    code = b""
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["accesses", "additions", "branch", "index", "address", "call", "return"]))
        if kind == "accesses":
            base = draw(st.sampled_from(POINTERS))
            code += b"".join(_access(draw, base) for _ in range(draw(st.integers(1, 9))))
        elif kind == "additions":
            code += b"".join(_addition(draw) for _ in range(draw(st.integers(1, 5))))
        elif kind == "branch":
            code += _addition(draw) + _branch(draw) + bump(A7, 1)
        elif kind == "index":
            code += _index(draw)
        elif kind == "address":
            register = draw(st.sampled_from(OTHERS))
            code += word("auipc", rd=register, imm=4096 * draw(st.integers(-3, 3)))
            code += word("addi", rd=register, rs1=register, imm=draw(st.integers(-2048, 2047)))
        elif kind == "call":  # over an instruction that must not be executed
            code += word("auipc", rd=RA, imm=0) + word("jalr", rd=RA, rs1=RA, imm=10) + word("c.ebreak")
        else:  # to behind the return
            code += word("auipc", rd=T0, imm=0) + word("addi", rd=T0, rs1=T0, imm=14)
            code += word("c.addi16sp", imm=32) + word("c.jr", rs1=T0) + word("c.ebreak")
    return code + ECALL


@settings(max_examples=400, deadline=None)
@given(
    code=programs(),
    places=st.tuples(*[st.sampled_from([DATA, DATA + 8, DATA + 4096 - 40, END - 48, DATA + 100, 0x1000])] * 3),
    start=st.integers(0, 4),
)
def test_sequences_do_what_their_instructions_do(engines, code: bytes, places: tuple[int, ...], start: int) -> None:
    """Also if one of them faults, misses its page, or lies across one."""
    pad = bump(A7, 1) * (start * 512 - 1 if start else 0)

    def prepare(hart: Hart) -> None:
        for register, place in zip(POINTERS, places, strict=True):
            hart.x[register] = place
        for register in OTHERS:
            hart.x[register] = register * 0x0101_0101_0101

    machines = Machines(engines, pad + code, prepare)

    assert machines.at_once() == machines.one_by_one()


@st.composite
def loops(draw: st.DrawFn) -> bytes:
    """A loop from A1 to A0, its end in A2, as compilers and kernels write them, or as they nearly do."""
    copies = draw(st.booleans())
    words = draw(st.integers(1, 8))
    registers = draw(st.permutations([T0, S0, S1, A3, A4, A5, A6, A7]))[:words]
    step = 8 * words
    parts: list[bytes] = []
    if copies:
        cut = draw(st.integers(1, words))
        for group in (registers[:cut], registers[cut:]):
            at = 8 * registers.index(group[0]) if group else 0
            parts += [word("ld", rd=each, rs1=A1, imm=at + 8 * n) for n, each in enumerate(group)]
            parts += [word("sd", rs2=each, rs1=A0, imm=at + 8 * n) for n, each in enumerate(group)]
        advances = [word("addi", rd=A0, rs1=A0, imm=step), word("addi", rd=A1, rs1=A1, imm=step)]
        parts += draw(st.permutations(advances))
        compared = draw(st.sampled_from([A0, A1]))
    else:
        value = draw(st.sampled_from([0, A3]))
        parts += [word("sd", rs2=value, rs1=A0, imm=8 * n) for n in range(words)]
        parts.append(word("addi", rd=A0, rs1=A0, imm=step))
        compared = A0
    if draw(st.integers(0, 5)) == 0:  # which makes it another loop
        at = draw(st.integers(0, len(parts) - 1))
        parts[at] = draw(st.sampled_from([parts[at - 1], word("addi", rd=A3, rs1=A3, imm=1), bump(A0, 8)]))
    back = -sum(map(len, parts))
    kind = draw(st.sampled_from(["bltu", "bgeu", "bne"]))
    operands = {"rs1": A2, "rs2": compared} if kind == "bgeu" else {"rs1": compared, "rs2": A2}
    if kind == "bne" and draw(st.booleans()):
        operands = {"rs1": A2, "rs2": compared}
    return b"".join(parts) + word(kind, **operands, imm=back) + ECALL


def _loop_start(places: tuple[int, int], rounds: int) -> Prepare:
    def prepare(hart: Hart) -> None:
        for register in range(3, 18):
            hart.x[register] = register * 0x1111_1111
        hart.x[A0], hart.x[A1] = places
        hart.x[A2] = places[rounds & 1] + rounds * 8

    return prepare


PLACES = st.sampled_from(
    [DATA, DATA + 8, DATA + 64, DATA + 4096 - 64, DATA + 0x8000, DATA + 4096 * 3 + 8, DATA + 4, END - 1024]
)


@settings(max_examples=300, deadline=None)
@given(code=loops(), places=st.tuples(PLACES, PLACES), rounds=st.integers(0, 1500))
def test_loops_do_what_their_instructions_do(engines, code: bytes, places: tuple[int, int], rounds: int) -> None:
    """Also where source and target overlap or are not aligned, and up to the end of memory and beyond."""
    machines = Machines(engines, code, _loop_start(places, rounds))

    assert machines.at_once() == machines.one_by_one()


COPY = (
    b"".join(word("ld", rd=each, rs1=A1, imm=8 * n) for n, each in enumerate((A4, A5, A6, A7)))
    + b"".join(word("sd", rs2=each, rs1=A0, imm=8 * n) for n, each in enumerate((A4, A5, A6, A7)))
    + word("addi", rd=A0, rs1=A0, imm=32)
    + word("addi", rd=A1, rs1=A1, imm=32)
    + word("bltu", rs1=A0, rs2=A2, imm=-40)
    + ECALL
)


@pytest.mark.parametrize("more", [1, 5, 11, 100, 20_000])
def test_a_loop_can_be_looked_at_after_any_number_of_instructions(engines, more: int) -> None:
    """The last ones of a budget are done one by one, all before that together."""

    def prepare(hart: Hart) -> None:
        hart.x[A0], hart.x[A1] = DATA + 0x40000, DATA + 16
        hart.x[A2] = hart.x[A0] + 0x38000

    looked = 0
    for run, stepped in Machines(engines, COPY, prepare).in_parts(EXACT_SPAN + more):
        looked += 1
        assert run == stepped
    assert looked == 78_848 // (EXACT_SPAN + more)


def test_a_loop_that_faults_has_done_all_before_and_nothing_after(engines) -> None:
    def prepare(hart: Hart) -> None:
        hart.x[A0], hart.x[A1], hart.x[A2] = END - 8192, DATA, END + 8192

    machines = Machines(engines, COPY, prepare)
    run = machines.at_once()

    assert run == machines.one_by_one()
    assert run.trap == (7, CODE + 16, END)
    assert run.memory[-8192:] == run.memory[DATA - RAM : DATA - RAM + 8192]


def _four_loads() -> bytes:
    return b"".join(word("ld", rd=each, rs1=A0, imm=8 * n) for n, each in enumerate((A4, A5, A6, A7)))


@pytest.mark.parametrize("changed", [0, 4, 8, 12])
@pytest.mark.parametrize("who", ["the guest", "a device"])
def test_a_changed_instruction_is_what_is_done_next(engines, changed: int, who: str) -> None:
    """Whichever of those that are done together it is."""
    new = BY_NAME["addi"].encode(rd=A3, rs1=0, imm=77)
    store = word("sw", rs1=A1, rs2=A2, imm=0) if who == "the guest" else word("addi", rd=0, rs1=0, imm=0)
    code = _four_loads() + store + word("fence.i") + bump(S0, -1)
    code += word("c.bnez", rs1=S0, imm=-len(code)) + ECALL

    def prepare(hart: Hart) -> None:
        hart.x[A0], hart.x[A1], hart.x[A2], hart.x[S0] = DATA, CODE + changed, new, 2

    machines = Machines(engines, code, prepare)
    if who == "a device":
        for hart, memory in machines.harts:
            hart.run(7)
            memory.write(CODE + changed, new.to_bytes(4, "little"))
    run = machines.at_once()

    assert run == machines.one_by_one()
    assert run.registers[A3] == 77


def test_a_loop_whose_end_is_changed_copies_no_more_than_it_says(engines) -> None:
    code = COPY[: -len(ECALL)] + word("c.j", imm=6) + word("c.ebreak") * 2 + ECALL

    def prepare(hart: Hart) -> None:
        hart.x[A0], hart.x[A1], hart.x[A2] = DATA + 0x3000, DATA, DATA + 0x3000 + 3200

    machines = Machines(engines, code, prepare)
    for hart, memory in machines.harts:
        hart.run(11 * 4)
        memory.write(CODE + 40, word("addi", rd=A3, rs1=0, imm=5))
    run = machines.at_once()

    assert run == machines.one_by_one()
    assert run.registers[A0] == DATA + 0x3000 + 5 * 32


def test_a_jump_into_the_middle_does_the_rest(engines) -> None:
    code = word("jal", rd=0, imm=12) + _four_loads() + ECALL

    def prepare(hart: Hart) -> None:
        hart.x[A0] = DATA

    machines = Machines(engines, code, prepare)
    run = machines.at_once()

    assert run == machines.one_by_one()
    assert (run.registers[A4], run.registers[A5]) == (0, 0)
    assert run.registers[A6] != 0
