"""The floating-point operations under test: how each is called, and the instruction that QEMU runs for it."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product

from tests.vmm.engine.floating import qemu
from tests.vmm.engine.floating.rational import BINARY32, BINARY64, Format
from vmm.engine.rv64 import floating

MODES = range(5)
MASK_32, MASK_64 = 2**32 - 1, 2**64 - 1


@dataclass(frozen=True)
class Operation:
    """One function of ``floating`` beside its instruction. Kinds: "s" binary32, "d" binary64, "x" integer."""

    name: str
    operands: str
    result: str
    instruction: int
    rounds: bool = True
    flags: bool = True

    def call(self, operands: tuple[int, ...], rounding: int, accrued: int) -> tuple[int, int]:
        """Result as an unsigned pattern, and the accrued flags after it."""
        word = ctypes.c_int64(accrued)
        arguments = [operand - 2**64 if operand >> 63 else operand for operand in operands]
        arguments += [rounding] * self.rounds
        arguments += [ctypes.addressof(word)] * self.flags
        function: Callable[..., int] = getattr(floating, self.name)
        result = function(*arguments)
        assert self.result != "s" or 0 <= result <= MASK_32, "a binary32 result is zero-extended"
        return result & MASK_64, word.value

    def referee(self, cases: list[tuple[tuple[int, ...], int]]) -> list[tuple[int, int]]:
        """QEMU's results and flags for operands and rounding modes."""
        records = []
        for operands, rounding in cases:
            a, b, c = (*operands, 0, 0)[:3]
            box = MASK_32 << 32 if "s" in self.operands else 0
            records.append((a | box, b | box, c | box, rounding))
        answers = qemu.answers(self.instruction, records)
        return [
            (a0 if self.result == "x" else fa0 & MASK_32 if self.result == "s" else fa0, flags)
            for a0, fa0, flags in answers
        ]


def _operations() -> list[Operation]:
    found = []
    for double, kind in enumerate("sd"):
        name = ("f32", "f64")[double]
        for funct7, stem in ((0x00, "add"), (0x04, "sub"), (0x08, "mul"), (0x0C, "div")):
            word = qemu.operation(funct7 | double, qemu.FA1, qemu.DYNAMIC)
            found.append(Operation(f"{name}_{stem}", kind * 2, kind, word))
        found.append(Operation(f"{name}_sqrt", kind, kind, qemu.operation(0x2C | double, 0, qemu.DYNAMIC)))
        found.append(Operation(f"{name}_fma", kind * 3, kind, qemu.fused(double)))
        for funct7, rm, stem, result in (
            (0x14, 0, "min", kind),
            (0x14, 1, "max", kind),
            (0x50, 0, "le", "x"),
            (0x50, 1, "lt", "x"),
            (0x50, 2, "eq", "x"),
        ):
            word = qemu.operation(funct7 | double, qemu.FA1, rm)
            found.append(Operation(f"{name}_{stem}", kind * 2, result, word, rounds=False))
        word = qemu.operation(0x70 | double, 0, 1)
        found.append(Operation(f"{name}_class", kind, "x", word, rounds=False, flags=False))
        for number, integer in enumerate(("i32", "u32", "i64", "u64")):
            word = qemu.operation(0x60 | double, number, qemu.DYNAMIC)
            found.append(Operation(f"{name}_to_{integer}", kind, "x", word))
            word = qemu.operation(0x68 | double, number, qemu.DYNAMIC)
            found.append(Operation(f"{integer}_to_{name}", "x", kind, word))
    found.append(Operation("f64_to_f32", "d", "s", qemu.operation(0x20, 1, qemu.DYNAMIC)))
    found.append(Operation("f32_to_f64", "s", "d", qemu.operation(0x21, 0, 0), rounds=False))
    return found


OPERATIONS = {operation.name: operation for operation in _operations()}


def _special_numbers(form: Format) -> list[int]:
    fraction = form.precision - 1
    one = form.greatest_exponent << fraction
    infinite = 2 * form.greatest_exponent + 1 << fraction
    quiet = 1 << (fraction - 1)
    sizes = [
        0,
        1,
        (1 << fraction) - 1,
        1 << fraction,
        (1 << fraction) + 1,
        one - 1,
        one,
        one + 1,
        one | quiet,
        one + (1 << fraction),
        infinite - 1,
        infinite,
        infinite | 1,
        infinite | quiet,
        infinite | quiet | 5,
    ]
    return [size | sign << (form.width - 1) for size in sizes for sign in (0, 1)]


def _edges_of_integers(form: Format) -> list[int]:
    """Numbers about the bounds of the integer types, where conversions round, saturate or are inexact."""
    fraction = form.precision - 1
    found = []
    for power in (-2, -1, 0, 1, 23, 24, 30, 31, 32, 52, 53, 61, 62, 63, 64):
        pattern = form.greatest_exponent + power << fraction
        half = 1 << max(fraction - power - 1, 0)
        found += [pattern, pattern + 1, pattern - 1, pattern + half, pattern + half + 1, pattern - half, pattern | 3]
    return [size | sign << (form.width - 1) for size in found for sign in (0, 1)]


def _integers() -> list[int]:
    found = []
    for power in (0, 1, 23, 24, 25, 31, 32, 33, 52, 53, 54, 55, 61, 62, 63):
        half = 1 << max(power - 24, 0)
        small = 1 << max(power - 53, 0)
        found += [
            (1 << power) + step for step in (0, 1, -1, half, -half, half + 1, small, small + 1, 3 * small, -small)
        ]
    return sorted({value & MASK_64 for size in found for value in (size, -size, size << 1)})


FORMS = {"s": BINARY32, "d": BINARY64}


def special_operands(operation: Operation) -> list[tuple[int, ...]]:
    """All tuples of special values; one in seven of three operands."""
    if operation.operands == "x":
        return [(value,) for value in _integers()]
    form = FORMS[operation.operands[0]]
    special = _special_numbers(form)
    if len(operation.operands) == 1:
        return [(value,) for value in special + _edges_of_integers(form)]
    if len(operation.operands) == 2:
        return list(product(special, repeat=2))
    few = [value for value in special if value not in (special[5], special[7], special[15], special[-1])]
    return list(islice(product(few, repeat=3), 0, None, 7))


def _random_number(source: random.Random, form: Format, near: int) -> int:
    """A pattern whose exponent is one of a few kinds and whose fraction often has long runs of equal bits."""
    fraction = form.precision - 1
    exponent = source.choice(
        (
            source.randrange(2 * form.greatest_exponent + 2),
            form.greatest_exponent + source.randrange(-3, 4),
            near + source.randrange(-fraction - 4, fraction + 5),
            near,
            source.randrange(3),
        )
    )
    exponent = min(max(exponent, 0), 2 * form.greatest_exponent + 1)
    bits = source.getrandbits(fraction)
    kind = source.randrange(4)
    if kind == 1:
        bits &= -1 << source.randrange(fraction)
    elif kind == 2:
        bits |= (1 << source.randrange(fraction)) - 1
    elif kind == 3:
        bits = (1 << source.randrange(fraction)) - source.randrange(2)
    bits &= (1 << fraction) - 1
    return exponent << fraction | bits | source.getrandbits(1) << (form.width - 1)


def random_operands(operation: Operation, count: int, seed: int) -> list[tuple[int, ...]]:
    """Tuples of random operands, near one another in exponent more often than chance."""
    source = random.Random(seed)
    if operation.operands == "x":
        integers = ((source.getrandbits(64) >> source.randrange(64)) * source.choice((1, -1)) for _ in range(count))
        return [(value & MASK_64,) for value in integers]
    form = FORMS[operation.operands[0]]
    found = []
    for _ in range(count):
        near = source.choice((form.greatest_exponent, source.randrange(2 * form.greatest_exponent + 1)))
        values = [_random_number(source, form, near) for _ in operation.operands]
        if operation.name.endswith("fma") and source.randrange(2):
            # An addend about the product, of the other sign: cancellation.
            fraction = form.precision - 1
            exponents = [value >> fraction & 2 * form.greatest_exponent + 1 for value in values]
            exponent = exponents[0] + exponents[1] - form.greatest_exponent + source.randrange(-2, 3)
            exponent = min(max(exponent, 0), 2 * form.greatest_exponent)
            sign = (values[0] ^ values[1]) >> (form.width - 1) ^ 1
            values[2] = exponent << fraction | values[2] & (1 << fraction) - 1 | sign << (form.width - 1)
        found.append(tuple(values))
    return found
