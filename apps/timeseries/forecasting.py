"""Forecasts of windows as they come: trailing gaps bridged, points of deterministic models widened to intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

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
    longest = int(gaps.max()) if len(gaps) else 0
    shifted = _shift(windows, gaps, longest) if longest else windows
    asked = levels if model.probabilistic else ()
    forecast = model.forecast(shifted, horizon + longest, asked)
    if levels and not model.probabilistic and intervals is not None:
        quantiles = intervals.quantiles(forecast.mean, shifted.past, levels)
        forecast = dataclasses.replace(forecast, quantiles=quantiles)
    if forecast.quantiles is not None:
        order = torch.tensor(np.argsort(np.argsort(levels)), device=forecast.mean.device)
        forecast = dataclasses.replace(forecast, quantiles=forecast.quantiles.sort(1).values[:, order])
    return _cut(forecast, gaps, horizon) if longest else forecast


def _trailing_gaps(past: Float[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Missing points at the end of each context; 0 where nothing at all is there."""
    seen = observed(past)
    gap = seen.flip(1).to(torch.int8).argmax(1)
    return gap.masked_fill(~seen.any(1), 0)


def _shift(windows: Windows, gaps: Int[Tensor, " B"], longest: int) -> Windows:
    """Every row moved to the right by its gap, so that contexts end with a value; NaN comes in on the left."""
    futr = None if windows.futr is None else _move(F.pad(windows.futr, (0, 0, 0, longest), value=torch.nan), gaps)
    return dataclasses.replace(
        windows,
        past=_move(windows.past[..., None], gaps)[..., 0],
        future=None,
        futr=futr,
        hist=None if windows.hist is None else _move(windows.hist, gaps),
    )


def _move(x: Float[Tensor, "B N C"], gaps: Int[Tensor, " B"]) -> Float[Tensor, "B N C"]:
    at = torch.arange(x.shape[1], device=x.device) - gaps[:, None]  # [B, N]
    moved = x.gather(1, at.clamp(min=0)[..., None].expand_as(x))
    return moved.masked_fill((at < 0)[..., None], torch.nan)


def _cut(forecast: Forecast, gaps: Int[Tensor, " B"], horizon: int) -> Forecast:
    """What lies after each gap."""

    def cut(x: Tensor) -> Tensor:
        at = gaps[:, None] + torch.arange(horizon, device=x.device)  # [B, H]
        at = at if x.dim() == 2 else at[:, None].expand(-1, x.shape[1], -1)
        return x.gather(-1, at)

    quantiles = None if forecast.quantiles is None else cut(forecast.quantiles)
    return Forecast(cut(forecast.mean), quantiles, {name: cut(part) for name, part in forecast.components.items()})
