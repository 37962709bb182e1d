"""Sequences of embedded values -> one vector each. Empty sequences give zeros, and padding changes nothing."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Mean(nn.Module):
    """Mean of the values."""

    def forward(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Tensor | None = None
    ) -> Float[Tensor, "B d"]:
        """[B, L, d] -> [B, d]."""
        return Sum()(values, mask) / mask.sum(1, keepdim=True).clamp(min=1)


class Sum(nn.Module):
    """Sum of the values."""

    def forward(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Tensor | None = None
    ) -> Float[Tensor, "B d"]:
        """[B, L, d] -> [B, d]."""
        return torch.bmm(mask[:, None].to(values.dtype), values).squeeze(1)


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
        self.value, self.product = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.target, self.out = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, 1)

    def weights(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Float[Tensor, "B d"]
    ) -> Float[Tensor, "B L"]:
        """Weight of every value, 0 for padding."""
        hidden = self.value(values) + self.product(values * target[:, None]) + self.target(target)[:, None]
        return self.out(hidden.relu()).squeeze(-1) * mask

    def forward(
        self, values: Float[Tensor, "B L d"], mask: Bool[Tensor, "B L"], target: Float[Tensor, "B d"]
    ) -> Float[Tensor, "B d"]:
        """[B, L, d] -> [B, d]."""
        return torch.bmm(self.weights(values, mask, target)[:, None], values).squeeze(1)


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
    """A pooling by the name that schemas use."""
    made = {"mean": Mean, "sum": Sum}
    if name in made:
        return made[name]()
    return TargetAttention(dim) if name == "target" else SelfAttention(dim)
