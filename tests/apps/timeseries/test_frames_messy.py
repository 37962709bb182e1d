"""Data that cannot be used gives one line that says where and what to do; data that can is used."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.timeseries.frames import Columns, read_series
from apps.timeseries.series import Series

GOOD = "unique_id,ds,y,x\n" + "".join(f"a,2024-01-0{day},{day},0\n" for day in range(1, 8))


def fails(source: Path | pd.DataFrame, *parts: str, columns: Columns = Columns(), freq: str | None = None) -> str:  # noqa: B008
    """Reading fails with one line that has all the parts."""
    with pytest.raises(UserError) as error:
        read_series(source, columns, freq)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 400
    for part in parts:
        assert part in line, line
    return line


@pytest.fixture
def csv(tmp_path: Path):
    def write(text: str | bytes, name: str = "file.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("a,2024-01-03,3", "a,2024-01-02,3"), ["series 'a'", "line 4", "2024-01-02 00:00:00 is there twice", "mean"]),
        (("2024-01-03", "2024-01-03T05:00"), ["series 'a'", "line 4", "2024-01-03 05:00:00", "grid", "--data.freq"]),
        (("01-03,3", "01-03,broken"), ["column 'y'", "line 4", "'broken' is not a number"]),
        (("01-03,3", "01-03,-"), ["column 'y'", "line 4", "'-' is not a number"]),
        (("01-03,3", "01-03,inf"), ["series 'a'", "line 4", "infinite"]),
        (("2024-01-03", "yesterday"), ["column 'ds'", "line 4", "'yesterday' is not a time"]),
        (("2024-01-03", "2024-02-30"), ["column 'ds'", "line 4", "'2024-02-30' is not a time"]),
        (("2024-01-03", ""), ["column 'ds'", "line 4", "no time"]),
        (("a,2024-01-03", ",2024-01-03"), ["column 'unique_id'", "line 4", "no id"]),
        (("3,0\n", "3,0,9\n"), ["cannot be read", "line 4"]),
        (("2024-01-07", "2204-01-07"), ["series 'a'", "line 8", "2204", "gap"]),
    ],
)
def test_one_bad_row_is_named(csv, change: tuple[str, str], parts: list[str]) -> None:
    assert GOOD.replace(*change) != GOOD
    path = csv(GOOD.replace(*change))

    fails(path, str(path), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["empty"]),
        ("unique_id,ds,y\n", ["no rows"]),
        ("a,b,c\n1,2,3\n", ["no column 'ds'", "it has a, b, c", "--data.time_column"]),
        ("unique_id,ds,value\na,1,2\n", ["no column 'y'", "unique_id, ds, value", "--data.target_column"]),
        ("date\n2024-01-01\n", ["nothing but times"]),
        ("date,load\n2024-01-01,\n2024-01-02,\n", ["no series has a value"]),
        ("date,load,city\n2024-01-01,1,Rome\n2024-01-02,1,Rome\n", ["column 'city'", "line 2", "'Rome'"]),
        (GOOD.replace("0\n", "sunny\n").encode(), ["column 'x'", "'sunny'", "encode text as numbers"]),
        ("unique_id,ds,y\nMünchen,1,2\n".encode("latin-1"), ["UTF-8"]),
        (GOOD.encode("utf-16"), ["UTF-8"]),
        (b"unique_id,ds,y\na,1.5,2\n", ["column 'ds'", "line 2", "1.5"]),
    ],
)
def test_files_that_hold_no_series(csv, content: str | bytes, parts: list[str]) -> None:
    fails(csv(content), *parts, columns=Columns(hist=("x",)) if b"sunny" in bytes(str(content), "utf-8") else Columns())


def test_paths_that_hold_nothing(tmp_path: Path, csv) -> None:
    fails(tmp_path / "none.csv", "no such file")
    fails(tmp_path, "no .csv or .parquet file")
    fails(csv(b"\x1f\x8b garbage", "a.csv.gz"), "cannot be read")
    fails(csv(gzip.compress(GOOD.encode())[:-12], "b.csv.gz"), "cannot be read")
    fails(csv(b"no parquet", "c.parquet"), "cannot be read")


def test_unknown_covariates_list_what_there_is(csv) -> None:
    fails(csv(GOOD), "no column 'price'", "unique_id, ds, y, x", columns=Columns(futr=("price",)))


def test_a_constant_that_changes(csv) -> None:
    path = csv(GOOD.replace("01-05,5,0", "01-05,5,1"))

    fails(path, "series 'a'", "line 6", "'x' is not constant", columns=Columns(stat=("x",)))


def test_rows_of_frames_are_named_by_index() -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2024", periods=4), "y": ["1", "2", "three", "4"]})

    fails(frame, "data frame: column 'y', row 2: 'three'")
    fails(frame.assign(y=[1.0, np.inf, 3.0, 4.0]), "series 'y', row 1", "infinite")
    fails(pd.DataFrame([[1, 2, 3]], columns=["ds", "y", "y"]), "two columns are named 'y'")


def test_mid_month_stamps_are_no_grid() -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2024-01-15", periods=12, freq=pd.DateOffset(months=1)), "y": 1.0})

    fails(frame, "does not lie on the grid")
    fails(frame, "does not lie on the grid of freq=MS", freq="MS")


def test_a_given_frequency_makes_irregular_rows_regular_where_they_fit() -> None:
    times = pd.to_datetime(["2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00", "2024-01-01 03:00"])
    stray = times.insert(2, pd.Timestamp("2024-01-01 01:30"))
    frame = pd.DataFrame({"ds": stray.repeat([1] * 5), "y": range(5)})

    (series,) = read_series(frame, freq="30min")

    np.testing.assert_array_equal(series.y, [0, np.nan, 1, 2, 3, np.nan, 4])
    fails(frame, "01:30:00 does not lie", freq="h")
    fails(frame, "freq=fortnight: not a frequency", freq="fortnight")
    fails(frame.assign(ds=range(5)), "freq=D: times are integers", freq="D")


@pytest.mark.parametrize(
    ("text", "y"),
    [
        ("\ufeffunique_id,ds,y\na,2024-01-01,1\na,2024-01-02,2\na,2024-01-03,\n", [1, 2, np.nan]),
        ("unique_id;ds;y\na;2024-01-01;1,5\na;2024-01-02;2,5\na;2024-01-03;3\n", [1.5, 2.5, 3]),
        ("unique_id;ds;y\na;2024-01-01;1.5\na;2024-01-02;2.5\na;2024-01-03;3\n", [1.5, 2.5, 3]),
        ("unique_id, ds, y\r\na, 2024-01-01, 1\r\n\r\na, 2024-01-02, NA\r\na, 2024-01-03, 3\r\n", [1, np.nan, 3]),
        ('unique_id,ds,y\n"a","2024-01-01","1"\n"a","2024-01-02","null"\n"a","2024-01-03","-3e2"\n', [1, np.nan, -300]),
        ("y,extra,ds,unique_id\n1,text,2024-01-01,a\n2,,2024-01-02,a\n3,x,2024-01-04,a\n", [1, 2, np.nan, 3]),
        ("ds,a,\n2024-01-01,1,\n2024-01-02,2,\n2024-01-03,3,\n", [1, 2, 3]),
    ],
    ids=["BOM", "semicolons", "semicolons and points", "spaces", "quotes", "other columns", "trailing commas"],
)
def test_ways_to_write_a_csv(csv, text: str, y: list[float]) -> None:
    (series,) = read_series(csv(text))

    assert series.id == "a"
    np.testing.assert_array_equal(series.y, y)


def test_a_series_without_a_value_is_left_out(csv) -> None:
    assert [one.id for one in read_series(csv("date,a,b\n2024-01-01,,1\n2024-01-02,,2\n2024-01-03,,3\n"))] == ["b"]


def test_two_rows_of_one_day_when_clocks_go_back() -> None:
    nights = Series.plain("a", np.zeros(5), pd.Timestamp("2023-10-27 02:30", tz="Europe/Berlin"), "D").times(0, 5)
    again = nights.insert(3, pd.Timestamp("2023-10-29 02:30+01:00").tz_convert("Europe/Berlin"))

    assert read_series(pd.DataFrame({"ds": nights, "y": 1.0}))[0].freq == "D"
    fails(pd.DataFrame({"ds": again, "y": 1.0}), "row 3", "twice in one step of the grid")


def test_times_finer_than_a_microsecond() -> None:
    fine = pd.date_range("2024", periods=4, freq="10ns", unit="ns")

    fails(pd.DataFrame({"ds": fine, "y": 1.0}), "column 'ds'", "finer than a microsecond")
