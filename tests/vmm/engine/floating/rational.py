"""A referee: arithmetic on exact rational numbers, rounded by the definitions of IEEE 754-2008 (clauses 4.3 and 7).

It knows finite operands and results that are not exact zeros; it shares nothing with any software floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor, isqrt

NX, UF, OF = 1, 2, 4


def _power(exponent: int) -> Fraction:
    """2^exponent."""
    return Fraction(2**exponent) if exponent >= 0 else Fraction(1, 2**-exponent)


@dataclass(frozen=True)
class Format:
    """A binary interchange format."""

    width: int
    precision: int

    @property
    def greatest_exponent(self) -> int:
        """Of a finite number; also the bias."""
        return int(2 ** (self.width - self.precision - 1)) - 1

    @property
    def least_exponent(self) -> int:
        """Of a normal number."""
        return 1 - self.greatest_exponent

    def value(self, pattern: int) -> Fraction | None:
        """The number that a pattern encodes; None for infinities and NaNs."""
        fraction = pattern & (2 ** (self.precision - 1) - 1)
        biased = pattern >> (self.precision - 1) & (2 * self.greatest_exponent + 1)
        if biased == 2 * self.greatest_exponent + 1:
            return None
        if biased:
            fraction += 2 ** (self.precision - 1)
        size: Fraction = fraction * _power(max(biased, 1) - self.greatest_exponent - self.precision + 1)
        return -size if pattern >> (self.width - 1) else size

    def encoded(self, value: Fraction) -> int:
        """The pattern of a number, not zero, that the format has."""
        size = abs(value)
        exponent = max(_exponent(size), self.least_exponent)
        steps = size / _power(exponent - self.precision + 1)
        assert steps.denominator == 1
        # A normal number's hidden bit is added to the exponent field.
        pattern = int(steps) + (exponent - self.least_exponent << (self.precision - 1))
        return pattern | (value < 0) << (self.width - 1)


BINARY32, BINARY64 = Format(32, 24), Format(64, 53)


def _exponent(size: Fraction) -> int:
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    return exponent if _power(exponent) <= size else exponent - 1


def _to_multiple(value: Fraction, step: Fraction, mode: int) -> Fraction:
    """The multiple of ``step`` that a value rounds to."""
    below = floor(value / step)
    rest = value / step - below
    if rest == 0:
        return value
    half = Fraction(1, 2)
    up = (
        rest > half or (rest == half and below % 2 == 1),
        value < 0,
        False,
        True,
        rest > half or (rest == half and value > 0),
    )[mode]
    return (below + up) * step


def rounded(value: Fraction, form: Format, mode: int) -> tuple[int, int]:
    """Pattern and exception flags of a real number, not zero, in a format; tininess is detected after rounding."""
    least = _power(form.least_exponent)
    free = _to_multiple(value, _power(_exponent(abs(value)) - form.precision + 1), mode)
    tiny = abs(free) < least
    result = free
    if tiny or abs(value) < least:
        result = _to_multiple(value, least / 2 ** (form.precision - 1), mode)
    flags = (NX if result != value else 0) | (UF if tiny and result != value else 0)
    sign = (value < 0) << (form.width - 1)
    if abs(result) >= _power(form.greatest_exponent + 1):
        infinite = 2 * form.greatest_exponent + 1 << (form.precision - 1)
        away = (True, False, value < 0, value > 0, True)[mode]
        return sign | (infinite if away else infinite - 1), OF | NX
    if result == 0:
        return sign, flags
    return form.encoded(result), flags


def square_root(value: Fraction) -> Fraction:
    """√value, or if that is irrational a number so near that it rounds alike in both formats."""
    scale = 4**1400
    whole = value * scale
    assert whole.denominator == 1
    root = isqrt(int(whole))
    exact = root * root == whole
    return Fraction(2 * root + (not exact), 2**1401)
