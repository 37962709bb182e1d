"""Fixed-point types as the accelerator declares them: two's complement, truncating, wrapping."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fixed:
    """`ap_fixed<width, integer>`, or `ap_ufixed` without a sign, in the default modes: AP_TRN and AP_WRAP."""

    width: int
    integer: int
    signed: bool = True

    @property
    def step(self) -> float:
        """Difference of neighbouring values."""
        return 2.0 ** (self.integer - self.width)

    @property
    def limit(self) -> float:
        """All values lie below it, and not below its negative (0 without a sign)."""
        return 2.0 ** (self.integer - self.signed)

    @property
    def lowest(self) -> float:
        """The smallest value."""
        return -self.limit if self.signed else 0.0

    @property
    def name(self) -> str:
        """As C++ has it."""
        return f"ap_{'' if self.signed else 'u'}fixed<{self.width},{self.integer}>"

    @property
    def interval(self) -> str:
        """Of the values, to print."""
        return f"[{self.lowest:g}, {self.limit:g})"

    def assign(self, x: np.ndarray) -> tuple[np.ndarray, int]:
        """What an assignment of `x` keeps: truncated downwards, wrapped around.

        Returns:
            Values as float64, which holds them exactly, and how many wrapped.
        """
        cut = np.floor(np.asarray(x, np.float64) / self.step) * self.step
        outside = int(np.count_nonzero((cut < self.lowest) | (cut >= self.limit)))
        if outside:
            cut = np.mod(cut - self.lowest, self.limit - self.lowest) + self.lowest
        return cut, outside

    def holds(self, low: float, high: float) -> bool:
        """Whether all of a range is kept; false for nan."""
        return self.lowest <= low and high < self.limit

    def excess(self, largest: np.ndarray | float) -> np.ndarray:
        """The smallest n for which 2^-n times a magnitude is within the limit; negative where there is room."""
        ratio = np.maximum(np.asarray(largest, np.float64) / self.limit, 2.0**-64)
        return np.ceil(np.log2(ratio)).astype(int)

    def headroom_bits(self, low: float, high: float) -> float | None:
        """log2 of the factor by which a range could still grow; None for a range of zeros."""
        largest = max(abs(low), abs(high))
        return math.log2(self.limit / largest) if largest else None


ACTIVATION = Fixed(32, 10)
LINEAR = Fixed(16, 2)
ATTENTION_BIAS = Fixed(16, 7)
BIAS = NORM = Fixed(16, 5)
PATCH = Fixed(16, 0)
PIXEL = Fixed(8, 0, signed=False)
POSITION = BIAS
"""Nothing published says what holds `pos_embed`; the narrower type of the two that could is assumed."""
