"""Why a guest stands where it stands: the crash report.

Read from harts that are out of guest code: the reason, every hart's registers by their ABI names (RISC-V ELF psABI 1.0,
chapter 1), the CSRs that decide where a trap goes, the instructions around pc, and the last lines of the console.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vmm.engine.rv64.registers import EXCEPTIONS, X_NAMES
from vmm.errors import VmmError
from vmm.memory import GuestMemory

REPORTED_CSRS = ("satp", "stvec", "sepc", "scause", "stval", "sstatus", "sie", "sip", "sscratch")

CODE_BYTES_BEFORE = 16
INSTRUCTIONS_AFTER = 8

PANIC = re.compile(r"Kernel panic - not syncing: ?(.*)")


class _Registers(Protocol):
    def __getitem__(self, key: int, /) -> int: ...


class _Csrs(Protocol):
    def __getitem__(self, key: str, /) -> int: ...


class ReportedHart(Protocol):
    """What a report reads of a hart."""

    @property
    def id(self) -> int: ...

    @property
    def x(self) -> _Registers: ...

    @property
    def csr(self) -> _Csrs: ...

    @property
    def pc(self) -> int: ...

    @property
    def privilege(self) -> int: ...

    @property
    def instructions(self) -> int: ...

    def translate(self, address: int, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class CodeLine:
    """One instruction: where it is, its encoding, its assembly. ``raw`` is None where nothing can be fetched."""

    address: int
    raw: int | None
    text: str


@dataclass(frozen=True, slots=True)
class HartReport:
    """One hart, as plain data. ``state`` is its HSM state, ``code`` the instructions from a little before pc."""

    hart: int
    state: str
    pc: int
    privilege: str
    instructions: int
    registers: dict[str, int]
    csrs: dict[str, int]
    code: tuple[CodeLine, ...]

    @property
    def trap(self) -> str:
        """What the hart last trapped for, in words; empty if it never did."""
        cause = self.csrs.get("scause", 0)
        if cause >> 63 or (cause == 0 and self.csrs.get("sepc", 0) == 0):
            return ""
        return EXCEPTIONS.get(cause, f"exception {cause}")

    @property
    def hint(self) -> str:
        """What this state usually means; empty if nothing can be said."""
        if not self.registers:
            return ""
        if self.csrs.get("stvec", 0) & ~3 == 0 and self.pc < 0x1000:
            return f"the hart trapped ({self.trap or 'unknown cause'}) while stvec was 0: no trap handler was set"
        here = next((line for line in self.code if line.address == self.pc), None)
        if here is not None and here.raw is None:
            return "no instruction can be fetched at pc: the guest jumped to where no memory is"
        if self.csrs.get("stvec", 0) & ~3 == self.pc and self.csrs.get("sepc", 0) == self.pc and self.trap:
            return f"the trap handler itself traps at its first instruction ({self.trap})"
        if here is not None and re.match(r"(c\.)?j(al)?\b.*\b0x0*" + f"{self.pc:x}$", here.text):
            return "the instruction at pc jumps to itself: an endless loop"
        return ""

    def __str__(self) -> str:
        lines = [
            f"hart {self.hart}: {self.state}, {self.privilege}-mode, pc {self.pc:#018x}, "
            f"{self.instructions:,} instructions retired"
        ]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        if self.trap:
            lines.append(
                f"  last exception: {self.trap} at {self.csrs.get('sepc', 0):#x}, stval {self.csrs.get('stval', 0):#x}"
            )
        for table in (self.registers, self.csrs):
            cells = [f"{name:>8} {value:016x}" for name, value in table.items()]
            lines += ["  " + " ".join(cells[start : start + 4]) for start in range(0, len(cells), 4)]
        for line in self.code:
            raw = "????????" if line.raw is None else f"{line.raw:08x}" if line.raw & 3 == 3 else f"{line.raw:04x}    "
            lines.append(f"  {'=>' if line.address == self.pc else '  '} {line.address:016x}: {raw}  {line.text}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class CrashReport:
    """A VM's harts and console at one moment.

    Attributes:
        reason: one sentence; why the report was made.
        panic: the kernel's own words after "Kernel panic - not syncing:", None if it did not panic.
        hart: the hart that caused the report, None if none did.
        harts: every hart.
        console: its last lines.
        bus_faults: the last accesses that no device answered, oldest first.
        trace: the host's traceback where a fault of the VMM is the reason, else "".
    """

    reason: str
    panic: str | None
    hart: int | None
    harts: tuple[HartReport, ...]
    console: tuple[str, ...]
    bus_faults: tuple[str, ...] = ()
    trace: str = ""

    def __str__(self) -> str:
        parts = [f"reason: {self.reason}"]
        if self.panic is not None:
            parts.append(f"kernel panic: {self.panic}")
        if self.hart is not None:
            parts.append(f"caused by hart {self.hart}")
        parts += [str(hart) for hart in self.harts]
        parts += [f"no device answered {fault}" for fault in self.bus_faults]
        parts.append("last console lines:" if self.console else "nothing was written to the console")
        parts += [f"  | {line}" for line in self.console]
        if self.trace:
            parts += ["host traceback:", self.trace.rstrip()]
        return "\n".join(parts)


def find_panic(lines: Sequence[str]) -> str | None:
    """The kernel's reason for a panic among ``lines`` of console output, None if it did not panic."""
    for line in lines:
        if match := PANIC.search(line):
            return match.group(1).strip()
    return None


def report_hart(hart: ReportedHart, memory: GuestMemory, state: str) -> HartReport:
    """Read one hart, which must be out of guest code."""
    return HartReport(
        hart=hart.id,
        state=state,
        pc=hart.pc,
        privilege="S" if hart.privilege else "U",
        instructions=hart.instructions,
        registers={name: hart.x[number] for number, name in enumerate(X_NAMES)},
        csrs={name: hart.csr[name] for name in REPORTED_CSRS},
        code=_code_around(hart, memory),
    )


def _code_around(hart: ReportedHart, memory: GuestMemory) -> tuple[CodeLine, ...]:
    # Instructions are 2 or 4 bytes long, so that walking backwards is a guess: take the earliest start before pc from
    # which decoding arrives at pc exactly.
    for start in range(max(hart.pc - CODE_BYTES_BEFORE, 0), hart.pc, 2):
        before: list[CodeLine] = []
        address = start
        while address < hart.pc and (line := _instruction(hart, memory, address)).raw is not None:
            before.append(line)
            address += 4 if line.raw is not None and line.raw & 3 == 3 else 2
        if address == hart.pc:
            break
    else:
        before = []
    after: list[CodeLine] = []
    address = hart.pc
    while len(after) < INSTRUCTIONS_AFTER:
        line = _instruction(hart, memory, address)
        after.append(line)
        if line.raw is None:
            break
        address += 4 if line.raw & 3 == 3 else 2
    return (*before, *after)


def _instruction(hart: ReportedHart, memory: GuestMemory, address: int) -> CodeLine:
    from vmm.engine.rv64.disassembler import disassemble
    from vmm.engine.rv64.instructions import instruction_length

    try:
        raw = _fetch(hart, memory, address)
        if instruction_length(raw) == 4:
            raw |= _fetch(hart, memory, address + 2) << 16
    except VmmError:
        return CodeLine(address, None, "no memory here")
    return CodeLine(address, raw, disassemble(raw, address))


def _fetch(hart: ReportedHart, memory: GuestMemory, address: int) -> int:
    physical = hart.translate(address & ((1 << 64) - 1))
    if physical is None:
        raise VmmError(f"guest-virtual address {address:#x} is not mapped")
    return memory.read_int(physical, 2)
