"""Forecasts as tables: what comes after the end of every series, with the columns of the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.errors import UserError
from apps.progress import track
from apps.timeseries.evaluation import forecast_batch
from apps.timeseries.loading import Trained
from apps.timeseries.series import Series
from apps.timeseries.windows import Borders, SeriesStore, WindowSet
from moecore.files import atomic_path


@dataclass(frozen=True)
class SeriesForecast:
    """The forecast of one series after its first `origin` points."""

    series: Series
    origin: int
    mean: Float[np.ndarray, " H"]
    quantiles: Float[np.ndarray, "Q H"] | None

    @property
    def times(self) -> pd.Index:
        """Times of the forecast points, at the series' own frequency."""
        return self.series.times(self.origin, self.origin + len(self.mean))


def forecast_series(
    trained: Trained,
    series: Sequence[Series],
    horizon: int,
    levels: Sequence[float] = (),
    origins: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> list[SeriesForecast]:
    """Forecast series in their own units.

    Every series is standardised by what is known of it before the origin, where training standardises. Where it ends
    with missing values the forecast starts after the last observed one, from a full context. A series that has never
    changed is forecast not to change.

    Args:
        trained: the model.
        series: what is known; later values than the origin are not looked at.
        horizon: H.
        levels: of quantiles.
        origins: number of known points, one per series; None: all.
        batch_size: windows per call.
        progress: show a bar.

    Raises:
        UserError: a series has no value at all before its origin, quantiles of a model without any, or covariates
            that do not reach as far as the horizon.
    """
    origins = [len(one) for one in series] if origins is None else list(origins)
    known = [one.until(origin) for one, origin in zip(series, origins, strict=True)]
    _check(trained, known, horizon, levels)
    store = SeriesStore(known, [Borders(len(s), len(s), len(s)) for s in known], trained.config.data.scale)
    torch.manual_seed(trained.config.run.seed)  # for models that sample
    found: dict[int, SeriesForecast] = {}
    jobs = _jobs(trained, store, horizon, batch_size)
    for gap, windows, rows in track(jobs, "forecasting", progress and len(jobs) > 1):
        batch = windows.batch(rows)
        forecast = forecast_batch(trained.model, batch, gap + horizon, tuple(levels), trained.intervals)
        for i, row in enumerate(windows.index[rows, 0].tolist()):
            mean = _restored(store, row, forecast.mean[i, gap:])
            bounds = forecast.quantiles
            quantiles = None if bounds is None else _restored(store, row, bounds[i, :, gap:])
            found[row] = SeriesForecast(series[row], origins[row], mean, quantiles)
    return [found[row] for row in range(len(known))]


def _jobs(
    trained: Trained, store: SeriesStore, horizon: int, batch_size: int
) -> list[tuple[int, WindowSet, Int[np.ndarray, " B"]]]:
    """Batches of series whose last value lies equally far before their end: that gap, windows, and rows of those."""
    last = np.array([np.isfinite(one.y).nonzero()[0][-1] + 1 for one in store.series])
    gaps, jobs = store.lengths - last, []
    for gap in np.unique(gaps).tolist():
        which = np.flatnonzero(gaps == gap)
        index = np.stack([which, last[which]], 1)
        windows = WindowSet(store, index, trained.spec.context, gap + horizon, season=trained.config.data.season)
        jobs += [(gap, windows, rows) for rows in windows.rows(batch_size)]
    return jobs


def _restored(store: SeriesStore, row: int, values: Float[Tensor, "*Q H"]) -> Float[np.ndarray, "*Q H"]:
    """In the series' own units; of a series that has never changed, that one value."""
    y = store.series[row].y
    if np.nanmin(y) == np.nanmax(y):
        return np.full(values.shape, np.nanmin(y))
    return values.double().numpy() * store.std[row] + store.mean[row]


def _check(trained: Trained, series: Sequence[Series], horizon: int, levels: Sequence[float]) -> None:
    if levels and not trained.model.probabilistic and trained.intervals is None:
        raise UserError(
            f"quantiles={','.join(map(str, levels))}: {trained.title} gives points, and no intervals were calibrated "
            "for these weights; train or fine-tune it, or give --quantiles []"
        )
    for one in series:
        if not np.isfinite(one.y).any():
            raise UserError(f"series {one.id}: has no value to forecast from; leave it out")
        for kind in ("futr", "hist", "stat"):
            wanted, given = getattr(trained.spec, kind), getattr(one, kind).shape[-1]
            if len(wanted) != given:
                raise UserError(
                    f"series {one.id}: {given} columns of {kind} covariates; the model needs {list(wanted)}"
                )
        if trained.model.covariates and trained.spec.futr and len(one.futr) < len(one) + horizon:
            raise UserError(
                f"series {one.id}: {', '.join(trained.spec.futr)} known for {len(one.futr) - len(one)} of {horizon} "
                "points after its end; give them with --future"
            )


def quantile_columns(title: str, levels: Sequence[float]) -> list[str]:
    """Column of each level: Model-lo-80 and Model-hi-80 for 0.1 and 0.9, Model-median for 0.5."""
    names = []
    for level in levels:
        if abs(level - 0.5) < 1e-9:
            names.append(f"{title}-median")
        else:
            inside = abs(1 - 2 * level) * 100
            names.append(f"{title}-{'lo' if level < 0.5 else 'hi'}-{round(inside, 4):g}")
    return names


def forecast_frame(title: str, forecasts: Sequence[SeriesForecast], levels: Sequence[float]) -> pd.DataFrame:
    """One row per series and point: unique_id, ds, the model, its quantiles by level."""
    names = quantile_columns(title, levels)
    frames = []
    for one in forecasts:
        columns = {"unique_id": one.series.id, "ds": one.times, title: one.mean}
        if one.quantiles is not None:
            columns |= dict(zip(names, one.quantiles, strict=True))
        frames.append(pd.DataFrame(columns))
    return _concat(frames)


def write_frame(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as .csv, .parquet or .json (records), whole or not at all."""
    path = Path(path)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            kinds = frame["ds"].map(type).unique()
            table = frame if len(kinds) == 1 else frame.assign(ds=frame["ds"].astype(str))
            table.to_parquet(temporary, index=False)
        elif path.suffix == ".json":
            frame.to_json(temporary, orient="records", date_format="iso", indent=2)
        else:
            frame.to_csv(temporary, index=False)
    return path


def _concat(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; times of several kinds (dates and whole numbers) stay what they are."""
    kinds = {frame["ds"].dtype for frame in frames}
    if len(kinds) > 1:
        frames = [frame.assign(ds=frame["ds"].astype(object)) for frame in frames]
    return pd.concat(frames, ignore_index=True)
