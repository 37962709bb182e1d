"""Forecasters in Python: load one, hand it a DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from apps.errors import UserError
from apps.runs import Runs
from apps.timeseries.frames import attach_future, read_series
from apps.timeseries.loading import Trained, load_trained
from apps.timeseries.prediction import SeriesForecast, forecast_frame, forecast_series
from apps.timeseries.series import Series
from apps.timeseries.sources import columns

LEVELS = (0.1, 0.5, 0.9)
"""Quantiles by default: the median and an interval that should hold 80 percent."""


class Forecaster:
    """A trained model that takes and gives DataFrames with columns unique_id, ds and y.

    Example:
        >>> import pandas as pd
        >>> from apps.timeseries.forecaster import Forecaster
        >>> forecaster = Forecaster.from_checkpoint("last")  # the newest run below runs/
        >>> df = pd.read_csv("my.csv")  # unique_id, ds, y
        >>> forecasts = forecaster.predict(df, h=96)
        >>> errors = forecaster.cross_validation(df, h=96, n_windows=3)
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    @classmethod
    def from_checkpoint(cls, path: str | Path, root: str = "runs") -> Forecaster:
        """From a checkpoint, a run folder, or "last" for the newest run below `root`.

        Raises:
            UserError: if there is none, or it is of another app.
        """
        return cls(load_trained(Runs(root, "timeseries").checkpoint(str(path), None)))

    def predict(
        self,
        df: pd.DataFrame | str | Path,
        h: int | None = None,
        quantiles: Sequence[float] = LEVELS,
        future: pd.DataFrame | str | Path | None = None,
    ) -> pd.DataFrame:
        """What comes after the end of every series.

        Args:
            df: a long frame, a wide one, or a file of either, as `apps.timeseries.frames.read_series` takes it.
            h: points to forecast; None: as many as the model was trained for.
            quantiles: levels in (0, 1).
            future: covariates of the future, where the model has such.

        Returns:
            unique_id, ds, the model's name, and a column per quantile; h rows per series, in the series' order.

        Raises:
            UserError: for tables that cannot be read, in one line.
        """
        forecasts = self.forecast(self.read(df, future), h, quantiles)
        return forecast_frame(self.trained.title, forecasts, self._levels(quantiles))

    def cross_validation(
        self,
        df: pd.DataFrame | str | Path,
        h: int | None = None,
        n_windows: int = 1,
        step_size: int | None = None,
        quantiles: Sequence[float] = LEVELS,
    ) -> pd.DataFrame:
        """Forecasts from several points of the past, beside what came.

        Args:
            df: as for `predict`.
            h: points to forecast each time.
            n_windows: origins per series; the last one is h points before its end.
            step_size: points between origins; None: h.
            quantiles: levels in (0, 1).

        Returns:
            unique_id, ds, cutoff (time of the last known point), y, and the columns of `predict`.

        Raises:
            UserError: if no series is long enough, or for tables that cannot be read.
        """
        horizon = self._horizon(h)
        step = horizon if step_size is None else step_size
        if n_windows < 1 or step < 1:
            raise UserError(f"n_windows={n_windows}, step_size={step}: must be at least 1")
        series = self.read(df)
        jobs = [
            (one, len(one) - horizon - k * step)
            for one in series
            for k in reversed(range(n_windows))
            if len(one) - horizon - k * step >= 1
        ]
        if not jobs:
            raise UserError(f"h={horizon}: no series has more points than that to cross-validate on")
        forecasts = self.forecast([one for one, _ in jobs], horizon, quantiles, [origin for _, origin in jobs])
        frames = [self._with_truth(one, quantiles) for one in forecasts]
        return pd.concat(frames, ignore_index=True)

    def _with_truth(self, one: SeriesForecast, quantiles: Sequence[float]) -> pd.DataFrame:
        frame = forecast_frame(self.trained.title, [one], self._levels(quantiles))
        frame.insert(2, "cutoff", one.series.times(one.origin - 1, one.origin)[0])
        frame.insert(3, "y", one.series.y[one.origin : one.origin + len(frame)])
        return frame

    def read(self, df: pd.DataFrame | str | Path, future: pd.DataFrame | str | Path | None = None) -> list[Series]:
        """Series of a table, with the columns the model was trained with."""
        config = self.trained.config.data
        series = read_series(df, columns(config), config.freq, config.on_duplicates)
        return series if future is None else attach_future(series, future, columns(config))

    def forecast(
        self, series: Sequence[Series], h: int | None, quantiles: Sequence[float], origins: Sequence[int] | None = None
    ) -> list[SeriesForecast]:
        """Forecasts of series that are read already."""
        return forecast_series(self.trained, series, self._horizon(h), self._levels(quantiles), origins)

    def _horizon(self, h: int | None) -> int:
        horizon = self.trained.spec.horizon if h is None else h
        if horizon < 1:
            raise UserError(f"h={horizon}: must be at least 1")
        if horizon != int(horizon):
            raise UserError(f"h={horizon}: must be a whole number of points")
        return int(horizon)

    def _levels(self, quantiles: Sequence[float]) -> tuple[float, ...]:
        if isinstance(quantiles, float):
            raise UserError(f"quantiles={quantiles}: must be a list of levels, such as [{quantiles}]")
        levels = tuple(sorted(float(q) for q in quantiles))
        if any(not 0 < level < 1 for level in levels):
            raise UserError(f"quantiles={levels}: must lie strictly between 0 and 1")
        return levels
