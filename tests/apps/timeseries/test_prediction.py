"""Forecasts as tables: columns, times, units, and what is known where."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from apps import tree
from apps.errors import UserError
from apps.timeseries.forecasting import Intervals
from apps.timeseries.loading import Trained
from apps.timeseries.models.build import build_model
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.prediction import forecast_frame, forecast_series, quantile_columns, write_frame
from apps.timeseries.series import Series
from apps.timeseries.settings import TimeseriesConfig
from tests.apps.timeseries.conftest import TINY, series_of

L, H = 24, 6
LEVELS = (0.1, 0.5, 0.9)


def trained(name: str = "segmoe", scale: str = "standard", **spec) -> Trained:
    """A model with weights drawn at random and intervals around its points."""
    given = {key: yaml.safe_load(value) for key, value in TINY.items() if key.startswith(f"model.{name}.")}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    config = tree.changed(TimeseriesConfig(), values | {"model.name": name, "data.scale": scale})
    spec = SeriesSpec(L, H, 24, **spec)
    torch.manual_seed(0)
    model = build_model(config.model, spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    errors = torch.linspace(-1, 1, 99)[:, None].expand(-1, H)
    return Trained(model, config, spec, Path("x"), None if model.probabilistic else Intervals(errors))


def wave(length: int, id: str = "s", freq: str | int = "h", level: float = 50.0) -> Series:
    rng = np.random.default_rng(length)
    return series_of(level + 5 * np.sin(np.arange(length) / 4) + rng.standard_normal(length), id, freq)


@pytest.mark.parametrize(
    ("freq", "times"),
    [
        ("h", ["2024-01-01 05:00", "2024-01-01 06:00", "2024-01-01 07:00"]),
        ("15min", ["2024-01-01 01:15", "2024-01-01 01:30", "2024-01-01 01:45"]),
        ("D", ["2024-01-06", "2024-01-07", "2024-01-08"]),
        ("B", ["2024-01-08", "2024-01-09", "2024-01-10"]),
        ("W-MON", ["2024-02-05", "2024-02-12", "2024-02-19"]),
        ("MS", ["2024-06-01", "2024-07-01", "2024-08-01"]),
        ("QS", ["2025-04-01", "2025-07-01", "2025-10-01"]),
        ("YS", ["2029-01-01", "2030-01-01", "2031-01-01"]),
    ],
)
def test_times_go_on_where_the_series_ends(freq, times):
    (one,) = forecast_series(trained(), [wave(5, freq=freq)], 3)
    assert one.times.tolist() == [pd.Timestamp(time) for time in times]
    frame = forecast_frame("SegMoE", [one], ())
    assert frame["ds"].tolist() == one.times.tolist()
    assert str(frame["ds"].dtype).startswith("datetime64")


def test_ends_of_months_and_whole_numbers_go_on_too():
    ends = dataclasses.replace(wave(3, freq="ME"), start=pd.Timestamp("2023-11-30").as_unit("us"))
    numbers = dataclasses.replace(wave(4, freq=5), start=100)
    first, second = forecast_series(trained(), [ends, numbers], 2)
    assert first.times.tolist() == [pd.Timestamp("2024-02-29"), pd.Timestamp("2024-03-31")]
    assert second.times.tolist() == [120, 125]
    frame = forecast_frame("SegMoE", [first, second], ())
    assert frame["ds"].tolist() == [*first.times, 120, 125]  # each stays what it is


def test_columns_are_those_of_the_field():
    assert quantile_columns("M", LEVELS) == ["M-lo-80", "M-median", "M-hi-80"]
    names = quantile_columns("M", (0.005, 0.025, 0.05, 0.95, 0.975, 0.3, 1 / 3))
    assert names == ["M-lo-99", "M-lo-95", "M-lo-90", "M-hi-90", "M-hi-95", "M-lo-40", "M-lo-33.3333"]
    forecasts = forecast_series(trained(), [wave(40, "a"), wave(50, "b")], 4, LEVELS)
    frame = forecast_frame("SegMoE", forecasts, LEVELS)
    assert list(frame) == ["unique_id", "ds", "SegMoE", "SegMoE-lo-80", "SegMoE-median", "SegMoE-hi-80"]
    assert frame["unique_id"].tolist() == ["a"] * 4 + ["b"] * 4
    np.testing.assert_array_equal(frame["SegMoE-hi-80"], np.concatenate([one.quantiles[2] for one in forecasts]))
    assert list(forecast_frame("SegMoE", forecast_series(trained(), [wave(40)], 4), ())) == list(frame)[:3]


@pytest.mark.parametrize("name", ["segmoe", "ldl_moe", "dlinear"])
def test_forecasts_are_in_the_units_of_each_series(name):
    model = trained(name)
    one = wave(60)
    other = dataclasses.replace(one, id="other", y=-1e4 + 1e3 * one.y)
    here, there = forecast_series(model, [one, other], 9, LEVELS)
    np.testing.assert_allclose(there.mean, -1e4 + 1e3 * here.mean, rtol=1e-4)
    np.testing.assert_allclose(there.quantiles, -1e4 + 1e3 * here.quantiles, rtol=1e-4)
    assert here.mean.shape == (9,)
    assert here.quantiles.shape == (3, 9)
    assert 20 < here.mean.mean() < 80


def test_a_model_of_raw_units_gets_raw_units():
    model = trained("dlinear", scale="none")
    (one,) = forecast_series(model, [wave(60)], H)
    past = torch.tensor(wave(60).y[-L:][None]).float()
    with torch.no_grad():
        expected = model.model(past)[0]
    np.testing.assert_allclose(one.mean, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["segmoe", "moirai_moe", "ldl_moe", "timemoe", "dlinear"])
def test_series_of_all_lengths(name):
    """From one point to more than the context, each as if it were alone."""
    model = trained(name)
    series = [wave(n, f"s{n}", freq) for n, freq in [(1, "h"), (2, "D"), (5, "h"), (24, "MS"), (25, "h"), (300, 1)]]
    forecasts = forecast_series(model, series, H, LEVELS)
    assert [one.series.id for one in forecasts] == [one.id for one in series]
    for one in forecasts:
        assert np.isfinite(one.mean).all()
        assert np.isfinite(one.quantiles).all()
        assert (np.diff(one.quantiles, axis=0) >= 0).all()
    if name != "moirai_moe":  # whose samples depend on their turn
        alone = [forecast_series(model, [one], H)[0].mean for one in series]
        np.testing.assert_allclose([one.mean for one in forecasts], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["segmoe", "moirai_moe", "ldl_moe", "timemoe", "dlinear"])
@pytest.mark.parametrize("value", [7.0, 0.0, -3e8])
def test_a_constant_series_goes_on_as_it_is(name, value):
    y = np.full(40, value)
    y[[3, -2]] = np.nan
    forecasts = forecast_series(trained(name), [series_of(y), series_of([value])], 8, LEVELS)
    for one in forecasts:
        assert one.mean.tolist() == [value] * 8
        assert one.quantiles.tolist() == [[value] * 8] * 3


@pytest.mark.parametrize("name", ["segmoe", "ldl_moe", "dlinear"])
@pytest.mark.parametrize("length", [10, 60])
def test_missing_values_at_the_end_are_a_longer_horizon(name, length):
    """The same as the forecast from the last observed point, whose first points are left out."""
    model = trained(name)
    whole = wave(length)
    gap = dataclasses.replace(whole, y=np.r_[whole.y, [np.nan] * 3], hist=np.empty((length + 3, 0)))
    found, _ = forecast_series(model, [gap, wave(30, "another")], H, LEVELS)
    (longer,) = forecast_series(model, [whole], H + 3, LEVELS)
    np.testing.assert_allclose(found.mean, longer.mean[3:], rtol=1e-5)
    np.testing.assert_allclose(found.quantiles, longer.quantiles[:, 3:], rtol=1e-5)
    assert found.times.tolist() == longer.times[3:].tolist()


def test_only_what_came_before_the_origin_is_looked_at():
    model, whole = trained(), wave(60)
    changed = dataclasses.replace(whole, y=np.r_[whole.y[:40], whole.y[40:] + 1000])
    (here,) = forecast_series(model, [whole], H, LEVELS, origins=[40])
    (there,) = forecast_series(model, [changed], H, LEVELS, origins=[40])
    (cut,) = forecast_series(model, [whole.until(40)], H, LEVELS)
    assert here.mean.tolist() == there.mean.tolist() == cut.mean.tolist()
    assert here.quantiles.tolist() == cut.quantiles.tolist()
    assert here.times.tolist() == cut.times.tolist()
    assert here.series is whole


def covariates(length: int, ahead: int) -> Series:
    rng = np.random.default_rng(0)
    futr, hist = rng.standard_normal((length + ahead, 1)), rng.standard_normal((length, 1))
    return dataclasses.replace(wave(length), futr=futr, hist=hist)


def test_known_covariates_of_the_future_change_the_forecast():
    model = trained("moirai_moe", futr=("price",), hist=("load",))
    one = covariates(40, 8)
    other = dataclasses.replace(one, futr=np.r_[one.futr[:40], one.futr[40:] + 3])
    beyond = dataclasses.replace(one, futr=np.r_[one.futr, [[9.0]]])
    here, there, same = (forecast_series(model, [s], 8)[0].mean for s in (one, other, beyond))
    assert not np.allclose(here, there)
    np.testing.assert_array_equal(here, same)  # what lies beyond the horizon is not looked at


def test_a_model_that_looks_at_no_covariates_asks_for_none():
    model = trained("segmoe", futr=("price",), hist=("load",))
    (one,) = forecast_series(model, [covariates(40, 0)], 8)
    assert np.isfinite(one.mean).all()


@pytest.mark.parametrize(
    ("series", "line"),
    [
        (covariates(40, 5), r"series s: price known for 5 of 6 points after its end; give them with --future"),
        (wave(40), r"series s: 0 columns of futr covariates; the model needs \['price'\]"),
        (series_of([np.nan] * 5), r"series s: has no value to forecast from; leave it out"),
    ],
)
def test_what_is_missing_is_one_line(series, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        forecast_series(trained("moirai_moe", futr=("price",), hist=("load",)), [series], H)


def test_quantiles_need_intervals():
    points = dataclasses.replace(trained(), intervals=None)
    with pytest.raises(
        UserError, match=r"^quantiles=0.1,0.5,0.9: SegMoE gives points, and no intervals were calibrated"
    ):
        forecast_series(points, [wave(40)], H, LEVELS)
    assert forecast_series(points, [wave(40)], H)[0].quantiles is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_change_nothing(batch_size):
    series = [wave(30 + i, f"s{i}", freq) for i, freq in enumerate(["h", "MS", "h", "D", "h"])]
    whole = forecast_series(trained(), series, H, LEVELS)
    parts = forecast_series(trained(), series, H, LEVELS, batch_size=batch_size)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)


def test_samples_repeat():
    model = trained("moirai_moe")
    first, second = (forecast_series(model, [wave(40)], H, LEVELS)[0] for _ in range(2))
    assert first.mean.tolist() == second.mean.tolist()


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
@pytest.mark.parametrize("mixed", [False, True])
def test_tables_are_written_and_read_back(tmp_path, ending, mixed):
    series = [wave(40, "a"), wave(50, "b", 2 if mixed else "D")]
    frame = forecast_frame("SegMoE", forecast_series(trained(), series, 4, LEVELS), LEVELS)
    path = write_frame(frame, tmp_path / "deep" / f"f.{ending}")
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "json": pd.read_json}[ending](path)
    assert list(read) == list(frame)
    np.testing.assert_allclose(read["SegMoE-lo-80"], frame["SegMoE-lo-80"], rtol=1e-6)
    assert read["unique_id"].tolist() == frame["unique_id"].tolist()
    if not mixed:
        assert pd.to_datetime(read["ds"]).tolist() == frame["ds"].tolist()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
