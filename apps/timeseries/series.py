"""One time series on a regular grid: what readers give and windows are cut from."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from apps.errors import UserError

OLD_ALIASES = {
    "H": "h",
    "BH": "bh",
    "T": "min",
    "S": "s",
    "L": "ms",
    "U": "us",
    "M": "ME",
    "BM": "BME",
    "SM": "SME",
    "Q": "QE",
    "BQ": "BQE",
    "A": "YE",
    "Y": "YE",
    "BA": "BYE",
    "AS": "YS",
    "BAS": "BYS",
}
"""Frequency names of pandas before 2.2, which people and files still use."""
PER_YEAR = {"Y": 1, "Q": 4, "M": 12, "SM": 24}
"""Periods of a year by the first letters of a pandas offset, without B (business) and S or E (start, end)."""
DAY = 86_400


@dataclass(frozen=True, eq=False)
class Series:
    """One series on a regular grid of n points; what is missing is NaN."""

    id: str
    y: Float[np.ndarray, " n"]
    """Target, float64."""
    start: pd.Timestamp | int
    """Time of `y[0]`."""
    freq: str | int
    """Step of the grid: a pandas offset alias ("h", "15min", "MS"), or an integer where times are integers."""
    futr: Float[np.ndarray, "m Cf"]
    """Covariates known in the future, m >= n; rows from n on lie after the last point of the target."""
    hist: Float[np.ndarray, "n Ch"]
    """Covariates known only in the past."""
    stat: Float[np.ndarray, " Cs"]
    """Constants of the series."""

    @classmethod
    def plain(cls, id: str, y: Float[np.ndarray, " n"], start: pd.Timestamp | int = 0, freq: str | int = 1) -> Series:
        """A series without covariates."""
        y = np.asarray(y, np.float64)
        return cls(id, y, start, freq, np.empty((len(y), 0)), np.empty((len(y), 0)), np.empty(0))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def season(self) -> int:
        """Season length in points."""
        return season_length(self.freq)

    def times(self, start: int, stop: int) -> pd.Index:
        """Times of the grid points start..stop-1, counted from `y[0]`; they may lie after the last point.

        Times of day that a change of clocks skips move forward, and of those that it repeats the earlier one is meant.
        """
        if isinstance(self.freq, int):
            return pd.Index(self.start + self.freq * np.arange(start, stop), dtype=np.int64)
        offset = parse_freq(self.freq)
        passing = isinstance(offset, pd.offsets.Tick) and not isinstance(offset, pd.offsets.Day)
        zone = None if passing else self.start.tz  # days and more go by the clock on the wall
        origin = self.start if zone is None else self.start.tz_localize(None)
        # a count of steps from the first point, so that a time of day or a 31st is never lost on the way
        first = origin if start == 0 else origin + start * offset
        times = pd.date_range(first, periods=stop - start, freq=offset, unit=first.unit)
        if zone is None:
            return times
        earlier = np.ones(len(times), bool)
        return times.tz_localize(zone, ambiguous=earlier, nonexistent="shift_forward")

    def until(self, n: int) -> Series:
        """The series as it was known after its first n points: covariates of the future stay."""
        return dataclasses.replace(self, y=self.y[:n], hist=self.hist[:n])


def parse_freq(freq: str) -> pd.offsets.BaseOffset:
    """The pandas offset of an alias; names from before pandas 2.2 ("H", "M") work too.

    Raises:
        UserError: not a frequency, or none that moves forward.
    """
    match = re.fullmatch(r"(-?\d*)([A-Z]+)(-[A-Z]+)?", freq)
    if match and match[2] in OLD_ALIASES:
        freq = match[1] + OLD_ALIASES[match[2]] + (match[3] or "")
    try:
        with warnings.catch_warnings(action="ignore"):
            offset = pd.tseries.frequencies.to_offset(freq)
    except ValueError:
        offset = None
    if offset is None or offset.n < 1:
        raise UserError(f"freq={freq}: not a frequency; use a pandas offset alias such as h, 15min, D, W-SUN, MS or QS")
    return offset


def season_length(freq: str | int) -> int:
    """Points of a season at a frequency; 1 where there is no natural one.

    A day for minutes and hours (h 24, 15min 96, min 1440), an hour for seconds, a week for days (7; business days 5),
    a year for weeks (52), months (12) and quarters (4). A multiple has fewer points accordingly (2h 12), or 1 where it
    does not divide the season. Integer times have none.
    """
    if isinstance(freq, int):
        return 1
    offset = parse_freq(freq)
    whole = _season_of_one(offset)
    return whole // offset.n if whole % offset.n == 0 else 1


def _season_of_one(offset: pd.offsets.BaseOffset) -> int:
    """Season of the offset's unit."""
    if isinstance(offset, pd.offsets.Day):
        return 7 if offset.n % 7 else 52 * offset.n  # 7D is a week
    if isinstance(offset, pd.offsets.Tick):
        step = pd.Timedelta(offset).total_seconds()
        season = 3600 if step < 60 else DAY if step < DAY else 7 * DAY
        return round(season / step) * offset.n if step >= 1 and season % step == 0 else 1
    name = offset.rule_code.split("-")[0]
    if name in ("W", "B", "C"):
        return 52 if name == "W" else 5
    return PER_YEAR.get(re.sub(r"^C?B?|[SE]$", "", name), 1)
