"""Measuring a forecaster on test windows, always beside seasonal naive and DLinear."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from apps.errors import UserError
from apps.progress import track
from apps.timeseries.data import SeriesData
from apps.timeseries.forecasting import Intervals, calibrate, forecast_windows
from apps.timeseries.metrics import ErrorSums
from apps.timeseries.model_settings import DLinearConfig
from apps.timeseries.models.base import Forecast, ForecastModel, Windows
from apps.timeseries.models.baselines import SeasonalNaive
from apps.timeseries.models.dlinear import DLinear
from apps.timeseries.windows import WindowSet, training_index

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Quantiles that CRPS and coverage are measured by."""
FIT_WINDOWS, CALIBRATION_WINDOWS = 40_000, 4_000
"""Windows that DLinear and intervals are fitted on at most, evenly spaced."""


@dataclass
class Horizon:
    """Errors at one horizon."""

    windows: WindowSet
    sums: dict[str, ErrorSums]
    """Model -> its sums; the first is the model that is evaluated."""

    def rows(self) -> list[dict[str, float | str]]:
        """A table row per model."""
        measures = ("mse", "mae", "mase", "smape", "crps", "coverage_80")
        rows = []
        for name, sums in self.sums.items():
            overall = sums.overall()
            rows.append({"horizon": sums.horizon, "model": name} | {m: overall.get(m, math.nan) for m in measures})
        return rows

    def series_rows(self, measure: str) -> list[dict[str, float | str]]:
        """A table row per series that was tested, a column per model."""
        errors = {name: sums.per_series()[measure] for name, sums in self.sums.items()}
        tested = np.unique(self.windows.index[:, 0])
        ids = [series.id for series in self.windows.store.series]
        return [{"series": ids[i]} | {name: float(values[i]) for name, values in errors.items()} for i in tested]


@dataclass
class Evaluation:
    """Errors at every horizon of the model and the baselines."""

    model: str
    horizons: dict[int, Horizon]
    windows_per_second: float
    """Of the model, all horizons together; CPU time if on a CPU."""

    def scalars(self) -> dict[str, float]:
        """Figures by flat name, `h<horizon>/<measure>` for the model and `h<horizon>/<model>/<measure>` for others."""
        figures: dict[str, float] = {}
        for horizon, tested in self.horizons.items():
            figures[f"h{horizon}/windows"] = float(len(tested.windows))
            for name, sums in tested.sums.items():
                prefix = f"h{horizon}/" if name == self.model else f"h{horizon}/{name}/"
                figures |= {f"{prefix}{measure}": value for measure, value in sums.overall().items()}
        if len(self.horizons) > 1:
            for measure in ("mse", "mae"):
                values = [figures[f"h{horizon}/{measure}"] for horizon in self.horizons]
                figures[f"average/{measure}"] = sum(values) / len(values)
        return figures | {"windows_per_second": self.windows_per_second}

    def details(self) -> dict[str, dict]:
        """Errors per step of the horizon and per series, as lists and by id: for JSON."""
        details: dict[str, dict] = {}
        for horizon, tested in self.horizons.items():
            ids = [series.id for series in tested.windows.store.series]
            for name, sums in tested.sums.items():
                details[f"h{horizon}/{name}"] = {
                    "per_step": {m: v.tolist() for m, v in sums.per_step().items()},
                    "per_series": {m: dict(zip(ids, v.tolist(), strict=True)) for m, v in sums.per_series().items()},
                }
        return details

    def rows(self) -> list[dict[str, float | str]]:
        """A table row per horizon and model."""
        return [row for tested in self.horizons.values() for row in tested.rows()]


def evaluate(
    title: str,
    model: ForecastModel,
    data: SeriesData,
    intervals: Intervals | None = None,
    progress: bool = True,
) -> Evaluation:
    """Forecast every test window.

    Args:
        title: the model's name.
        model: put into eval mode.
        data: whose test windows.
        intervals: of a model that gives points only.
        progress: show a bar.

    Raises:
        UserError: if no series has test windows.
    """
    model.eval()
    horizons, seconds, count = {}, 0.0, 0
    for horizon in data.config.horizons:
        windows = data.windows("test", horizon)
        if not len(windows):
            raise UserError(f"data.horizon={horizon}: no series is long enough to test on; lower it")
        models = {title: (model, intervals)} | _baselines(title, data, horizon)
        sums = {}
        for name, (contender, errors) in models.items():
            started = time.process_time()
            description = f"{name}, {horizon} steps"
            sums[name] = _measure(contender, errors, windows, data, description, progress)
            if name == title:
                seconds += time.process_time() - started
                count += len(windows)
        horizons[horizon] = Horizon(windows, sums)
    return Evaluation(title, horizons, count / max(seconds, 1e-9))


def _measure(
    model: ForecastModel,
    intervals: Intervals | None,
    windows: WindowSet,
    data: SeriesData,
    description: str,
    progress: bool,
) -> ErrorSums:
    probabilistic = model.probabilistic or intervals is not None
    levels = LEVELS if probabilistic else ()
    sums = ErrorSums(windows.horizon, len(windows.store.series), levels)
    scales = windows.store.naive_errors(data.config.season)
    torch.manual_seed(data.seed)  # for models that sample
    batches = windows.rows(data.config.eval_batch_size)
    for rows in track(batches, description, progress):
        batch = windows.batch(rows)
        forecast = forecast_batch(model, batch, windows.horizon, levels, intervals)
        series = windows.index[rows, 0]
        sums.update(batch.future, forecast.mean, forecast.quantiles, scales[series], series)
    return sums


def forecast_batch(
    model: ForecastModel,
    windows: Windows,
    horizon: int,
    levels: tuple[float, ...] = (),
    intervals: Intervals | None = None,
) -> Forecast:
    """`forecast_windows` on the device of the model, the result on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    forecast = forecast_windows(model, windows.to(device), horizon, levels, intervals)
    quantiles = None if forecast.quantiles is None else forecast.quantiles.float().cpu()
    return Forecast(forecast.mean.float().cpu(), quantiles, {k: v.cpu() for k, v in forecast.components.items()})


def _baselines(title: str, data: SeriesData, horizon: int) -> dict[str, tuple[ForecastModel, Intervals | None]]:
    """Seasonal naive, and DLinear in closed form where there is something to fit it on.

    Names differ from the title of what is measured; seasonal naive is not measured twice.
    """
    models: dict[str, tuple[ForecastModel, Intervals | None]] = {}
    if title != "SeasonalNaive":
        models["SeasonalNaive"] = (SeasonalNaive(), None)
    linear = DLinear(DLinearConfig(), data.config.context, horizon)
    try:
        linear.fit(_training(data, horizon), _held_out(data, horizon))
    except UserError:  # not one complete window: series too short or with gaps everywhere
        return models
    name = "DLinear (closed form)" if title == "DLinear" else "DLinear"
    return models | {name: (linear.eval(), calibrate(linear, _held_out(data, horizon), horizon))}


def _training(data: SeriesData, horizon: int) -> Iterator[Windows]:
    index = training_index(data.store, data.config.context, horizon, data.config.min_context)
    limits = np.array([border.train for border in data.store.borders])
    windows = WindowSet(data.store, thinned(index, FIT_WINDOWS), data.config.context, horizon, limits)
    return (batch for _, batch in windows.batches(1024))


def _held_out(data: SeriesData, horizon: int) -> Iterator[Windows]:
    windows = data.windows("val", horizon)
    windows.index = thinned(windows.index, CALIBRATION_WINDOWS)
    return (batch for _, batch in windows.batches(data.config.eval_batch_size))


def thinned(index: Int[np.ndarray, "W 2"], most: int) -> Int[np.ndarray, "V 2"]:
    """Every so many windows, so that at most `most` are left."""
    return index[:: max(1, -(-len(index) // most))]


def calibrate_on_validation(model: ForecastModel, data: SeriesData) -> Intervals | None:
    """Intervals of a model that gives points only; None for one that gives quantiles itself."""
    if model.probabilistic:
        return None
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    horizon = max(data.config.horizons)
    return calibrate(model, (batch.to(device) for batch in _held_out(data, horizon)), horizon)
