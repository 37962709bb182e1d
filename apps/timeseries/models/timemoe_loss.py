"""What Time-MoE is trained by: Huber losses of its heads, and one balance loss over all layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.timeseries.models.base import filled, instance_scale, masked_mean, observed

HUBER_DELTA = 2.0
"""Where the published loss turns from squares to absolute values."""


def horizon_losses(
    heads: Iterable[nn.Module],
    hidden: Float[Tensor, "B N D"],
    sequence: Float[Tensor, "B M"],
    segments: Int[Tensor, "B M"] | None = None,
    delta: float = HUBER_DELTA,
) -> list[Float[Tensor, ""]]:
    """Mean Huber loss of each head: from positions that were observed, on targets that were.

    Args:
        heads: each from a token to the next points.
        hidden: of all points but the last, N = M - 1.
        sequence: NaN where missing.
        segments: which packed series each point is of; targets beyond its end count for nothing.
        delta: where the loss turns from squares to absolute values.
    """
    labels, known = filled(sequence[:, 1:]), observed(sequence[:, 1:])
    losses = []
    for head in heads:
        predicted = head(hidden)
        points = predicted.shape[-1]
        mask = targets(known, points) & observed(sequence[:, :-1])[..., None]
        if segments is not None:
            mask &= targets(segments[:, 1:], points) == segments[:, :-1, None]
        losses.append(huber(predicted, targets(labels, points), mask, delta))
    return losses


def targets(labels: Tensor, points: int) -> Tensor:
    """The next `points` labels at every position, a view `[B, N] -> [B, N, p]`; what lies past the end is 0."""
    return F.pad(labels, (0, points - 1)).unfold(1, points, 1)


def huber(
    predicted: Float[Tensor, "B N p"],
    target: Float[Tensor, "B N p"],
    mask: Bool[Tensor, "B N p"] | None = None,
    delta: float = HUBER_DELTA,
) -> Float[Tensor, ""]:
    """Mean Huber loss; without a mask over everything, zeros past the end included, as the published code has it."""
    losses = F.huber_loss(predicted, target, reduction="none", delta=delta)
    return losses.mean() if mask is None else masked_mean(losses, mask)


def aux_loss(recording: Iterable[moecore.Routing], seen: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, ""]:
    """Balance loss over the tokens of all layers taken together: top_k when routing is even.

    E * sum_e (pairs of e per token) * (mean probability of e); the paper's equation divides by top_k, the code that
    the published weights were trained with does not.

    Args:
        recording: one pass.
        seen: which tokens count, the observed ones; None: all.
    """
    routings = list(recording)
    probs = torch.cat([routing.probs for routing in routings])  # [layers T, E]
    chosen = torch.cat([routing.assignment.chosen() for routing in routings]).to(probs.dtype)
    if seen is None:
        return probs.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()
    weight = seen.flatten().to(probs.dtype).repeat(len(routings))  # [layers T]
    weight = weight / weight.sum().clamp(min=1)
    return probs.shape[1] * ((weight @ chosen) * (weight @ probs)).sum()


def normalize_packed(sequence: Float[Tensor, "B N"], segments: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Packed series brought to mean 0 and deviation 1, each by all of its own points; NaN stays NaN."""
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    series = starts.flatten().cumsum(0) - 1  # [B N], numbered through
    at = torch.arange(sequence.shape[1], device=sequence.device).repeat(len(sequence))
    apart = sequence.new_full((int(series[-1]) + 1, sequence.shape[1]), torch.nan)  # one series per row
    apart[series, at] = sequence.flatten()
    return instance_scale(apart).normalize(apart)[series, at].view_as(sequence)
