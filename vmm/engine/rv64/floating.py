"""Floating-point operations of the hart, as the executor calls them: binary32 (``f32_``) and binary64 (``f64_``).

Follows the RISC-V unprivileged specification (20191213), chapter 11 "F", version 2.2, and chapter 12 "D", version 2.2,
over IEEE 754-2008: canonical NaN results, ``minimumNumber``/``maximumNumber``, tininess detected after rounding.

Operands and results are bit patterns in an ``int64``: binary32 ones without their NaN box, zero-extended. ``rounding``
is 0 to nearest even, 1 toward zero, 2 down, 3 up, 4 to nearest with ties away; the executor resolved the dynamic mode
and refused reserved ones. ``flags`` is the host address of the 64-bit word into which exceptions (NX 1, UF 2, OF 4,
DZ 8, NV 16) are accrued.

The host computes to nearest even, but does not tell which exceptions it met. So its result is taken where it can raise
no flag that is not already up: where it is exact, or where the inexact flag stands and the result is an ordinary number
away from overflow and underflow. A running program is nearly always there. Everything else is ``floating_exact``'s.
The host thread must be in its default floating-point state: nearest even, subnormal numbers not flushed to zero.

Left out, since they only move bits: sign injection, moves between register files, loads, stores and NaN boxing.
"""

from __future__ import annotations

import numpy as np

from vmm.engine.rv64.floating_exact import (
    CANONICAL_NAN,
    INEXACT,
    INFINITY,
    INVALID,
    MAGNITUDE,
    NEAREST_EVEN,
    SIGN,
    converted,
    divided,
    from_integer,
    fused,
    raised,
    signals,
    square_root,
    to_integer,
)
from vmm.engine.rv64.native import (
    as_bits32,
    as_bits64,
    as_f32,
    as_f64,
    fma32,
    fma64,
    load_i64,
    native,
    sign_extend_32,
    sqrt64,
    zero_extend_32,
)

ONE = 1023 << 52
SIGN_32 = 1 << 31
INFINITY_32 = 0xFF << 23
#: Two binary64 numbers whose low 27 bits are zero have an exact product: 26 + 26 significant bits.
LOW_27 = (1 << 27) - 1


@native
def ordinary32(pattern: int) -> int:
    """1 if a binary32 result is normal and not the least normal number, which a tiny one may have been rounded to."""
    size = pattern & (SIGN_32 - 1)
    return int(1 << 23 < size < INFINITY_32)


@native
def ordinary64(pattern: int) -> int:
    """1 if a binary64 result is normal and not the least normal number, which a tiny one may have been rounded to."""
    return int(1 << 52 < (pattern & MAGNITUDE) < INFINITY)


@native
def widen(pattern: int) -> int:
    """The binary64 pattern of a binary32 value; a NaN stays quiet or signalling. Raises nothing."""
    size = pattern & (SIGN_32 - 1)
    if size > INFINITY_32:
        return INFINITY | (size << 29)
    result: int = as_bits64(np.float64(as_f32(pattern)))
    return result


@native
def narrow(pattern: int) -> int:
    """The binary32 pattern of a binary64 value that has one; the canonical NaN for a NaN. Raises nothing."""
    if (pattern & MAGNITUDE) > INFINITY:
        return 0x7FC0 << 16
    result: int = as_bits32(np.float32(as_f64(pattern)))
    return result


# Binary64 arithmetic.


@native
def f64_add(a: int, b: int, rounding: int, flags: int) -> int:
    """fadd.d"""
    if rounding == NEAREST_EVEN:
        x, y = as_f64(a), as_f64(b)
        total = x + y
        pattern: int = as_bits64(total)
        if load_i64(flags) & INEXACT:
            # A tiny sum is exact: only infinity and NaN are to be kept out.
            if (pattern & MAGNITUDE) < INFINITY:
                return pattern
        else:
            # Knuth's TwoSum: the error of the sum, itself exact.
            part = total - x
            if (x - (total - part)) + (y - part) == 0.0:
                return pattern
    return fused(a, ONE, b, rounding, flags, 1)


@native
def f64_sub(a: int, b: int, rounding: int, flags: int) -> int:
    """fsub.d"""
    return f64_add(a, b ^ SIGN, rounding, flags)


@native
def f64_mul(a: int, b: int, rounding: int, flags: int) -> int:
    """fmul.d"""
    pattern: int = as_bits64(as_f64(a) * as_f64(b))
    if ordinary64(pattern) and ((rounding == NEAREST_EVEN and load_i64(flags) & INEXACT) or ((a | b) & LOW_27) == 0):
        return pattern
    if (pattern & MAGNITUDE) == 0 and ((a & MAGNITUDE) == 0 or (b & MAGNITUDE) == 0):
        return pattern
    # A zero of the product's sign adds nothing, and keeps a zero product's sign in every rounding mode.
    return fused(a, b, (a ^ b) & SIGN, rounding, flags, 1)


@native
def f64_div(a: int, b: int, rounding: int, flags: int) -> int:
    """fdiv.d"""
    x, y = as_f64(a), as_f64(b)
    quotient = x / y
    pattern: int = as_bits64(quotient)
    if ordinary64(pattern) and (
        (rounding == NEAREST_EVEN and load_i64(flags) & INEXACT)
        or (((pattern | b) & LOW_27) == 0 and quotient * y == x and ordinary64(a))
    ):
        return pattern
    return divided(a, b, rounding, flags, 1)


@native
def f64_sqrt(a: int, rounding: int, flags: int) -> int:
    """fsqrt.d"""
    root = sqrt64(as_f64(a))
    pattern: int = as_bits64(root)
    if ordinary64(pattern) and (
        (rounding == NEAREST_EVEN and load_i64(flags) & INEXACT)
        or ((pattern & LOW_27) == 0 and root * root == as_f64(a) and ordinary64(a))
    ):
        return pattern
    return square_root(a, rounding, flags, 1)


@native
def f64_fma(a: int, b: int, c: int, rounding: int, flags: int) -> int:
    """fmadd.d: a × b + c. The executor negates operands for the other three."""
    if rounding == NEAREST_EVEN:
        x, y, z = as_f64(a), as_f64(b), as_f64(c)
        if load_i64(flags) & INEXACT:
            pattern: int = as_bits64(fma64(x, y, z))
            if ordinary64(pattern):
                return pattern
        elif ((a | b) & LOW_27) == 0:
            product = x * y
            if ordinary64(as_bits64(product)):
                total = product + z
                part = total - product
                if (product - (total - part)) + (z - part) == 0.0:
                    result: int = as_bits64(total)
                    return result
    return fused(a, b, c, rounding, flags, 1)


@native
def f64_min(a: int, b: int, flags: int) -> int:
    """fmin.d: the number if the other operand is none; -0 is below +0."""
    if (a & MAGNITUDE) > INFINITY or (b & MAGNITUDE) > INFINITY:
        if signals(a) | signals(b):
            raised(flags, INVALID)
        if (a & MAGNITUDE) <= INFINITY:
            return a
        if (b & MAGNITUDE) <= INFINITY:
            return b
        return CANONICAL_NAN
    # With the magnitude of negative patterns complemented, the patterns stand in the order of their values.
    if (a ^ ((a >> 63) & MAGNITUDE)) < (b ^ ((b >> 63) & MAGNITUDE)):
        return a
    return b


@native
def f64_max(a: int, b: int, flags: int) -> int:
    """fmax.d: the number if the other operand is none; +0 is above -0."""
    least = f64_min(a ^ SIGN, b ^ SIGN, flags)
    if least == CANONICAL_NAN:
        return least
    return least ^ SIGN


@native
def f64_eq(a: int, b: int, flags: int) -> int:
    """feq.d: a quiet comparison, which only a signalling NaN makes invalid."""
    if signals(a) | signals(b):
        raised(flags, INVALID)
    return int(as_f64(a) == as_f64(b))


@native
def f64_lt(a: int, b: int, flags: int) -> int:
    """flt.d: a signalling comparison, which any NaN makes invalid."""
    if (a & MAGNITUDE) > INFINITY or (b & MAGNITUDE) > INFINITY:
        raised(flags, INVALID)
    return int(as_f64(a) < as_f64(b))


@native
def f64_le(a: int, b: int, flags: int) -> int:
    """fle.d: a signalling comparison, which any NaN makes invalid."""
    if (a & MAGNITUDE) > INFINITY or (b & MAGNITUDE) > INFINITY:
        raised(flags, INVALID)
    return int(as_f64(a) <= as_f64(b))


@native
def classified(size: int, negative: int, infinity: int, least_normal: int, quiet: int) -> int:
    """The mask of table 11.5 for a magnitude, of a format that the last three patterns describe."""
    if size > infinity:
        return 1 << 9 if size & quiet else 1 << 8
    # Classes 0 to 3 are infinite, normal, subnormal and zero below zero; 7 to 4 the same above.
    kind = 2
    if size == infinity:
        kind = 0
    elif size >= least_normal:
        kind = 1
    elif size == 0:
        kind = 3
    return 1 << kind if negative else 1 << (7 - kind)


@native
def f64_class(a: int) -> int:
    """fclass.d"""
    return classified(a & MAGNITUDE, a & SIGN, INFINITY, 1 << 52, 1 << 51)


# Binary64 and integers.


@native
def f64_to_i32(a: int, rounding: int, flags: int) -> int:
    """fcvt.w.d"""
    return to_integer(a, 32, 1, rounding, flags)


@native
def f64_to_u32(a: int, rounding: int, flags: int) -> int:
    """fcvt.wu.d: the 32 bits, sign-extended."""
    return to_integer(a, 32, 0, rounding, flags)


@native
def f64_to_i64(a: int, rounding: int, flags: int) -> int:
    """fcvt.l.d"""
    return to_integer(a, 64, 1, rounding, flags)


@native
def f64_to_u64(a: int, rounding: int, flags: int) -> int:
    """fcvt.lu.d"""
    return to_integer(a, 64, 0, rounding, flags)


@native
def i64_to_f64(a: int, rounding: int, flags: int) -> int:
    """fcvt.d.l"""
    return from_integer(a, 1, rounding, flags, 1)


@native
def u64_to_f64(a: int, rounding: int, flags: int) -> int:
    """fcvt.d.lu"""
    return from_integer(a, 0, rounding, flags, 1)


@native
def i32_to_f64(a: int, rounding: int, flags: int) -> int:
    """fcvt.d.w of the low 32 bits: always exact."""
    result: int = as_bits64(np.float64(sign_extend_32(a)))
    return result


@native
def u32_to_f64(a: int, rounding: int, flags: int) -> int:
    """fcvt.d.wu of the low 32 bits: always exact."""
    result: int = as_bits64(np.float64(zero_extend_32(a)))
    return result


# Between the formats.


@native
def f32_to_f64(a: int, flags: int) -> int:
    """fcvt.d.s: always exact."""
    if (a & (SIGN_32 - 1)) > INFINITY_32:
        return converted(widen(a), NEAREST_EVEN, flags, 1)
    return widen(a)


@native
def f64_to_f32(a: int, rounding: int, flags: int) -> int:
    """fcvt.s.d"""
    x = as_f64(a)
    single = np.float32(x)
    pattern: int = as_bits32(single)
    if np.float64(single) == x or (rounding == NEAREST_EVEN and load_i64(flags) & INEXACT and ordinary32(pattern)):
        return pattern
    return converted(a, rounding, flags, 0)


# Binary32 arithmetic. The host computes in binary64, whose 53 bits are more than twice 24 and two: rounding its result
# once more gives what rounding the true one gives, and a product of two binary32 numbers is exact in it.


@native
def f32_add(a: int, b: int, rounding: int, flags: int) -> int:
    """fadd.s"""
    if rounding == NEAREST_EVEN:
        x, y = np.float64(as_f32(a)), np.float64(as_f32(b))
        total = x + y
        single = np.float32(total)
        pattern: int = as_bits32(single)
        if load_i64(flags) & INEXACT:
            if (pattern & (SIGN_32 - 1)) < INFINITY_32:
                return pattern
        else:
            part = total - x
            if (x - (total - part)) + (y - part) == 0.0 and np.float64(single) == total:
                return pattern
    return fused(widen(a), ONE, widen(b), rounding, flags, 0)


@native
def f32_sub(a: int, b: int, rounding: int, flags: int) -> int:
    """fsub.s"""
    return f32_add(a, b ^ SIGN_32, rounding, flags)


@native
def f32_mul(a: int, b: int, rounding: int, flags: int) -> int:
    """fmul.s"""
    product = np.float64(as_f32(a)) * np.float64(as_f32(b))
    single = np.float32(product)
    pattern: int = as_bits32(single)
    if np.float64(single) == product or (
        rounding == NEAREST_EVEN and load_i64(flags) & INEXACT and ordinary32(pattern)
    ):
        return pattern
    return fused(widen(a), widen(b), ((a ^ b) & SIGN_32) << 32, rounding, flags, 0)


@native
def f32_div(a: int, b: int, rounding: int, flags: int) -> int:
    """fdiv.s"""
    x, y = np.float64(as_f32(a)), np.float64(as_f32(b))
    single = np.float32(x / y)
    pattern: int = as_bits32(single)
    if np.float64(single) * y == x or (rounding == NEAREST_EVEN and load_i64(flags) & INEXACT and ordinary32(pattern)):
        return pattern
    return divided(widen(a), widen(b), rounding, flags, 0)


@native
def f32_sqrt(a: int, rounding: int, flags: int) -> int:
    """fsqrt.s"""
    x = np.float64(as_f32(a))
    single = np.float32(sqrt64(x))
    root = np.float64(single)
    pattern: int = as_bits32(single)
    if root * root == x or (rounding == NEAREST_EVEN and load_i64(flags) & INEXACT and ordinary32(pattern)):
        return pattern
    return square_root(widen(a), rounding, flags, 0)


@native
def f32_fma(a: int, b: int, c: int, rounding: int, flags: int) -> int:
    """fmadd.s: a × b + c. The executor negates operands for the other three."""
    if rounding == NEAREST_EVEN:
        if load_i64(flags) & INEXACT:
            # Adding rounds in binary64 here, and twice would be wrong: hence the host's own fused binary32 operation.
            pattern: int = as_bits32(fma32(as_f32(a), as_f32(b), as_f32(c)))
            if ordinary32(pattern):
                return pattern
        else:
            product, z = np.float64(as_f32(a)) * np.float64(as_f32(b)), np.float64(as_f32(c))
            total = product + z
            single = np.float32(total)
            part = total - product
            if (product - (total - part)) + (z - part) == 0.0 and np.float64(single) == total:
                result: int = as_bits32(single)
                return result
    return fused(widen(a), widen(b), widen(c), rounding, flags, 0)


# What follows is the same in both formats: every binary32 value is a binary64 value.


@native
def f32_min(a: int, b: int, flags: int) -> int:
    """fmin.s: the number if the other operand is none; -0 is below +0."""
    return narrow(f64_min(widen(a), widen(b), flags))


@native
def f32_max(a: int, b: int, flags: int) -> int:
    """fmax.s: the number if the other operand is none; +0 is above -0."""
    return narrow(f64_max(widen(a), widen(b), flags))


@native
def f32_eq(a: int, b: int, flags: int) -> int:
    """feq.s: a quiet comparison, which only a signalling NaN makes invalid."""
    return f64_eq(widen(a), widen(b), flags)


@native
def f32_lt(a: int, b: int, flags: int) -> int:
    """flt.s: a signalling comparison, which any NaN makes invalid."""
    return f64_lt(widen(a), widen(b), flags)


@native
def f32_le(a: int, b: int, flags: int) -> int:
    """fle.s: a signalling comparison, which any NaN makes invalid."""
    return f64_le(widen(a), widen(b), flags)


@native
def f32_class(a: int) -> int:
    """fclass.s"""
    return classified(a & (SIGN_32 - 1), a & SIGN_32, INFINITY_32, 1 << 23, 1 << 22)


@native
def f32_to_i32(a: int, rounding: int, flags: int) -> int:
    """fcvt.w.s"""
    return to_integer(widen(a), 32, 1, rounding, flags)


@native
def f32_to_u32(a: int, rounding: int, flags: int) -> int:
    """fcvt.wu.s: the 32 bits, sign-extended."""
    return to_integer(widen(a), 32, 0, rounding, flags)


@native
def f32_to_i64(a: int, rounding: int, flags: int) -> int:
    """fcvt.l.s"""
    return to_integer(widen(a), 64, 1, rounding, flags)


@native
def f32_to_u64(a: int, rounding: int, flags: int) -> int:
    """fcvt.lu.s"""
    return to_integer(widen(a), 64, 0, rounding, flags)


@native
def i64_to_f32(a: int, rounding: int, flags: int) -> int:
    """fcvt.s.l"""
    return from_integer(a, 1, rounding, flags, 0)


@native
def u64_to_f32(a: int, rounding: int, flags: int) -> int:
    """fcvt.s.lu"""
    return from_integer(a, 0, rounding, flags, 0)


@native
def i32_to_f32(a: int, rounding: int, flags: int) -> int:
    """fcvt.s.w of the low 32 bits."""
    return from_integer(sign_extend_32(a), 1, rounding, flags, 0)


@native
def u32_to_f32(a: int, rounding: int, flags: int) -> int:
    """fcvt.s.wu of the low 32 bits."""
    return from_integer(zero_extend_32(a), 1, rounding, flags, 0)
