"""Phases of the season: what hour, day, month or quarter a point is at, by the calendar where there is one.

S series of N points altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Int

from apps.timeseries.series import Series, parse_freq

MOST = 24
"""Phases of a season without a calendar; longer ones are counted in so many equal parts."""
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True)
class Calendar:
    """A cycle with names."""

    title: str
    names: tuple[str, ...]
    phase: Callable[[pd.DatetimeIndex], Int[np.ndarray, " n"]] | None = None
    """Of times; None: by position in the series."""


HOURS = Calendar("hour of the day", tuple(map(str, range(24))), lambda t: t.hour)
MINUTES = Calendar("minute of the hour", tuple(f"{5 * i}-{5 * i + 4}" for i in range(12)), lambda t: t.minute // 5)
WEEKDAYS = Calendar("day of the week", DAYS, lambda t: t.day_of_week)
MONTH = Calendar("month", MONTHS, lambda t: t.month - 1)
QUARTER = Calendar("quarter", ("Q1", "Q2", "Q3", "Q4"), lambda t: t.quarter - 1)


def calendar(series: Series, season: int) -> Calendar | None:
    """What a season of a series is called; None for a season of 1."""
    if season == 1:
        return None
    if season == series.season and (named := _named(series.freq)) is not None:
        return named
    count = min(season, MOST)
    return Calendar(f"point of the season of {season}", tuple(str(i * season // count) for i in range(count)))


def _named(freq: str | int) -> Calendar | None:
    if isinstance(freq, int):
        return None
    offset = parse_freq(freq)
    if isinstance(offset, pd.offsets.Day):
        return WEEKDAYS if offset.n % 7 else MONTH
    if isinstance(offset, pd.offsets.Tick):
        seconds = pd.Timedelta(offset).total_seconds()
        return MINUTES if seconds < 60 else HOURS if seconds < 86_400 else WEEKDAYS
    name = offset.rule_code.split("-")[0].lstrip("CB") or "B"
    return {"B": WEEKDAYS, "W": MONTH, "M": MONTH, "Q": QUARTER}.get(name[0])


class Phases:
    """Phases of the points of many series, which may have calendars of several kinds.

    Args:
        series: S.
        seasons: season length of each.
    """

    def __init__(self, series: Sequence[Series], seasons: Int[np.ndarray, " S"]) -> None:
        found = [calendar(one, int(season)) for one, season in zip(series, seasons, strict=True)]
        self.calendars: dict[str, Calendar] = {c.title: c for c in found if c is not None}
        sizes = [len(c.names) for c in self.calendars.values()]
        first = dict(zip(self.calendars, np.cumsum([0, *sizes])[:-1].tolist(), strict=True))
        self.count = sum(sizes)
        self._first = np.array([0 if c is None else first[c.title] for c in found])
        self._size = np.array([0 if c is None else len(c.names) for c in found])
        self._own = [_point_phases(*parts) for parts in zip(series, seasons, found, strict=True)]
        self._starts = np.concatenate([[0], np.cumsum([len(own) for own in self._own])[:-1]])
        self._flat = np.concatenate(self._own)

    def parts(self) -> dict[str, slice]:
        """Title of each calendar -> its rows among all `count` phases."""
        parts, first = {}, 0
        for title, one in self.calendars.items():
            parts[title] = slice(first, first + len(one.names))
            first += len(one.names)
        return parts

    def at(
        self, series: Int[np.ndarray, " n"], points: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """First row of the calendar, its number of phases (0: none) and the phase, of points inside their series."""
        return self._first[series], self._size[series], self._flat[self._starts[series] + points].astype(int)


def _point_phases(series: Series, season: int, one: Calendar | None) -> Int[np.ndarray, " n"]:
    """Of every point of a series, and of the one after its end: a forecast may start there."""
    count = len(series) + 1
    if one is None:
        return np.zeros(count, np.int16)
    if one.phase is None:
        return (np.arange(count) % season * len(one.names) // season).astype(np.int16)
    return np.asarray(one.phase(series.times(0, count))).astype(np.int16)
