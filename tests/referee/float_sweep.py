"""Every floating-point instruction over special values and all rounding modes, several operations to a case.

A case's f registers are dealt out: operands below, results from f22 on. x1..x10 are integer operands, x11..x20 integer
results, x21..x30 the flags that each operation raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from random import Random

from tests.referee import values
from tests.referee.case import CSR, FS_INITIAL, Case
from vmm.engine.rv64.instructions import BY_NAME, INSTRUCTIONS, Instruction

_OPERANDS, _RESULTS, _INTEGERS, _INTEGER_RESULTS, _FLAGS = 0, 22, 1, 11, 21
_MOST_OPERANDS, _MOST_OPERATIONS = _RESULTS - _OPERANDS, 10
_DYNAMIC = 7

NUMERIC = tuple(
    row
    for row in INSTRUCTIONS
    if row.length == 4 and row.match & 0x7F in (0x43, 0x47, 0x4B, 0x4F, 0x53) and not row.name.startswith("fmv")
)


def _sources(row: Instruction) -> tuple[str, ...]:
    return tuple(name for name in ("fs1", "fs2", "fs3", "rs1") if name in row.operands)


def _operands(row: Instruction, random: Random, most: int) -> Iterator[tuple[int, ...]]:
    """Operand patterns for ``row``: every special value, at most ``most`` combinations of several."""
    sources = _sources(row)
    if sources == ("rs1",):
        yield from ((value,) for value in values.INTEGERS)
        yield from ((values.integer(random),) for _ in range(most // 10))
        return
    if row.name.endswith(".s"):
        corners = [values.BOX | sign | value for value in values.SINGLES for sign in (0, 1 << 31)]
    else:
        corners = [sign | value for value in values.DOUBLES for sign in (0, 1 << 63)]
    if len(sources) == 1:
        yield from ((value,) for value in corners)
        return
    if len(sources) == 2:
        every = list(product(corners, repeat=2))
        yield from every if len(every) <= most else random.sample(every, most)
        return
    for _ in range(most):
        yield random.choice(corners), random.choice(corners), random.choice(corners)


def _pack(row: Instruction, mode: int, group: Sequence[tuple[int, ...]], *, dynamic: bool) -> Case:
    """One case that applies ``row`` to every operand tuple of ``group``."""
    sources = _sources(row)
    x, f = [0] * 32, [0] * 32
    units = []
    for index, operands in enumerate(group):
        fields = {"fd": _RESULTS + index} if "fd" in row.operands else {"rd": _INTEGER_RESULTS + index}
        for place, (name, value) in enumerate(zip(sources, operands, strict=True)):
            if name == "rs1":
                fields[name] = _INTEGERS + index
                x[fields[name]] = value
            else:
                fields[name] = _OPERANDS + index * len(sources) + place
                f[fields[name]] = value
        if "rm" in row.operands:
            fields["rm"] = _DYNAMIC if dynamic else mode
        flags = BY_NAME["csrrwi"].encode(rd=_FLAGS + index, csr=CSR["fflags"], zimm=0)
        units.append(row.encode(**fields).to_bytes(4, "little") + flags.to_bytes(4, "little"))
    fcsr = mode << 5 if dynamic else 0
    title = f"{row.name}, rounding mode {mode}{' from frm' if dynamic else ''}"
    return Case(tuple(units), x=tuple(x), f=tuple(f), fcsr=fcsr, sstatus=FS_INITIAL, title=title)


def float_sweep(row: Instruction, seed: int, most: int) -> list[Case]:
    """Cases for one instruction: all rounding modes, static and dynamic in turn."""
    random = Random(f"{row.name} {seed}")
    packed = min(_MOST_OPERATIONS, _MOST_OPERANDS // len(_sources(row)))
    cases = []
    for mode in (0, 1, 2, 3, 4) if "rm" in row.operands else (0,):
        every = list(_operands(row, random, most))
        groups = [every[at : at + packed] for at in range(0, len(every), packed)]
        cases += [_pack(row, mode, group, dynamic=bool(index & 1)) for index, group in enumerate(groups)]
    return cases
