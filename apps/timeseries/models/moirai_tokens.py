"""From windows to Moirai's tokens: scaled patches of the target and of its covariates, in one sequence.

B windows, V variates (the target, then covariates), T patches of P points each on one grid, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from apps.timeseries.models.base import Scale, Windows, filled, observed

MAX_VALUE = 1e4
"""Scaled values are cut off here, so that no square of one overflows."""


@dataclass(frozen=True)
class Tokens:
    """Patches as a sequence, variate by variate, the target first."""

    values: Float[Tensor, "B N P"]
    """Scaled; 0 where nothing was observed."""
    observed: Bool[Tensor, "B N P"]
    variate: Int[Tensor, " N"]
    """0: the target."""
    time: Int[Tensor, " N"]
    """Number of the patch on the grid."""
    clock: Int[Tensor, " N"]
    """When a token is known: others see it that are known then or later."""
    segments: Int[Tensor, "B N"] | None = None
    """Which of several packed series a token belongs to."""

    @property
    def valid(self) -> Bool[Tensor, "B N"]:
        """Tokens of which at least one point was observed."""
        return self.observed.any(-1)

    def select(self, index: Bool[Tensor, " N"]) -> Tokens:
        """Some of the tokens."""
        segments = None if self.segments is None else self.segments[:, index]
        sequence = (self.variate[index], self.time[index], self.clock[index])
        return Tokens(self.values[:, index], self.observed[:, index], *sequence, segments)


@dataclass(frozen=True)
class Grid:
    """Windows cut into patches on one grid; a patch starts where the horizon does."""

    tokens: Tokens
    """Of target and covariates, context and horizon; what is not known is not observed."""
    scale: Scale
    """Of the target; of its last segment if series are packed."""
    context: int
    """Patches before the horizon."""
    length: int
    """T, patches in all."""

    @property
    def target(self) -> Tokens:
        """Tokens of the target alone, [B, T, P]."""
        return self.tokens.select(self.tokens.variate == 0)


@dataclass(frozen=True)
class Patches:
    """Windows cut into patches, before any of them is a token."""

    values: Float[Tensor, "B V T P"]
    """Scaled; NaN where nothing was observed."""
    kinds: tuple[int, ...]
    """Of each variate: 0 target, 1 known in the future too, 2 known in the past only."""
    scale: Scale
    """Of the target; of its last segment if series are packed."""
    context: int
    """Patches before the horizon."""
    segments: Int[Tensor, "B TP"] | None
    """Which of several packed series a point belongs to."""


def make_patches(windows: Windows, patch_size: int, horizon: int | None = None) -> Patches:
    """Scale windows and cut them.

    Context and horizon are padded with missing values, on the left and on the right, to whole patches. Each variate is
    scaled by mean and deviation of what its context shows (a packed series without context: of all it shows). A patch
    across the border of two packed series belongs to the later one.

    Args:
        windows: contexts, futures if known, covariates.
        patch_size: P.
        horizon: points to forecast instead of those in `windows.future`.
    """
    future = windows.future if horizon is None else None
    points = horizon if horizon is not None else 0 if future is None else future.shape[1]
    length = windows.past.shape[1]
    ends = length + points
    left, right = -length % patch_size, -points % patch_size
    if left + ends + right < 2 * patch_size:
        left += patch_size  # so that there is a patch to predict from, be it empty
    parts, kinds = [windows.past if future is None else windows.sequence], [0]
    for kind, covariates, end in ((1, windows.futr, ends), (2, windows.hist, length)):
        if covariates is not None:
            parts += covariates[:, :end].to(windows.past.dtype).unbind(-1)
            kinds += [kind] * covariates.shape[-1]
    x = torch.stack([_padded(part, left, left + ends + right) for part in parts], 1)  # [B, V, T P]
    segments = None if windows.segments is None else _padded(windows.segments, left, x.shape[-1], -1)
    x, segments = _one_series_per_patch(x, segments, patch_size)
    mean, std = _scale(x, left + length, segments)
    scaled = ((x - mean) / std).clamp(-MAX_VALUE, MAX_VALUE)
    last = left + length - 1
    scale = Scale(mean[:, 0, last : last + 1], std[:, 0, last : last + 1])
    values = scaled.unflatten(-1, (-1, patch_size))  # [B, V, T, P]
    return Patches(values, tuple(kinds), scale, (left + length) // patch_size, segments)


def make_grid(windows: Windows, patch_size: int, horizon: int | None = None, ahead: bool = True) -> Grid:
    """Cut windows into tokens; see `make_patches` for how.

    Args:
        windows: contexts, futures if known, covariates.
        patch_size: P.
        horizon: points to forecast instead of those in `windows.future`.
        ahead: whether the target sees covariates with a known future one patch ahead, as far as it predicts. The
            published model shows it none of the patch it predicts.
    """
    patches = make_patches(windows, patch_size, horizon)
    tokens = _tokens(patches.values, patches.kinds, patches.segments, ahead)
    hidden = torch.tensor(patches.kinds, device=tokens.time.device)[tokens.variate] == 2
    tokens = tokens.select(~hidden | (tokens.time < patches.context))
    return Grid(_with_constants(tokens, windows.stat), patches.scale, patches.context, patches.values.shape[2])


def _padded(x: Tensor, left: int, size: int, value: float = torch.nan) -> Tensor:
    return F.pad(x, (left, size - left - x.shape[1]), value=value)


def _one_series_per_patch(x: Tensor, segments: Tensor | None, patch_size: int) -> tuple[Tensor, Tensor | None]:
    """Give each patch the series of its last point in one, and drop the points of others."""
    if segments is None:
        return x, None
    patches = segments.unflatten(-1, (-1, patch_size))
    owner = patches.amax(-1, keepdim=True)  # series are numbered in order, and padding is below all
    keep = (patches == owner).flatten(1)
    return torch.where(keep[:, None], x, torch.nan), owner.expand_as(patches).flatten(1)


def _scale(x: Float[Tensor, "B V M"], context: int, segments: Int[Tensor, "B M"] | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation (correction 1) for every point, [B, V, M]; deviation 1 where there is none.

    A deviation that is but rounding of a large constant counts as none. Sums, not products of matrices: mixed
    precision must not touch them.
    """
    groups = torch.zeros_like(x[:, 0], dtype=torch.long) if segments is None else segments + 1
    member = F.one_hot(groups, int(groups.max()) + 1 if segments is not None else 1)[:, None].bool()  # [B, 1, M, S]
    mask = observed(x)[..., None] & member  # [B, V, M, S]
    shown = mask & (torch.arange(x.shape[-1], device=x.device) < context)[:, None]
    mask = shown | (mask & ~shown.any(2, keepdim=True))
    count = mask.sum(2, keepdim=True)
    values = filled(x)[..., None]
    mean = torch.where(mask, values, 0.0).sum(2, keepdim=True) / count.clamp(min=1)
    square = torch.where(mask, values - mean, 0.0).square().sum(2, keepdim=True)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    per_point = [torch.where(member, stat, 0.0).sum(-1) for stat in (mean, std)]
    return per_point[0].expand_as(x), per_point[1].expand_as(x)


def _tokens(patches: Float[Tensor, "B V T P"], kinds: tuple[int, ...], segments: Tensor | None, ahead: bool) -> Tokens:
    variates, count, size = patches.shape[1:]
    kind = torch.tensor(kinds, device=patches.device).repeat_interleave(count)
    time = torch.arange(count, device=patches.device).repeat(variates)
    clock = time - (kind == 1).long() if ahead else time
    variate = torch.arange(variates, device=patches.device).repeat_interleave(count)
    if segments is not None:
        segments = segments[:, ::size].repeat(1, variates)
    patches = patches.flatten(1, 2)
    return Tokens(filled(patches), observed(patches), variate, time, clock, segments)


def _with_constants(tokens: Tokens, stat: Float[Tensor, "B Cs"] | None) -> Tokens:
    """A token for each constant of the series behind the others, known from the first patch on."""
    if stat is None or tokens.segments is not None:
        return tokens
    shown = constant_patches(stat, tokens.values.shape[-1]).to(tokens.values.dtype)
    first = torch.zeros(stat.shape[1], dtype=torch.long, device=stat.device)
    variate = tokens.variate.max() + 1 + torch.arange(stat.shape[1], device=stat.device)
    return Tokens(
        torch.cat([tokens.values, filled(shown)], 1),
        torch.cat([tokens.observed, observed(shown)], 1),
        torch.cat([tokens.variate, variate]),
        torch.cat([tokens.time, first]),
        torch.cat([tokens.clock, first]),
    )


def constant_patches(stat: Float[Tensor, "B Cs"], patch_size: int) -> Float[Tensor, "B Cs P"]:
    """A patch for each constant of a series.

    Scaled, a constant would be nothing: its inverse hyperbolic sine is shown, linear for small numbers and logarithmic
    for large ones.
    """
    return stat.asinh()[..., None].expand(-1, -1, patch_size)
