"""The hart's floating point against two referees that share nothing with it: QEMU's, and exact rational numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.vmm.engine.floating.operations import MODES, OPERATIONS, Operation, random_operands, special_operands
from tests.vmm.engine.floating.rational import BINARY32, BINARY64, Format, rounded, square_root

NX = 1
RANDOM_CASES = 10_000


def _differences(operation: Operation, cases: list[tuple[tuple[int, ...], int]]) -> list[str]:
    """Where an operation and QEMU disagree, with no flag accrued before it and with the inexact flag accrued."""
    found = []
    for (operands, rounding), (pattern, flags) in zip(cases, operation.referee(cases), strict=True):
        for before in (0, NX):
            result, after = operation.call(operands, rounding, before)
            expected = flags | before if operation.flags else before
            if (result, after) != (pattern, expected):
                words = ", ".join(f"{operand:#x}" for operand in operands)
                found.append(
                    f"{operation.name}({words}) in mode {rounding} after flags {before}:"
                    f" {result:#x} with {after}, not {pattern:#x} with {expected}"
                )
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_special_values_agree_with_qemu_in_every_rounding_mode(name: str) -> None:
    operation = OPERATIONS[name]
    modes = MODES if operation.rounds else range(1)
    cases = [(operands, rounding) for operands in special_operands(operation) for rounding in modes]

    assert _differences(operation, cases)[:5] == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_random_values_agree_with_qemu(name: str) -> None:
    operation = OPERATIONS[name]
    operands = random_operands(operation, RANDOM_CASES, seed=len(name))
    # Nearest even is what programs use and what the fast paths serve: every other case.
    cases = [(values, (index // 2) % 5 if index % 2 else 0) for index, values in enumerate(operands)]

    assert _differences(operation, cases)[:5] == []


def _finite(form: Format) -> st.SearchStrategy[int]:
    """Patterns of finite numbers, often near 1 or near the least normal number."""
    fraction = form.precision - 1
    exponent = st.one_of(
        st.integers(0, 2 * form.greatest_exponent),
        st.integers(form.greatest_exponent - 3, form.greatest_exponent + 3),
        st.integers(0, form.precision + 2),
    )
    bits = st.one_of(st.integers(0, 2**fraction - 1), st.sampled_from((0, 1, 2**fraction - 1, 2 ** (fraction - 1))))
    return st.builds(
        lambda sign, exponent, bits: sign << (form.width - 1) | exponent << fraction | bits,
        st.booleans(),
        exponent,
        bits,
    )


def _exact(stem: str, a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    """The true result; 0 where it is zero or there is none."""
    nothing = Fraction(0)
    if stem == "add":
        return a + b
    if stem == "sub":
        return a - b
    if stem == "mul":
        return a * b
    if stem == "div":
        return a / b if b else nothing
    if stem == "fma":
        return a * b + c
    return square_root(a) if a > 0 else nothing


@pytest.mark.parametrize("stem", ["add", "sub", "mul", "div", "fma", "sqrt"])
@pytest.mark.parametrize("form", [BINARY32, BINARY64], ids=["f32", "f64"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_result_and_flags_are_the_exact_value_rounded(form: Format, stem: str, data: st.DataObject) -> None:
    operation = OPERATIONS[f"f{form.width}_{stem}"]
    operands = tuple(data.draw(_finite(form)) for _ in operation.operands)
    a, b, c = (form.value(operand) or Fraction(0) for operand in (*operands, 0, 0)[:3])
    exact = _exact(stem, a, b, c)
    assume(exact != 0)

    for mode in MODES:
        pattern, flags = rounded(exact, form, mode)
        assert operation.call(operands, mode, 0) == (pattern, flags)
        assert operation.call(operands, mode, NX) == (pattern, flags | NX)


def test_product_just_above_half_a_unit_of_the_addend_is_no_tie() -> None:
    # (2^57 + 1) has two factors that are binary64 numbers; only its last bit tells the sum from a tie, which goes down.
    factors = Fraction(898_107_057), Fraction(160_465_489)
    assert factors[0] * factors[1] == 2**57 + 1
    addend = Fraction(2**110)

    operands = tuple(BINARY64.encoded(value) for value in (*factors, addend))
    result = OPERATIONS["f64_fma"].call(operands, 0, 0)

    assert result == (BINARY64.encoded(addend) + 1, NX)
