"""Seasonal naive and DLinear."""

from __future__ import annotations

import pytest
import torch

from apps.errors import UserError
from apps.timeseries.model_settings import DLinearConfig
from apps.timeseries.models.base import Windows
from apps.timeseries.models.baselines import SeasonalNaive
from apps.timeseries.models.dlinear import DLinear, interpolated, moving_average

NAN = float("nan")


def naive(past: list[float], season: int, horizon: int, levels=()) -> tuple[list[float], torch.Tensor | None]:
    forecast = SeasonalNaive().forecast(Windows(torch.tensor([past]), season=season), horizon, levels)
    return forecast.mean[0].tolist(), None if forecast.quantiles is None else forecast.quantiles[0]


def test_the_last_season_again():
    assert naive([9, 9, 1, 2, 3.0], 3, 7)[0] == [1, 2, 3, 1, 2, 3, 1]
    assert naive([5.0, 6.0], 1, 3)[0] == [6, 6, 6]


def test_missing_values_take_the_season_before_and_then_the_last_value():
    assert naive([7, 8, NAN, 1, NAN, 3.0], 3, 4)[0] == [1, 8, 3, 1]
    assert naive([4.0, 5.0], 4, 4)[0] == [5, 5, 4, 5]  # shorter than a season


def test_quantiles_of_one_season_are_those_of_the_differences():
    past = torch.arange(240).repeat(1, 1) % 24 + torch.randn(1, 240)
    levels = torch.tensor([0.1, 0.5, 0.9])
    mean, quantiles = naive(past[0].tolist(), 24, 24, levels.tolist())
    differences = past[:, 24:] - past[:, :-24]
    expected = (differences - differences.mean()).quantile(levels, 1)
    assert quantiles - torch.tensor(mean) == pytest.approx(expected.expand(3, 24), abs=0.1)


def test_errors_grow_with_the_seasons_ahead_and_with_the_age_of_what_is_repeated():
    past = torch.randn(1, 400).cumsum(1)
    past[0, -1] = NAN
    mean, quantiles = naive(past[0].tolist(), 4, 64, (0.1, 0.9))
    width = quantiles[1] - quantiles[0]
    sixteen, one = width[60], width[0]
    assert sixteen / one == pytest.approx(4.0, rel=0.15)  # a sum of 16 independent differences
    assert width[3] == width[4]  # the point before was missing: its phase is a season older
    assert mean[3] == past[0, -5]


def test_coverage_on_a_seasonal_random_walk():
    season, count = 6, 400
    steps = torch.randn(count, 30, season)
    series = steps.cumsum(1).flatten(1)
    past, future = series[:, :-18], series[:, -18:]
    quantiles = SeasonalNaive().forecast(Windows(past, season=season), 18, (0.1, 0.9)).quantiles
    inside = (quantiles[:, 0] <= future) & (future <= quantiles[:, 1])
    for k in range(3):
        assert inside[:, k * season : (k + 1) * season].float().mean() == pytest.approx(0.8, abs=0.04)


def test_a_window_does_not_depend_on_its_batch_and_scales():
    past = torch.randn(5, 50)
    past[2, 10:20] = NAN
    many = SeasonalNaive().forecast(Windows(past, season=7), 20, (0.2, 0.7))
    one = SeasonalNaive().forecast(Windows(10 * past[2:3] + 3, season=7), 20, (0.2, 0.7))
    torch.testing.assert_close(one.mean, 10 * many.mean[2:3] + 3)
    torch.testing.assert_close(one.quantiles, 10 * many.quantiles[2:3] + 3)


def test_a_context_without_a_season_difference_has_its_own_spread():
    _, quantiles = naive([1.0, 2.0, 3.0], 5, 5, (0.1, 0.9))
    assert (quantiles[1] - quantiles[0]).tolist() == pytest.approx([2.0] * 5)
    assert SeasonalNaive().loss(Windows(torch.ones(1, 3))) == 0


def test_interpolation_is_linear_inside_and_flat_outside():
    x = torch.tensor([[NAN, 1.0, NAN, NAN, 4.0, NAN], [NAN] * 6, [1.0, 2, 3, 4, 5, 6]])
    assert interpolated(x).tolist() == [[1, 1, 2, 3, 4, 4], [0] * 6, [1, 2, 3, 4, 5, 6]]


def test_moving_average_repeats_the_edges():
    assert moving_average(torch.tensor([[0.0, 3.0, 6.0, 0.0]]), 3).tolist() == [[1, 3, 3, 2]]


def model(context: int = 12, horizon: int = 4, kernel: int = 5) -> DLinear:
    return DLinear(DLinearConfig(kernel), context, horizon)


def test_decomposition_into_rest_and_trend():
    net = model()
    past = torch.randn(3, 12)
    trend = moving_average(past, 5)
    expected = net.rest(past - trend) + net.trend(trend)
    torch.testing.assert_close(net.forecast(Windows(past), 4).mean, expected)
    assert (net.rest.weight == 1 / 12).all()


def test_short_long_and_ragged_contexts_and_longer_horizons():
    net = model()
    past = torch.randn(2, 20)
    torch.testing.assert_close(net.forecast(Windows(past), 4).mean, net.forecast(Windows(past[:, -12:]), 4).mean)
    repeated = torch.cat([past[:, 13:14].expand(-1, 5), past[:, 13:]], 1)
    torch.testing.assert_close(net.forecast(Windows(past[:, 13:]), 4).mean, net.forecast(Windows(repeated), 4).mean)
    long = net.forecast(Windows(past), 7).mean
    first = net.forecast(Windows(past), 4).mean
    torch.testing.assert_close(long[:, :4], first)
    torch.testing.assert_close(long[:, 4:], net.forecast(Windows(torch.cat([past, first], 1)), 3).mean)


def test_loss_counts_what_was_observed():
    net = model()
    past, future = torch.randn(3, 12), torch.randn(3, 4)
    error = net.forecast(Windows(past), 4).mean - future
    future[0], future[1, 2] = NAN, NAN
    kept = torch.isfinite(future)
    assert net.loss(Windows(past, future)).item() == pytest.approx(error[kept].square().mean().item())
    nothing = net.loss(Windows(past, torch.full_like(future, NAN)))
    nothing.backward()
    assert nothing == 0


def linear_process(count: int, noise: float) -> Windows:
    past = torch.randn(count, 12)
    weights = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    return Windows(past, past @ weights.T + 2 + noise * torch.randn(count, 4))


def test_closed_form_finds_the_map_and_the_bias():
    net = model()
    data = linear_process(400, 0.0)
    data.future[0, 1] = NAN  # left out
    chosen = net.fit([data[:150], data[150:]], [linear_process(50, 0.0)])
    assert chosen.strength == pytest.approx(1e-6)
    test = linear_process(50, 0.0)
    assert net.loss(test) < 1e-6
    zero = Windows(torch.zeros(1, 12))
    torch.testing.assert_close(net.forecast(zero, 4).mean, torch.full((1, 4), 2.0), atol=1e-3, rtol=0)


def test_closed_form_is_ridge_by_the_textbook_and_picks_by_validation():
    train, held = linear_process(30, 4.0), linear_process(300, 4.0)
    net = model()
    chosen = net.fit([train], [held[:100], held[100:]])
    assert chosen.strength > 1e-3
    assert chosen.validation_mse == pytest.approx(net.loss(held).item(), rel=1e-4)
    trend = moving_average(train.past, 5)
    features = torch.cat([train.past - trend, trend], 1).double()
    features = features - features.mean(0)
    target = (train.future - train.future.mean(0)).double()
    penalty = chosen.strength * features.square().sum() / 24  # sum over rows, mean over features
    maps = torch.linalg.solve(features.T @ features + penalty * torch.eye(24), features.T @ target)
    fitted = torch.cat([net.rest.weight, net.trend.weight], 1).T.double()
    torch.testing.assert_close(fitted, maps, atol=1e-5, rtol=1e-4)
    for strength in (chosen.strength / 10, chosen.strength * 10):
        assert model().fit([train], [held], (strength,)).validation_mse > chosen.validation_mse


def test_closed_form_needs_a_complete_future():
    data = linear_process(5, 1.0)
    empty = Windows(data.past, torch.full_like(data.future, NAN))
    with pytest.raises(UserError, match="validation windows=none"):
        model().fit([data], [empty])
