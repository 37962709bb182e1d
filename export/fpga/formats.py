"""Fixed-point numbers: formats, how they are chosen, and the one rule by which a wide result becomes a narrow one.

Codes are int64 arrays; a code stands for `code * 2^-(width - integer)`, two's complement, as `ap_fixed<W, I>` has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from export.errors import ExportError

LIMIT = 64
"""Bits of the widest accumulator."""


@dataclass(frozen=True)
class Fixed:
    """A format: `width` bits, of which `integer` stand before the binary point, the sign among them.

    `integer` may be negative (all numbers are small) or larger than `width` (all are multiples of a power of two).
    """

    width: int
    integer: int

    @property
    def fraction(self) -> int:
        """Bits behind the binary point."""
        return self.width - self.integer

    @property
    def low(self) -> int:
        """Least code."""
        return -(1 << (self.width - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return (1 << (self.width - 1)) - 1

    @property
    def step(self) -> float:
        """Value of one code."""
        return math.ldexp(1.0, -self.fraction)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values -> codes: rounded, halves up; saturated, infinities too."""
        codes = np.floor(np.ldexp(np.asarray(values, np.float64), self.fraction) + 0.5)
        return np.clip(codes, self.low, self.high).astype(np.int64)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> values, float64."""
        return np.ldexp(np.asarray(codes).astype(np.float64), -self.fraction)

    def overflows(self, values: np.ndarray) -> int:
        """How many finite values lie outside."""
        values = np.asarray(values, np.float64)
        codes = np.floor(np.ldexp(values, self.fraction) + 0.5)
        return int((np.isfinite(values) & ((codes < self.low) | (codes > self.high))).sum())


INDEX = Fixed(32, 32)
"""Of whole numbers: ids, counts, positions."""
BYTE = Fixed(9, 9)
"""Of pixels."""
FLAG = Fixed(2, 2)
"""Of truth values."""


def choose(low: float, high: float, width: int, margin: int = 0) -> Fixed:
    """The finest format of a width that holds a range.

    Args:
        low: least value.
        high: largest value.
        width: bits.
        margin: integer bits to spare, for values beyond those that were observed.
    """
    largest = max(-low, high)
    if largest == 0:
        return Fixed(width, 1 + margin)
    _, exponent = math.frexp(largest)  # largest < 2^exponent
    integer = exponent + 1
    finer = Fixed(width, integer - 1)  # enough where the range ends in -2^n, or the top rounds to the largest code
    if low >= math.ldexp(finer.low, -finer.fraction) and high <= math.ldexp(finer.high, -finer.fraction):
        integer -= 1
    elif high > math.ldexp((1 << (width - 1)) - 1, -(width - integer)):
        integer += 1  # a top so close to 2^n that it rounds to it
    return Fixed(width, integer + margin)


@dataclass(frozen=True)
class Requantise:
    """From an accumulator to a format: add half, shift right arithmetically (or left), then saturate or wrap.

    Args:
        shift: to the right; negative: to the left.
        width: bits of the result.
        wrap: keep the low bits of what does not fit, instead of saturating. Either way it is counted.
    """

    shift: int
    width: int
    wrap: bool = False

    def __call__(self, accumulator: np.ndarray) -> tuple[np.ndarray, int]:
        """Accumulator (int64, any shape) -> codes of the same shape, and how many did not fit."""
        codes = shift_right(accumulator, self.shift)
        low, high = -(1 << (self.width - 1)), (1 << (self.width - 1)) - 1
        outside = int(((codes < low) | (codes > high)).sum())
        if outside and self.wrap:
            codes = ((codes - low) & ((1 << self.width) - 1)) + low
        elif outside:
            codes = np.clip(codes, low, high)
        return codes, outside

    def bits(self, accumulator: int) -> int:
        """Bits that the accumulator needs for rounding and shifting, given those of its value."""
        return max(accumulator, self.shift) + 1 if self.shift > 0 else accumulator - self.shift

    @property
    def arguments(self) -> str:
        """Template arguments in C++."""
        return f"{self.shift}, {str(self.wrap).lower()}"


def shift_right(values: np.ndarray, shift: int) -> np.ndarray:
    """`floor(values / 2^shift + 1/2)`; exact shift to the left where `shift` is negative."""
    if shift > 0:
        return (values + (1 << (shift - 1))) >> shift
    return values << -shift if shift else values


def divide(numerator: np.ndarray, denominator: np.ndarray | int) -> np.ndarray:
    """`floor(numerator / denominator + 1/2)` for a positive denominator."""
    return (2 * numerator + denominator) // (2 * denominator)


def bits_of(largest: int) -> int:
    """Bits of a two's complement number whose magnitude is at most `largest`."""
    return largest.bit_length() + 1


def declare(bits: int, what: str, remedy: str) -> int:
    """Width of an accumulator, checked.

    Raises:
        ExportError: if it is over 64 bits.
    """
    if bits > LIMIT:
        raise ExportError(f"{what}: needs an accumulator of {bits} bits, at most {LIMIT} are supported; {remedy}")
    return bits
