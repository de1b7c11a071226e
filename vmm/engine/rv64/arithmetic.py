"""Integer arithmetic that needs care: division by zero and overflow have defined results (volume I, 13.2), NaN
boxes."""

from __future__ import annotations

from vmm.engine.rv64.native import divide_signed, divide_unsigned, native, remainder_signed, remainder_unsigned

BOXED = -1 << 32
CANONICAL_NAN_F32 = 0x7FC00000


@native
def quotient(dividend: int, divisor: int) -> int:
    """DIV: -1 on division by zero; the most negative dividend over -1 is itself."""
    if divisor == 0:
        return -1
    if divisor == -1:
        return -dividend
    return divide_signed(dividend, divisor)


@native
def quotient_unsigned(dividend: int, divisor: int) -> int:
    """DIVU: all ones on division by zero."""
    if divisor == 0:
        return -1
    return divide_unsigned(dividend, divisor)


@native
def remainder(dividend: int, divisor: int) -> int:
    """REM: the dividend on division by zero; 0 on overflow."""
    if divisor == 0:
        return dividend
    if divisor == -1:
        return 0
    return remainder_signed(dividend, divisor)


@native
def remainder_of_unsigned(dividend: int, divisor: int) -> int:
    """REMU: the dividend on division by zero."""
    if divisor == 0:
        return dividend
    return remainder_unsigned(dividend, divisor)


@native
def box(pattern: int) -> int:
    """A 32-bit pattern as an f register holds it: upper half all ones (volume I, 21.2)."""
    return pattern & 0xFFFFFFFF | BOXED


@native
def unbox(register: int) -> int:
    """The 32-bit pattern in an f register; the canonical NaN where it is not boxed."""
    if register >> 32 == -1:
        return register & 0xFFFFFFFF
    return CANONICAL_NAN_F32


@native
def exact(pattern: int, rm: int) -> int:
    """A result that no rounding mode changes."""
    return pattern
