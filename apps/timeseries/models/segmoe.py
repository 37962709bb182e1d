"""Seg-MoE: a patch encoder whose experts are chosen per segment of consecutive patches (arXiv 2601.21641)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.timeseries.model_settings import SegMoEConfig
from apps.timeseries.models.base import (
    Forecast,
    ForecastModel,
    Scale,
    Windows,
    filled,
    instance_scale,
    masked_mean,
    observed,
)
from apps.timeseries.models.segmoe_blocks import Block, Norm
from moecore.errors import require

HUBER_DELTA = 2.0
"""Where the published loss turns from squares to absolute values, in deviations of the context."""


class SegMoE(ForecastModel):
    """Contexts -> the next `block` points; longer horizons are rolled out block by block.

    Channel-independent: every window is one series. Contexts are normalised by their own mean and deviation. A patch
    that misses values is told so by a map of its own, which starts at zero; a patch without any value is no key in
    attention.

    Args:
        config: sizes, segments, experts, and which head.
        context: L, points it sees: of longer contexts the last L are used.
        block: points predicted at once.
        season: length of the season for `config.seasonal`; without one (1, or less than two in the context) the map is
            a full linear one.
        dense: plain FFNs of equal active multiply-adds instead of the MoE layers.
    """

    def __init__(self, config: SegMoEConfig, context: int, block: int, season: int = 1, dense: bool = False) -> None:
        super().__init__()
        self.config, self.context, self.block = config, context, config.block or block
        fits = config.head == "direct" or self.block <= context
        require(fits, "block", self.block, f"must not exceed data.context={context} with head=shift")
        size, width = config.patch_size, config.d_model
        self.pad = -context % size
        patches = (context + self.pad) // size
        self.embed = nn.Conv1d(1, width, size, stride=size)
        self.missing = nn.Conv1d(1, width, size, stride=size, bias=False)
        nn.init.zeros_(self.missing.weight)
        self.blocks = nn.ModuleList(Block(config, layer, dense) for layer in range(config.num_layers))
        self.norm = Norm(width)
        self.dropout = nn.Dropout(config.dropout)
        if config.head == "direct":
            self.head = nn.Linear(patches * width, self.block)
        else:
            self.head = nn.ConvTranspose1d(width, 1, size, stride=size)
        self.seasons = SeasonalMap(context, self.block, season) if config.seasonal else None
        if self.seasons is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.register_buffer("step_weight", _step_weights(config.loss_horizons, self.block), persistent=False)

    def loss(self, windows: Windows) -> Float[Tensor, ""]:
        """Of the block after the context, and with the published head of what the input shows too.

        Published, the loss is the mean over the whole output, the context shifted by one block.
        """
        context, scale = self._context(windows.past)
        future = scale.normalize(windows.future)[:, : self.block]
        target = future if self.config.head == "direct" else torch.cat([context[:, self.block :], future], 1)
        output = self(context)[:, : target.shape[1]]  # short where the future is
        if self.config.loss == "mae":
            errors = (output - filled(target)).abs()
        else:
            errors = F.huber_loss(output, filled(target), reduction="none", delta=HUBER_DELTA)
        if self.config.head == "direct":
            errors = errors * self.step_weight[: errors.shape[1]]
        return masked_mean(errors, observed(target))

    def forecast(self, windows: Windows, horizon: int, quantiles: Sequence[float] = ()) -> Forecast:
        """Block by block; what was predicted is context for the next."""
        context, scale = self._context(windows.past)
        blocks: list[Tensor] = []
        for _ in range(-(-horizon // self.block)):
            blocks.append(self(context)[:, -self.block :])
            context = torch.cat([context, blocks[-1]], 1)[:, -self.context :]
        return Forecast(scale.restore(torch.cat(blocks, 1)[:, :horizon]))

    def _context(self, past: Float[Tensor, "B N"]) -> tuple[Float[Tensor, "B L"], Scale]:
        """Normalised, and as long as the model sees; short ones miss their beginning."""
        past = past[:, -self.context :]
        scale = instance_scale(past)
        return F.pad(scale.normalize(past), (self.context - past.shape[1], 0), value=torch.nan), scale

    def forward(self, context: Float[Tensor, "B L"]) -> Float[Tensor, "B O"]:
        """Normalised contexts -> the block after them, or with the published head the context one block later."""
        padded = F.pad(context, (self.pad, 0), value=torch.nan)
        seen = observed(padded)
        gaps = (~seen).to(context.dtype)[:, None]
        x = self.embed(filled(padded)[:, None]) + self.missing(gaps)  # [B, D, P]
        x = x.transpose(1, 2)  # [B, P, D]
        keys = seen.unflatten(1, (-1, self.config.patch_size)).any(-1)  # [B, P]
        mask = None if _all(keys) else keys | ~keys.any(1, keepdim=True)  # attention to nothing is undefined
        for block in self.blocks:
            x = block(x, mask)
        x = self.dropout(self.norm(x))
        if self.config.head == "direct":
            output = self.head(x.flatten(1))
        else:
            output = self.head(x.transpose(1, 2)).squeeze(1)[:, self.pad :]
        return output if self.seasons is None else self._add_seasons(output, context)

    def _add_seasons(self, output: Float[Tensor, "B O"], context: Float[Tensor, "B L"]) -> Float[Tensor, "B O"]:
        """The linear map's block added to the last points of the output."""
        known = output.shape[1] - self.block
        return output + F.pad(self.seasons(context), (known, 0))

    def trace(self, windows: Windows) -> Int[Tensor, " P"]:
        """One pass; positions are patches."""
        self(self._context(windows.past)[0])
        first = windows.past.shape[1] - self.context - self.pad
        return torch.arange((self.context + self.pad) // self.config.patch_size) * self.config.patch_size + first

    def segment_lengths(self) -> dict[str, int]:
        """Patches per segment by the name of each MoE layer."""
        return {name: m.unit for name, m in self.named_modules() if isinstance(m, moecore.MoE)}


class SeasonalMap(nn.Module):
    """The next seasons as a linear map of the last ones, one map for all phases (SparseTSF, arXiv 2405.00946).

    With season 1 it is the full linear map from context to block. Starts as the mean over the seasons. A missing value
    counts as the mean of what its phase shows.

    Args:
        context: L.
        block: points to predict.
        season: S, length of the season; taken as 1 where the context holds fewer than two.
    """

    def __init__(self, context: int, block: int, season: int) -> None:
        super().__init__()
        self.block, self.season = block, season if context >= 2 * season else 1
        self.count = context // self.season
        self.map = nn.Linear(self.count, -(-block // self.season), bias=False)
        nn.init.constant_(self.map.weight, 1 / self.count)

    def forward(self, context: Float[Tensor, "B L"]) -> Float[Tensor, "B O"]:
        """[B, L] -> [B, block]."""
        turns = context[:, -self.count * self.season :].unflatten(1, (self.count, self.season))  # [B, C, S]
        seen = observed(turns)
        values = filled(turns)
        mean = values.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        by_phase = torch.where(seen, values, mean).transpose(1, 2)  # [B, S, C]
        return self.map(by_phase).transpose(1, 2).flatten(1)[:, : self.block]


def _step_weights(horizons: Sequence[int], block: int) -> Float[Tensor, " O"]:
    """Weight of each step ahead, mean 1, such that the loss is the mean of the losses at the horizons."""
    if not horizons:
        return torch.ones(block)
    step = torch.arange(block)
    weights = sum((step < horizon) / min(horizon, block) for horizon in horizons)
    return weights * block / len(horizons)


def _all(mask: Bool[Tensor, "B P"]) -> bool:
    """Whether nothing need be masked; an exported graph always masks."""
    return not torch.compiler.is_exporting() and bool(mask.all())
