"""Elements brought to other places: strided copies, concatenation, look-ups, scattering, resized images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from export.fpga.formats import Requantise
from export.fpga.ops.base import Codes, Op, view


@dataclass(frozen=True)
class Copy(Op):
    """A nest of loops over another tensor: transposes, slices, repetitions, flips."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    kind: ClassVar[str] = "copy"

    def run(self, x: Codes) -> tuple[list[Codes], int]:
        """-> `sizes`."""
        return [view(x, self.sizes, self.strides, self.offset).copy()], 0

    def arguments(self) -> Sequence[Any]:
        """Of `copy`."""
        return (self.sizes, self.strides, self.offset)

    @property
    def dims(self) -> dict[str, int]:
        """Elements."""
        return {"elements": int(np.prod(self.sizes))}


@dataclass(frozen=True)
class Concat(Op):
    """Parts `[outer, lengths[i]]` side by side, brought to one format."""

    outer: int
    lengths: tuple[int, ...]
    shifts: tuple[int, ...]
    """To the right, of each part."""
    width: int
    wrap: bool

    kind: ClassVar[str] = "concat"

    def run(self, *inputs: Codes) -> tuple[list[Codes], int]:
        """-> `[outer, sum of the lengths]`."""
        parts, overflow = [], 0
        for x, shift in zip(inputs, self.shifts, strict=True):
            codes, outside = Requantise(shift, self.width, self.wrap)(x.reshape(self.outer, -1))
            parts.append(codes)
            overflow += outside
        return [np.concatenate(parts, 1)], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `place`, for the whole."""
        return (self.outer, sum(self.lengths))

    def call(self, inputs: Sequence[str], outputs: Sequence[str], overflow: str) -> str:
        """One statement per part."""
        statements, start = [], 0
        for x, length, shift in zip(inputs, self.lengths, self.shifts, strict=True):
            rule = Requantise(shift, self.width, self.wrap).arguments
            sizes = f"{self.outer}, {length}, {sum(self.lengths)}, {start}"
            statements.append(f"place<{sizes}, {rule}>({x}, {outputs[0]}, {overflow});")
            start += length
        return "\n  ".join(statements)

    @property
    def dims(self) -> dict[str, int]:
        """Elements."""
        return {"elements": self.outer * sum(self.lengths)}


@dataclass(frozen=True)
class Gather(Op):
    """Whole blocks by their number: x `[outer, inner, columns]`, index `[count]`; numbers outside are clamped, counted.

    Negative numbers count from the end, as ONNX has it.
    """

    outer: int
    inner: int
    columns: int
    count: int

    kind: ClassVar[str] = "gather"

    def run(self, x: Codes, index: Codes) -> tuple[list[Codes], int]:
        """-> `[outer, count, columns]`."""
        index, outside = _inside(index.reshape(-1), self.inner)
        return [x.reshape(self.outer, self.inner, self.columns)[:, index]], outside

    def arguments(self) -> Sequence[Any]:
        """Of `gather`."""
        return (self.outer, self.inner, self.columns, self.count)

    @property
    def dims(self) -> dict[str, int]:
        """Outer, inner (chosen from), columns, count (chosen)."""
        return {"outer": self.outer, "inner": self.inner, "columns": self.columns, "count": self.count}


def _inside(index: Codes, size: int) -> tuple[Codes, int]:
    index = np.where(index < 0, index + size, index)
    outside = int(((index < 0) | (index >= size)).sum())
    return np.clip(index, 0, size - 1), outside


@dataclass(frozen=True)
class GatherElements(Op):
    """Single elements by their number: x `[outer, inner, columns]`, index `[outer, count, columns]`."""

    outer: int
    inner: int
    columns: int
    count: int

    kind: ClassVar[str] = "gather_elements"

    def run(self, x: Codes, index: Codes) -> tuple[list[Codes], int]:
        """-> `[outer, count, columns]`."""
        index, outside = _inside(index.reshape(self.outer, self.count, self.columns), self.inner)
        return [np.take_along_axis(x.reshape(self.outer, self.inner, self.columns), index, 1)], outside

    def arguments(self) -> Sequence[Any]:
        """Of `gather_elements`."""
        return (self.outer, self.inner, self.columns, self.count)

    @property
    def dims(self) -> dict[str, int]:
        """Outer, inner (chosen from), columns, count (chosen)."""
        return {"outer": self.outer, "inner": self.inner, "columns": self.columns, "count": self.count}


@dataclass(frozen=True)
class ScatterElements(Op):
    """Single elements replaced, or added to: x `[outer, inner, columns]`, index and updates `[outer, count, columns]`.

    In order of `count`, so that of two updates of one element the later wins.
    """

    outer: int
    inner: int
    columns: int
    count: int
    add: bool
    shift_x: int
    """To the right, from the format of x to that of the result."""
    shift_update: int
    width: int
    wrap: bool

    kind: ClassVar[str] = "scatter_elements"

    def run(self, x: Codes, index: Codes, updates: Codes) -> tuple[list[Codes], int]:
        """-> the shape of x."""
        result, overflow = Requantise(self.shift_x, self.width, self.wrap)(x)
        result = result.reshape(self.outer, self.inner, self.columns).copy()
        shape = (self.outer, self.count, self.columns)
        index, outside = _inside(index.reshape(shape), self.inner)
        updates, lost = Requantise(self.shift_update, self.width, self.wrap)(updates.reshape(shape))
        overflow += outside + lost
        for step in range(self.count):
            place, update = index[:, step : step + 1], updates[:, step : step + 1]
            if self.add:
                update, lost = Requantise(0, self.width, self.wrap)(update + np.take_along_axis(result, place, 1))
                overflow += lost
            np.put_along_axis(result, place, update, 1)
        return [result], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `scatter_elements`."""
        sizes = (self.outer, self.inner, self.columns, self.count, self.add)
        return (*sizes, self.shift_x, self.shift_update, self.wrap)

    @property
    def dims(self) -> dict[str, int]:
        """Outer, inner (written to), columns, count (written)."""
        return {"outer": self.outer, "inner": self.inner, "columns": self.columns, "count": self.count}


@dataclass(frozen=True)
class Resize(Op):
    """Images `[channels, height, width]` by interpolation between two rows and two columns each.

    Tables give for each row (column) of the result the first of its two, the second, and the second's weight in units
    of `2^-weight_bits`.
    """

    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    weight_bits: int
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "resize"

    def run(self, x: Codes, rows: Codes, columns: Codes) -> tuple[list[Codes], int]:
        """-> `[channels, out_height, out_width]`."""
        x, one = x.reshape(self.channels, self.height, self.width), 1 << self.weight_bits
        top, bottom, down = rows.reshape(3, -1)
        left, right, across = columns.reshape(3, -1)
        between = x[:, top] * (one - down[:, None]) + x[:, bottom] * down[:, None]  # [channels, out_height, width]
        codes, overflow = self.to(between[:, :, left] * (one - across) + between[:, :, right] * across)
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `resize`."""
        sizes = (self.channels, self.height, self.width, self.out_height, self.out_width)
        return (*sizes, self.weight_bits, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Channels, and sizes before and after."""
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "out_height": self.out_height,
            "out_width": self.out_width,
        }
