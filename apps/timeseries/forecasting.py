"""Forecasts of windows as they come: trailing gaps bridged, points of deterministic models widened to intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.timeseries.models.base import Forecast, ForecastModel, Windows, instance_scale, observed

LEVELS = tuple(round(0.01 * i, 2) for i in range(1, 100))
"""Quantile levels that calibration keeps."""


@dataclass(frozen=True)
class Intervals:
    """Quantiles of a model's errors on held-out windows, per step ahead, in deviations of the context.

    Split-conformal prediction (Vovk et al. 2005), signed: a forecast's quantile is the point plus the quantile of the
    errors, so that bias and skew of the errors are in it.
    """

    errors: Float[Tensor, "Q H"]
    """Q = 99 levels, 0.01 to 0.99."""

    def quantiles(
        self, mean: Float[Tensor, "B H"], past: Float[Tensor, "B L"], levels: Sequence[float]
    ) -> Float[Tensor, "B q H"]:
        """Quantiles around points; beyond the calibrated horizon errors grow with the square root of the time."""
        table = self.at(levels)  # [q, H]
        calibrated, horizon = table.shape[1], mean.shape[1]
        if horizon > calibrated:
            steps = torch.arange(calibrated + 1, horizon + 1, dtype=table.dtype)
            table = torch.cat([table, table[:, -1:] * (steps / calibrated).sqrt()], 1)
        table = table[:, :horizon].to(mean)
        return mean[:, None] + table * instance_scale(past).std[:, :, None]

    def at(self, levels: Sequence[float]) -> Float[Tensor, "q H"]:
        """Rows for any levels, interpolated; outside 0.01 to 0.99 the outermost."""
        grid = np.array(LEVELS)
        table = self.errors.double().numpy()
        rows = [[np.interp(level, grid, table[:, h]) for h in range(table.shape[1])] for level in levels]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(levels), table.shape[1])

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"errors": self.errors}

    @classmethod
    def from_plain(cls, values: dict[str, Any] | None) -> Intervals | None:
        """From a checkpoint; None where it has none."""
        return None if values is None else cls(values["errors"])


@torch.no_grad()
def calibrate(model: ForecastModel, batches: Iterable[Windows], horizon: int) -> Intervals | None:
    """Intervals from held-out windows; None where nothing was observed to compare with."""
    errors: list[Tensor] = []
    for windows in batches:
        mean = forecast_windows(model, windows, horizon).mean
        errors.append((windows.future[:, :horizon] - mean) / instance_scale(windows.past).std)
    if not errors:
        return None
    stacked = torch.cat(errors).double()  # [W, H], NaN where the truth is missing
    if not bool(observed(stacked).any()):
        return None
    table = np.nanquantile(_pooled(stacked.numpy()), LEVELS, axis=0)
    return Intervals(torch.from_numpy(table).float())


def _pooled(errors: Float[np.ndarray, "W H"], least: int = 50) -> Float[np.ndarray, "W2 H"]:
    """Errors with those of neighbouring steps added where a step has too few of its own for a tail."""
    counts = np.isfinite(errors).sum(0)
    if counts.min() >= least or errors.shape[1] == 1:
        return errors
    reach = int(np.ceil(least / max(counts.mean(), 1) / 2))
    padded = np.pad(errors, ((0, 0), (reach, reach)), constant_values=np.nan)
    pooled = np.concatenate([padded[:, i : i + errors.shape[1]] for i in range(2 * reach + 1)])
    empty = ~np.isfinite(pooled).any(0)
    pooled[0, empty] = 0.0 if not (~empty).any() else np.nanmean(pooled[:, ~empty])
    return pooled


@torch.no_grad()
def forecast_windows(
    model: ForecastModel,
    windows: Windows,
    horizon: int,
    levels: Sequence[float] = (),
    intervals: Intervals | None = None,
) -> Forecast:
    """The next `horizon` points after each context, whatever its last points are.

    Where a context ends with missing values the forecast starts after the last observed one, and the points within
    the gap are cut off again: a gap is a longer horizon, not a value to make up.

    Args:
        model: in eval mode.
        windows: contexts with at least one value each.
        horizon: H.
        levels: quantile levels.
        intervals: of a model that gives points only.

    Returns:
        The forecast, its quantiles sorted by level; without quantiles where neither model nor intervals give them.
    """
    gaps = _trailing_gaps(windows.past)
    if not bool(gaps.any()):
        return _forecast(model, windows, horizon, levels, intervals)
    rows, parts = [], []
    for gap in gaps.unique().tolist():  # one at a time: a row's forecast does not depend on the gaps of others
        rows.append((gaps == gap).nonzero().squeeze(1))
        longer = _forecast(model, _shift(windows[rows[-1]], gap), gap + horizon, levels, intervals)
        parts.append(_map(lambda x, gap=gap: x[..., gap:], longer))
    back = torch.cat(rows).argsort()
    return _map(lambda *pieces: torch.cat(pieces)[back], *parts)


def _forecast(
    model: ForecastModel, windows: Windows, horizon: int, levels: Sequence[float], intervals: Intervals | None
) -> Forecast:
    """Of contexts that end with a value."""
    forecast = model.forecast(windows, horizon, levels if model.probabilistic else ())
    quantiles = forecast.quantiles
    if levels and not model.probabilistic and intervals is not None:
        quantiles = intervals.quantiles(forecast.mean, windows.past, levels)
    if quantiles is not None:
        rank = torch.tensor(np.argsort(np.argsort(levels)), device=quantiles.device)
        quantiles = quantiles.sort(1).values[:, rank]
    return dataclasses.replace(forecast, quantiles=quantiles)


def _trailing_gaps(past: Float[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Missing points at the end of each context; 0 where nothing at all is there."""
    seen = observed(past)
    gap = seen.flip(1).to(torch.int8).argmax(1)
    return gap.masked_fill(~seen.any(1), 0)


def _shift(windows: Windows, gap: int) -> Windows:
    """Contexts moved to the right by `gap` points, so that they end with a value; NaN comes in on the left."""

    def later(x: Tensor) -> Tensor:
        missing = x.new_full((x.shape[0], gap, *x.shape[2:]), torch.nan)
        return torch.cat([missing, x], 1)

    length = windows.past.shape[1]
    return dataclasses.replace(
        windows,
        past=later(windows.past)[:, :length],
        future=None,
        futr=None if windows.futr is None else later(windows.futr),
        hist=None if windows.hist is None else later(windows.hist)[:, :length],
        segments=None,
    )


def _map(function: Callable[..., Tensor], *forecasts: Forecast) -> Forecast:
    """Apply a function to each of the tensors that the forecasts have."""
    means = [one.mean for one in forecasts]
    bounds = [one.quantiles for one in forecasts if one.quantiles is not None]
    components = {name: function(*(one.components[name] for one in forecasts)) for name in forecasts[0].components}
    return Forecast(function(*means), function(*bounds) if bounds else None, components)
