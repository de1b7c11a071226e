"""A hart, one instruction at a time: what was executed and what it changed.

Instructions are shown as the disassembler of :mod:`vmm.engine.rv64` writes them, registers by the names of the RISC-V
ABIs Specification 1.0, chapter 1. Floating-point registers are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kata_lab.lab.machines import LabError
from kata_lab.lab.picture import Table

if TYPE_CHECKING:
    from vmm.engine.base import Exit
    from vmm.engine.rv64.hart import Hart, Rv64Engine

_TRAP_CSRS = ("sepc", "scause", "stval", "sstatus")
_CSRS = (*_TRAP_CSRS, "stvec", "satp")


@dataclass(frozen=True, slots=True)
class Step:
    """One executed instruction: where it was, its word (None where none could be fetched), its text, what it changed
    (name → value after it), and the trap or exit that it ended in ("" if it completed)."""

    address: int
    word: int | None
    text: str
    changes: dict[str, int] = field(default_factory=dict)
    event: str = ""


def take_steps(engine: Rv64Engine, count: int, hart: int = 0) -> list[Step]:
    """Execute at most ``count`` instructions, and stop where one needs the VMM.

    Raises:
        LabError: the engine's memory is closed.
    """
    from vmm.engine.base import ExitReason

    _require_open(engine)
    stepped = engine.harts[hart]
    steps: list[Step] = []
    for _ in range(count):
        address, before, traps = stepped.pc, _state(stepped), stepped.traps
        word, text = _fetch(engine, stepped, address)
        ended = stepped.step()
        changes = {name: value for name, value in _state(stepped).items() if value != before[name]}
        if stepped.traps > traps:
            # What traps does not complete: the step went on with the handler's first instruction.
            noted = {name: changes.pop(name) for name in _TRAP_CSRS if name in changes}
            steps.append(Step(address, word, text, noted, f"trap: {_trap_text(stepped)}"))
            address = stepped.csr["stvec"] & ~3
            word, text = _fetch(engine, stepped, address)
        event = "" if ended.reason is ExitReason.BUDGET else _exit_text(ended)
        steps.append(Step(address, word, text, changes, event))
        if event:
            break
    return steps


def step_table(steps: Sequence[Step]) -> Table:
    """A row for every step; those that trapped or left guest code are marked."""
    rows = [
        (
            f"{step.address:#x}",
            "-" if step.word is None else f"{step.word:08x}" if step.word & 3 == 3 else f"{step.word:04x}",
            step.text,
            ", ".join(
                [f"{name} = {value:#x}" for name, value in step.changes.items()] + [step.event] * bool(step.event)
            ),
        )
        for step in steps
    ]
    marked = frozenset(number for number, step in enumerate(steps) if step.event)
    return Table(("address", "word", "instruction", "what changed"), rows, f"{len(rows)} steps, in order", marked)


def code_table(program: bytes, base: int) -> Table:
    """The instructions of ``program``, which lies at address ``base``, up to the first word that is none."""
    from vmm.engine.rv64.disassembler import disassemble
    from vmm.engine.rv64.instructions import decode, instruction_length

    rows, at = [], 0
    while at < len(program):
        length = instruction_length(int.from_bytes(program[at : at + 2], "little"))
        word = int.from_bytes(program[at : at + length], "little")
        if decode(word) is None:
            break
        rows.append((f"{base + at:#x}", f"{word:0{2 * length}x}", disassemble(word, base + at)))
        at += length
    return Table(("address", "word", "instruction"), rows, f"{len(rows)} instructions in {at} bytes")


def register_table(hart: Hart) -> Table:
    """All integer registers, in four columns, and pc; registers that are not zero are worth a look."""
    from vmm.engine.rv64.registers import X_NAMES

    cells = [f"{name:>4} {hart.x[number]:#x}" for number, name in enumerate(X_NAMES)]
    rows = [tuple(cells[row + 8 * column] for column in range(4)) for row in range(8)]
    mode = "S" if hart.privilege else "U"
    caption = f"hart {hart.id} in {mode}-mode: pc = {hart.pc:#x}, {hart.instructions:,} instructions retired"
    return Table(("x0 to x7", "x8 to x15", "x16 to x23", "x24 to x31"), rows, caption)


def _require_open(engine: Rv64Engine) -> None:
    try:
        engine.memory.read(engine.memory.base, 1)
    except ValueError:
        raise LabError("this machine is closed; run the cells that build it again") from None


def _state(hart: Hart) -> dict[str, int]:
    from vmm.engine.rv64.registers import X_NAMES

    registers = {name: hart.x[number] for number, name in enumerate(X_NAMES)}
    return registers | {name: hart.csr[name] for name in _CSRS}


def _trap_text(hart: Hart) -> str:
    from vmm.engine.rv64.registers import EXCEPTIONS

    cause = hart.csr["scause"]
    return f"interrupt {cause & 63}" if cause >> 63 else EXCEPTIONS.get(cause, f"exception {cause}")


def _fetch(engine: Rv64Engine, hart: Hart, address: int) -> tuple[int | None, str]:
    from vmm.engine.rv64.disassembler import disassemble
    from vmm.engine.rv64.instructions import instruction_length

    memory, physical = engine.memory, hart.translate(address)
    if physical is None or not memory.base <= physical <= memory.end - 4:
        return None, "no memory here"
    word = memory.read_int(physical, 2)
    if instruction_length(word) == 4:
        word = memory.read_int(physical, 4)
    return word, disassemble(word, address)


def _exit_text(ended: Exit) -> str:
    from vmm.engine.base import ExitReason

    name = ended.reason.name.lower().replace("_", " ")
    match ended.reason:
        case ExitReason.MMIO_WRITE:
            return f"exit: {name} of {ended.value:#x} to {ended.address:#x}"
        case ExitReason.MMIO_READ:
            return f"exit: {name} from {ended.address:#x}"
        case ExitReason.SBI_CALL:
            return f"exit: {name}, a7 = {ended.args[7]:#x}, a6 = {ended.args[6]:#x}"
        case _:
            return f"exit: {name}"
