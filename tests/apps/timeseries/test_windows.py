"""Splits, and windows cut from series: the published protocol, and what a window may show."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.errors import UserError
from apps.timeseries.frames import read_series
from apps.timeseries.windows import (
    Borders,
    SeriesStore,
    WindowSet,
    evaluation_index,
    split_series,
    training_index,
)
from tests.apps.timeseries.conftest import series_of

ROWS = 17_420
"""Of the hourly ETT files."""


def store_of(*ys, how="tail", horizon=4, windows=2, scale="none", freq="h") -> SeriesStore:
    series = [series_of(y, f"s{i}", freq) for i, y in enumerate(ys)]
    return SeriesStore(series, [split_series(s, how, horizon, windows) for s in series], scale)


def test_the_ett_protocol_has_the_published_windows():
    """Counts of Informer's split at lookback 336 and horizon 96; contexts of later parts reach back before them."""
    store = store_of(np.arange(ROWS), np.arange(ROWS), how="ett_hour")
    assert store.borders == [Borders(8640, 11520, 14400)] * 2
    train = training_index(store, 336, 96)
    val, test = (evaluation_index(store, part, 336, 96) for part in ("val", "test"))
    assert [len(index) // 2 for index in (train, val, test)] == [8209, 2785, 2785]
    for index, first, last in ((train, 336, 8640 - 96), (val, 8640, 11520 - 96), (test, 11520, 14400 - 96)):
        own = index[index[:, 0] == 0, 1]
        assert (own == np.arange(first, last + 1)).all()
    windows = WindowSet(store, test, 336, 96)
    batch = windows.batch(np.array([0, 2784]))
    assert batch.past[0].tolist() == list(range(11520 - 336, 11520))
    assert batch.future[0].tolist() == list(range(11520, 11520 + 96))
    assert batch.future[1, -1] == 14399
    assert split_series(store.series[0], "ratio", 96, 2) == Borders(12194, 13936, ROWS)


def test_minutes_have_four_times_the_points():
    series = series_of(np.arange(4 * ROWS), freq="15min")
    assert split_series(series, "ett_minute", 96, 2) == Borders(4 * 8640, 4 * 11520, 4 * 14400)
    with pytest.raises(UserError, match=r"^data.split=ett_minute: series s has 57599 points of 57600; use tail or"):
        split_series(series_of(np.arange(57_599)), "ett_minute", 96, 2)


def test_series_are_standardised_by_their_training_points_alone():
    rng = np.random.default_rng(0)
    y = rng.normal(50, 7, ROWS)
    y[8640:] *= 100
    y[17] = np.nan
    store = store_of(y, np.full(ROWS, 1e6), np.full(ROWS, np.nan), how="ett_hour", scale="standard")
    seen = np.delete(y[:8640], 17)
    assert store.mean[0] == pytest.approx(sum(seen) / 8639)
    assert store.std[0] == pytest.approx((sum((seen - seen.mean()) ** 2) / 8639) ** 0.5)  # divisor n
    flat = store.y.reshape(3, ROWS)
    np.testing.assert_allclose(flat[0], ((y - seen.mean()) / seen.std()).astype(np.float32), rtol=1e-6)
    assert (flat[1] == 0).all()
    assert np.isnan(flat[2]).all()


def test_the_real_benchmark(shared_data):
    file = shared_data / "ett" / "ETTh1.csv.gz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    frame = pd.read_csv(file)
    series = read_series(file)
    assert [s.id for s in series] == list(frame.columns[1:])
    assert all(len(s) == ROWS and s.season == 24 for s in series)
    store = SeriesStore(series, [split_series(s, "ett_hour", 96, 2) for s in series])
    table = frame.iloc[:, 1:].to_numpy()
    mean, std = table[:8640].mean(0), table[:8640].std(0, ddof=0)
    np.testing.assert_allclose(store.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(store.std, std, rtol=1e-9)
    index = evaluation_index(store, "test", 336, 96)
    assert len(index) == 7 * 2785
    last = WindowSet(store, index, 336, 96).batch(np.array([2784, 7 * 2785 - 1]))
    expected = (table - mean) / std
    for row, column in enumerate((0, 6)):
        np.testing.assert_allclose(last.past[row], expected[14400 - 432 : 14400 - 96, column], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(last.future[row], expected[14400 - 96 : 14400, column], rtol=2e-5, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    context=st.integers(1, 20),
    horizon=st.integers(1, 12),
    how=st.sampled_from(["tail", "ratio"]),
    least=st.sampled_from([None, 1, 3]),
    stride=st.integers(1, 3),
)
def test_no_training_window_shows_a_point_after_the_border(lengths, context, horizon, how, least, stride):
    """Values are their own positions, so that a window tells what it shows."""
    store = store_of(*(np.arange(n) for n in lengths), how=how, horizon=horizon)
    least = None if least is None else min(least, context)
    index = training_index(store, context, horizon, least, stride)
    limits = np.array([border.train for border in store.borders])
    windows = WindowSet(store, index, context, horizon, limits)
    assert len(np.unique(index, axis=0)) == len(index)
    for row, (which, origin) in enumerate(index):
        batch = windows.batch(np.array([row]))
        shown = batch.sequence[0].numpy()
        position = origin + np.arange(-context, horizon)
        known = (position >= 0) & (position < limits[which])
        assert (np.isfinite(shown) == known).all()
        assert (shown[known] == position[known]).all()
        assert known[:context].any()
        assert known[context:].any()
    for which, border in enumerate(store.borders):
        own = index[index[:, 0] == which, 1]
        if border.train >= context + horizon and least is None:  # whole windows only
            assert (own == np.arange(context, border.train - horizon + 1, stride)).all()
        elif border.train > (least or 1):
            assert len(own)  # short ones are learned from too


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    context=st.integers(1, 20),
    horizon=st.integers(1, 12),
    how=st.sampled_from(["tail", "ratio"]),
    part=st.sampled_from(["val", "test"]),
)
def test_futures_of_evaluation_windows_lie_in_their_part(lengths, context, horizon, how, part):
    store = store_of(*(np.arange(n) for n in lengths), how=how, horizon=horizon)
    index = evaluation_index(store, part, context, horizon)
    batch = WindowSet(store, index, context, horizon).batch(np.arange(len(index))) if len(index) else None
    for which, border in enumerate(store.borders):
        if batch is None:
            break
        low, high = (border.train, border.val) if part == "val" else (border.val, border.test)
        own = batch.future[index[:, 0] == which]
        assert len(own) == max(0, high - horizon - max(low, 1) + 1)
        assert bool(torch.isfinite(own).all())
        assert own.numel() == 0 or (low <= own.min() and own.max() < high)
        past = batch.past[index[:, 0] == which]
        assert len(past) == 0 or bool((past[:, -1] == own[:, 0] - 1).all())  # nothing between context and future


@pytest.mark.parametrize(
    ("n", "borders"),
    [
        (100, (84, 92, 100)),
        (32, (16, 24, 32)),
        (31, (23, 27, 31)),
        (16, (8, 12, 16)),
        (15, (15, 15, 15)),
        (1, (1,) * 3),
    ],
)
def test_tails_shrink_with_the_series(n, borders):
    """Two horizons of 4 for testing and two for validation, but no more than half of the series altogether."""
    assert split_series(series_of(np.zeros(n)), "tail", 4, 2) == Borders(*borders)


def test_a_series_of_five_points_is_learned_from():
    store = store_of(np.arange(5), horizon=4)
    index = training_index(store, context=8, horizon=4)
    assert index.tolist() == [[0, 2], [0, 3], [0, 4]]
    batch = WindowSet(store, index, 8, 4).batch(np.arange(len(index)))
    assert bool(torch.isfinite(batch.past[:, -1]).all())
    assert bool(torch.isfinite(batch.future[:, 0]).all())
    assert torch.isnan(batch.past[:, :3]).all()  # padding is on the left


def test_windows_without_anything_seen_are_left_out():
    y = np.full(40, np.nan)
    y[[10, 30]] = 1.0
    store = store_of(y, how="ratio")
    origins = training_index(store, 4, 2)[:, 1].tolist()
    assert origins == []  # never a value in the context and one in the future
    y[12] = 2.0
    origins = training_index(store_of(y, how="ratio"), 4, 2)[:, 1].tolist()
    assert origins == [11, 12]


def test_missing_values_stay_missing():
    y = np.arange(30.0)
    y[[3, 7]] = np.nan
    windows = WindowSet(store_of(y), np.array([[0, 8]]), 6, 3)
    np.testing.assert_array_equal(windows.batch(np.array([0])).past[0], [2, np.nan, 4, 5, 6, np.nan])


def test_covariates_are_those_of_the_same_points():
    n, context, horizon = 10, 4, 3
    time = np.arange(n + 2.0)
    one = dataclasses.replace(
        series_of(np.arange(n)),
        futr=np.stack([time, 10 * time], 1),  # known two points beyond the end
        hist=100 * time[:n, None],
        stat=np.array([7.0]),
    )
    other = dataclasses.replace(series_of(-np.arange(n)), futr=-one.futr, hist=-one.hist, stat=np.array([8.0]))
    store = SeriesStore([one, other], [Borders(n, n, n)] * 2, "none")
    batch = WindowSet(store, np.array([[0, 5], [1, 2]]), context, horizon).batch(np.arange(2))
    assert batch.futr[0].tolist() == [[t, 10 * t] for t in range(1, 8)]
    assert batch.hist[0].tolist() == [[100.0 * t] for t in range(1, 5)]
    np.testing.assert_array_equal(batch.futr[1, :, 0], [np.nan, np.nan, 0, -1, -2, -3, -4])
    np.testing.assert_array_equal(batch.hist[1, :, 0], [np.nan, np.nan, 0, -100])
    assert batch.stat.tolist() == [[7.0], [8.0]]
    assert bool(torch.isfinite(batch.future[0]).all())


def test_covariates_known_beyond_the_end_reach_forecasts():
    """What is known of the time after the last point of the target is what forecasts need."""
    n = 6
    time = np.arange(n + 3.0)
    series = [dataclasses.replace(series_of(np.arange(n), f"s{i}"), futr=(i + 1) * time[:, None]) for i in range(2)]
    store = SeriesStore(series, [Borders(n, n, n)] * 2, "none")
    batch = WindowSet(store, np.array([[0, n], [1, n]]), 2, 3).batch(np.arange(2))
    assert batch.futr[..., 0].tolist() == [[4, 5, 6, 7, 8], [8, 10, 12, 14, 16]]
    assert bool(torch.isnan(batch.future).all())


def test_batches_have_one_season_each_and_hold_every_window_once():
    days, months = series_of(np.arange(30), "d", "D"), series_of(np.arange(40), "m", "MS")
    store = SeriesStore([days, months, days], [Borders(len(s), len(s), len(s)) for s in (days, months, days)], "none")
    windows = WindowSet(store, training_index(store, 6, 2), 6, 2)
    seen = []
    for rows, batch in windows.batches(7):
        assert len(rows) == len(batch) <= 7
        wanted = {7} if batch.season == 7 else {12}
        assert {store.series[i].season for i in windows.index[rows, 0]} == wanted
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(windows)))
    assert WindowSet(store, windows.index, 6, 2, season=5).batch(np.array([0])).season == 5
    assert list(WindowSet(store, np.empty((0, 2), int), 6, 2).batches(7)) == []


def test_the_unit_of_mase_is_the_seasonal_naive_error_of_the_training_points():
    y = np.tile([1.0, 5.0, 2.0, 2.0], 10) + 0.25 * np.arange(40)
    y[30:] += 1000
    store = store_of(y, how="ratio", freq=1)
    assert store.naive_errors(4) == pytest.approx([1.0])
    assert store.naive_errors() == pytest.approx([np.abs(np.diff(y[:28])).mean()], rel=1e-6)
