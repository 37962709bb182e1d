"""How far forecasts are from the truth: sums over batches of windows, from which all figures follow.

N windows, H steps of the horizon, Q quantile levels, S series. Truth that is NaN was not observed and counts nowhere.

Every measure is a sum over points divided by a sum over points, e = forecast - truth:

- mse, mae: e^2 and abs(e) over the number of points.
- mase: abs(e) / scale over the number of points, scale being the MAE of the seasonal naive forecast inside the series'
  training points (Hyndman and Koehler 2006); series whose scale is zero or unknown are left out.
- smape: 200 abs(e) / (abs(truth) + abs(forecast)), from 0 to 200, 0 where both are zero (M4 competition).
- crps: the mean over levels q of 2 pinball_q summed over abs(truth) summed, pinball_q = max(q d, (q - 1) d) with
  d = truth - quantile. This is the mean weighted quantile loss of GluonTS (arXiv 1906.05264), which approximates the
  continuous ranked probability score, normalised by the size of the data.
- coverage_80: share of points inside the central interval between the levels 0.1 and 0.9, bounds included;
  width_80: its mean width. Likewise for every pair of levels q and 1 - q.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

Array = np.ndarray | Tensor


def seasonal_scale(y: Float[np.ndarray, " n"], season: int) -> float:
    """MAE of the seasonal naive forecast inside a series, the unit of MASE; NaN where no two points compare."""
    y = np.asarray(y, np.float64)
    errors = np.abs(y[season:] - y[:-season])
    seen = np.isfinite(errors)
    return float(errors[seen].mean()) if seen.any() else float("nan")


def central_intervals(levels: Sequence[float]) -> dict[int, tuple[int, int]]:
    """Intervals between symmetric levels: percent inside -> positions of the lower and the upper level."""
    found = {}
    for low, level in enumerate(levels):
        for high, other in enumerate(levels):
            if level < 0.5 and abs(level + other - 1) < 1e-6:
                found[round(100 * (other - level))] = (low, high)
    return dict(sorted(found.items()))


class ErrorSums:
    """Running sums of errors per step of the horizon and per series: memory does not grow with the windows.

    Args:
        horizon: H.
        num_series: S.
        levels: of the quantiles that `update` gets, none for point forecasts: then there is no crps and no coverage.
    """

    def __init__(self, horizon: int, num_series: int = 1, levels: Sequence[float] = ()) -> None:
        self.horizon, self.num_series, self.levels = horizon, num_series, tuple(levels)
        names = ["mse", "mae", "mase", "smape"]
        if self.levels:
            names += ["crps", *(f"{kind}_{k}" for k in central_intervals(levels) for kind in ("coverage", "width"))]
        self._steps = {name: np.zeros((2, horizon)) for name in names}  # numerator, denominator
        self._series = {name: np.zeros((2, num_series)) for name in names}
        self._below = np.zeros((2, len(self.levels)))

    def update(
        self,
        truth: Float[Array, "N H"],
        mean: Float[Array, "N H"],
        quantiles: Float[Array, "N Q H"] | None = None,
        scale: Float[Array, " N"] | None = None,
        series: Int[Array, " N"] | None = None,
    ) -> None:
        """Add a batch of windows.

        Args:
            truth: NaN where not observed.
            mean: point forecasts.
            quantiles: one row per level.
            scale: `seasonal_scale` of each window's series; None: mase stays NaN.
            series: number of each window's series, 0 to S - 1; None: all belong to the first.

        Raises:
            ValueError: levels without quantiles, or quantiles without levels, or shapes that do not fit.
        """
        truth, mean = _double(truth), _double(mean)
        count = truth.shape[0]
        if truth.shape != mean.shape or truth.shape[1] != self.horizon:
            raise ValueError(f"shapes {truth.shape} and {mean.shape}: truth and forecast are [N, {self.horizon}]")
        if (quantiles is None) != (not self.levels):
            raise ValueError(f"levels={self.levels}: quantiles come with levels, and levels with quantiles")
        index = np.zeros(count, np.int64) if series is None else _array(series).astype(np.int64)
        unit = np.full(count, np.nan) if scale is None else _double(scale)
        self._add(_point_terms(truth, mean, unit), index)
        if quantiles is not None:
            values = _double(quantiles)
            if values.shape != (count, len(self.levels), self.horizon):
                raise ValueError(f"shape {values.shape}: quantiles are [N, {len(self.levels)}, {self.horizon}]")
            self._add(_quantile_terms(truth, values, self.levels), index)
            seen = np.isfinite(truth)
            self._below += [
                ((truth[:, None] <= values) & seen[:, None]).sum((0, 2)),
                np.full(len(self.levels), seen.sum()),
            ]

    def _add(self, terms: dict[str, tuple[np.ndarray, np.ndarray]], index: np.ndarray) -> None:
        for name, parts in terms.items():
            for row, part in enumerate(parts):
                self._steps[name][row] += part.sum(0)
                self._series[name][row] += np.bincount(index, part.sum(1), self.num_series)

    def merge(self, other: ErrorSums) -> None:
        """Add what another has summed, of the same horizon, series and levels.

        Raises:
            ValueError: it was made for something else.
        """
        mine = (self.horizon, self.num_series, self.levels)
        if mine != (other.horizon, other.num_series, other.levels):
            raise ValueError(f"sums over (horizon, series, levels) = {mine}: the others are over something else")
        for name in self._steps:
            self._steps[name] += other._steps[name]
            self._series[name] += other._series[name]
        self._below += other._below

    def overall(self) -> dict[str, float]:
        """Every measure over all points; NaN where there was nothing to measure."""
        return {name: float(_ratio(*sums.sum(1))) for name, sums in self._steps.items()}

    def per_step(self) -> dict[str, Float[np.ndarray, " H"]]:
        """Every measure at each step of the horizon."""
        return {name: _ratio(*sums) for name, sums in self._steps.items()}

    def per_series(self) -> dict[str, Float[np.ndarray, " S"]]:
        """Every measure of each series."""
        return {name: _ratio(*sums) for name, sums in self._series.items()}

    def calibration(self) -> Float[np.ndarray, " Q"]:
        """Share of the truth at or below the quantile of each level: the level itself where forecasts are right."""
        return _ratio(*self._below)

    @property
    def count(self) -> Int[np.ndarray, " H"]:
        """Points that were compared at each step."""
        return self._steps["mae"][1].astype(np.int64)


def _array(x: Array) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _double(x: Array) -> np.ndarray:
    return _array(x.float() if isinstance(x, Tensor) and x.element_size() < 4 else x).astype(np.float64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def _point_terms(truth: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator of every point [N, H]. A forecast that is NaN makes its sums NaN, and is seen."""
    seen = np.isfinite(truth)
    truth = np.where(seen, truth, 0.0)
    error = np.where(seen, np.abs(mean - truth), 0.0)
    size = np.where(seen, np.abs(truth) + np.abs(mean), 0.0)
    smape = 200 * error / np.where(size == 0, 1.0, size)
    known = np.isfinite(scale) & (scale > 0)
    scaled = np.where(known[:, None], error, 0.0) / np.where(known, scale, 1.0)[:, None]
    points = seen.astype(np.float64)
    return {
        "mse": (error**2, points),
        "mae": (error, points),
        "mase": (scaled, points * known[:, None]),
        "smape": (smape, points),
    }


def _quantile_terms(
    truth: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator of every point [N, H]."""
    seen = np.isfinite(truth)
    points = seen.astype(np.float64)
    loss = np.zeros_like(truth)
    for position, level in enumerate(levels):  # one level at a time: [N, Q, H] more than once is much memory
        below = truth - quantiles[:, position]
        loss += 2 * np.maximum(level * below, (level - 1) * below) / len(levels)
    terms = {"crps": (np.where(seen, loss, 0.0), np.where(seen, np.abs(truth), 0.0))}
    for percent, (low, high) in central_intervals(levels).items():
        lower, upper = quantiles[:, low], quantiles[:, high]
        terms[f"coverage_{percent}"] = (((lower <= truth) & (truth <= upper)).astype(np.float64), points)
        terms[f"width_{percent}"] = (np.where(seen, upper - lower, 0.0), points)
    return terms
