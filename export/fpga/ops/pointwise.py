"""Element by element: arithmetic and comparisons with broadcasting, choices, clamps, functions by table, quotients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from export.fpga.formats import Requantise, divide, shift_right
from export.fpga.ops.base import Codes, Op, view

BINARY: dict[str, Callable[[Codes, Codes], Codes]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": np.maximum,
    "min": np.minimum,
    "equal": lambda a, b: a == b,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "greater": lambda a, b: a > b,
    "greater_equal": lambda a, b: a >= b,
    "and": lambda a, b: (a != 0) & (b != 0),
    "or": lambda a, b: (a != 0) | (b != 0),
    "xor": lambda a, b: (a != 0) ^ (b != 0),
}
"""Functions of two operands; truth values are 0 and 1."""


@dataclass(frozen=True)
class Binary(Op):
    """A function of two operands, their binary points aligned first (`mul` needs no alignment)."""

    function: str
    sizes: tuple[int, ...]
    a: tuple[int, ...]
    """Strides of the first operand, 0 where it repeats."""
    b: tuple[int, ...]
    shift_a: int
    """To the right, rounded; negative: to the left."""
    shift_b: int
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "binary"

    def run(self, a: Codes, b: Codes) -> tuple[list[Codes], int]:
        """-> `sizes`."""
        a = shift_right(view(a, self.sizes, self.a), self.shift_a)
        b = shift_right(view(b, self.sizes, self.b), self.shift_b)
        codes, overflow = self.to(BINARY[self.function](a, b).astype(np.int64))
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `binary`."""
        name = f"Function::{self.function}_"
        return (name, self.sizes, self.a, self.b, self.shift_a, self.shift_b, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Elements."""
        return {"elements": int(np.prod(self.sizes))}


@dataclass(frozen=True)
class Divide(Op):
    """`floor(a / b + 1/2)` in the result's format; by zero: the largest value of a's sign, counted as an overflow."""

    sizes: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    shift_a: int
    """To the left, so that the quotient has the result's binary point."""
    shift_b: int
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "divide"

    def run(self, a: Codes, b: Codes) -> tuple[list[Codes], int]:
        """-> `sizes`."""
        a, b = view(a, self.sizes, self.a) << self.shift_a, view(b, self.sizes, self.b) << self.shift_b
        a, b = np.where(b < 0, -a, a), np.abs(b)
        beyond = 1 << self.to.width  # does not fit
        quotient = np.where(b == 0, np.where(a < 0, -beyond, beyond), divide(a, np.maximum(b, 1)))
        codes, overflow = self.to(quotient)
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `divide`."""
        return (self.sizes, self.a, self.b, self.shift_a, self.shift_b, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Elements."""
        return {"elements": int(np.prod(self.sizes))}


@dataclass(frozen=True)
class Select(Op):
    """`a` where a condition holds, else `b`."""

    sizes: tuple[int, ...]
    condition: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    from_a: Requantise
    from_b: Requantise

    kind: ClassVar[str] = "select"

    def run(self, condition: Codes, a: Codes, b: Codes) -> tuple[list[Codes], int]:
        """-> `sizes`."""
        condition = view(condition, self.sizes, self.condition) != 0
        a, b = (view(codes, self.sizes, strides) for codes, strides in ((a, self.a), (b, self.b)))
        shifted = np.where(condition, shift_right(a, self.from_a.shift), shift_right(b, self.from_b.shift))
        codes, overflow = Requantise(0, self.from_a.width, self.from_a.wrap)(shifted)
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `select`."""
        shifts = (self.from_a.shift, self.from_b.shift)
        return (self.sizes, self.condition, self.a, self.b, *shifts, self.from_a.wrap)

    @property
    def dims(self) -> dict[str, int]:
        """Elements."""
        return {"elements": int(np.prod(self.sizes))}


def integer_root(values: Codes) -> Codes:
    """`floor(sqrt(values))` of integers below 2^62, exact."""
    root = np.sqrt(values.astype(np.float64)).astype(np.int64)
    root = np.where(root * root > values, root - 1, root)
    return np.where((root + 1) * (root + 1) <= values, root + 1, root)


UNARY: dict[str, Callable[[Codes, int], Codes]] = {
    "copy": lambda x, fraction: x,
    "abs": lambda x, fraction: np.abs(x),
    "neg": lambda x, fraction: -x,
    "sign": lambda x, fraction: np.sign(x),
    "not": lambda x, fraction: (x == 0).astype(np.int64),
    "floor": lambda x, fraction: x >> fraction,
    "ceil": lambda x, fraction: -(-x >> fraction),
    "trunc": lambda x, fraction: np.where(x < 0, -(-x >> fraction), x >> fraction),
    "sqrt": lambda x, fraction: integer_root(np.maximum(x, 0) << fraction),
}
"""Functions of one operand. Floor, ceil and trunc give whole numbers of an operand with so many bits behind its binary
point; the root is of the operand times 2^fraction."""


@dataclass(frozen=True)
class Unary(Op):
    """A function of one operand, after a clamp to `[low, high]`."""

    function: str
    size: int
    fraction: int
    low: int
    high: int
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "unary"

    def run(self, x: Codes) -> tuple[list[Codes], int]:
        """-> `[size]`."""
        codes, overflow = self.to(UNARY[self.function](np.clip(x.reshape(-1), self.low, self.high), self.fraction))
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `unary`."""
        name = f"Function::{self.function}_"
        return (name, self.size, self.fraction, self.low, self.high, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Elements."""
        return {"elements": self.size}


@dataclass(frozen=True)
class Table(Op):
    """A function by linear interpolation in a table, plus the rectified input where `relu_shift` is not negative.

    The table holds `count + 1` values at `low + i * 2^shift`, in codes of the input; inputs beyond are clamped to its
    ends. What is far from a line only near zero (GELU, SiLU, softplus) is kept as its difference from ReLU.
    """

    size: int
    low: int
    shift: int
    count: int
    relu_shift: int
    """To the left, from the input's binary point to the accumulator's; -1: without."""
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "table"

    def run(self, x: Codes, table: Codes) -> tuple[list[Codes], int]:
        """-> `[size]`."""
        x = x.reshape(-1)
        total = interpolate(x, table.reshape(-1), self.low, self.shift)
        if self.relu_shift >= 0:
            total = total + (np.maximum(x, 0) << self.relu_shift)
        codes, overflow = self.to(total)
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `table`."""
        return (self.size, self.low, self.shift, self.count, self.relu_shift, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Elements and segments."""
        return {"elements": self.size, "segments": self.count}


def interpolate(x: Codes, table: Codes, low: int, shift: int) -> Codes:
    """The line through neighbouring entries, `2^shift` times as fine as these: exact, nothing is rounded."""
    place = np.clip(x - low, 0, (len(table) - 1) << shift)
    index = np.minimum(place >> shift, len(table) - 2)
    rest = place - (index << shift)
    left = table[index]
    return (left << shift) + (table[index + 1] - left) * rest
