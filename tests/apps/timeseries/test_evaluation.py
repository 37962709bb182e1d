"""Measures of test windows against plain loops, beside baselines that are what they say."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from apps.errors import UserError
from apps.timeseries.data import SeriesData
from apps.timeseries.evaluation import LEVELS, calibrate_on_validation, evaluate, forecast_batch
from apps.timeseries.forecasting import forecast_windows
from apps.timeseries.metrics import seasonal_scale
from apps.timeseries.model_settings import DLinearConfig, LDLMoEConfig, SegMoEConfig
from apps.timeseries.models.base import Windows
from apps.timeseries.models.dlinear import DLinear
from apps.timeseries.models.ldl_moe import LDLMoE
from apps.timeseries.models.segmoe import SegMoE
from apps.timeseries.settings import DataConfig
from tests.apps.timeseries.conftest import hourly

L, H = 24, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SeriesData:
    """Three hourly series, one of them with gaps, and a monthly one."""
    frame = hourly()
    frame.loc[frame["unique_id"].eq("s1") & (frame.index % 7 == 3), "y"] = np.nan
    months = pd.DataFrame({"ds": pd.date_range("2000-01-01", periods=90, freq="MS")})
    months = months.assign(unique_id="months", y=np.sin(np.arange(90) / 2) + np.arange(90) / 20)
    file = tmp_path_factory.mktemp("data") / "mixed.csv"
    pd.concat([frame, months]).to_csv(file, index=False)
    return SeriesData(DataConfig(source=str(file), context=L, horizon=H, test_horizons=(4, H), eval_batch_size=5), 0)


@pytest.fixture(scope="module")
def model() -> SegMoE:
    torch.manual_seed(3)
    config = SegMoEConfig(4, 8, 8, 1, 2, 1, segments=(2,), num_experts=2)
    model = SegMoE(config, L, H, 24).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def measured(model, data):
    return evaluate("SegMoE", model, data, calibrate_on_validation(model, data), progress=False)


def loop(model, data: SeriesData, horizon: int, levels=(), intervals=None):
    """(series, truth, forecast, quantiles) of every test window, one by one."""
    store = data.store
    for number, (series, border) in enumerate(zip(store.series, store.borders, strict=True)):
        y = (series.y - store.mean[number]) / store.std[number]
        for origin in range(border.val, border.test - horizon + 1):
            past, truth = torch.tensor(y[origin - L : origin][None]).float(), y[origin : origin + horizon]
            if not np.isfinite(truth).any():
                continue
            windows = Windows(past, season=series.season)
            forecast = forecast_windows(model, windows, horizon, levels, intervals)
            quantiles = None if forecast.quantiles is None else forecast.quantiles[0].double().numpy()
            yield number, truth, forecast.mean[0].double().numpy(), quantiles


@pytest.mark.parametrize("horizon", [4, H])
def test_errors_are_those_of_a_plain_loop(model, data, measured, horizon):
    square, absolute, per_step, per_series = [], [], {}, {}
    for number, truth, mean, _ in loop(model, data, horizon):
        for step in range(horizon):
            if math.isfinite(truth[step]):
                error = mean[step] - truth[step]
                square.append(error**2)
                absolute.append(abs(error))
                per_step.setdefault(step, []).append(error**2)
                per_series.setdefault(number, []).append(abs(error))
    figures, details = measured.scalars(), measured.details()[f"h{horizon}/SegMoE"]
    assert figures[f"h{horizon}/mse"] == pytest.approx(sum(square) / len(square), rel=1e-5)
    assert figures[f"h{horizon}/mae"] == pytest.approx(sum(absolute) / len(absolute), rel=1e-5)
    assert details["per_step"]["mse"] == pytest.approx([np.mean(per_step[s]) for s in range(horizon)], rel=1e-5)
    ids = [series.id for series in data.store.series]
    expected = {ids[number]: np.mean(errors) for number, errors in per_series.items()}
    assert details["per_series"]["mae"] == pytest.approx(expected, rel=1e-5)


def test_uncertainty_is_that_of_a_plain_loop(model, data, measured):
    intervals = calibrate_on_validation(model, data)
    pinball, size, inside, count, mase = 0.0, 0.0, 0, 0, 0.0
    scales = [
        seasonal_scale(((s.y - m) / d)[: b.train], s.season)
        for s, m, d, b in zip(data.store.series, data.store.mean, data.store.std, data.store.borders, strict=True)
    ]
    for number, truth, mean, quantiles in loop(model, data, H, LEVELS, intervals):
        for step in np.flatnonzero(np.isfinite(truth)):
            for level, quantile in zip(LEVELS, quantiles[:, step], strict=True):
                difference = truth[step] - quantile
                pinball += 2 * max(level * difference, (level - 1) * difference) / len(LEVELS)
            size += abs(truth[step])
            inside += quantiles[0, step] <= truth[step] <= quantiles[-1, step]
            mase += abs(mean[step] - truth[step]) / scales[number]
            count += 1
    figures = measured.scalars()
    assert figures[f"h{H}/crps"] == pytest.approx(pinball / size, rel=1e-5)
    assert figures[f"h{H}/coverage_80"] == pytest.approx(inside / count)
    assert figures[f"h{H}/mase"] == pytest.approx(mase / count, rel=1e-5)


def test_baselines_are_what_they_say(data, measured):
    """Seasonal naive: the value one season before. DLinear: fitted on the training windows of this very horizon."""
    figures = measured.scalars()
    errors = []
    for number, (series, border) in enumerate(zip(data.store.series, data.store.borders, strict=True)):
        y = (series.y - data.store.mean[number]) / data.store.std[number]
        for origin in range(border.val, border.test - H + 1):
            if series.id != "s1":  # the one with gaps
                errors += [abs(y[origin + h] - y[origin + h - series.season]) for h in range(H)]
    own = measured.details()[f"h{H}/SeasonalNaive"]["per_series"]["mae"]
    count = len(errors) // 3
    assert np.mean([own[k] for k in ("s0", "s2", "months")]) == pytest.approx(sum(errors) / 3 / count, rel=1e-5)
    linear = DLinear(DLinearConfig(), L, H)
    train, val = data.train_set, data.windows("val", H)
    linear.fit([train.batch(np.arange(len(train)))], [val.batch(np.arange(len(val)))])
    errors = [
        abs(m - t) for _, truth, mean, _ in loop(linear.eval(), data, H) for m, t in zip(mean, truth, strict=True)
    ]
    assert figures[f"h{H}/DLinear/mae"] == pytest.approx(np.nanmean(errors), rel=1e-3)


def test_figures_are_named_by_horizon_and_averaged(data, measured):
    figures = measured.scalars()
    assert list(measured.horizons) == [4, H]
    for measure in ("mse", "mae"):
        assert figures[f"average/{measure}"] == pytest.approx((figures[f"h4/{measure}"] + figures[f"h6/{measure}"]) / 2)
    expected = sum(max(0, b.test - H - b.val + 1) for b in data.store.borders)
    assert figures["h6/windows"] == expected
    assert figures["windows_per_second"] > 0
    rows = measured.rows()
    assert [(row["horizon"], row["model"]) for row in rows] == [
        (h, name) for h in (4, H) for name in ("SegMoE", "SeasonalNaive", "DLinear")
    ]
    assert rows[0]["mse"] == figures["h4/mse"]
    by_series = measured.horizons[4].series_rows("mase")
    assert [row["series"] for row in by_series] == ["s0", "s1", "s2", "months"]
    json.dumps([figures, measured.details()])  # plain numbers


def test_batches_change_nothing(model, data, measured):
    config = dataclasses.replace(data.config, eval_batch_size=64)
    again = evaluate("SegMoE", model, SeriesData(config, 0), calibrate_on_validation(model, data), progress=False)
    for name, value in measured.scalars().items():
        assert name == "windows_per_second" or again.scalars()[name] == pytest.approx(value, rel=1e-4), name


def test_models_that_sample_repeat():
    """The same seed, the same figures; probabilistic ones are not calibrated."""
    config = DataConfig(context=24, horizon=4, eval_batch_size=64)
    data = SeriesData(config, 0)
    model = LDLMoE(LDLMoEConfig(d_model=8, d_ff=8), 24, 4)
    assert calibrate_on_validation(model, data) is None
    first, second = (evaluate("LDLMoE", model, data, progress=False).scalars() for _ in range(2))
    first.pop("windows_per_second")
    second.pop("windows_per_second")
    assert first == pytest.approx(second, rel=0, abs=0, nan_ok=True)
    assert first["h4/coverage_80"] > 0


def test_without_intervals_there_are_points_only(model, data):
    figures = evaluate("SegMoE", model, data, None, progress=False)
    assert "h6/crps" not in figures.scalars()
    assert math.isnan(figures.rows()[0]["crps"])
    assert figures.scalars()["h6/DLinear/crps"] > 0


def test_series_too_short_to_test_on_are_one_line(tmp_path):
    hourly(2, 20).to_csv(tmp_path / "short.csv", index=False)
    data = SeriesData(DataConfig(source=str(tmp_path / "short.csv"), context=8, horizon=6), 0)
    with pytest.raises(UserError, match=r"^data.horizon=6: no series is long enough to test on; lower it$"):
        evaluate("SegMoE", SegMoE(SegMoEConfig(4, 8, 8, 1, 2, 1), 8, 6), data, progress=False)


def test_dlinear_is_left_out_where_it_cannot_be_fitted(tmp_path):
    frame = hourly(1, 120)
    frame.loc[frame.index % 3 == 0, "y"] = np.nan  # no horizon is complete
    frame.to_csv(tmp_path / "gaps.csv", index=False)
    data = SeriesData(DataConfig(source=str(tmp_path / "gaps.csv"), context=8, horizon=6), 0)
    model = SegMoE(SegMoEConfig(4, 8, 8, 1, 2, 1, segments=(2,)), 8, 6)
    assert list(evaluate("SegMoE", model, data, progress=False).horizons[6].sums) == ["SegMoE", "SeasonalNaive"]


def test_a_forecast_of_a_batch_is_plain_float32(model):
    half = forecast_batch(model, Windows(torch.randn(2, L)), 3)
    assert half.mean.dtype == torch.float32
    assert half.mean.shape == (2, 3)
