"""Forecasts that learn nothing, to measure others by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from apps.timeseries.models.base import Forecast, ForecastModel, Windows, observed


class SeasonalNaive(ForecastModel):
    """The last season again and again; its quantiles are the seasonal naive bootstrap.

    Point forecast: the last observed value at the same phase of the season, or the last observed value where the
    context shows none at that phase. Quantiles: k seasons after that value, the error is a sum of k season differences
    `y[t] - y[t - season]` drawn independently, with replacement, from those of the context, whose mean is taken off so
    that the point forecast stays the mean (Hyndman and Athanasopoulos, Forecasting: Principles and Practice, section
    5.5). A context without any season difference has the deviations from its own mean instead.

    Draws are the same in every call and for every window, so that a window's forecast depends on nothing else.

    Args:
        num_samples: draws for every season ahead.
    """

    probabilistic = True

    def __init__(self, num_samples: int = 500) -> None:
        super().__init__()
        self.num_samples = num_samples

    def loss(self, windows: Windows) -> Float[Tensor, ""]:
        """Zero: there is nothing to learn."""
        return windows.past.new_zeros(())

    @torch.no_grad()
    def forecast(self, windows: Windows, horizon: int, quantiles: Sequence[float] = ()) -> Forecast:
        """The last season again; a context without any value gives NaN."""
        season = windows.season
        value, age = _last_of_each_phase(windows.past, season)
        steps = torch.arange(horizon, device=value.device)
        mean = value[:, steps % season]
        if not len(quantiles):
            return Forecast(mean)
        ahead = age[:, steps % season] + steps // season  # seasons between value and forecast, less one: [B, H]
        spread = self._spread(windows.past, season, quantiles, int(ahead.max()) + 1)  # [K, B, Q]
        rows = torch.arange(len(windows), device=value.device)[:, None]
        return Forecast(mean, mean[:, None] + spread[ahead, rows].transpose(1, 2))

    def _spread(
        self, past: Float[Tensor, "B L"], season: int, levels: Sequence[float], most: int
    ) -> Float[Tensor, "K B Q"]:
        """Quantiles of the error 1 to K seasons ahead."""
        residuals = _season_differences(past, season)
        seen = observed(residuals)
        residuals = residuals.gather(1, (~seen).long().argsort(dim=1, stable=True))  # observed ones first
        count = seen.sum(1, keepdim=True)
        generator = torch.Generator().manual_seed(0)
        at = torch.tensor(tuple(levels), dtype=past.dtype, device=past.device)
        total, rows = past.new_zeros(len(past), self.num_samples), []
        for _ in range(most):
            # Evenly spaced ranks in random order: every season's draws alone are the residuals' own distribution.
            rank = (torch.randperm(self.num_samples, generator=generator) + 0.5) / self.num_samples
            drawn = (rank.to(past.device) * count).long()
            total = total + residuals.gather(1, drawn)
            rows.append(total.quantile(at, 1).T)
        return torch.stack(rows)


def _last_of_each_phase(past: Float[Tensor, "B L"], season: int) -> tuple[Float[Tensor, "B P"], Int[Tensor, "B P"]]:
    """What was seen last at each phase of the season (phase 0 is the next point), and how many seasons before."""
    turns = F.pad(past, (-past.shape[1] % season, 0), value=torch.nan).unflatten(1, (-1, season)).flip(1)
    seen = observed(turns)
    age = seen.long().argmax(1)  # of the first that is seen, going back
    value = turns.gather(1, age[:, None]).squeeze(1)
    length = past.shape[1]
    last = length - 1 - observed(past).flip(1).long().argmax(1, keepdim=True)
    value = torch.where(seen.any(1), value, past.gather(1, last))
    return value, age


def _season_differences(past: Float[Tensor, "B L"], season: int) -> Float[Tensor, "B M"]:
    """Season differences less their mean, NaN where not known; deviations from the mean where there is none at all."""
    differences = F.pad(past[:, season:] - past[:, :-season], (min(season, past.shape[1]), 0), value=torch.nan)
    none = ~observed(differences).any(1, keepdim=True)
    values = torch.where(none, past, differences)
    return values - values.nanmean(1, keepdim=True)
