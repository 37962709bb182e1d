"""The three ways rows can be laid out over experts: one expert's, every expert's, sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def _ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(number, first, end) of consecutive ranges."""
    first = 0
    for i, size in enumerate(sizes):
        yield i, first, first + size
        first += size


class SingleLayout:
    """All rows belong to one expert: rows [n, ..., D].

    `cut` remembers the stacked weights cut into per-expert tensors, so that autograd stacks their gradients once
    instead of adding E full-size ones.
    """

    def __init__(self, expert: int, cut: dict[int, tuple[Tensor, ...]] | None = None) -> None:
        self.expert = expert
        self.cut = {} if cut is None else cut

    def _of(self, stacked: Tensor) -> Tensor:
        key = id(stacked)
        if key not in self.cut:
            self.cut[key] = (stacked, *stacked.unbind())  # itself too: while it lives, no other tensor has its id
        return self.cut[key][1 + self.expert]

    def linear(self, x: Tensor, weight: Float[Tensor, "E F D"], bias: Float[Tensor, "E F"] | None) -> Tensor:
        """[n, ..., D] -> [n, ..., F] with the expert's weights."""
        return F.linear(x, self._of(weight), None if bias is None else self._of(bias))

    def pick(self, table: Float[Tensor, "E D"], x: Tensor) -> Tensor:
        """The expert's entry, [D]."""
        return self._of(table)

    def parts(self, x: Tensor, sizes: Sequence[int]) -> list[tuple[int, Tensor, SingleLayout]]:
        """The one range that holds this expert."""
        return [
            (i, x, SingleLayout(self.expert - first, self.cut))
            for i, first, end in _ranges(sizes)
            if first <= self.expert < end
        ]


class EveryLayout:
    """Every expert sees every row: rows [E, T, ..., D] (or [1, T, ..., D] before the first expert map)."""

    def linear(self, x: Tensor, weight: Float[Tensor, "E F D"], bias: Float[Tensor, "E F"] | None) -> Tensor:
        """[E or 1, T, ..., D] -> [E, T, ..., F]."""
        experts, wide, _ = weight.shape
        y = torch.matmul(x.flatten(1, -2), weight.transpose(1, 2))  # [E, R, F]
        if bias is not None:
            y = y + bias[:, None].to(y.dtype)
        return y.reshape(experts, *x.shape[1:-1], wide)

    def pick(self, table: Float[Tensor, "E D"], x: Tensor) -> Tensor:
        """[E, 1, ..., D]: broadcasts against [E, T, ..., D]."""
        return table.view(table.shape[0], *[1] * (x.dim() - 2), table.shape[1])

    def parts(self, x: Tensor, sizes: Sequence[int]) -> list[tuple[int, Tensor, EveryLayout]]:
        """The experts' slices; rows still shared by all stay so."""
        shared = x.shape[0] == 1
        return [
            (i, x.expand(end - first, *x.shape[1:]) if shared else x[first:end], EveryLayout())
            for i, first, end in _ranges(sizes)
        ]


class SortedLayout:
    """Rows [P, ..., D] sorted by expert, multiplied by one grouped GEMM.

    Args:
        ends: row number at which each expert's rows end, int32 as `F.grouped_mm` wants it.
        expert: expert of each row.
    """

    def __init__(self, ends: Int[Tensor, " E"], expert: Int[Tensor, " P"]) -> None:
        self.ends, self.expert = ends, expert

    def linear(self, x: Tensor, weight: Float[Tensor, "E F D"], bias: Float[Tensor, "E F"] | None) -> Tensor:
        """[P, ..., D] -> [P, ..., F]."""
        unit = x[0].numel() // x.shape[-1]  # rows per routed unit
        rows = x.reshape(-1, x.shape[-1])
        y = F.grouped_mm(rows, weight.to(x.dtype).transpose(1, 2), offs=self.ends * unit)
        y = y.view(*x.shape[:-1], weight.shape[1])
        return y if bias is None else y + self._rows(bias.to(x.dtype), x.dim())

    def _rows(self, table: Float[Tensor, "E D"], dim: int) -> Tensor:
        rows = _ExpertRows.apply(table, self.expert, self.ends)  # [P, D]
        return rows.reshape(rows.shape[0], *[1] * (dim - 2), rows.shape[1])

    def pick(self, table: Float[Tensor, "E D"], x: Tensor) -> Tensor:
        """[P, 1, ..., D]: each row's entry."""
        return self._rows(table, x.dim())

    def parts(self, x: Tensor, sizes: Sequence[int]) -> list[tuple[int, Tensor, SortedLayout]]:
        """Slices of rows; reads the range ends on the host."""
        result = []
        for i, first, end in _ranges(sizes):
            begin = self.ends[first - 1] if first else torch.zeros_like(self.ends[0])
            a, b = int(begin), int(self.ends[end - 1])
            result.append((i, x[a:b], SortedLayout(self.ends[first:end] - begin, self.expert[a:b] - first)))
        return [part for part in result if part[1].shape[0]] or result[:1]


class _ExpertRows(torch.autograd.Function):
    """table[expert] for rows sorted by expert; the gradient is a segment sum, free of atomics."""

    @staticmethod
    def forward(ctx, table: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return table.index_select(0, expert)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ends,) = ctx.saved_tensors
        offsets = F.pad(ends.long(), (1, 0))
        return torch.segment_reduce(grad.contiguous(), "sum", offsets=offsets, initial=0.0), None, None
