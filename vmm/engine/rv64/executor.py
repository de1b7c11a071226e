"""The executor: code for every row of the instruction table, and the loop that runs it.

From each row's meaning comes one statement of Python; ``source()`` shows them all. numba compiles the statements in
groups, and LLVM joins the groups into one jump table, the inner loop of ``loop.run``.
"""

from __future__ import annotations

import re
from typing import Any

from llvmlite import ir
from numba import types

from vmm.engine.rv64 import arithmetic, floating, fused, mmu, native, operands, system
from vmm.engine.rv64.fused import FUSED, Fused
from vmm.engine.rv64.instructions import INSTRUCTIONS, Instruction
from vmm.engine.rv64.layout import Hart
from vmm.engine.rv64.native import I64, define

ROWS: tuple[Instruction | Fused, ...] = (*INSTRUCTIONS, *FUSED)
GROUP = 16  #: rows that numba compiles as one function: its analyses take more than linear time
STRAIGHT = "rv64_straight"  #: symbol of the inner loop, made when everything is linked
PARAMETERS = "operation, s, word, record, retired"

CSR_OPERATIONS = {"csr_write": system.WRITE, "csr_set": system.SET, "csr_clear": system.CLEAR}

_LOAD = re.compile(r"(rd|fd) = (?:box\()?([iu]\d+)\[(.+?)\]\)?$")
_STORE = re.compile(r"([iu]\d+)\[(.+)\] = (.+)$")
_BRANCH = re.compile(r"if (.+): goto pc \+ imm$")
_JUMP = re.compile(r"(rd = link; )?goto (.+)$")
_ATOMIC = re.compile(r"rd = (atomic_\w+)\[rs1\]\(rs2\)$")
_RESERVED = re.compile(r"rd = (load_reserved|store_conditional)_(i32|i64)\(.+\)$")
_CSR = re.compile(r"rd = (csr_\w+)\(csr, (\w+)\)$")
_PLAIN = re.compile(r"(rd|fd) = (.+)$")

_OPERANDS = {
    "zimm": "(word >> 16 & 255)",
    "imm": "(word >> 32)",
    "flags": "(s + FFLAGS)",
    "rm": "mode",
    **{name: f"{name}(s, word)" for name in ("rs1", "rs2", "fs1", "fs2", "fs3")},
}


def _fetch(meaning: str) -> str:
    """A meaning's operands, as expressions that fetch them."""
    return re.sub(r"\b(rs1|rs2|fs1|fs2|fs3|zimm|imm|rm|flags)\b", lambda name: _OPERANDS[name[0]], meaning)


def _guards(row: Instruction) -> list[str]:
    """What must hold before a floating-point instruction: FS is not off, the rounding mode is not a reserved one."""
    lines = []
    if re.search(r"\bf[ds]\d?\b", row.semantics):
        changes = "fd =" in row.semantics or "flags" in row.semantics
        lines += [f"if {'floating_dirty' if changes else 'floating_off'}(s):", "    return stop(s, record)"]
    if re.search(r"\brm\b", row.semantics):
        lines += ["mode = rounding_mode(s, word)", "if mode < 0:", "    return stop(s, record)"]
    return lines


_STOP = "return stop(s, record)"
_SERIALISE = "return serialise(s, record, {link})"
_SYSTEM = {
    "memory_fence": ["memory_fence()", "return {next}"],
    "pause": ["yield_processor()", "return {next}"],
    "fence_i": ["fence_instructions(s)", _SERIALISE],
    "ecall": ["environment_call(s)", _STOP],
    "ebreak": ["raise_exception(s, 3, 0)", _STOP],
    "sret": [
        "if load_i64(s + PRIVILEGE) == 0:",
        "    illegal(s)",
        "    " + _STOP,
        "return serialise(s, record, return_from_trap(s))",
    ],
    "wfi": ["if wait_for_interrupt(s, retired - 1):", "    " + _STOP, _SERIALISE],
    "sfence_vma": [
        "if fence_translations(s, word >> 16 & 255, word >> 24 & 255, rs1(s, word)):",
        "    " + _STOP,
        _SERIALISE,
    ],
}


def _statements(row: Instruction) -> list[str]:
    """Python for one row: ends by returning the next record."""
    meaning = row.semantics
    step = row.length << 2
    following, link = f"record + {step}", f"pc_of(s, record) + {row.length}"
    near = "jump_near(s, record, record + (word >> 32), retired)"  # the decoder scaled the distance to records
    lines = _guards(row)
    if found := _LOAD.match(meaning):
        file = "x" if found[1] == "rd" else "f"
        lines.append(f"return load_{file}_{found[2]}(s, word, {_fetch(found[3])}, record, {step})")
    elif found := _STORE.match(meaning):
        lines.append(f"return store_to_{found[1]}(s, {_fetch(found[2])}, {_fetch(found[3])}, record, {step})")
    elif found := _BRANCH.match(meaning):
        lines += [f"if {_fetch(found[1])}:", f"    return {near}", f"return {following}"]
    elif found := _JUMP.match(meaning):
        if found[2] != "pc + imm":
            lines.append(f"target_{row.operation} = {_fetch(found[2])}")
        if found[1]:
            lines.append(f"set_rd(s, word, {link}, {following})")
        far = f"jump_far(s, record, target_{row.operation}, retired)"
        lines.append(f"return {near if found[2] == 'pc + imm' else far}")
    elif found := _ATOMIC.match(meaning):
        width = 4 if found[1].endswith("i32") else 8
        lines += [f"host = atomic_address(s, rs1(s, word), {width})", "if host == 0:", "    " + _STOP]
        lines.append(f"return set_rd(s, word, {found[1]}(host, rs2(s, word)), {following})")
    elif found := _RESERVED.match(meaning):
        lines += [f"if {found[1]}_{found[2]}(s, word):", "    " + _STOP, f"return {following}"]
    elif found := _CSR.match(meaning):
        writes = "1" if found[1] == "csr_write" else "word >> 16 & 255"
        arguments = f"word >> 32 & 4095, {CSR_OPERATIONS[found[1]]}, {_fetch(found[2])}, {writes}, retired - 1"
        lines.append(f"return access_csr_of(s, word, record, {arguments})")
    elif found := _PLAIN.match(meaning):
        value = _fetch(found[2]).replace("pc +", "pc_of(s, record) +")
        lines.append(f"return set_{found[1]}(s, word, {value}, {following})")
    else:
        texts = _SYSTEM[re.sub(r"\(.*", "", meaning)]
        lines += [text.format(next=following, link=link) for text in texts]
    return lines


def group_source(number: int) -> str:
    """Python text of one group of rows."""
    lines = [f"def group_{number}({PARAMETERS}):"]
    for row in ROWS[number * GROUP : (number + 1) * GROUP]:
        if isinstance(row, Fused):
            name, statements = row.name, list(row.statements)
        else:
            name, statements = f"{row.name}: {row.semantics}", _statements(row)
        lines.append(f"    if operation == {row.operation}:  # {name}")
        lines += ["        " + line for line in statements]
    lines.append("    return record")
    return "\n".join(lines) + "\n"


def source() -> str:
    """Python text of all rows."""
    return "\n\n".join(group_source(number) for number in range(groups()))


def groups() -> int:
    """How many groups there are."""
    return -(-len(ROWS) // GROUP)


def _emit_straight(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(I64, [I64] * 3)
    function = builder.module.globals.get(STRAIGHT) or ir.Function(builder.module, kind, STRAIGHT)
    return builder.call(function, values)


straight = define(
    "straight",
    _emit_straight,
    types.int64,
    (types.int64,) * 3,
    "Execute records from one on, with so many instructions retired: the record that no row stands for, the stop record"
    " or an empty one. RETIRED then counts it, too.",
)


def _count(row: Fused) -> tuple[list[str], str]:
    """LLVM text that takes apart what a fused row returned; the name of the new number of instructions retired."""
    n = row.operation
    if row.loops:
        lines = [f"  %field{n} = add i64 %s, {Hart.AHEAD}", f"  %at{n} = inttoptr i64 %field{n} to ptr"]
        lines += [f"  %more{n} = load i64, ptr %at{n}, align 8", f"  %next{n} = load i64, ptr %place{n}"]
    else:
        lines = [f"  %both{n} = load i64, ptr %place{n}", f"  %more{n} = and i64 %both{n}, 7"]
        lines.append(f"  %next{n} = and i64 %both{n}, -8")
    return [*lines, f"  %retired{n} = add i64 %retired, %more{n}"], f"%retired{n}"


def straight_module(symbols: list[str]) -> str:
    """LLVM text of the inner loop: load a record, count, jump by its operation.

    Each of the jump table's targets calls its group with the operation as a constant, which LLVM inlines and cuts
    down to the one row. The groups have numba's calling convention (result and exception pointers).
    """
    kind = "i32 (ptr, ptr, i64, i64, i64, i64, i64)"
    first = ROWS[0].operation
    cases, blocks, counts = [], [], []
    for row in ROWS:
        n, symbol = row.operation, symbols[(row.operation - first) // GROUP]
        cases.append(f"    i8 {n}, label %row{n}")
        after, count = (
            _count(row) if isinstance(row, Fused) else ([f"  %next{n} = load i64, ptr %place{n}"], "%retired")
        )
        counts.append(f"[{count}, %row{n}]")
        blocks += [
            f"row{n}:",
            f"  call {kind} @{symbol}(ptr %place{n}, ptr null, i64 {n}, i64 %s, i64 %word, i64 %record, i64 %retired)",
            *after,
            "  br label %loop",
        ]
    # Every value of the operation has a case, so that nothing has to be compared before the jump.
    cases += [f"    i8 {n}, label %end" for n in range(256) if not 0 <= n - first < len(ROWS)]
    predecessors = ", ".join(f"[%next{row.operation}, %row{row.operation}]" for row in ROWS)
    return "\n".join(
        [
            *(f"declare i32 @{symbol}(ptr, ptr, i64, i64, i64, i64, i64)" for symbol in symbols),
            f"define i64 @{STRAIGHT}(i64 %s, i64 %start, i64 %count) {{",
            "entry:",
            *(f"  %place{row.operation} = alloca i64" for row in ROWS),
            "  br label %loop",
            "loop:",
            f"  %record = phi i64 [%start, %entry], {predecessors}",
            f"  %before = phi i64 [%count, %entry], {', '.join(counts)}",
            "  %pointer = inttoptr i64 %record to ptr",
            "  %word = load i64, ptr %pointer, align 8",
            "  %retired = add i64 %before, 1",
            "  %operation = trunc i64 %word to i8",
            "  switch i8 %operation, label %never [",
            *cases,
            "  ]",
            *blocks,
            "never:",
            "  unreachable",
            "end:",
            f"  %field = add i64 %s, {Hart.RETIRED}",
            "  %out = inttoptr i64 %field to ptr",
            "  store i64 %retired, ptr %out, align 8",
            "  ret i64 %record",
            "}",
        ]
    )


def compile_groups() -> list[Any]:
    """The groups, compiled."""
    names = namespace()
    compiled = []
    for number in range(groups()):
        exec(compile(group_source(number), f"<rv64 rows, group {number}>", "exec"), names)
        compiled.append(native.native(names[f"group_{number}"]))
    return compiled


def namespace() -> dict[str, Any]:
    """What the compiled texts refer to."""
    names: dict[str, Any] = {}
    for module in (native, arithmetic, mmu, system, floating, operands, fused):
        names.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
    names.update({name: value for name, value in vars(Hart).items() if not name.startswith("_")})
    names["SIGN"] = -1 << 63
    return names
