"""Windows cut from series: which there are in each split, and batches of them.

S series of N points altogether, W windows, L context points, H horizon points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from apps.errors import UserError
from apps.timeseries.metrics import seasonal_scale
from apps.timeseries.models.base import Windows
from apps.timeseries.series import Series

ETT_MONTH = 30 * 24
"""Hours of the months that the ETT protocol counts in."""


@dataclass(frozen=True)
class Borders:
    """Where the parts of a series end; every evaluation window lies with its horizon inside one part."""

    train: int
    val: int
    test: int


def split_series(series: Series, how: str, horizon: int, windows: int) -> Borders:
    """Borders of one series.

    Args:
        series: to split.
        how: "tail" (the last `windows` horizons are for testing, as many before for validation, fewer in short
            series, none in very short ones), "ratio" (70, 10, 20 percent), "ett_hour" or "ett_minute" (12, 4 and 4
            months of 30 days; the rest is not used, as in Informer, arXiv 2012.07436).
        horizon: longest that is tested.
        windows: of "tail".

    Raises:
        UserError: if the series is too short for the ETT protocol.
    """
    n = len(series)
    if how == "tail":
        held = horizon * min(windows, n // (4 * horizon))
        return Borders(n - 2 * held, n - held, n)
    if how == "ratio":
        train, test = int(0.7 * n), int(0.2 * n)
        return Borders(train, n - test, n)
    month = ETT_MONTH * (4 if how == "ett_minute" else 1)
    borders = Borders(12 * month, 16 * month, 20 * month)
    if n < borders.test:
        raise UserError(f"data.split={how}: series {series.id} has {n} points of {borders.test}; use tail or ratio")
    return borders


class SeriesStore:
    """Many series in flat arrays, standardised by their training points.

    Args:
        series: at least one, all with the same covariates.
        borders: of each.
        scale: "standard" or "none".
    """

    def __init__(self, series: Sequence[Series], borders: Sequence[Borders], scale: str = "standard") -> None:
        self.series, self.borders = list(series), list(borders)
        lengths = np.array([len(s) for s in self.series])
        self.starts: Int[np.ndarray, " S"] = np.concatenate([[0], lengths.cumsum()[:-1]])
        self.lengths: Int[np.ndarray, " S"] = lengths
        moments = [_moments(s.y[: b.train], scale) for s, b in zip(self.series, self.borders, strict=True)]
        self.mean: Float[np.ndarray, " S"] = np.array([m for m, _ in moments])
        self.std: Float[np.ndarray, " S"] = np.array([d for _, d in moments])
        scaled = [(s.y - m) / d for s, (m, d) in zip(self.series, moments, strict=True)]
        self.y: Float[np.ndarray, " N"] = np.concatenate(scaled).astype(np.float32)
        known = np.array([len(s.futr) for s in self.series])  # reaches beyond the target, where the future is known
        self.futr_starts = np.concatenate([[0], known.cumsum()[:-1]])
        self.futr_lengths = known
        self.futr = _flat([s.futr for s in self.series])
        self.hist = _flat([s.hist for s in self.series])
        self.stat = np.stack([s.stat for s in self.series]).astype(np.float32)

    def naive_errors(self, season: int | None = None) -> Float[np.ndarray, " S"]:
        """Mean absolute error of seasonal naive within each series' training points, by which MASE divides."""
        parts = zip(self.series, self.borders, self.starts, strict=True)
        return np.array([seasonal_scale(self.y[i : i + b.train], season or s.season) for s, b, i in parts])

    def season(self, override: int | None = None) -> Int[np.ndarray, " S"]:
        """Season length of each series."""
        return np.array([override or s.season for s in self.series])


def _flat(parts: Sequence[np.ndarray]) -> Float[np.ndarray, "N C"] | None:
    flat = np.concatenate(parts).astype(np.float32)
    return flat if flat.shape[1] else None


def _moments(y: Float[np.ndarray, " n"], scale: str) -> tuple[float, float]:
    """Mean and deviation (divisor n) of what was observed; deviation 1 for constants."""
    y = y[np.isfinite(y)]
    if scale == "none" or not len(y):
        return 0.0, 1.0
    mean, std = float(y.mean()), float(y.std())
    return mean, std if std > 1e-8 * max(1.0, abs(mean)) else 1.0


class WindowSet(Dataset):
    """Windows of a store, cut when they are asked for; hands out whole batches by (epoch, index) pairs.

    Args:
        store: the series.
        index: series and origin (first point of the horizon) of every window.
        context: L.
        horizon: H.
        limits: points of each series that may be seen; what lies after them is NaN.
        season: of the batches, where the series do not all have the same.
    """

    def __init__(
        self,
        store: SeriesStore,
        index: Int[np.ndarray, "W 2"],
        context: int,
        horizon: int,
        limits: Int[np.ndarray, " S"] | None = None,
        season: int | None = None,
    ) -> None:
        self.store, self.index, self.context, self.horizon = store, index, context, horizon
        self.limits = store.lengths if limits is None else limits
        self.seasons = store.season(season)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Windows:
        """A batch."""
        return self.batch(np.array([index for _, index in keys]))

    def batch(self, rows: Int[np.ndarray, " B"]) -> Windows:
        """The windows of these rows of the index."""
        which, origin = self.index[rows, 0], self.index[rows, 1]
        at = origin[:, None] + np.arange(-self.context, self.horizon)  # [B, L + H], within the series
        store, inside = self.store, (at >= 0) & (at < self.limits[which][:, None])
        known = (at >= 0) & (at < store.futr_lengths[which][:, None])
        flat = store.starts[which][:, None] + np.where(inside, at, 0)
        futr = store.futr_starts[which][:, None] + np.where(known, at, 0)
        y = _from_numpy(np.where(inside, store.y[flat], np.float32(np.nan)))
        return Windows(
            past=y[:, : self.context],
            future=y[:, self.context :],
            futr=self._covariates(store.futr, futr, known),
            hist=self._covariates(store.hist, flat[:, : self.context], inside[:, : self.context]),
            stat=_from_numpy(store.stat[which]) if store.stat.shape[1] else None,
            season=most_common(self.seasons[which]),
        )

    @staticmethod
    def _covariates(table: np.ndarray | None, flat: np.ndarray, inside: np.ndarray) -> Tensor | None:
        if table is None:
            return None
        return _from_numpy(np.where(inside[..., None], table[flat], np.float32(np.nan)))

    def batches(self, size: int) -> Iterator[tuple[Int[np.ndarray, " B"], Windows]]:
        """All windows once, in batches of one season each: rows of the index, and the windows."""
        for rows in self.rows(size):
            yield rows, self.batch(rows)

    def rows(self, size: int) -> list[Int[np.ndarray, " B"]]:
        """Rows of the index in batches of one season each."""
        season = self.seasons[self.index[:, 0]] if len(self.index) else np.empty(0, int)
        groups = [np.flatnonzero(season == value) for value in np.unique(season)]
        return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def most_common(values: Int[np.ndarray, " n"]) -> int:
    """The most frequent value; of equals the first."""
    return int(Counter(values.tolist()).most_common(1)[0][0])


def _from_numpy(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def training_index(
    store: SeriesStore,
    context: int,
    horizon: int,
    least: int | None = None,
    stride: int = 1,
    least_future: int | None = None,
) -> Int[np.ndarray, "W 2"]:
    """Windows within the training parts.

    A series of at least context + horizon points gives whole windows. A shorter one gives windows with less context
    and, where it must be, less future, so that it is learned from too.

    Args:
        store: the series.
        context: L.
        horizon: H.
        least: points before the first window's origin; None: L, or what a short series allows.
        stride: points between windows.
        least_future: points of the future that lie in the part, the rest being missing; None: all H, or what a short
            series allows.
    """
    index = []
    future = min(horizon, least_future or horizon)
    for number, border in enumerate(store.borders):
        n = border.train
        whole = n >= context + horizon
        first = min(least, n) if least else context if whole else max(1, min(horizon, n) // 2)
        last = n - future if n - future >= first else n - 1  # of a very short series: at least one future point
        origins = np.arange(first, last + 1, stride)
        index.append(np.stack([np.full(len(origins), number), origins], 1))
    return _with_something(store, np.concatenate(index), context, horizon)


def evaluation_index(
    store: SeriesStore, part: str, context: int, horizon: int, stride: int = 1
) -> Int[np.ndarray, "W 2"]:
    """Windows whose horizon lies in the part ("val" or "test") of their series; contexts reach back before it."""
    index = []
    for number, border in enumerate(store.borders):
        low, high = (border.train, border.val) if part == "val" else (border.val, border.test)
        origins = np.arange(max(low, 1), high - horizon + 1, stride)
        index.append(np.stack([np.full(len(origins), number), origins], 1))
    return _with_something(store, np.concatenate(index), context, horizon)


def _with_something(
    store: SeriesStore, index: Int[np.ndarray, "W 2"], context: int, horizon: int
) -> Int[np.ndarray, "W 2"]:
    """The windows that show at least one value of context and one of the future."""
    seen = np.concatenate([[0], np.isfinite(store.y).cumsum()])  # values before each point
    start = store.starts[index[:, 0]]
    end = start + store.lengths[index[:, 0]]
    at = start + index[:, 1]
    past = seen[at] - seen[np.maximum(at - context, start)]
    future = seen[np.minimum(at + horizon, end)] - seen[at]
    return index[(past > 0) & (future > 0)]
