"""From instruction words to assembly text, by the rows of the instruction table.

The syntax is that of the RISC-V Assembly Programmer's Manual; pseudo-instructions are not used, so that what is printed
is what the hart executes.
"""

from __future__ import annotations

import re

from vmm.engine.rv64.instructions import Instruction, decode, instruction_length
from vmm.engine.rv64.registers import CSR_NAMES, F_NAMES, X_NAMES

ROUNDING_MODES = ("rne", "rtz", "rdn", "rup", "rmm", "reserved5", "reserved6", "dyn")


def _fence_set(bits: int) -> str:
    return "".join(letter for letter, bit in zip("iorw", (8, 4, 2, 1), strict=True) if bits & bit) or "0"


def _operand(name: str, fields: dict[str, int], pc: int) -> str:
    if name == "target":
        return f"{(pc + fields['imm']) & (1 << 64) - 1:#x}"
    if name == "upper":
        return f"{fields['imm'] >> 12 & 0xFFFFF:#x}"
    if name == "order":
        return f"{_fence_set(fields['pred'])}, {_fence_set(fields['succ'])}"
    value = fields[name]
    if name == "csr":
        return CSR_NAMES.get(value, f"{value:#x}")
    if name == "rm":
        return ROUNDING_MODES[value]
    if name in ("rd", "rs1", "rs2", "rs3"):
        return X_NAMES[value]
    if name in ("fd", "fs1", "fs2", "fs3"):
        return F_NAMES[value]
    return str(value)


def _text(instruction: Instruction, fields: dict[str, int], pc: int) -> str:
    operands = re.sub(r"[a-z]+\d?", lambda found: _operand(found[0], fields, pc), instruction.assembly)
    order = ".aq" * fields.get("aq", 0) + (
        "rl" if fields.get("aq") and fields.get("rl") else ".rl" * fields.get("rl", 0)
    )
    return f"{instruction.name}{order} {operands}".rstrip()


def disassemble(word: int, pc: int = 0) -> str:
    """Assembly text of one instruction word at address ``pc`` (branch targets are absolute)."""
    found = decode(word)
    if found is None:
        return f".2byte {word & 0xFFFF:#06x}" if instruction_length(word) == 2 else f".4byte {word & 0xFFFFFFFF:#010x}"
    return _text(*found, pc)
