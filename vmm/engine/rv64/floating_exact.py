"""Exact floating-point arithmetic of the hart: any rounding mode, any operand, every flag, in integer arithmetic.

Follows IEEE 754-2008 with the choices of the RISC-V unprivileged specification (20191213, chapters 11 and 12: "F" and
"D"): a result that is not a number is the canonical one, and tininess is detected after rounding.

There is one set of operations for both formats. Operands are always binary64 patterns, since every binary32 value is
also a binary64 value (``floating.widen``); ``wide`` is the format of the result, 1 for binary64 and 0 for binary32, and
there is one rounding, into that format. Between unpacking and rounding a magnitude is an integer ``significand`` whose
unit the ``exponent`` tells. Addition and multiplication are fused multiply-add with an operand of one or zero.

Slow (tens of nanoseconds) and small on purpose: ``floating`` gives the host's own floating point whatever that does
alike; only conversions of integers do so here. Left out: NaN boxing, which is the executor's.
"""

from __future__ import annotations

import numpy as np

from vmm.engine.rv64.native import (
    as_bits32,
    as_bits64,
    as_f64,
    count_leading_zeros,
    divide_unsigned,
    less_unsigned,
    load_i64,
    native,
    shift_right_logical,
    store_i64,
)

# Accrued exceptions: the bits of fflags (unprivileged 20191213, 11.2).
INEXACT, UNDERFLOW, OVERFLOW, DIVIDE_BY_ZERO, INVALID = 1, 2, 4, 8, 16

# Rounding modes: the values of frm (unprivileged 20191213, 11.2, table 11.1).
NEAREST_EVEN, TOWARD_ZERO, DOWN, UP, NEAREST_AWAY = 0, 1, 2, 3, 4

# Binary64: sign at bit 63, biased exponent in 62..52, fraction in 51..0.
SIGN = -(1 << 63)
MAGNITUDE = (1 << 63) - 1
INFINITY = 0x7FF << 52
CANONICAL_NAN = 0x7FF8 << 48
QUIET = 1 << 51
HIDDEN = 1 << 52
FRACTION = HIDDEN - 1
LIMB = (1 << 56) - 1
HALF_LIMB = (1 << 26) - 1


@native
def raised(flags: int, exceptions: int) -> int:
    """OR exception bits into the word of accrued flags at a host address; returns the new word."""
    result: int = store_i64(flags, load_i64(flags) | exceptions)
    return result


@native
def signals(pattern: int) -> int:
    """1 for a signalling NaN, else 0."""
    return int((pattern & MAGNITUDE) > INFINITY and (pattern & QUIET) == 0)


@native
def infinity(sign: int, wide: int) -> int:
    """The pattern of an infinity in the result's format."""
    if wide:
        return (sign << 63) | INFINITY
    return (sign << 31) | (0xFF << 23)


@native
def not_a_number(invalid: int, flags: int, wide: int) -> int:
    """The canonical NaN of the result's format, after raising the invalid flag if ``invalid`` is not 0."""
    if invalid:
        raised(flags, INVALID)
    if wide:
        return CANONICAL_NAN
    return 0x7FC0 << 16


@native
def exponent_of(pattern: int) -> int:
    """Power of two of the leading bit of a finite value; for zero, less than that of any other."""
    biased = (pattern >> 52) & 0x7FF
    if biased:
        return biased - 1023
    result: int = -1011 - count_leading_zeros(pattern & FRACTION)
    return result


@native
def significand_of(pattern: int) -> int:
    """The 53 significant bits of a finite value, the leading one at bit 52; 0 for zero."""
    fraction = pattern & FRACTION
    if (pattern >> 52) & 0x7FF:
        return fraction | HIDDEN
    result: int = fraction << (count_leading_zeros(fraction | 1) - 11)
    return result


@native
def least(left: int, right: int) -> int:
    """The lesser of two integers."""
    return left if left < right else right


@native
def jammed(significand: int, amount: int) -> int:
    """Shift right by 0..63; bit 0 of the result also stands for all the bits that were shifted out."""
    kept = significand >> amount
    return kept | int((kept << amount) != significand)


@native
def rounded(significand: int, drop: int, sign: int, rounding: int) -> int:
    """A magnitude without its low ``drop`` bits (1..61), rounded to an integer in the mode ``rounding``."""
    half = 1 << (drop - 1)
    if rounding == NEAREST_EVEN:
        bias = half - 1 + ((significand >> drop) & 1)
    elif rounding == NEAREST_AWAY:
        bias = half
    elif rounding == UP - sign:
        bias = half + half - 1
    else:
        bias = 0
    return (significand + bias) >> drop


@native
def packed(sign: int, exponent: int, significand: int, rounding: int, flags: int, wide: int) -> int:
    """Round ±significand × 2^(exponent - 61) into the result's format; 0 < significand < 2^62, its bit 0 sticky."""
    fraction_bits = 23 + 29 * wide
    bias = 127 + 896 * wide
    shift = count_leading_zeros(significand) - 2
    significand <<= shift
    exponent += bias - shift
    drop = 61 - fraction_bits
    tiny = 0
    if exponent <= 0:
        # Tiny unless rounding as if exponents had no lower bound makes it the least normal number.
        tiny = int(exponent < 0 or (rounded(significand, drop, sign, rounding) >> (fraction_bits + 1)) == 0)
        significand = jammed(significand, least(1 - exponent, 62))
        exponent = 1
    exceptions = int((significand & ((1 << drop) - 1)) != 0)
    exceptions |= (exceptions & tiny) * UNDERFLOW
    greatest = infinity(0, wide) - 1
    # The hidden bit adds 1 to the exponent field; so does a carry out of rounding.
    pattern = rounded(significand, drop, sign, rounding) + ((exponent - 1) << fraction_bits)
    if exponent > bias + bias or pattern > greatest:
        exceptions = OVERFLOW | INEXACT
        pattern = greatest
        if rounding == NEAREST_EVEN or rounding >= NEAREST_AWAY or rounding == UP - sign:
            pattern += 1
    if exceptions:
        raised(flags, exceptions)
    return (sign << (31 + 32 * wide)) | pattern


@native
def fused(a: int, b: int, c: int, rounding: int, flags: int, wide: int) -> int:
    """a × b + c with one rounding."""
    product_sign, sign = ((a ^ b) >> 63) & 1, (c >> 63) & 1
    size_a, size_b, size_c = a & MAGNITUDE, b & MAGNITUDE, c & MAGNITUDE
    if size_a >= INFINITY or size_b >= INFINITY or size_c >= INFINITY:
        # Infinity times zero is invalid even when the addend is a quiet NaN (11.6).
        invalid = signals(a) | signals(b) | signals(c)
        invalid |= int((size_a == INFINITY and size_b == 0) or (size_a == 0 and size_b == INFINITY))
        if invalid or size_a > INFINITY or size_b > INFINITY or size_c > INFINITY:
            return not_a_number(invalid, flags, wide)
        if size_a == INFINITY or size_b == INFINITY:
            if size_c == INFINITY and sign != product_sign:
                return not_a_number(1, flags, wide)
            return infinity(product_sign, wide)
        return infinity(sign, wide)

    # The product: (high × 2^56 + low) × 2^(exponent - 108), 106 bits above four spare ones; the addend alike.
    left, right = significand_of(a), significand_of(b)
    cross = (left >> 26) * (right & HALF_LIMB) + (left & HALF_LIMB) * (right >> 26)
    low = (left & HALF_LIMB) * (right & HALF_LIMB) + ((cross & HALF_LIMB) << 26)
    high = (left >> 26) * (right >> 26) + (cross >> 26) + (low >> 52)
    low = (low & FRACTION) << 4
    exponent = exponent_of(a) + exponent_of(b)
    high_c, low_c = significand_of(c), 0
    # A zero has no exponent of its own: it must not push the other operand's bits out.
    distance = exponent - exponent_of(c) if high and high_c else 0
    if high == 0:
        exponent = exponent_of(c)
    if distance >= 0:
        if distance > 56:
            low_c, high_c = jammed(high_c, least(distance - 56, 63)), 0
        else:
            low_c, high_c = (high_c << (56 - distance)) & LIMB, high_c >> distance
    else:
        exponent -= distance
        if distance < -56:
            low = jammed(high, least(-56 - distance, 63)) | int(low != 0)
            high = 0
        else:
            low = jammed(low, -distance) | ((high << (56 + distance)) & LIMB)
            high >>= -distance

    if product_sign == sign:
        high, low = high + high_c, low + low_c
    else:
        high, low = high - high_c, low - low_c
    high, low = high + (low >> 56), low & LIMB
    if high < 0:
        product_sign, high, low = sign, -high - int(low != 0), -low & LIMB
    if high < 64:
        high, low, exponent = (high << 56) | low, 0, exponent - 56
        if high == 0:
            # The sum of zeros of one sign keeps it; exact cancellation is +0, or -0 when rounding down.
            sign = product_sign if product_sign == sign else int(rounding == DOWN)
            return sign << (31 + 32 * wide)
    else:
        shift = count_leading_zeros(high) - 2
        high, low, exponent = high << shift, jammed(low, 56 - shift), exponent - shift
    return packed(product_sign, exponent + 9, high | low, rounding, flags, wide)


@native
def divided(a: int, b: int, rounding: int, flags: int, wide: int) -> int:
    """a ÷ b."""
    sign = ((a ^ b) >> 63) & 1
    size_a, size_b = a & MAGNITUDE, b & MAGNITUDE
    if size_a > INFINITY or size_b > INFINITY:
        return not_a_number(signals(a) | signals(b), flags, wide)
    if size_a == size_b and (size_a == 0 or size_a == INFINITY):
        return not_a_number(1, flags, wide)
    if size_a == INFINITY or size_b == 0:
        if size_a != INFINITY:
            raised(flags, DIVIDE_BY_ZERO)
        return infinity(sign, wide)
    if size_a == 0 or size_b == INFINITY:
        return sign << (31 + 32 * wide)
    # Long division, ten bits of the quotient at a time: the remainder stays below 2^53.
    rest, divisor = significand_of(a), significand_of(b)
    quotient = steps = 0
    if rest >= divisor:
        quotient, rest = 1, rest - divisor
    while steps < 6:
        rest <<= 10
        digit = divide_unsigned(rest, divisor)
        quotient, rest, steps = (quotient << 10) | digit, rest - digit * divisor, steps + 1
    exponent = exponent_of(a) - exponent_of(b) + 1
    return packed(sign, exponent, quotient | int(rest != 0), rounding, flags, wide)


@native
def square_root(a: int, rounding: int, flags: int, wide: int) -> int:
    """√a; -0 for -0."""
    size = a & MAGNITUDE
    if size > INFINITY or (a < 0 and size != 0):
        return not_a_number(signals(a) | int(size <= INFINITY), flags, wide)
    if size == 0:
        return a if wide else shift_right_logical(a, 32)
    if size == INFINITY:
        return infinity(0, wide)
    exponent = exponent_of(a)
    radicand = significand_of(a) << (exponent & 1)
    # Digit by digit: two bits of the radicand, and then sixty zeros, give a root of 57 bits.
    root = rest = 0
    position = 52
    while position >= -60:
        rest = (rest << 2) | (((radicand >> position) & 3) if position >= 0 else 0)
        trial = (root << 2) | 1
        root <<= 1
        if rest >= trial:
            rest -= trial
            root |= 1
        position -= 2
    return packed(0, (exponent >> 1) + 5, root | int(rest != 0), rounding, flags, wide)


@native
def converted(a: int, rounding: int, flags: int, wide: int) -> int:
    """The same value in the result's format."""
    size = a & MAGNITUDE
    sign = (a >> 63) & 1
    if size > INFINITY:
        return not_a_number(signals(a), flags, wide)
    if size == INFINITY:
        return infinity(sign, wide)
    if size == 0:
        return sign << (31 + 32 * wide)
    return packed(sign, exponent_of(a), significand_of(a) << 9, rounding, flags, wide)


@native
def to_integer(a: int, width: int, signed: int, rounding: int, flags: int) -> int:
    """The integer of ``width`` bits (32 or 64) that a value rounds to, sign-extended from them even if unsigned.

    Out of range it is the nearest there is, and the invalid flag alone; a NaN counts as greater than all
    (unprivileged 20191213, table 11.4).
    """
    value = as_f64(a)
    if -9.2e18 < value < 9.2e18:
        # The host truncates. That is the answer if it is exact, or asked for and the inexact flag is up already.
        truncated: int = int(value)
        beyond = truncated >> (width - 1)
        if (beyond == 0 or beyond == -signed) and (
            np.float64(truncated) == value or (rounding == TOWARD_ZERO and load_i64(flags) & INEXACT)
        ):
            return truncated

    size = a & MAGNITUDE
    sign = int(a < 0 and size <= INFINITY)
    ceiling: int = shift_right_logical(-1, 64 - width + signed)
    if sign:
        ceiling = signed << (width - 1)
    exceptions = 0
    exponent = exponent_of(a)
    if exponent > 63:
        exceptions = INVALID
        whole = ceiling
    elif exponent >= 52:
        whole = significand_of(a) << (exponent - 52)
    else:
        drop = least(52 - exponent, 55)
        significand = significand_of(a)
        whole = rounded(significand, drop, sign, rounding)
        exceptions = int((significand & ((1 << drop) - 1)) != 0)
    if less_unsigned(ceiling, whole):
        exceptions = INVALID
        whole = ceiling
    if exceptions:
        raised(flags, exceptions)
    if sign:
        whole = ~whole + 1
    return (whole << (64 - width)) >> (64 - width)


@native
def from_integer(value: int, signed: int, rounding: int, flags: int, wide: int) -> int:
    """The value of a 64-bit integer, rounded."""
    size = value
    sign = 0
    if signed and value < 0:
        size, sign = ~value + 1, 1
    # The host converts signed integers, to nearest even: without rounding, or with the inexact flag up already.
    exact = 0 <= size <= 1 << (24 + 29 * wide)
    if exact or (rounding == NEAREST_EVEN and sign == int(value < 0) and load_i64(flags) & INEXACT):
        result: int = as_bits64(np.float64(value)) if wide else as_bits32(np.float32(value))
        return result
    if size < 0 or size >= 1 << 62:
        return packed(sign, 63, shift_right_logical(size, 2) | int((size & 3) != 0), rounding, flags, wide)
    return packed(sign, 61, size, rounding, flags, wide)
