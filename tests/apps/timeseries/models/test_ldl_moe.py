"""LDL-MoE: components, gradients, missing values, units, roll-out, and what short training reaches."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

import moecore
from apps.timeseries.metrics import ErrorSums
from apps.timeseries.model_settings import LDLMoEConfig
from apps.timeseries.models.base import Windows
from apps.timeseries.models.baselines import SeasonalNaive
from apps.timeseries.models.ldl_moe import LDLMoE, extended
from apps.timeseries.models.ldl_patterns import one_step, season_basis

NAN = float("nan")
SMALL = LDLMoEConfig(d_model=16, d_ff=16, num_experts=3, num_bins=12, num_samples=8, dropout=0.0)
VARIANTS = {
    f"{heads}{'-pattern' if pattern else ''}": dataclasses.replace(SMALL, heads=heads, pattern=pattern)
    for heads in ("continuous", "bins")
    for pattern in (False, True)
}
LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture(params=VARIANTS)
def config(request) -> LDLMoEConfig:
    return VARIANTS[request.param]


def shaken(config: LDLMoEConfig, context: int = 24, horizon: int = 8) -> LDLMoE:
    """A model whose maps that start at zero do not."""
    model = LDLMoE(config, context, horizon).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def drawn(count: int = 6, context: int = 24, horizon: int = 8) -> Windows:
    return Windows(5 + 3 * torch.randn(count, context), 5 + 3 * torch.randn(count, horizon), season=6)


@pytest.mark.parametrize("horizon", [3, 8, 20])
def test_components_sum_to_the_mean_and_quantiles_rise(config, horizon):
    forecast = shaken(config).forecast(drawn(), horizon, LEVELS)
    assert forecast.mean.shape == (6, horizon)
    assert forecast.quantiles.shape == (6, 3, horizon)
    assert (forecast.quantiles.diff(dim=1) >= 0).all()
    if not config.pattern:
        assert forecast.components == {}
        return
    assert list(forecast.components) == ["trend", "seasonality", "changepoint", "volatility"]
    torch.testing.assert_close(sum(forecast.components.values()), forecast.mean, atol=1e-5, rtol=1e-5)
    for component in forecast.components.values():
        assert component.std(1).min() > 0


def test_forecast_of_another_unit_is_the_same_in_that_unit(config):
    model, windows = shaken(config), drawn()
    one = model.forecast(windows, 12, LEVELS)
    other = model.forecast(Windows(100 * windows.past - 7, season=6), 12, LEVELS)
    torch.testing.assert_close(other.mean, 100 * one.mean - 7, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(other.quantiles, 100 * one.quantiles - 7, rtol=1e-3, atol=1e-2)


def test_every_expert_and_gate_learns(config):
    model = LDLMoE(config, 24, 8)
    model.loss(drawn(64)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".mlp.down" in name:  # a row per expert
            assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name
        elif not name.startswith("encoder"):
            assert parameter.grad.abs().sum() > 0, name


def test_one_expert_per_window_is_its_own_distribution_and_the_gate_learns(config):
    model = shaken(dataclasses.replace(config, top_k=1))
    model.experts.router.score.weight.data.normal_()
    windows = Windows(torch.randn(32, 24), torch.randn(32, 8), season=6)
    model.loss(windows).backward()
    assert model.experts.router.score.weight.grad.abs().sum() > 0
    noise, expert = model.predict(windows.past, 6).noise, chosen_expert(model, windows)
    assert len(expert.unique()) > 1
    if config.heads == "bins":
        torch.testing.assert_close(noise.sum(-1), torch.ones(32, 8))
    alone = LDLMoE(dataclasses.replace(config, num_experts=1, top_k=1), 24, 8).eval()
    alone.encoder.load_state_dict(model.encoder.state_dict())
    number = int(expert[0])
    for name in ("up", "up_bias", "down", "down_bias"):
        stacked = getattr(model.experts.experts.mlp, name).data
        getattr(alone.experts.experts.mlp, name).data.copy_(stacked[number : number + 1])
    torch.testing.assert_close(alone.predict(windows.past, 6).noise[expert == number], noise[expert == number])


def chosen_expert(model: LDLMoE, windows: Windows) -> torch.Tensor:
    """Number of the expert that each window's distribution comes from, of contexts as they are."""
    with moecore.record(model) as recording:
        model.predict(windows.past, 6)
    return recording.by_layer()["experts"][0].assignment.expert[:, 0]


def test_record_shows_gates_and_sparsity(config):
    model, windows = LDLMoE(config, 24, 8), drawn(10)
    with moecore.record(model) as recording:
        model.loss(windows)
    layers = {"experts"}
    if config.pattern:
        layers |= {f"patterns.{name}.experts" for name in ("trend", "seasonality", "changepoint")}
    assert recording.by_layer().keys() == layers
    for routing in recording:
        weights = routing.assignment.dense(routing.weights)
        assert ((weights > 0).sum(1) == 2).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(10))
        assert routing.aux_loss == {"switch": config.aux_loss}


def test_missing_values_are_seen_as_such_and_count_for_nothing(config):
    model, windows = shaken(config), drawn()
    past = windows.past.clone()
    past[:, 3:9] = NAN
    holes = model.forecast(Windows(past, season=6), 8, LEVELS)
    assert holes.quantiles.isfinite().all()
    seen = torch.isfinite(past)
    mean = torch.where(seen, past, 0).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    deviation = (torch.where(seen, past - mean, 0).square().sum(1) / seen.sum(1)).sqrt()[:, None]
    normal = (past - mean) / deviation
    by_zero = model.predict(torch.where(seen, normal, 0), 6).location
    assert (model.predict(normal, 6).location - by_zero).abs().max() > 1e-3  # the indicator's doing

    short = model.forecast(Windows(past[:, 9:], season=6), 8).mean
    padded = torch.cat([torch.full((6, 9), NAN), past[:, 9:]], 1)
    torch.testing.assert_close(short, model.forecast(Windows(padded, season=6), 8).mean)
    longer = torch.cat([torch.randn(6, 5), past], 1)
    torch.testing.assert_close(model.forecast(Windows(longer, season=6), 8).mean, holes.mean)


def test_missing_futures_do_not_count(config):
    model, windows = shaken(config), drawn()
    config.mmd, whole = 0.0, config.mmd
    try:
        future = windows.future.clone()
        future[0], future[1, 2:] = NAN, NAN
        known = torch.isfinite(future)
        scale = windows.past.std(1, unbiased=False, keepdim=True)
        error = ((model.forecast(windows, 8).mean - future) / scale)[known]
        expected = torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=2.0)
        torch.testing.assert_close(model.loss(Windows(windows.past, future, season=6)), expected)
    finally:
        config.mmd = whole
    nothing = model.loss(Windows(windows.past, torch.full_like(future, NAN), season=6))
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_short_futures_and_constant_contexts(config):
    model = shaken(config)
    flat = Windows(torch.full((2, 24), 1e6), torch.full((2, 3), 1e6), season=6)
    assert model.loss(flat).isfinite()
    assert model.forecast(flat, 20, LEVELS).quantiles.isfinite().all()


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_spread_goes_on_growing_as_it_grew_and_never_shrinks(power):
    steps = torch.arange(1, 97) ** power
    offsets = torch.stack([-steps, 0 * steps, 2 * steps])[None]
    far = extended(offsets, 720)
    assert (far[..., :96] == offsets).all()
    assert far[0, 2, -1] == pytest.approx(2 * 720**power, rel=0.01)
    shrinking = extended(offsets.flip(-1), 200)
    assert (shrinking[0, 2].diff()[96:] >= 0).all()
    assert extended(torch.tensor([[[-1.0], [1.0]]]), 16)[0, 1, -1] == pytest.approx(4.0)  # of one step: a random walk


def test_a_basis_made_by_validation_serves_training():
    with torch.inference_mode():
        shaken(VARIANTS["continuous-pattern"], 20, 7).forecast(drawn(2, 20), 7)
    LDLMoE(VARIANTS["continuous-pattern"], 20, 7).loss(drawn(2, 20, 7)).backward()


def test_bases_of_patterns():
    day = season_basis(48, 24)
    assert day.shape == (48, 48)
    torch.testing.assert_close(day[:24, :24], day[:24, 24:], atol=1e-5, rtol=0)
    assert (season_basis(10, 1) == 0).all()
    assert (season_basis(10, 4).abs().sum(1) > 1e-6).sum() == 6  # cos and sin of 4 points, cos of 2; each growing too
    heights = one_step(torch.tensor([3.0, 0.0, 50.0, 0.0]))
    torch.testing.assert_close(heights, torch.tensor([0.0, 3.0, 0.0]))


def synthetic(count: int, context: int, horizon: int) -> Windows:
    """Daily waves of any phase and size with noise of deviation 0.4 of the wave, on any level."""
    time = torch.arange(context + horizon)
    phase, size = 2 * math.pi * torch.rand(count, 1), torch.empty(count, 1).uniform_(0.5, 5)
    clean = torch.sin(2 * math.pi * time / 12 + phase)
    series = 10 * torch.randn(count, 1) + size * (clean + 0.4 * torch.randn(count, context + horizon))
    return Windows(series[:, :context], series[:, context:], season=12)


def test_short_training_beats_seasonal_naive_and_covers(config):
    model = LDLMoE(dataclasses.replace(config, num_bins=24), 36, 12).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        with moecore.record(model) as recording:
            loss = model.loss(synthetic(96, 36, 12))
        loss = loss + moecore.balance_loss(recording)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test, figures = synthetic(500, 36, 12), []
    for forecaster in (model.eval(), SeasonalNaive()):
        forecast, sums = forecaster.forecast(test, 12, LEVELS), ErrorSums(12, 1, LEVELS)
        sums.update(test.future, forecast.mean, forecast.quantiles)
        figures.append(sums.overall())
    ours, naive = figures
    assert ours["mse"] < 0.75 * naive["mse"]  # noise of both is in naive's errors: the floor is half of it
    assert ours["crps"] < 0.9 * naive["crps"]
    assert ours["coverage_80"] == pytest.approx(0.8, abs=0.08)


def test_dense_is_one_expert_as_wide_as_the_chosen(config):
    model = LDLMoE(config, 24, 8, dense=True)
    assert model.experts.experts.mlp.up.shape == (1, config.top_k * config.d_ff, config.d_model)
    assert model.loss(drawn()).isfinite()


def test_copies_and_half_precision(config):
    model, windows = shaken(config), drawn()
    before = model.forecast(windows, 8, LEVELS)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(copied.forecast(windows, 8, LEVELS).quantiles, before.quantiles)
    with torch.autocast("cpu", torch.bfloat16):
        loss, half = copied.loss(windows), copied.forecast(windows, 8, LEVELS)
    loss.backward()
    torch.testing.assert_close(half.quantiles.float(), before.quantiles, atol=0.3, rtol=0.05)
    if config.pattern:
        torch.testing.assert_close(sum(half.components.values()), half.mean, atol=1e-4, rtol=1e-4)


def test_training_needs_a_future(config):
    with pytest.raises(ValueError, match="future=None"):
        LDLMoE(config, 24, 8).loss(Windows(torch.randn(2, 24)))
