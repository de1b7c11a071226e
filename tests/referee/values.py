"""Operand values worth trying: the corners of integers and of IEEE 754 formats, and random ones between them."""

from __future__ import annotations

from random import Random

MASK = (1 << 64) - 1
BOX = 0xFFFF_FFFF << 32

INTEGERS = tuple(
    value & MASK
    for edge in (0, 1 << 7, 1 << 8, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63)
    for value in (edge - 1, edge, edge + 1, -edge - 1, -edge)
)

SINGLES = (
    *(0x0000_0000, 0x0000_0001, 0x0000_0002, 0x007F_FFFF, 0x0080_0000, 0x0080_0001, 0x00FF_FFFF, 0x0100_0000),
    *(0x3EFF_FFFF, 0x3F00_0000, 0x3F00_0001, 0x3F7F_FFFF, 0x3F80_0000, 0x3F80_0001, 0x3FC0_0000, 0x4020_0000),
    *(0x4B00_0000, 0x4B00_0001, 0x4B7F_FFFF, 0x4EFF_FFFF, 0x4F00_0000, 0x4F00_0001, 0x4F7F_FFFF, 0x4F80_0000),
    *(0x5EFF_FFFF, 0x5F00_0000, 0x5F00_0001, 0x5F7F_FFFF, 0x5F80_0000, 0x7F7F_FFFE, 0x7F7F_FFFF, 0x7F80_0000),
    *(0x7F80_0001, 0x7FBF_FFFF, 0x7FC0_0000, 0x7FC0_0001, 0x7FFF_FFFF, 0x1F80_0000, 0x2000_0000, 0x0C80_0000),
)

DOUBLES = (
    *(0x0000_0000_0000_0000, 0x0000_0000_0000_0001, 0x0000_0000_0000_0002, 0x000F_FFFF_FFFF_FFFF),
    *(0x0010_0000_0000_0000, 0x0010_0000_0000_0001, 0x001F_FFFF_FFFF_FFFF, 0x0020_0000_0000_0000),
    *(0x3FDF_FFFF_FFFF_FFFF, 0x3FE0_0000_0000_0000, 0x3FE0_0000_0000_0001, 0x3FEF_FFFF_FFFF_FFFF),
    *(0x3FF0_0000_0000_0000, 0x3FF0_0000_0000_0001, 0x3FF8_0000_0000_0000, 0x4004_0000_0000_0000),
    *(0x41DF_FFFF_FFC0_0000, 0x41DF_FFFF_FFE0_0000, 0x41E0_0000_0000_0000, 0x41E0_0000_0010_0000),
    *(0x41EF_FFFF_FFE0_0000, 0x41EF_FFFF_FFF0_0000, 0x41F0_0000_0000_0000, 0x4330_0000_0000_0000),
    *(0x4330_0000_0000_0001, 0x4340_0000_0000_0000, 0x43DF_FFFF_FFFF_FFFF, 0x43E0_0000_0000_0000),
    *(0x43E0_0000_0000_0001, 0x43EF_FFFF_FFFF_FFFF, 0x43F0_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFE),
    *(0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001, 0x7FF7_FFFF_FFFF_FFFF),
    *(0x7FF8_0000_0000_0000, 0x7FF8_0000_0000_0001, 0x7FFF_FFFF_FFFF_FFFF, 0x1FF0_0000_0000_0000),
    # The borders of single precision, as doubles: largest, overflow by rounding, smallest normal and subnormal,
    # halves of it.
    *(0x47EF_FFFF_E000_0000, 0x47EF_FFFF_F000_0000, 0x47EF_FFFF_EFFF_FFFF, 0x47F0_0000_0000_0000),
    *(0x3810_0000_0000_0000, 0x380F_FFFF_F000_0000, 0x380F_FFFF_E000_0000, 0x380F_FFFF_EFFF_FFFF),
    *(0x36A0_0000_0000_0000, 0x3690_0000_0000_0000, 0x3690_0000_0000_0001, 0x3680_0000_0000_0000),
)


def integer(random: Random) -> int:
    """A 64-bit register pattern: corners, small numbers, sign-extended words, powers of two, anything."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(INTEGERS)
    if kind < 0.5:
        return random.randrange(-64, 65) & MASK
    if kind < 0.65:
        return random.randrange(-(1 << 31), 1 << 31) & MASK
    if kind < 0.75:
        return (1 << random.randrange(64)) + random.randrange(-1, 2) & MASK
    return random.getrandbits(64)


def _spread(random: Random, exponent_bits: int, fraction_bits: int) -> int:
    """A finite number whose exponent lies near the middle, so that sums cancel and products stay finite."""
    middle = (1 << exponent_bits - 1) - 1
    width = random.choice((2, 30, fraction_bits + 4, middle - 1))
    exponent = min(max(middle + random.randrange(-width, width + 1), 0), 2 * middle)
    fraction = random.getrandbits(fraction_bits)
    if random.random() < 0.4:
        # Few bits set: exact results and ties come up.
        fraction &= ~((1 << random.randrange(fraction_bits)) - 1)
    return random.getrandbits(1) << exponent_bits + fraction_bits | exponent << fraction_bits | fraction


def single(random: Random) -> int:
    """A binary32 pattern, 32 bits."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(SINGLES) | random.getrandbits(1) << 31
    if kind < 0.85:
        return _spread(random, 8, 23)
    if kind < 0.92:
        return random.getrandbits(23) | random.getrandbits(1) << 31
    return random.getrandbits(32)


def double(random: Random) -> int:
    """A binary64 pattern."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(DOUBLES) | random.getrandbits(1) << 63
    if kind < 0.85:
        return _spread(random, 11, 52)
    if kind < 0.92:
        return random.getrandbits(52) | random.getrandbits(1) << 63
    return random.getrandbits(64)


def float_register(random: Random, singles: float = 0.5) -> int:
    """An f register: a boxed single with probability ``singles`` (now and then badly boxed), else a double."""
    if random.random() >= singles:
        return double(random)
    upper = random.choice((0, BOX >> 1, random.getrandbits(32) << 32)) if random.random() < 0.08 else BOX
    return upper & BOX | single(random)
