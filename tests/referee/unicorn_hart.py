"""The second referee: unicorn's RISC-V core, for blocks without privileged state.

Unicorn 2.1 descends from another QEMU (5.0) than the first referee and runs a block flat, in machine mode, without paging.
What it cannot judge is left out by :func:`can_judge`: traps (cases that QEMU ends otherwise than at their last ebreak), CSRs
beyond fcsr, and instructions in which QEMU 5.0 has known faults (see `_FAULTY`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import unicorn
import unicorn.riscv_const as names

from tests.referee.case import CODE_S, CODE_U, CSR, DATA_S, DATA_U, FS_MASK, FS_OFF, PAGE, Case, Outcome
from tests.referee.machines import RefereeError
from tests.referee.verdict import Difference, describe
from vmm.engine.rv64.instructions import decode

_CODE_SIZE = 1 << 20
#: QEMU 5.0 does not check single-precision inputs for NaN boxing nor boxes what fmv.w.x moves (both fixed in 5.2), and its
#: fmin and fmax return the other operand beside a signalling NaN as IEEE 754-2008 did (fixed in 6.1).
_FAULTY_PREFIXES = ("fmin.", "fmax.", "fmv.w.x")
_SYSTEM = frozenset(("ecall", "ebreak", "sret", "wfi", "sfence.vma", "fence.i", "c.ebreak"))
_FLOAT_CSRS = frozenset((CSR["fflags"], CSR["frm"], CSR["fcsr"]))
_X = tuple(getattr(names, f"UC_RISCV_REG_X{index}") for index in range(32))
_F = tuple(getattr(names, f"UC_RISCV_REG_F{index}") for index in range(32))


def can_judge(case: Case, start: int, outcome: Outcome) -> bool:
    """Whether the case ran to its end on the first referee and holds nothing that unicorn is known to get wrong."""
    fields = outcome.fields
    end = start + len(case.code)
    if case.space is not None or fields["scause"] != 3 or fields["sepc"] != end or case.sstatus & FS_MASK == FS_OFF:
        return False
    boxed = {index for index, value in enumerate(case.f) if value >> 32 == 0xFFFF_FFFF}
    straight = True
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
        single = row.name.startswith("f") and ".s" in row.name
        if single and row.name != "fcvt.s.d" and any(operands.get(name, 0) not in boxed for name in _inputs(operands)):
            return False
        straight = straight and "goto" not in row.semantics
        if "fd" in operands:
            # Past a branch a result may never have been written.
            boxes = row.name == "flw" or single and row.name != "fcvt.d.s"
            boxed = (
                boxed | {operands["fd"]} if boxes and straight else boxed - ({operands["fd"]} if not boxes else set())
            )
    return True


def _inputs(operands: dict[str, int]) -> tuple[str, ...]:
    return tuple(name for name in operands if name.startswith("fs"))


class UnicornHart:
    """One flat machine that is set anew for each case."""

    def __init__(self) -> None:
        self._cpu = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
        # Both windows show one page, as in the shared address space.
        self._page = ctypes.create_string_buffer(2 * PAGE)
        aligned = -ctypes.addressof(self._page) % PAGE + ctypes.addressof(self._page)
        for base in (CODE_S, CODE_U):
            self._cpu.mem_map(base, _CODE_SIZE)
        for base in (DATA_S, DATA_U):
            self._cpu.mem_map_ptr(base, PAGE, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, aligned)

    def run(self, case: Case, start: int) -> tuple[dict[str, int], bytes]:
        """Registers and fcsr after the block at ``start``, and the data page.

        Raises:
            RefereeError: the block trapped.
        """
        cpu = self._cpu
        cpu.mem_write(start, case.code)
        cpu.ctl_flush_tb()
        cpu.mem_write(DATA_S, case.data.ljust(PAGE, b"\0"))
        cpu.reg_write(names.UC_RISCV_REG_MSTATUS, 3 << 13)
        for register, value in zip(_X[1:], case.x[1:], strict=True):
            cpu.reg_write(register, value)
        for register, value in zip(_F, case.f, strict=True):
            cpu.reg_write(register, value)
        cpu.reg_write(names.UC_RISCV_REG_FCSR, case.fcsr)
        try:
            cpu.emu_start(start, start + len(case.code))
        except unicorn.UcError as error:
            raise RefereeError(f"unicorn stopped in {case.title}: {error}") from error
        result = {f"x{index}": cpu.reg_read(_X[index]) for index in range(1, 32)}
        result |= {f"f{index}": cpu.reg_read(_F[index]) for index in range(32)}
        return result | {"fcsr": cpu.reg_read(names.UC_RISCV_REG_FCSR)}, bytes(cpu.mem_read(DATA_S, PAGE))


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
        found = [Difference(name, mine[name], value) for name, value in fields.items() if mine[name] != value]
        if found or data != outcome.data:
            reports.append(describe(case, found))
    return judged, reports
