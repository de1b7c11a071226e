"""The second referee: unicorn's RISC-V core, for blocks without privileged state.

Unicorn 2.1 descends from another QEMU (5.0) than the first referee. It runs a block flat, in machine mode, without
paging. What it cannot judge is left out by :func:`can_judge`: cases that trap before their last ebreak, CSRs beyond
fcsr, and instructions in which QEMU 5.0 has known faults.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

from tests.referee.case import CODE_S, CODE_U, CSR, DATA_S, DATA_U, FS_MASK, FS_OFF, PAGE, Case, Outcome, RefereeError
from tests.referee.verdict import Difference, describe
from vmm.engine.rv64.instructions import decode

# Unicorn's type information is incomplete: it is used untyped.
_unicorn: Any = importlib.import_module("unicorn")
_names: Any = importlib.import_module("unicorn.riscv_const")

_CODE_SIZE = 1 << 20
_BREAKPOINT = 3
#: fmin and fmax of QEMU 5.0 treat signalling NaNs as IEEE 754-2008 did (fixed in 6.1).
_FAULTY_PREFIXES = ("fmin.", "fmax.")
_SYSTEM = frozenset(("ecall", "ebreak", "sret", "wfi", "sfence.vma", "fence.i", "c.ebreak"))
_FLOAT_CSRS = frozenset((CSR["fflags"], CSR["frm"], CSR["fcsr"]))
_X = tuple(getattr(_names, f"UC_RISCV_REG_X{index}") for index in range(32))
_F = tuple(getattr(_names, f"UC_RISCV_REG_F{index}") for index in range(32))
_SINGLE_SOURCE = frozenset(("fmv.x.w", "fsw", "fcvt.d.s"))
_DOUBLE_SOURCE = frozenset(("fmv.x.d", "fsd", "fcvt.s.d", "c.fsd", "c.fsdsp"))
_BOX = 0xFFFF_FFFF << 32


class _Boxes:
    """Which f registers hold a boxed single, so far as that can be told without running the block.

    QEMU 5.0 neither checks nor writes NaN boxes (fixed in 5.2): a single must be read as a single, a double as a
    double.
    """

    def __init__(self, f: Sequence[int]) -> None:
        self.boxed = {index for index, value in enumerate(f) if value & _BOX == _BOX}
        self.halves: set[int] = set()
        self.straight = True

    def admits(self, name: str, operands: dict[str, int], semantics: str) -> bool:
        """Whether the next instruction means the same with and without boxes."""
        sources = {value for key, value in operands.items() if key.startswith("fs")}
        single = name.endswith(".s") or (name.startswith("f") and ".s." in name)
        if name in _DOUBLE_SOURCE or (not single and name not in _SINGLE_SOURCE):
            fine = not sources & self.halves
        else:
            fine = sources <= self.boxed
        self.straight = self.straight and "goto" not in semantics
        if "fd" in operands:
            self._write(operands["fd"], (single and name != "fcvt.d.s") or name in ("flw", "fmv.w.x"))
        return fine

    def _write(self, register: int, single: bool) -> None:
        # Past a branch a result may never have been written.
        if single:
            self.halves.add(register)
        elif self.straight:
            self.halves.discard(register)
        if not single:
            self.boxed.discard(register)
        elif self.straight:
            self.boxed.add(register)


def can_judge(case: Case, start: int, outcome: Outcome) -> bool:
    """Whether the case ran to its end and holds nothing that unicorn is known to get wrong."""
    fields = outcome.fields
    end = start + len(case.code)
    if case.space is not None or case.sstatus & FS_MASK == FS_OFF:
        return False
    if fields["scause"] != _BREAKPOINT or fields["sepc"] != end:
        return False
    boxes = _Boxes(case.f)
    code, at = case.code, 0
    while at < len(code):
        size = 4 if code[at] & 3 == 3 else 2
        found = decode(int.from_bytes(code[at : at + size], "little"))
        at += size
        if found is None:
            return False
        row, operands = found
        if row.name in _SYSTEM or row.name.startswith(_FAULTY_PREFIXES):
            return False
        if row.name.startswith("csr") and operands["csr"] not in _FLOAT_CSRS:
            return False
        if not boxes.admits(row.name, operands, row.semantics):
            return False
    return True


class UnicornHart:
    """One flat machine that is set anew for each case."""

    def __init__(self) -> None:
        self._cpu = _unicorn.Uc(_unicorn.UC_ARCH_RISCV, _unicorn.UC_MODE_RISCV64)
        # Both windows show one page, as in the shared address space.
        self._page = ctypes.create_string_buffer(2 * PAGE)
        aligned = ctypes.addressof(self._page) + -ctypes.addressof(self._page) % PAGE
        for base in (CODE_S, CODE_U):
            self._cpu.mem_map(base, _CODE_SIZE)
        for base in (DATA_S, DATA_U):
            self._cpu.mem_map_ptr(base, PAGE, _unicorn.UC_PROT_READ | _unicorn.UC_PROT_WRITE, aligned)

    def run(self, case: Case, start: int) -> tuple[dict[str, int], bytes]:
        """Registers and fcsr after the block at ``start``, and the data page.

        Raises:
            RefereeError: the block trapped.
        """
        cpu = self._cpu
        cpu.mem_write(start, case.code)
        cpu.ctl_flush_tb()
        cpu.mem_write(DATA_S, case.data.ljust(PAGE, b"\0"))
        cpu.reg_write(_names.UC_RISCV_REG_MSTATUS, FS_MASK)
        for register, value in zip(_X[1:], case.x[1:], strict=True):
            cpu.reg_write(register, value)
        for register, value in zip(_F, case.f, strict=True):
            cpu.reg_write(register, value)
        cpu.reg_write(_names.UC_RISCV_REG_FCSR, case.fcsr)
        try:
            cpu.emu_start(start, start + len(case.code))
        except _unicorn.UcError as error:
            raise RefereeError(f"unicorn stopped in {case.title}: {error}") from error
        result = {f"x{index}": int(cpu.reg_read(_X[index])) for index in range(1, 32)}
        result |= {f"f{index}": int(cpu.reg_read(_F[index])) for index in range(32)}
        result["fcsr"] = int(cpu.reg_read(_names.UC_RISCV_REG_FCSR))
        return result, bytes(cpu.mem_read(DATA_S, PAGE))


def _unboxed(name: str, ours: int, theirs: int) -> bool:
    """An f register with the same single, in its box with us, bare with unicorn."""
    return name.startswith("f") and name != "fcsr" and ours == theirs | _BOX


def unicorn_disagreements(
    cases: Sequence[Case], ours: Sequence[Outcome], starts: Sequence[int]
) -> tuple[int, list[str]]:
    """How many of ``cases`` unicorn could judge, and a report for each whose outcome it disputes."""
    hart = UnicornHart()
    judged = 0
    reports = []
    for case, outcome, start in zip(cases, ours, starts, strict=True):
        if not can_judge(case, start, outcome):
            continue
        judged += 1
        fields, data = hart.run(case, start)
        mine = outcome.fields
        found = [
            Difference(name, mine[name], value)
            for name, value in fields.items()
            if mine[name] != value and not _unboxed(name, mine[name], value)
        ]
        if found or data != outcome.data:
            reports.append(describe(case, found))
    return judged, reports
