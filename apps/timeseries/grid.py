"""Regular grids of time: which one rows lie on, and where.

A frequency splits a time into a cell number and a rest; rows of one grid have the same rest, and their cell numbers
count its points. Days, weeks and months count by the wall clock, so that a change of clocks moves nothing; hours and
less by the time that passes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from apps.errors import UserError
from apps.timeseries.series import parse_freq

DAY = 86_400_000_000
"""Microseconds, the unit of all times here."""
UNITS = {"h": 3_600_000_000, "min": 60_000_000, "s": 1_000_000, "ms": 1_000, "us": 1}
WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
MOST = 0.8
"""Share of rows that must agree before the others count as the odd ones."""
RARE = 0.25
"""Share of differences below which the smallest one is taken for a stray row, not for the step."""
FEWEST = 3
"""Rows that tell a frequency: two a month apart may as well be 31 days apart."""


@dataclass(frozen=True)
class Stamps:
    """Times of n rows in microseconds, or plain integers."""

    utc: Int[np.ndarray, " n"]
    """As time passes; what rows are sorted by."""
    wall: Int[np.ndarray, " n"]
    """As the clock shows it in the rows' time zone."""
    tz: object = None
    integer: bool = False

    @classmethod
    def of(cls, times: pd.Index | pd.Timestamp | int) -> Stamps:
        """From an index of integers or times of at most microsecond resolution, or from one of them.

        Raises:
            ValueError: times finer than a microsecond.
        """
        index = times if isinstance(times, pd.Index) else pd.Index([times])
        if not isinstance(index, pd.DatetimeIndex):
            values = index.to_numpy(np.int64)
            return cls(values, values, integer=True)
        utc = _microseconds(index.tz_convert(None) if index.tz is not None else index)
        return cls(utc, _microseconds(index.tz_localize(None)) if index.tz is not None else utc, index.tz)

    def __len__(self) -> int:
        return len(self.utc)

    def __getitem__(self, rows: slice | np.ndarray) -> Stamps:
        return Stamps(self.utc[rows], self.wall[rows], self.tz, self.integer)

    def at(self, row: int) -> pd.Timestamp | int:
        """The time of one row."""
        if self.integer:
            return int(self.utc[row])
        time = pd.Timestamp(int(self.utc[row]), unit="us", tz="UTC").as_unit("us")
        return time.tz_convert(self.tz)  # None makes it naive


def _microseconds(index: pd.DatetimeIndex) -> Int[np.ndarray, " n"]:
    fine = index.to_numpy()
    coarse = fine.astype("datetime64[us]")
    if fine.dtype == "datetime64[ns]" and (coarse != fine).any():
        raise ValueError("times finer than a microsecond")
    return coarse.astype(np.int64)


def infer_freq(stamps: Stamps) -> str | int | None:
    """The frequency of sorted, distinct times with gaps and few stray rows among them; None for fewer than 3 rows.

    The most common difference tells it; where the calendar explains the rows better (business days, months, quarters,
    years), the calendar does.
    """
    if len(stamps) < FEWEST:
        return None
    if stamps.integer:
        return _step(np.diff(stamps.utc))
    time_of_day = stamps.wall % DAY
    if not _mostly(time_of_day == _commonest(time_of_day)):
        return _tick(_step(np.diff(stamps.utc)))
    days = stamps.wall // DAY
    gaps = np.diff(days)
    step = _step(gaps[gaps > 0])
    freq = _monthly(days) if _commonest(gaps) >= 28 else None
    if freq:
        return freq
    if step % 7 == 0:
        return _multiple(step // 7, f"W-{WEEKDAYS[_commonest(_weekday(days))]}")
    if step == 1 and (_weekday(days) < 5).all() and np.busday_count(*_dates(days[[0, -1]])) < days[-1] - days[0]:
        return "B"
    return _multiple(step, "D")


def cells(stamps: Stamps, freq: str | int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Number of the cell of each time, and its rest within the cell (negative where a calendar has no such point).

    Raises:
        UserError: a frequency for integers with times or the reverse, or one that makes no grid.
    """
    if stamps.integer:
        if not str(freq).isdigit() or int(freq) < 1:
            raise UserError(f"freq={freq}: times are integers, so the frequency is an integer step such as 1")
        return stamps.utc // int(freq), stamps.utc % int(freq)
    offset = parse_freq(str(freq))
    name, _, anchor = offset.rule_code.partition("-")
    days, time_of_day = stamps.wall // DAY, stamps.wall % DAY
    if isinstance(offset, pd.offsets.Day):
        return days // offset.n, days % offset.n * DAY + time_of_day
    if isinstance(offset, pd.offsets.Tick):
        step = max(int(pd.Timedelta(offset) / pd.Timedelta(1, "us")), 1)
        return stamps.utc // step, stamps.utc % step
    if name == "W":
        days = days - WEEKDAYS.index(anchor) + 3  # day 0 is a Thursday
        week = days // 7
        return week // offset.n, _rest(week % offset.n, days % 7 == 0, time_of_day)
    if name == "B":
        count = np.busday_count("0001-01-01", _dates(days))
        return count // offset.n, _rest(count % offset.n, _weekday(days) < 5, time_of_day)
    if span := _span(name):
        month = _months(days) - (MONTHS.index(anchor) if anchor else 0)
        in_place = _in_place(days, name) & (month % span == 0)
        return month // (span * offset.n), _rest(month % (span * offset.n), in_place, time_of_day)
    raise UserError(f"freq={freq}: no regular grid; use a frequency such as h, 15min, D, B, W-SUN, MS, QS or YS")


def odd_rows(rest: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which rows lie beside the grid that most of them lie on."""
    return (rest < 0) | (rest != _commonest(rest))


def anchored(freq: str | int, stamps: Stamps) -> str | int:
    """The frequency with the weekday or month that most rows have, where the calendar needs one."""
    if stamps.integer:
        return freq
    offset = parse_freq(str(freq))
    name = offset.rule_code.partition("-")[0]
    days = stamps.wall // DAY
    if name == "W":
        return _multiple(offset.n, f"W-{WEEKDAYS[_commonest(_weekday(days))]}")
    if _span(name) > 1:
        return _multiple(offset.n, f"{name}-{MONTHS[_commonest(_months(days) % 12)]}")
    return freq


def _span(name: str) -> int:
    """Months of a calendar offset such as MS, BME or QS; 0 for other offsets."""
    match = re.fullmatch("B?([MQY])[SE]", name)
    return {"M": 1, "Q": 3, "Y": 12}[match[1]] if match else 0


def _rest(cell: np.ndarray, in_place: np.ndarray, time_of_day: np.ndarray) -> np.ndarray:
    """What tells grids of the same step apart; negative off the calendar."""
    return np.where(in_place, cell * DAY + time_of_day, -1)


def _monthly(days: Int[np.ndarray, " n"]) -> str | None:
    """Months, quarters or years, by the day of the month that most rows fall on."""
    place = next((name for name in ("MS", "ME", "BMS", "BME") if _mostly(_in_place(days, name))), None)
    if place is None:
        return None
    months = _months(days)[_in_place(days, place)]
    step = _step(np.diff(months))
    month = MONTHS[_commonest(months % 12)]
    if step % 12 == 0:
        return _multiple(step // 12, f"{place.replace('M', 'Y', 1)}-{month}")
    if step % 3 == 0:
        first = 0 if place.endswith("S") else 9  # pandas writes QS-JAN, but QE-DEC
        return _multiple(step // 3, f"{place.replace('M', 'Q', 1)}-{MONTHS[_commonest(months % 3) + first]}")
    return _multiple(step, place)


def _in_place(days: Int[np.ndarray, " n"], name: str) -> Bool[np.ndarray, " n"]:
    """Which days are the first (..S) or last (..E) of a month, or its first or last business day (B...)."""
    months = _dates(days).astype("datetime64[M]")
    if name.endswith("S"):
        edge, roll = months.astype("datetime64[D]"), "forward"
    else:
        edge, roll = (months + 1).astype("datetime64[D]") - 1, "backward"
    if name.startswith("B"):
        edge = np.busday_offset(edge, 0, roll=roll)
    return edge == _dates(days)


def _step(gaps: Int[np.ndarray, " n"]) -> int:
    """The step that the differences are multiples of, as far as most of them go."""
    values, counts = np.unique(gaps, return_counts=True)
    common = int(values[counts.argmax()])
    divides = not (values % values[0]).any()
    return int(values[0]) if divides and counts[0] >= RARE * len(gaps) else common


def _tick(step: int) -> str:
    unit = next(unit for unit, size in UNITS.items() if step % size == 0)
    return _multiple(step // UNITS[unit], unit)


def _multiple(n: int, unit: str) -> str:
    return unit if n == 1 else f"{n}{unit}"


def _commonest(values: np.ndarray) -> int:
    """The most common value; the smallest of several."""
    if (values == values[0]).all():
        return int(values[0])
    unique, counts = np.unique(values, return_counts=True)
    return int(unique[counts.argmax()])


def _mostly(mask: np.ndarray) -> bool:
    return mask.mean() >= MOST


def _dates(days: Int[np.ndarray, " n"]) -> np.ndarray:
    return days.astype("datetime64[D]")


def _weekday(days: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return (days + 3) % 7  # day 0 is a Thursday


def _months(days: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return _dates(days).astype("datetime64[M]").astype(np.int64)
