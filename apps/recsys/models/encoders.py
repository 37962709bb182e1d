"""Sequences of embedded values -> one vector each. Empty sequences give zeros, and padding changes nothing.

Two forms that give the same: padded `[B, L, d]` for graphs of fixed shape, and packed, where the P values of a batch
that are there lie one after another and only they are computed.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Mean(nn.Module):
    """Mean of the values."""

    def forward(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Tensor | None = None
    ) -> Float[Tensor, "B d"]:
        """[B, L, d] -> [B, d]."""
        return _total(values, mask.to(values.dtype)) / mask.sum(1, keepdim=True).clamp(min=1)

    def packed(
        self, values: Float[Tensor, "P d"], row: Int[Tensor, " P"], rows: int, target: Tensor | None = None
    ) -> Float[Tensor, "B d"]:
        """[P, d] -> [B, d]; `row` says whose each value is."""
        counts = torch.bincount(row, minlength=rows).clamp(min=1)
        return _packed_total(values, row, rows) / counts[:, None]


class Sum(nn.Module):
    """Sum of the values."""

    def forward(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Tensor | None = None
    ) -> Float[Tensor, "B d"]:
        """[B, L, d] -> [B, d]."""
        return _total(values, mask.to(values.dtype))

    def packed(
        self, values: Float[Tensor, "P d"], row: Int[Tensor, " P"], rows: int, target: Tensor | None = None
    ) -> Float[Tensor, "B d"]:
        """[P, d] -> [B, d]."""
        return _packed_total(values, row, rows)


class TargetAttention(nn.Module):
    """Values weighted by what the candidate has in common with each: DIN (Zhou et al. 2018, arXiv 1706.06978).

    The weight of value h for target t is an MLP of `[h, h * t, t]`; as published, weights are not normalised, so that
    their sum says how much of the candidate the past holds.

    Args:
        dim: d.
        hidden: units of the MLP.
    """

    def __init__(self, dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.pair, self.target = nn.Linear(2 * dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)

    def forward(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Float[Tensor, "B d"]
    ) -> Float[Tensor, "B d"]:
        """[B, L, d] -> [B, d]."""
        hidden = self.pair(torch.cat([values, values * target[:, None]], -1)) + self.target(target)[:, None]
        return _total(values, self.out(hidden.relu()).squeeze(-1) * mask)

    def packed(
        self, values: Float[Tensor, "P d"], row: Int[Tensor, " P"], rows: int, target: Float[Tensor, "B d"]
    ) -> Float[Tensor, "B d"]:
        """[P, d] -> [B, d]."""
        own = torch.cat([target, self.target(target)], 1).index_select(0, row)  # one gather for both
        candidate, hidden = own.split([values.shape[1], own.shape[1] - values.shape[1]], 1)
        hidden = self.pair(torch.cat([values, values * candidate], 1)) + hidden
        return _packed_total(values * self.out(hidden.relu()), row, rows)


class SelfAttention(nn.Module):
    """One layer of attention of the values to each other, then their mean.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.pool = nn.LayerNorm(dim), Mean()

    def forward(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Tensor | None = None
    ) -> Float[Tensor, "B d"]:
        """[B, L, d] -> [B, d]."""
        query, key, value = self.qkv(values).chunk(3, -1)
        scores = torch.bmm(query, key.transpose(1, 2)) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)  # finite: rows may be empty
        mixed = self.out(torch.bmm(scores.softmax(-1), value))
        return self.pool(self.norm(values + mixed), mask)


def make_pooling(name: str, dim: int) -> nn.Module:
    """A pooling by the name that schemas use; those that work on each value alone have a method `packed`."""
    made = {"mean": Mean, "sum": Sum}
    if name in made:
        return made[name]()
    return TargetAttention(dim) if name == "target" else SelfAttention(dim)


def _total(values: Float[Tensor, "B L d"], weights: Float[Tensor, "B L"]) -> Float[Tensor, "B d"]:
    return torch.bmm(weights[:, None], values).squeeze(1)


def _packed_total(values: Float[Tensor, "P d"], row: Int[Tensor, " P"], rows: int) -> Float[Tensor, "B d"]:
    return values.new_zeros(rows, values.shape[1]).index_add(0, row, values)
