"""Long and wide tables, files and folders become series."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.errors import UserError
from apps.timeseries.frames import Columns, attach_future, read_series
from apps.timeseries.series import Series

HOURS = pd.date_range("2024-01-01", periods=6, freq="h")


def long(ids: str = "ab", points: int = 6) -> pd.DataFrame:
    """Hourly series, one per letter, that count up."""
    parts = [
        pd.DataFrame({"unique_id": i, "ds": HOURS[:points], "y": np.arange(points) + 100.0 * k})
        for k, i in enumerate(ids)
    ]
    return pd.concat(parts, ignore_index=True)


def same(one: Series, other: Series) -> None:
    assert (one.id, one.start, one.freq) == (other.id, other.start, other.freq)
    for name in ("y", "futr", "hist", "stat"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_long_frame_gives_its_series_in_order_of_appearance() -> None:
    first, second = read_series(long("ba"))

    assert (first.id, second.id) == ("b", "a")
    assert (first.freq, first.start, first.season) == ("h", HOURS[0], 24)
    np.testing.assert_array_equal(second.y, np.arange(6) + 100.0)
    assert first.futr.shape == (6, 0)
    assert first.hist.shape == (6, 0)
    assert first.stat.shape == (0,)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".parquet"])
def test_files_of_all_kinds_hold_the_same(tmp_path: Path, suffix: str) -> None:
    path, frame = tmp_path / f"sales{suffix}", long()
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")

    for one, other in zip(read_series(path), read_series(frame), strict=True):
        same(one, other)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(3, 12), min_size=1, max_size=4))
def test_rows_may_come_in_any_order(data: st.DataObject, lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    frame = pd.concat(
        [
            pd.DataFrame(
                {"unique_id": f"s{i}", "ds": pd.date_range("2024", periods=n, freq="D"), "y": rng.normal(size=n)}
            )
            for i, n in enumerate(lengths)
        ],
        ignore_index=True,
    )
    order = data.draw(st.permutations(range(len(frame))))

    shuffled = {one.id: one for one in read_series(frame.iloc[order])}

    for one in read_series(frame):
        same(one, shuffled.pop(one.id))
    assert not shuffled


def test_gaps_become_nan_and_only_leading_missing_values_go() -> None:
    frame = pd.DataFrame({"ds": HOURS, "y": [np.nan, 1.0, np.nan, 3.0, 4.0, np.nan], "x": np.arange(6.0)})

    (series,) = read_series(frame.drop(index=3), Columns(futr=("x",)))

    assert series.start == HOURS[1]
    np.testing.assert_array_equal(series.y, [1, np.nan, np.nan, 4, np.nan])
    np.testing.assert_array_equal(series.futr[:, 0], [1, 2, np.nan, 4, 5])


def test_integer_values_keep_their_fractions_elsewhere_and_their_type_is_float() -> None:
    frame = pd.DataFrame({"ds": range(6), "y": np.arange(10, 70, 10, dtype=np.int64)})

    (series,) = read_series(frame)

    assert series.y.dtype == np.float64
    np.testing.assert_array_equal(series.y, [10, 20, 30, 40, 50, 60])


@pytest.mark.parametrize("dtype", ["Int64", "Float32", "float32", "uint8", "bool", object])
def test_numbers_of_any_type(dtype: object) -> None:
    frame = pd.DataFrame({"ds": HOURS[:4], "y": pd.Series([1, 0, 1, 1], dtype=dtype)})

    np.testing.assert_array_equal(read_series(frame)[0].y, [1, 0, 1, 1])


def test_nullable_numbers_are_missing_where_they_are_null() -> None:
    frame = pd.DataFrame({"ds": HOURS[:4], "y": pd.array([1, None, 3, 4], dtype="Int64")})

    np.testing.assert_array_equal(read_series(frame)[0].y, [1, np.nan, 3, 4])


def test_covariates_go_where_they_belong() -> None:
    frame = long().assign(price=range(12), temp=range(12, 24), size=[5] * 6 + [7] * 6)

    _, b = read_series(frame, Columns(futr=("price",), hist=("temp",), stat=("size",)))

    np.testing.assert_array_equal(b.futr, np.arange(6, 12.0)[:, None])
    np.testing.assert_array_equal(b.hist, np.arange(18, 24.0)[:, None])
    np.testing.assert_array_equal(b.stat, [7])


def test_a_wide_table_has_a_series_per_column(tmp_path: Path) -> None:
    frame = pd.DataFrame({"date": HOURS, "HUFL": np.arange(6.0), "OT": np.arange(6.0) * 2, "temp": 1.0})
    frame.loc[:1, "OT"] = np.nan
    frame.to_csv(tmp_path / "ett.csv", index=False)

    hufl, ot = read_series(tmp_path / "ett.csv", Columns(hist=("temp",)))

    assert (hufl.id, ot.id, len(hufl), len(ot), ot.start) == ("HUFL", "OT", 6, 4, HOURS[2])
    np.testing.assert_array_equal(ot.y, [4, 6, 8, 10])
    assert ot.hist.shape == (4, 1)


def test_a_wide_frame_by_its_index_also_from_a_file(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": range(6), "b": range(6)}, index=HOURS)
    frame.to_csv(tmp_path / "wide.csv")

    for source in (frame, tmp_path / "wide.csv"):
        assert [(one.id, one.freq) for one in read_series(source)] == [("a", "h"), ("b", "h")]


def test_a_table_without_ids_is_one_series_named_by_its_file(tmp_path: Path) -> None:
    long("a").drop(columns="unique_id").to_csv(tmp_path / "demand.csv", index=False)

    assert [one.id for one in read_series(tmp_path / "demand.csv")] == ["demand"]


def test_ids_and_times_in_the_index() -> None:
    frame = long().set_index(["unique_id", "ds"])

    assert [(one.id, len(one)) for one in read_series(frame)] == [("a", 6), ("b", 6)]


def test_ids_are_text_as_written(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        "unique_id,ds,y\n" + "".join(f"{i},{t},1\n" for i in ("007", "NA") for t in range(3))
    )

    assert [one.id for one in read_series(tmp_path / "x.csv")] == ["007", "NA"]


def test_a_folder_prefixes_ids_that_clash(tmp_path: Path) -> None:
    long("ab").to_csv(tmp_path / "north.csv", index=False)
    long("bc").to_parquet(tmp_path / "south.parquet")
    (tmp_path / "notes.md").write_text("ignored")

    assert [one.id for one in read_series(tmp_path)] == ["a", "north/b", "south/b", "c"]


def test_series_of_different_frequencies_in_one_file() -> None:
    monthly = pd.DataFrame({"unique_id": "m", "ds": pd.date_range("2024", periods=5, freq="MS"), "y": 1.0})

    assert [one.freq for one in read_series(pd.concat([long(), monthly]))] == ["h", "h", "MS"]


@pytest.mark.parametrize("points", [1, 2])
def test_a_series_too_short_to_tell_takes_the_frequency_of_the_others(points: int) -> None:
    frame = pd.concat([long("ab"), long("c", points)])

    assert [(one.freq, len(one)) for one in read_series(frame)] == [("h", 6), ("h", 6), ("h", points)]


def test_a_short_series_alone_needs_its_frequency() -> None:
    with pytest.raises(UserError, match=r"series 'a' has fewer than 3 rows.*give --data\.freq$"):
        read_series(long("a", 2))
    assert read_series(long("a", 1), freq="h")[0].freq == "h"


def test_five_points_and_constants_are_fine() -> None:
    (series,) = read_series(long("a", 5).assign(y=3))

    np.testing.assert_array_equal(series.y, [3] * 5)


@pytest.mark.parametrize("freq", [None, "2", 2])
def test_integer_times(freq: str | int | None) -> None:
    frame = pd.DataFrame({"ds": [4, 10, 6, 14, 12], "y": [0.0, 3.0, 1.0, 5.0, 4.0]})

    (series,) = read_series(frame, freq=freq)

    assert (series.start, series.freq) == (4, 2)
    np.testing.assert_array_equal(series.y, [0, 1, np.nan, 3, 4, 5])


def test_integers_that_are_dates_are_dates() -> None:
    frame = pd.DataFrame({"ds": [20240130, 20240131, 20240201], "y": 1.0})

    assert read_series(frame)[0].start == pd.Timestamp("2024-01-30")


@pytest.mark.parametrize(
    "times",
    [
        ["2024-01-01 22:00", "2024-01-01 23:00", "2024-01-02", "2024-01-02 01:00"],
        ["2024-01-01T22:00Z", "2024-01-01T23:00Z", "2024-01-02T00:00Z", "2024-01-02T01:00Z"],
        ["13.01.2024 22:00", "13.01.2024 23:00", "14.01.2024 00:00", "14.01.2024 01:00"],
        ["2024-10-27T02:00+02:00", "2024-10-27T02:00+01:00", "2024-10-27T03:00+01:00", "2024-10-27T04:00+01:00"],
    ],
    ids=["midnight without time", "UTC", "day first", "changing offset"],
)
def test_times_as_people_write_them(times: list[str]) -> None:
    (series,) = read_series(pd.DataFrame({"ds": times, "y": [1.0, 2.0, 3.0, 4.0]}))

    assert series.freq == "h"
    np.testing.assert_array_equal(series.y, [1, 2, 3, 4])


def test_periods_and_dates_are_times() -> None:
    months = pd.period_range("2024-01", periods=4, freq="M")
    days = [day.date() for day in pd.date_range("2024", periods=4)]

    assert read_series(pd.DataFrame({"ds": months, "y": 1.0}))[0].freq == "MS"
    assert read_series(pd.DataFrame({"ds": days, "y": 1.0}))[0].freq == "D"


@pytest.mark.parametrize(("how", "value"), [("mean", 2.0), ("last", 3.0)])
def test_duplicates_are_settled_as_told(how: str, value: float) -> None:
    frame = pd.concat([long("a"), long("a").iloc[[2, 2]].assign(y=[np.nan, 3.0])]).replace({"y": {2.0: 1.0}})
    frame.iloc[2, 2] = 1.0

    (series,) = read_series(frame, on_duplicates=how)

    assert len(series) == 6
    assert series.y[2] == value


def test_the_ett_benchmark(shared_data: Path) -> None:
    series = read_series(shared_data / "ett" / "ETTh1.csv.gz")

    assert [one.id for one in series] == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert {(len(one), one.freq, one.season) for one in series} == {(17420, "h", 24)}
    with gzip.open(shared_data / "ett" / "ETTh1.csv.gz", "rt") as file:
        last = file.read().split()[-1]
    assert series[-1].y[-1] == float(last.split(",")[-1])


def future(ids: str = "ab", first: int = 6, points: int = 3) -> pd.DataFrame:
    times = pd.date_range(HOURS[0], periods=first + points, freq="h")[first:]
    return pd.DataFrame(
        {"unique_id": np.repeat(list(ids), points), "ds": np.tile(times, len(ids)), "x": range(len(ids) * points)}
    )


def with_x() -> tuple[list[Series], Columns]:
    columns = Columns(futr=("x",))
    return read_series(long().assign(x=-1.0), columns), columns


def test_future_covariates_are_put_after_the_past_ones() -> None:
    series, columns = with_x()

    a, b = attach_future(series, future().sample(frac=1, random_state=0), columns)

    np.testing.assert_array_equal(a.futr[:, 0], [-1] * 6 + [0, 1, 2])
    np.testing.assert_array_equal(b.futr[:, 0], [-1] * 6 + [3, 4, 5])
    assert len(a.y) == 6


def test_future_rows_of_known_times_are_passed_over_and_without_ids_they_are_those_of_all(tmp_path: Path) -> None:
    series, columns = with_x()
    path = tmp_path / "future.csv"
    future("a", first=4, points=5).drop(columns="unique_id").to_csv(path, index=False)

    for one in attach_future(series, path, columns):
        np.testing.assert_array_equal(one.futr[:, 0], [-1] * 6 + [2, 3, 4])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (future(first=7), "series 'a': covariates of 2024-01-01 06:00:00 must be there, once"),
        (future("a"), "series 'b': covariates of 2024-01-01 06:00:00 must be there"),
        (future().drop(index=1), "series 'a': covariates of 2024-01-01 07:00:00 must be there"),
        (pd.concat([future(), future()]), "series 'a': covariates of 2024-01-01 07:00:00 must be there, once"),
        (future().drop(columns="x"), "no column 'x'"),
        (future().assign(x=np.inf), "row 0: infinite"),
        (future().assign(ds=range(6)), "series 'a' has times such as 2024-01-01 00:00:00"),
        (future().assign(ds=future().ds + pd.Timedelta("5min")), "06:05:00 does not continue the grid of freq=h"),
    ],
)
def test_future_covariates_that_do_not_continue_a_series(frame: pd.DataFrame, message: str) -> None:
    series, columns = with_x()

    with pytest.raises(UserError, match=message) as error:
        attach_future(series, frame, columns)
    assert "\n" not in str(error.value)


def test_future_covariates_in_another_time_zone_are_of_the_same_moment() -> None:
    columns = Columns(futr=("x",))
    local = long("a").assign(ds=HOURS.tz_localize("Europe/Berlin"), x=-1.0)
    (days,) = read_series(local.assign(ds=pd.date_range("2024-03-28", periods=6, tz="Europe/Berlin")), columns)
    ahead = pd.date_range("2024-04-03", periods=2, tz="Europe/Berlin").tz_convert("UTC")

    (extended,) = attach_future([days], pd.DataFrame({"unique_id": "a", "ds": ahead, "x": [1, 2]}), columns)

    assert extended.futr[6:, 0].tolist() == [1, 2]


def test_future_covariates_of_another_number_than_the_series_have() -> None:
    with pytest.raises(UserError, match=r"series 'a' has 0 future covariates, not 1"):
        attach_future(read_series(long("a")), future("a"), Columns(futr=("x",)))


def test_a_series_as_it_was_known_keeps_the_covariates_of_its_future() -> None:
    (series,) = read_series(long("a").assign(x=range(6), z=range(6)), Columns(futr=("x",), hist=("z",)))

    known = series.until(4)

    assert (len(known), known.futr.shape, known.hist.shape) == (4, (6, 1), (4, 1))


def test_categories_are_ids_and_numbers() -> None:
    frame = long().astype({"unique_id": "category"}).assign(y=lambda f: f.y.astype("category"))

    np.testing.assert_array_equal([one.y[0] for one in read_series(frame)], [0, 100])
