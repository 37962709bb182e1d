"""Matrix products and convolutions: exact sums of products, then one rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from export.fpga.formats import Requantise
from export.fpga.ops.base import Codes, Op

EXACT = 1 << 53
"""Below this float64 sums of integers are exact."""
PATCHES = 1 << 22
"""Elements of unfolded images at a time."""


def exact_matmul(a: Codes, b: Codes) -> Codes:
    """`a @ b` in integers `[..., M, K] @ [..., K, N]`, by float64 products of parts small enough to be exact."""
    if not a.size or not b.size:
        return np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), np.int64)
    most_a, most_b = int(np.abs(a).max()), int(np.abs(b).max())
    if most_a * most_b * a.shape[-1] < EXACT:
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
    if most_a < most_b:
        return exact_matmul(b.swapaxes(-1, -2), a.swapaxes(-1, -2)).swapaxes(-1, -2)
    half = most_a.bit_length() // 2
    high = a >> half
    return (exact_matmul(high, b) << half) + exact_matmul(a - (high << half), b)


@dataclass(frozen=True)
class Linear(Op):
    """Rows times a constant matrix, plus bias: x `[rows, inner]`, weight `[outputs, inner]`, bias `[outputs]`."""

    rows: int
    inner: int
    outputs: int
    tile_in: int
    tile_out: int
    accumulator: int
    """Bits; wide enough for any input."""
    bias_shift: int
    """To the left, from the bias's binary point to the accumulator's."""
    to: Requantise

    kind: ClassVar[str] = "linear"

    def run(self, x: Codes, weight: Codes, bias: Codes) -> tuple[list[Codes], int]:
        """-> `[rows, outputs]`."""
        total = exact_matmul(x.reshape(self.rows, self.inner), weight.reshape(self.outputs, self.inner).T)
        codes, overflow = self.to(total + (bias.reshape(-1) << self.bias_shift))
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `linear`."""
        sizes = (self.rows, self.inner, self.outputs, self.tile_in, self.tile_out)
        return (*sizes, self.accumulator, self.bias_shift, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Rows, in, out."""
        return {"rows": self.rows, "in": self.inner, "out": self.outputs}

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inner * self.outputs


@dataclass(frozen=True)
class Matmul(Op):
    """Batched products: a `[batch or 1, rows, inner]`, b `[batch or 1, inner, columns]`."""

    batch: int
    rows: int
    inner: int
    columns: int
    repeat_a: bool
    """One `a` for all of the batch."""
    repeat_b: bool
    tile_in: int
    tile_out: int
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "matmul"

    def run(self, a: Codes, b: Codes) -> tuple[list[Codes], int]:
        """-> `[batch, rows, columns]`."""
        a = a.reshape(1 if self.repeat_a else self.batch, self.rows, self.inner)
        b = b.reshape(1 if self.repeat_b else self.batch, self.inner, self.columns)
        total = np.broadcast_to(exact_matmul(a, b), (self.batch, self.rows, self.columns))
        codes, overflow = self.to(total)
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `matmul`."""
        steps = (0 if self.repeat_a else self.rows * self.inner, 0 if self.repeat_b else self.inner * self.columns)
        sizes = (self.batch, self.rows, self.inner, self.columns)
        return (*sizes, *steps, self.tile_in, self.tile_out, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Batch, rows, in, out."""
        return {"batch": self.batch, "rows": self.rows, "in": self.inner, "out": self.columns}

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.batch * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Conv2d(Op):
    """x `[channels, height, width]`, weight `[outputs, channels / groups, *kernel]`, bias `[outputs]`."""

    channels: int
    height: int
    width: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    """Zeros above and on the left."""
    out_height: int
    out_width: int
    tile_out: int
    accumulator: int
    bias_shift: int
    to: Requantise

    kind: ClassVar[str] = "conv2d"

    def run(self, x: Codes, weight: Codes, bias: Codes) -> tuple[list[Codes], int]:
        """-> `[outputs, out_height, out_width]`."""
        weight = weight.reshape(self.groups, self.outputs // self.groups, -1).swapaxes(1, 2)
        patches = self._windows(x.reshape(self.channels, self.height, self.width))
        rows = max(1, PATCHES // max(1, patches[:, 0].size))
        parts = [self._products(patches[:, i : i + rows], weight) for i in range(0, self.out_height, rows)]
        total = np.concatenate(parts, 1) + (bias.reshape(-1, 1, 1) << self.bias_shift)
        codes, overflow = self.to(total)
        return [codes], overflow

    def _windows(self, x: Codes) -> Codes:
        """[channels, out_height, out_width, *kernel], a view."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        need = [
            (size - 1) * step + window
            for size, step, window in zip((self.out_height, self.out_width), self.stride, reach, strict=True)
        ]
        after = [max(0, n - x.shape[1 + i] - self.before[i]) for i, n in enumerate(need)]
        x = np.pad(x, ((0, 0), *((self.before[i], after[i]) for i in range(2))))[:, : need[0], : need[1]]
        windows = np.lib.stride_tricks.sliding_window_view(x, reach, (1, 2))
        return windows[:, :: self.stride[0], :: self.stride[1], :: self.dilation[0], :: self.dilation[1]]

    def _products(self, patches: Codes, weight: Codes) -> Codes:
        height = patches.shape[1]
        split = patches.reshape(self.groups, -1, height, self.out_width, *self.kernel)
        split = split.transpose(0, 2, 3, 1, 4, 5).reshape(self.groups, height * self.out_width, -1)
        total = exact_matmul(split, weight)  # [groups, positions, outputs / groups]
        return total.swapaxes(1, 2).reshape(self.outputs, height, self.out_width)

    def arguments(self) -> Sequence[Any]:
        """Of `conv2d`."""
        sizes = (self.channels, self.height, self.width, self.outputs, self.groups)
        steps = (*self.kernel, *self.stride, *self.dilation, *self.before, self.out_height, self.out_width)
        return (*sizes, *steps, self.tile_out, self.accumulator, self.bias_shift, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Of the image, the kernel and the output."""
        return {
            "channels": self.channels,
            "height": self.out_height,
            "width": self.out_width,
            "outputs": self.outputs,
            "groups": self.groups,
            "kernel_height": self.kernel[0],
            "kernel_width": self.kernel[1],
        }

    @property
    def macs(self) -> int:
        """Multiply-adds, those with padding too."""
        return (
            self.out_height * self.out_width * self.outputs * (self.channels // self.groups) * int(np.prod(self.kernel))
        )


@dataclass(frozen=True)
class Affine(Op):
    """A factor and a summand per channel, batch norm once trained: x `[outer, channels, inner]`."""

    outer: int
    channels: int
    inner: int
    bias_shift: int
    accumulator: int
    to: Requantise

    kind: ClassVar[str] = "affine"

    def run(self, x: Codes, scale: Codes, bias: Codes) -> tuple[list[Codes], int]:
        """-> the shape of x."""
        x = x.reshape(self.outer, self.channels, self.inner)
        codes, overflow = self.to(x * scale.reshape(-1, 1) + (bias.reshape(-1, 1) << self.bias_shift))
        return [codes], overflow

    def arguments(self) -> Sequence[Any]:
        """Of `affine`."""
        return (self.outer, self.channels, self.inner, self.bias_shift, self.accumulator, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Outer, channels, inner."""
        return {"outer": self.outer, "channels": self.channels, "inner": self.inner}

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.outer * self.channels * self.inner
