"""Patterns of the pattern-aware LDL-MoE: curves over the horizon whose coefficients experts choose.

The paper (arXiv 2602.04678) names trend, seasonality, change points and volatility; the curves are ours. Every pattern
has a linear map of the context and routed experts on top of it, which give the coefficients of a fixed basis.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.timeseries.model_settings import LDLMoEConfig
from apps.timeseries.models.ldl_experts import Experts, ZeroLinear

DEGREE = 3
"""Of the trend's polynomial."""
HARMONICS = 12
"""Of the season: all of a day of hours."""
KNOTS = 8
"""Places inside the horizon where the level may change."""


def trend_basis(horizon: int, season: int) -> Float[Tensor, "C H"]:
    """Powers of time, which is 1 at the end of the horizon."""
    time = torch.arange(1, horizon + 1) / horizon
    return torch.stack([time**degree for degree in range(DEGREE + 1)])


def season_basis(horizon: int, season: int) -> Float[Tensor, "C H"]:
    """Harmonics of the season, each constant and growing with time; zero where the season is too short for one."""
    step = torch.arange(horizon, dtype=torch.float64)
    rows = []
    for k in range(1, HARMONICS + 1):
        angle = 2 * math.pi * k / season * step
        rows += [angle.cos(), angle.sin()] if 2 * k <= season else [torch.zeros_like(step)] * 2
    waves = torch.stack(rows).float()
    return torch.cat([waves, waves * (step + 1) / horizon]).float()


def step_basis(horizon: int, season: int) -> Float[Tensor, "C H"]:
    """Soft steps from 0 to 1 at the knots, evenly spaced inside the horizon."""
    gap = horizon / (KNOTS + 1)
    knots = gap * torch.arange(1, KNOTS + 1)
    return torch.sigmoid((torch.arange(horizon) + 0.5 - knots[:, None]) / (gap / 4))


def one_step(raw: Float[Tensor, "*N C"]) -> Float[Tensor, "*N D"]:
    """A height, and where it is most likely: soft choice of a knot."""
    return raw[..., :1] * raw[..., 1:].softmax(-1)


@lru_cache(maxsize=32)
def basis(name: str, horizon: int, season: int) -> Float[Tensor, "C H"]:
    """The basis of a pattern, kept: training asks for the same one at every step."""
    with torch.inference_mode(False):  # what validation makes, training must be able to use
        return PATTERNS[name](horizon, season)


PATTERNS = {"trend": trend_basis, "seasonality": season_basis, "changepoint": step_basis}
"""Bases of the patterns that make up the location; volatility is the distribution around it."""


class Pattern(nn.Module):
    """A routed pattern: encoded contexts [B, D] and plain ones [B, I] -> its curve [B, H].

    Args:
        config: experts.
        name: a key of `PATTERNS`. Change points come from experts alone, one soft step of each.
        inputs: I.
    """

    def __init__(self, config: LDLMoEConfig, name: str, inputs: int) -> None:
        super().__init__()
        self.name = name
        size = basis(name, 1, 1).shape[0]
        if name == "changepoint":
            self.linear, self.experts = None, Experts(config, 1, size + 1, one_step, size)
        else:
            self.linear, self.experts = ZeroLinear(inputs, size), Experts(config, 1, size, nn.Identity())

    def forward(
        self, encoded: Float[Tensor, "B D"], inputs: Float[Tensor, "B I"], horizon: int, season: int
    ) -> Float[Tensor, "B H"]:
        """The curve over the horizon."""
        coefficients = self.experts(encoded)[:, 0]
        if self.linear is not None:
            coefficients = coefficients + self.linear(inputs)
        with torch.autocast(coefficients.device.type, enabled=False):  # the sum of patterns is the forecast, to the end
            return coefficients @ basis(self.name, horizon, season).to(coefficients)
