"""Frequencies told from times, and the grids they make."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.timeseries.frames import read_series
from apps.timeseries.grid import Stamps, cells, infer_freq
from apps.timeseries.series import Series, season_length

FREQS = (
    *("s", "10s", "min", "15min", "h", "2h", "36h", "D", "2D", "B", "W-SUN", "W-WED", "2W-MON"),
    *("MS", "ME", "BMS", "BME", "2MS", "QS-JAN", "QS-FEB", "QE-DEC", "QE-NOV", "YS-JAN", "YS-JUL", "YE-DEC", "YE-JUN"),
)


@pytest.mark.parametrize("tz", [None, "Europe/Berlin"])
@pytest.mark.parametrize("freq", FREQS)
def test_the_frequency_is_found_despite_gaps_and_the_grid_is_the_calendars(freq: str, tz: str | None) -> None:
    times = pd.date_range("1999-03-05", periods=120, freq=freq, tz=tz)
    kept = np.random.default_rng(1).random(120) < 0.75
    kept[[0, -1]] = True
    frame = pd.DataFrame({"ds": times[kept], "y": np.flatnonzero(kept)})

    (series,) = read_series(frame)

    assert series.freq == freq
    assert series.y.shape == (120,)
    np.testing.assert_array_equal(np.isfinite(series.y), kept)
    np.testing.assert_array_equal(series.y[kept], np.flatnonzero(kept))
    assert series.times(0, 120).tolist() == times.tolist()
    assert series.times(100, 120).tolist() == times[100:].tolist()


def test_times_go_on_after_the_last_point() -> None:
    series = Series.plain("a", np.zeros(3), pd.Timestamp("2024-01-31 06:00"), "ME")

    assert list(series.times(3, 5)) == [pd.Timestamp("2024-04-30 06:00"), pd.Timestamp("2024-05-31 06:00")]
    assert list(Series.plain("b", np.zeros(3), 7, 2).times(3, 5)) == [13, 15]
    assert len(series.times(2, 2)) == 0


def test_days_keep_their_time_of_day_when_clocks_change_and_hours_do_not() -> None:
    start = pd.Timestamp("2024-03-30 06:00", tz="Europe/Berlin")

    assert Series.plain("a", np.zeros(1), start, "D").times(1, 2)[0] == pd.Timestamp("2024-03-31 06:00+02:00")
    assert Series.plain("a", np.zeros(1), start, "h").times(24, 25)[0] == pd.Timestamp("2024-03-31 07:00+02:00")


def test_times_of_day_that_a_change_of_clocks_skips_or_repeats() -> None:
    spring = Series.plain("a", np.zeros(1), pd.Timestamp("2024-03-30 02:30", tz="Europe/Berlin"), "D")
    autumn = Series.plain("a", np.zeros(1), pd.Timestamp("2024-10-26 02:30", tz="Europe/Berlin"), "D")

    assert [str(time) for time in spring.times(1, 3)] == ["2024-03-31 03:00:00+02:00", "2024-04-01 02:30:00+02:00"]
    assert [str(time) for time in autumn.times(1, 3)] == ["2024-10-27 02:30:00+02:00", "2024-10-28 02:30:00+01:00"]


def test_hours_across_a_change_of_clocks_are_neither_gap_nor_duplicate() -> None:
    times = pd.date_range("2023-10-28", periods=72, freq="h", tz="Europe/Berlin")

    (series,) = read_series(pd.DataFrame({"ds": times, "y": np.arange(72.0)}))

    assert np.isfinite(series.y).all()
    assert series.start == times[0]
    assert str(series.start.tz) == "Europe/Berlin"


def test_weekdays_alone_are_days_until_a_weekend_is_left_out() -> None:
    assert infer_freq(Stamps.of(pd.date_range("2024-01-01", periods=5))) == "D"
    assert infer_freq(Stamps.of(pd.bdate_range("2024-01-01", periods=6))) == "B"


def test_one_stray_row_does_not_halve_the_step() -> None:
    times = pd.date_range("2024-01-01", periods=40, freq="h").insert(7, pd.Timestamp("2024-01-01 06:30"))

    assert infer_freq(Stamps.of(times)) == "h"


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        *[("h", 24), ("2h", 12), ("15min", 96), ("min", 1440), ("s", 3600), ("24h", 7), ("5h", 1), ("ms", 1)],
        *[("D", 7), ("7D", 52), ("B", 5), ("W", 52), ("W-MON", 52), ("2W", 26)],
        *[("MS", 12), ("ME", 12), ("M", 12), ("BME", 12), ("3MS", 4), ("QS-OCT", 4), ("Q", 4), ("YS", 1), ("A", 1)],
        *[(1, 1), (5, 1), ("H", 24)],
    ],
)
def test_season_lengths(freq: str | int, season: int) -> None:
    assert season_length(freq) == season


@pytest.mark.parametrize("freq", ["fortnightly", "-1h", "0D", ""])
def test_what_is_no_frequency_is_an_error(freq: str) -> None:
    with pytest.raises(UserError, match=r"^freq=.*: not a frequency"):
        season_length(freq)


@pytest.mark.parametrize("freq", ["SMS", "bh"])
def test_frequencies_without_a_regular_grid_are_refused(freq: str) -> None:
    with pytest.raises(UserError, match="no regular grid"):
        cells(Stamps.of(pd.date_range("2024", periods=3)), freq)


def test_old_names_of_frequencies_are_taken() -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2024-01-31", periods=4, freq="ME"), "y": 1.0})

    assert read_series(frame, freq="M")[0].freq == "ME"


def test_a_weekly_frequency_takes_the_weekday_of_the_rows_unless_it_names_one() -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=4, freq="W-MON"), "y": 1.0})

    assert read_series(frame, freq="W")[0].freq == "W-MON"
    with pytest.raises(UserError, match="freq=W-TUE"):
        read_series(frame, freq="W-TUE")


def test_years_out_of_reach_of_nanoseconds() -> None:
    frame = pd.DataFrame({"ds": np.array(["1500", "1501", "1502"], "datetime64[s]"), "y": [1, 2, 3]})

    (series,) = read_series(frame)

    assert (series.freq, str(series.start)) == ("YS-JAN", "1500-01-01 00:00:00")
    assert str(series.times(3, 4)[0]) == "1503-01-01 00:00:00"
