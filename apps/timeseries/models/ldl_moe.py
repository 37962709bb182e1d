"""LDL-MoE: experts that predict distributions, trained with maximum mean discrepancy (arXiv 2602.04678).

Of the paper, Multi-Expert LDL and Pattern-Aware LDL-MoE, only the outline was published with its abstract: experts with
parameters of their own, distributions learned by MMD, and trend, seasonality, change-point and volatility sub-experts.
Everything more concrete here is our derivation of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from apps.timeseries.model_settings import LDLMoEConfig
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
from apps.timeseries.models.ldl_experts import Experts, ZeroLinear, encoder
from apps.timeseries.models.ldl_heads import BinsHead, ContinuousHead, Head
from apps.timeseries.models.ldl_patterns import PATTERNS, Pattern

HUBER_DELTA = 2.0
"""Where the point loss turns from squares to absolute values, in deviations of the context."""


@dataclass(frozen=True)
class Prediction:
    """One block, in deviations of the context: a location, and distributions around it."""

    parts: dict[str, Float[Tensor, "B H"]]
    """What the location is the sum of."""
    noise: Float[Tensor, "B H P"]
    """Parameters of the distributions around the location."""

    @property
    def location(self) -> Float[Tensor, "B H"]:
        """Sum of the parts."""
        return torch.stack(list(self.parts.values())).sum(0)


class LDLMoE(ForecastModel):
    """Contexts -> distributions of the next H points.

    Contexts are normalised by their own mean and deviation; models see zeros where values are missing, and where that
    is. A linear map of the context gives a location, an encoder of it the gate and experts, whose distributions around
    the location are mixed. Pattern-aware, the location is the sum of a trend, a seasonality and change points, and the
    experts of the distribution are the volatility: what they add to the mean is the lean of a skewed distribution.
    Covariates are not used.

    Routing is visible in `moecore.record`: layer `experts`, or `patterns.trend.experts` and its kin and `experts`
    for volatility.

    Args:
        config: kind of distribution, experts, sizes.
        context: L; of longer contexts the last L points count, shorter ones are padded.
        horizon: H, points predicted at once; see `forecast` for more.
        dense: one expert as wide as the top-k together, instead of routed ones.
    """

    probabilistic = True

    def __init__(self, config: LDLMoEConfig, context: int, horizon: int, dense: bool = False) -> None:
        super().__init__()
        if dense:
            config = dataclasses.replace(config, num_experts=1, top_k=1, d_ff=config.d_ff * config.top_k)
        self.config, self.context, self.horizon = config, context, horizon
        inputs = 2 * context
        self.encoder = encoder(inputs, config.d_model, config.dropout)
        if config.pattern:
            self.patterns = nn.ModuleDict({name: Pattern(config, name, inputs) for name in PATTERNS})
        else:
            self.linear = ZeroLinear(inputs, horizon)
        self.head = _head(config)
        self.experts = Experts(config, horizon, self.head.width, self.head.activate)

    def loss(self, windows: Windows) -> Float[Tensor, ""]:
        """Huber loss of the mean, and `config.mmd` times the squared MMD to the truth, per step."""
        if windows.future is None:
            raise ValueError("future=None: training windows have a future")
        past, future = windows.past[:, -self.context :], windows.future[:, : self.horizon]
        scale = instance_scale(past)
        prediction = self.predict(scale.normalize(past), windows.season)
        steps = future.shape[1]
        location, noise = prediction.location[:, :steps], prediction.noise[:, :steps]
        seen, target = observed(future), filled(scale.normalize(future))
        errors = F.huber_loss(location + self.head.mean(noise), target, reduction="none", delta=HUBER_DELTA)
        loss = masked_mean(errors, seen)
        if self.config.mmd == 0:
            return loss
        return loss + self.config.mmd * masked_mean(self.head.discrepancy(noise, target - location), seen)

    @torch.no_grad()
    def forecast(self, windows: Windows, horizon: int, quantiles: Sequence[float] = ()) -> Forecast:
        """Mean, quantiles and, pattern-aware, components.

        Beyond H, means are rolled out block by block, and quantiles keep the distance from the mean that they have in
        the last quarter of the first block, times (step / middle of that quarter)^a. The growth a, between 0 (a
        stationary series) and 1, is that of the spread inside the block.
        """
        past = windows.past[:, -self.context :]
        scale = instance_scale(past)
        context, parts, first = scale.normalize(past), [], None
        while self.horizon * len(parts) < horizon:
            prediction = self.predict(context, windows.season)
            first = first or prediction
            parts.append(self._components(prediction))
            mean = torch.stack(list(parts[-1].values())).sum(0)
            context = torch.cat([context, mean], 1)[:, -self.context :]
        components = {name: torch.cat([part[name] for part in parts], 1)[:, :horizon] for name in parts[0]}
        mean = torch.stack(list(components.values())).sum(0)
        bounds = None
        if len(quantiles):
            offsets = self.head.quantiles(first.noise, quantiles) - self.head.mean(first.noise)[:, None]
            bounds = scale.restore(mean[:, None] + extended(offsets, horizon))
        return Forecast(scale.restore(mean), bounds, self._restored(components, scale))

    def predict(self, context: Float[Tensor, "B N"], season: int) -> Prediction:
        """The next H points of normalised contexts, NaN where nothing was observed."""
        context = F.pad(context, (self.context - context.shape[1], 0), value=torch.nan)
        inputs = torch.cat([filled(context), (~observed(context)).to(context.dtype)], 1)
        encoded = self.encoder(inputs)
        if self.config.pattern:
            parts = {n: pattern(encoded, inputs, self.horizon, season) for n, pattern in self.patterns.items()}
        else:
            parts = {"linear": self.linear(inputs).to(context.dtype)}
        return Prediction(parts, self.experts(encoded))

    def _components(self, prediction: Prediction) -> dict[str, Float[Tensor, "B H"]]:
        """Parts of the mean: those of the location, and what the distributions add."""
        return {**prediction.parts, "volatility": self.head.mean(prediction.noise)}

    def _restored(self, components: dict[str, Tensor], scale: Scale) -> dict[str, Float[Tensor, "B H"]]:
        """In the units of the windows; the mean of the context goes to the trend."""
        if not self.config.pattern:
            return {}
        return {n: scale.restore(c) if n == "trend" else c * scale.std for n, c in components.items()}


def _head(config: LDLMoEConfig) -> Head:
    if config.heads == "bins":
        return BinsHead(config.num_bins)
    return ContinuousHead(config.num_samples, shifted=not config.pattern)


def extended(offsets: Float[Tensor, "B Q H"], horizon: int) -> Float[Tensor, "B Q M"]:
    """Distances of quantiles from the mean, for more steps: they grow on as they grew, and never shrink."""
    steps = offsets.shape[-1]
    if horizon <= steps:
        return offsets[..., :horizon]
    quarter = max(steps // 4, 1)
    last = offsets[..., -quarter:].mean(-1)  # [B, Q], in the middle of the last quarter
    middle = steps - (quarter - 1) / 2
    growth = torch.full_like(last[:, :1], 0.5)  # of a single step nothing is known: a random walk
    if steps > 1:
        before = offsets[..., -2 * quarter : -quarter].mean(-1)
        size, smaller = (part.abs().mean(1, keepdim=True).clamp(min=1e-9) for part in (last, before))
        growth = ((size / smaller).log() / math.log(middle / (middle - quarter))).clamp(0, 1)
    ahead = torch.arange(steps + 1, horizon + 1, device=offsets.device) / middle
    return torch.cat([offsets, last[..., None] * (ahead**growth)[:, None]], -1)
