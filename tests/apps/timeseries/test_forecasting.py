"""Forecasts of windows as they come: trailing gaps are longer horizons, and points get calibrated intervals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from apps.timeseries.forecasting import LEVELS, Intervals, calibrate, forecast_windows
from apps.timeseries.model_settings import DLinearConfig, LDLMoEConfig, MoiraiMoEConfig, SegMoEConfig
from apps.timeseries.models.base import Forecast, ForecastModel, Windows
from apps.timeseries.models.baselines import SeasonalNaive
from apps.timeseries.models.dlinear import DLinear
from apps.timeseries.models.ldl_moe import LDLMoE
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.segmoe import SegMoE

L, H = 24, 6
MODELS = {
    "segmoe": lambda: SegMoE(SegMoEConfig(4, 8, 8, 1, 2, 1, seasonal=False), L, H),
    "dlinear": lambda: DLinear(DLinearConfig(5), L, H),
    "ldl_moe": lambda: LDLMoE(LDLMoEConfig(d_model=8, d_ff=8, pattern=True), L, H),
    "seasonal_naive": SeasonalNaive,
}


def randomised(name: str) -> ForecastModel:
    """Weights away from zero, so that every part of the input matters."""
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class Echo(ForecastModel):
    """The last value plus the covariates of each step ahead and the last one of the past: all can be checked by eye."""

    def loss(self, windows):
        return windows.past.sum() * 0

    def forecast(self, windows, horizon, quantiles=()):
        assert bool(torch.isfinite(windows.past[:, -1]).all())
        ahead = windows.futr[:, windows.past.shape[1] :][:, :horizon, 0]
        assert ahead.shape[1] == horizon
        mean = windows.past[:, -1:] + ahead + 1000 * windows.hist[:, -1, :1]
        return Forecast(mean, None, {"ahead": ahead, "rest": mean - ahead})


def gapped(gaps: list[int], length: int = L) -> Windows:
    """Windows whose last points are missing."""
    past = torch.randn(len(gaps), length)
    for row, gap in enumerate(gaps):
        past[row, length - gap :] = torch.nan
    return Windows(past, season=4)


@pytest.mark.parametrize("name", MODELS)
def test_a_gap_at_the_end_is_a_longer_horizon(name):
    model, gaps = randomised(name), [0, 3, 1, 3]
    windows = gapped(gaps)
    found = forecast_windows(model, windows, H, (0.2, 0.5))
    for row, gap in enumerate(gaps):
        cut = torch.cat([torch.full((1, gap), torch.nan), windows.past[row : row + 1, : L - gap]], 1)
        whole = model.forecast(Windows(cut, season=4), gap + H, (0.2, 0.5))
        torch.testing.assert_close(found.mean[row], whole.mean[0, gap:])
        assert found.mean.shape == (4, H)
        if whole.quantiles is not None:
            torch.testing.assert_close(found.quantiles[row], whole.quantiles[0, :, gap:])
        for part, values in whole.components.items():
            torch.testing.assert_close(found.components[part][row], values[0, gap:])


def test_covariates_move_with_the_contexts():
    windows = gapped([0, 2, 5])
    time = torch.arange(L + H, dtype=torch.float32)
    windows = dataclasses.replace(
        windows, futr=(10 * time).expand(3, -1)[..., None], hist=time[:L].expand(3, -1)[..., None], stat=torch.eye(3)
    )
    found = forecast_windows(Echo(), windows, H)
    for row, gap in enumerate([0, 2, 5]):
        last = L - 1 - gap
        expected = windows.past[row, last] + 10 * time[L:] + 1000 * last
        torch.testing.assert_close(found.mean[row], expected)
        assert found.components["ahead"][row].tolist() == (10 * time[L:]).tolist()


def test_covariates_of_real_models_move_too():
    sizes = {"patch_size": 4, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "num_experts": 2}
    model = MoiraiMoE(MoiraiMoEConfig(**sizes, num_samples=20)).eval()
    windows = dataclasses.replace(gapped([4]), futr=torch.randn(1, L + H, 1), hist=torch.randn(1, L, 1))
    torch.manual_seed(0)
    found = forecast_windows(model, windows, H, (0.5,))
    futr = torch.cat([torch.full((1, 4, 1), torch.nan), windows.futr], 1)
    hist = torch.cat([torch.full((1, 4, 1), torch.nan), windows.hist[:, :-4]], 1)
    past = torch.cat([torch.full((1, 4), torch.nan), windows.past[:, :-4]], 1)
    torch.manual_seed(0)
    whole = model.forecast(Windows(past, None, futr, hist), H + 4, (0.5,))
    torch.testing.assert_close(found.quantiles, whole.quantiles[..., 4:])


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_the_gaps_of_others(name):
    model = randomised(name)
    windows = gapped([0, 7, 2])
    together = forecast_windows(model, windows, H).mean
    alone = torch.cat([forecast_windows(model, windows[row : row + 1], H).mean for row in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", ["ldl_moe", "seasonal_naive"])
def test_quantiles_rise_with_the_level_in_whatever_order_they_are_asked_for(name):
    model, windows = randomised(name), gapped([0, 2])
    levels = (0.9, 0.1, 0.5, 0.25)
    found = forecast_windows(model, windows, H, levels).quantiles
    rising = forecast_windows(model, windows, H, tuple(sorted(levels))).quantiles
    assert bool((rising.diff(dim=1) >= 0).all())
    torch.testing.assert_close(found, rising[:, [3, 0, 2, 1]])


class Crossed(ForecastModel):
    """Quantiles that cross, as those of models may."""

    probabilistic = True

    def loss(self, windows):
        return windows.past.sum() * 0

    def forecast(self, windows, horizon, quantiles=()):
        mean = windows.past[:, -1:].expand(-1, horizon)
        return Forecast(mean, torch.stack([mean - level for level in quantiles], 1))


def test_crossing_quantiles_are_put_in_order():
    found = forecast_windows(Crossed(), Windows(torch.zeros(1, 4)), 2, (0.5, 0.1, 0.9)).quantiles
    assert found[0, :, 0].tolist() == pytest.approx([-0.5, -0.9, -0.1])


class Level(ForecastModel):
    """The mean of the context."""

    def loss(self, windows):
        return windows.past.sum() * 0

    def forecast(self, windows, horizon, quantiles=()):
        return Forecast(windows.past.nanmean(1, keepdim=True).expand(-1, horizon))


def noise(count: int, seed: int, scale: float = 1.0, skewed: bool = False) -> Windows:
    rng = np.random.default_rng(seed)
    x = rng.exponential(1, (count, L + H)) if skewed else rng.standard_normal((count, L + H))
    x = torch.tensor(scale * x, dtype=torch.float32)
    return Windows(x[:, :L], x[:, L:])


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_hold_as_much_as_they_promise(skewed):
    """Calibrated on noise of one size, tested on noise a hundred times as large: errors are in deviations."""
    intervals = calibrate(Level(), [noise(1000, 0, skewed=skewed), noise(1000, 1, skewed=skewed)], H)
    assert intervals.errors.shape == (99, H)
    test = noise(2000, 2, scale=100, skewed=skewed)
    found = forecast_windows(Level(), test, H, (0.1, 0.9, 0.5), intervals)
    low, high, median = found.quantiles.unbind(1)
    inside = ((low <= test.future) & (test.future <= high)).float().mean()
    assert inside == pytest.approx(0.8, abs=0.02)
    assert (test.future <= median).float().mean() == pytest.approx(0.5, abs=0.025)  # skew is in the errors
    assert bool((low < median).all())
    assert bool((median < high).all())


def test_levels_are_those_of_the_errors_and_between_them_interpolated():
    errors = torch.linspace(-49, 49, 99)[:, None] * torch.tensor([1.0, 2.0])
    intervals = Intervals(errors)
    assert intervals.at((0.5, 0.51, 0.515, 0.001, 0.999))[:, 0].tolist() == pytest.approx([0, 1, 1.5, -49, 49])
    assert intervals.at(()).shape == (0, 2)
    past = torch.tensor([[0.0, 2.0, 0.0, 2.0], [5.0, 5.0, 5.0, 5.0]])  # deviations 1, and 1 where nothing changes
    found = intervals.quantiles(torch.tensor([[10.0, 20.0], [0.0, 0.0]]), past, (0.6,))
    assert found[:, 0].tolist() == [pytest.approx([20, 40]), pytest.approx([10, 20])]


def test_beyond_the_calibrated_horizon_intervals_grow_with_the_square_root():
    intervals = Intervals(torch.linspace(-1, 1, 99)[:, None].expand(-1, 4))
    found = intervals.quantiles(torch.zeros(1, 16), torch.tensor([[-1.0, 1.0]]), (0.1, 0.9))
    width = found[0, 1] - found[0, 0]
    expected = [1.0] * 4 + [(step / 4) ** 0.5 for step in range(5, 17)]
    torch.testing.assert_close(width / width[0], torch.tensor(expected))
    shorter = intervals.quantiles(torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), (0.1, 0.9))
    torch.testing.assert_close(shorter, found[..., :2])


def test_calibration_passes_over_what_was_not_observed():
    windows = noise(400, 0)
    windows.future[:, 0] = torch.nan  # a step without any truth
    windows.future[::2] = torch.nan
    windows.past[0, -3:] = torch.nan
    intervals = calibrate(Level(), [windows], H)
    assert bool(torch.isfinite(intervals.errors).all())
    assert bool((intervals.errors.diff(dim=0) >= 0).all())
    half = calibrate(Level(), [windows[1::2]], H)
    torch.testing.assert_close(intervals.errors[:, 1:], half.errors[:, 1:])
    windows.future[:] = torch.nan
    assert calibrate(Level(), [windows], H) is None
    assert calibrate(Level(), [], H) is None


def test_few_windows_share_the_errors_of_neighbouring_steps():
    """Three windows have no tails of their own: every step takes the errors of all within reach, here of all."""
    windows = noise(3, 0)
    errors = (windows.future - windows.past.mean(1, keepdim=True)) / windows.past.std(1, correction=0, keepdim=True)
    found = calibrate(Level(), [windows], H).errors
    expected = torch.from_numpy(np.quantile(errors.double().numpy(), LEVELS)).float()
    torch.testing.assert_close(found, expected[:, None].expand(-1, H))


def test_intervals_come_back_from_a_checkpoint():
    intervals = calibrate(Level(), [noise(60, 0)], H)
    again = Intervals.from_plain(intervals.plain())
    assert torch.equal(again.errors, intervals.errors)
    assert Intervals.from_plain(None) is None
    assert (len(LEVELS), LEVELS[0], LEVELS[-1]) == (99, 0.01, 0.99)


def test_points_alone_where_there_is_nothing_to_widen_them_by():
    assert forecast_windows(Level(), noise(2, 0), H, (0.1,)).quantiles is None
    assert forecast_windows(SeasonalNaive(), noise(2, 0), H).quantiles is None
