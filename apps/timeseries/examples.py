"""Test windows worth showing: the best, some in the middle, and the worst, of different series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from apps.timeseries.evaluation import LEVELS, forecast_batch
from apps.timeseries.loading import Trained
from apps.timeseries.models.base import Forecast
from apps.timeseries.models.baselines import SeasonalNaive
from apps.timeseries.pictures import Example, short_name
from apps.timeseries.windows import WindowSet

KINDS = ("best", "median", "worst")


def choose_examples(
    trained: Trained,
    windows: WindowSet,
    rows: Int[np.ndarray, " R"],
    scales: Float[np.ndarray, " S"],
    count: int = 3,
) -> list[Example]:
    """Forecast windows and keep those with the least, middle and largest errors.

    Args:
        trained: the model.
        windows: test windows at a horizon.
        rows: of the windows to choose from.
        scales: error of the seasonal naive forecast in each series' training points, the unit of MASE.
        count: windows of each kind.

    Returns:
        best, median, worst, best, ...: at most `count` of each.
    """
    forecasts, errors = _forecasts(trained, windows, rows)
    unit = scales[windows.index[rows, 0]]
    scaled = errors / np.where(unit > 0, unit, np.nan)
    known = np.isfinite(scaled).any()
    chosen = _pick(scaled if known else errors, windows.index[rows], windows.horizon, count)
    measure = "MASE" if known else "MAE"
    return [
        _example(windows, int(rows[i]), forecasts[i], f"{measure} {(scaled if known else errors)[i]:.3g}, {kind}")
        for i, kind in chosen
    ]


def _forecasts(
    trained: Trained, windows: WindowSet, rows: Int[np.ndarray, " R"]
) -> tuple[list[Forecast], Float[np.ndarray, " R"]]:
    """One forecast per row, and its mean absolute error."""
    levels = LEVELS if trained.model.probabilistic or trained.intervals is not None else ()
    found: list[Forecast] = [None] * len(rows)
    errors = np.full(len(rows), np.nan)
    torch.manual_seed(trained.config.run.seed)  # for models that sample
    seasons = windows.seasons[windows.index[rows, 0]]
    groups = [np.flatnonzero(seasons == value) for value in np.unique(seasons)]
    for part in (group[i : i + 64] for group in groups for i in range(0, len(group), 64)):
        batch = windows.batch(rows[part])
        forecast = forecast_batch(trained.model, batch, windows.horizon, levels, trained.intervals)
        errors[part] = (forecast.mean - batch.future).abs().nanmean(1).numpy()
        for i, place in enumerate(part):
            quantiles = None if forecast.quantiles is None else forecast.quantiles[i]
            components = {name: values[i] for name, values in forecast.components.items()}
            found[place] = Forecast(forecast.mean[i], quantiles, components)
    return found, errors


def _pick(
    errors: Float[np.ndarray, " R"], index: Int[np.ndarray, "R 2"], horizon: int, count: int
) -> list[tuple[int, str]]:
    """Positions and kinds, in turn; of different series while there are some, else at least not overlapping."""
    order = [int(i) for i in np.argsort(errors, kind="stable") if np.isfinite(errors[i])]
    middle = len(order) / 2 - 0.5
    by_kind = {
        "best": order,
        "median": [order[p] for p in sorted(range(len(order)), key=lambda p: abs(p - middle))],
        "worst": order[::-1],
    }
    chosen: list[tuple[int, str]] = []
    for kind in KINDS * count:
        taken = [i for i, _ in chosen]
        rules = (
            lambda i, taken: all(index[i, 0] != index[j, 0] for j in taken),
            lambda i, taken: all(
                tuple(index[i]) == tuple(index[j]) or _apart(index[i], index[j], horizon) for j in taken
            ),
            lambda i, taken: True,
        )
        left = [i for i in by_kind[kind] if i not in taken]
        near = left[: max(1, len(order) // 5)]  # a best window is one of the best, whatever series it is of
        found = next((i for rule in rules for i in near if rule(i, taken)), None)
        if found is not None:
            chosen.append((found, kind))
    return chosen


def _apart(one: Sequence[int], other: Sequence[int], horizon: int) -> bool:
    return one[0] != other[0] or abs(one[1] - other[1]) >= horizon


def _example(windows: WindowSet, row: int, forecast: Forecast, words: str) -> Example:
    """In the units of the series."""
    number, origin = (int(value) for value in windows.index[row])
    series = windows.store.series[number]
    scale, shift = windows.store.std[number], windows.store.mean[number]
    batch = windows.batch(np.array([row]))
    naive = forecast_batch(SeasonalNaive(), batch, windows.horizon).mean[0]
    parts = {name: values.double().numpy() * scale for name, values in forecast.components.items()}
    if parts:
        level = "trend" if "trend" in parts else next(iter(parts))
        parts[level] = parts[level] + shift
    return Example(
        series,
        row,
        origin,
        windows.context,
        f"{short_name(series.id, 26)}: {words}",
        forecast.mean.double().numpy() * scale + shift,
        naive.double().numpy() * scale + shift,
        None if forecast.quantiles is None else forecast.quantiles.double().numpy() * scale + shift,
        LEVELS,
        parts,
    )
