"""Statistics of rows: norms, softmax, reductions, the best of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from export.fpga.formats import Requantise, divide, shift_right
from export.fpga.ops.base import Codes, Op
from export.fpga.ops.pointwise import integer_root, interpolate

ROOT = 60
"""Variances are scaled by a power of four into [2^60, 2^62), whose roots have 31 bits."""
RECIPROCAL = 24
"""Bits of the reciprocal of a deviation."""


@dataclass(frozen=True)
class Norm(Op):
    """Layer norm, or RMS norm without `centred`: x `[rows, inner]`, scale and bias `[inner]`.

    Mean and variance are integers: deviations have `guard` more bits behind the binary point than x (fewer where it is
    negative), so that the sum of their squares fits 64 bits. The reciprocal of the deviation is one integer root and
    one division a row, after the variance was scaled by a power of four to full precision.
    """

    rows: int
    inner: int
    centred: bool
    guard: int
    epsilon: int
    """In units of the variance."""
    unit: int
    """Bits behind the binary point of normalised values."""
    bias_shift: int
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "norm"

    def run(self, x: Codes, scale: Codes, bias: Codes) -> tuple[list[Codes], int]:
        """-> `[rows, inner]`."""
        x = shift_right(x.reshape(self.rows, self.inner), -self.guard)
        if self.centred:
            x = x - divide(x.sum(1, keepdims=True), self.inner)
        variance = divide((x * x).sum(1, keepdims=True), self.inner) + self.epsilon
        variance = np.maximum(variance, 1)
        scaled, power = _scaled(variance)
        reciprocal = (1 << (ROOT // 2 + RECIPROCAL)) // integer_root(scaled)
        normal = _shift_rows(x * reciprocal, ROOT // 2 + RECIPROCAL - power - self.unit)
        codes, overflow = self.to(normal * scale.reshape(-1) + (bias.reshape(-1) << self.bias_shift))
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `norm`."""
        sizes = (self.rows, self.inner, self.centred, self.guard, self.epsilon, self.unit)
        return (*sizes, self.bias_shift, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Rows and their length."""
        return {"rows": self.rows, "inner": self.inner}


def _scaled(variance: Codes) -> tuple[Codes, Codes]:
    """Times 4^power, into [2^ROOT, 4 * 2^ROOT)."""
    power = np.zeros_like(variance)
    for step in (16, 8, 4, 2, 1):
        room = variance < (1 << (ROOT + 2 - 2 * step))
        variance, power = np.where(room, variance << (2 * step), variance), power + np.where(room, step, 0)
    return variance, power


def _shift_rows(values: Codes, shift: Codes) -> Codes:
    """`shift_right` by a positive number of bits for each row."""
    return (values + (np.int64(1) << (shift - 1))) >> shift


@dataclass(frozen=True)
class Softmax(Op):
    """Over the last dimension of `[rows, inner]`: the largest subtracted, exp by table, one division a row."""

    rows: int
    inner: int
    shift: int
    """Of the table of exp, see `Table`."""
    count: int
    exponential: Requantise
    """To the codes of exp(x - max)."""
    reciprocal: int
    """The sum of a row goes into `2^reciprocal`."""
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "softmax"

    def run(self, x: Codes, table: Codes) -> tuple[list[Codes], int]:
        """-> `[rows, inner]`."""
        x = x.reshape(self.rows, self.inner)
        below = x.max(1, keepdims=True) - x
        power, _ = self.exponential(interpolate(below, table.reshape(-1), 0, self.shift))
        reciprocal = (1 << self.reciprocal) // power.sum(1, keepdims=True)
        codes, overflow = self.to(power * reciprocal)
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `softmax`."""
        exponential = (self.exponential.shift, self.exponential.width)
        return (self.rows, self.inner, self.shift, self.count, *exponential, self.reciprocal, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Rows and their length."""
        return {"rows": self.rows, "inner": self.inner}


@dataclass(frozen=True)
class Reduce(Op):
    """Sum, mean, norm (l2), largest, least, or place of the first largest or least: x `[outer, inner, columns]`."""

    function: str
    outer: int
    inner: int
    columns: int
    shift: int
    """To the left before a mean's division, or before a norm's root."""
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "reduce"

    def run(self, x: Codes) -> tuple[list[Codes], int]:
        """-> `[outer, columns]`."""
        x = x.reshape(self.outer, self.inner, self.columns)
        if self.function == "mean":
            total = divide(x.sum(1) << self.shift, self.inner)
        elif self.function == "l2":
            total = integer_root((x * x).sum(1) << self.shift)
        else:
            total = {"sum": x.sum, "max": x.max, "min": x.min, "argmax": x.argmax, "argmin": x.argmin}[self.function](1)
        codes, overflow = self.to(total)
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `reduce`."""
        sizes = (self.outer, self.inner, self.columns, self.shift)
        return (f"Function::{self.function}_", *sizes, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Outer, inner (reduced), columns."""
        return {"outer": self.outer, "inner": self.inner, "columns": self.columns}


@dataclass(frozen=True)
class TopK(Op):
    """The `count` largest of each row of `[rows, inner]`, largest first, of equals the first; values and places."""

    rows: int
    inner: int
    count: int

    kind: ClassVar[str] = "topk"

    def run(self, x: Codes) -> tuple[list[Codes], int]:
        """-> values and indices `[rows, count]`."""
        x = x.reshape(self.rows, self.inner)
        index = np.argsort(-x, axis=1, kind="stable")[:, : self.count]
        return [np.take_along_axis(x, index, 1), index.astype(np.int64)], 0

    def arguments(self) -> Sequence[Any]:
        """Of `topk`."""
        return (self.rows, self.inner, self.count)

    @property
    def dims(self) -> dict[str, int]:
        """Rows, their length, and how many are taken."""
        return {"rows": self.rows, "inner": self.inner, "count": self.count}


@dataclass(frozen=True)
class Cumulate(Op):
    """Running sums along the middle of `[outer, inner, columns]`, each with or without its own element."""

    outer: int
    inner: int
    columns: int
    exclusive: bool
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "cumulate"

    def run(self, x: Codes) -> tuple[list[Codes], int]:
        """-> the shape of x."""
        x = x.reshape(self.outer, self.inner, self.columns)
        codes, overflow = self.to(x.cumsum(1) - (x if self.exclusive else 0))
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `cumulate`."""
        return (self.outer, self.inner, self.columns, self.exclusive, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Outer, inner (summed along), columns."""
        return {"outer": self.outer, "inner": self.inner, "columns": self.columns}
