"""Moirai-MoE: what may see what, how it is routed, sampled and trained."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

import moecore
from apps.errors import ConfigError
from apps.timeseries.models.base import Windows
from apps.timeseries.models.moirai_encoder import PathEncoder, rotate
from apps.timeseries.models.moirai_moe import MoiraiMoE, sample_quantiles
from apps.timeseries.models.moirai_tokens import make_grid
from tests.apps.timeseries.models.moirai_cases import NAN, TINY, P, forecast, hidden, model, windows


@pytest.mark.parametrize("ahead", [True, False])
def test_the_future_changes_nothing_before(ahead):
    made, given = model(known_ahead=ahead), windows(futr=1, hist=1)
    before, clock = hidden(made, given)
    future = given.future.clone()
    future[:, P:] += 1  # from patch 6 on: the horizon starts with patch 5
    after, _ = hidden(made, dataclasses.replace(given, future=future))
    torch.testing.assert_close(before[:, clock < 6], after[:, clock < 6], rtol=0, atol=1e-12)
    assert not torch.isclose(before[:, clock == 6], after[:, clock == 6]).all(-1).any()


@pytest.mark.parametrize(("ahead", "first"), [(True, 5), (False, 6)])
def test_known_covariates_are_seen_as_far_as_the_target_predicts(ahead, first):
    """Those of patch 6 already by the token that predicts it, or as published by the one after."""
    made, given = model(known_ahead=ahead), windows(futr=1)
    before, clock = hidden(made, given)
    futr = given.futr.clone()
    futr[:, 24:28] += 1
    after, _ = hidden(made, dataclasses.replace(given, futr=futr))
    changed = ~torch.isclose(before, after).all(-1).all(0)
    assert clock[changed].min() == first


def test_likelihood_of_a_patch_is_that_of_the_patches_before():
    """The loss, written out patch by patch through one forecast step at a time."""
    made, given = model(), windows(16, 8, futr=1, hist=2, batch=2)
    grid = make_grid(given, P)
    likelihoods = []
    for patch in range(1, grid.length):
        tokens = grid.tokens.select(grid.tokens.clock < patch)
        last = made.encoder(tokens)[:, patch - 1]  # of the target, which comes first
        likelihoods.append(made.head(last).log_prob(grid.target.values[:, patch]))
    torch.testing.assert_close(made.loss(given), -torch.stack(likelihoods).mean())


def test_paths_continue_as_the_whole_sequence_does():
    """Caches, paths that share a context, several variates per step, a gap in a known covariate."""
    made, paths = model(), 3
    given = windows(20, 12, futr=2, hist=1, batch=2)
    given.futr[0, 24:28, 1] = NAN  # a whole patch
    given.futr[1, 29, 0] = NAN  # a point
    futures = torch.randn(paths, 2, 12).double()
    grid = make_grid(dataclasses.replace(given, future=None), P, 12)
    with torch.no_grad():
        encoder = PathEncoder(made.encoder, grid.tokens.select(grid.tokens.clock < grid.context))
        steps = []
        for step in range(grid.context, grid.length):
            known = grid.tokens.select(grid.tokens.clock == step)
            values = known.values[:, None].repeat(1, paths, 1, 1)
            at = (step - grid.context) * P
            scaled = (futures[..., at : at + P] - grid.scale.mean) / grid.scale.std
            values[:, :, 0] = scaled.transpose(0, 1)
            seen = known.observed | (known.variate == 0)[:, None]
            steps.append(encoder.extend(values, dataclasses.replace(known, observed=seen))[:, :, 0])
    for path in range(paths):
        whole, clock = hidden(made, dataclasses.replace(given, future=futures[path]))
        target = make_grid(given, P).tokens.variate == 0
        for step, ours in zip(range(grid.context, grid.length), steps, strict=True):
            theirs = whole[:, target & (clock == step)][:, 0]
            torch.testing.assert_close(ours[:, path], theirs, rtol=0, atol=1e-12)


def test_patches_are_sampled_one_after_another():
    """The same draws, from mixtures of the whole sequence with each path's first patch in it."""
    made, given, count = model(), windows(20, 0, batch=2), 6
    torch.manual_seed(5)
    paths = made.sample(given, 2 * P, count)
    torch.manual_seed(5)
    grid = make_grid(given, P)
    with torch.no_grad():
        first = made.head(made.encoder(grid.tokens)[:, -1]).sample((count,)).transpose(0, 1)
        wholes = [dataclasses.replace(given, future=grid.scale.restore(first[:, path])) for path in range(count)]
        last = torch.stack([made.encoder(make_grid(whole, P).tokens)[:, -1] for whole in wholes], 1)
        second = made.head(last).sample()
    torch.testing.assert_close(paths, grid.scale.restore(torch.cat([first, second], -1)))


def test_a_horizon_within_a_patch_is_its_beginning():
    made, given = model(), windows(20, 0)
    assert torch.equal(forecast(made, given, 2 * P - 3), forecast(made, given, 2 * P)[..., : 2 * P - 3])


def test_the_bias_tells_variates_apart():
    made, given = model(), windows(futr=1)
    before, _ = hidden(made, given)
    alone, _ = hidden(made, dataclasses.replace(given, futr=None))
    for block in made.encoder.blocks:
        block.attention.variate_bias.data += torch.tensor([[3.0], [3.0]])  # the same for all: no change
    same, _ = hidden(made, given)
    for block in made.encoder.blocks:
        block.attention.variate_bias.data[0] = -1e9  # no other variate is looked at
    apart, _ = hidden(made, given)
    torch.testing.assert_close(before, same)
    assert not torch.allclose(before, apart)
    torch.testing.assert_close(apart[:, : alone.shape[1]], alone)


def test_the_order_of_covariates_does_not_matter():
    made, given = model(), windows(futr=3, hist=2)
    turned = dataclasses.replace(given, futr=given.futr[..., [2, 0, 1]], hist=given.hist[..., [1, 0]])
    torch.testing.assert_close(made.loss(given), made.loss(turned))
    torch.testing.assert_close(forecast(made, given), forecast(made, turned))


@pytest.mark.parametrize("prefer", ["nearest", "farthest"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_experts_by_distance(prefer, top_k):
    """One layer written out: the farthest as the published code has it, topk of distances and their softmax."""
    layer = model(prefer=prefer, top_k=top_k).moe_layers[0]
    x, bank, centroids = torch.randn(6, 16).double(), layer.experts, layer.router.score.centroids
    assert not list(layer.router.parameters())
    wanted = []
    for token in x:
        distance = (token - centroids).norm(dim=1)
        score = distance if prefer == "farthest" else -distance
        chosen = score.argsort(descending=True)[:top_k]
        weights = score[chosen].softmax(0)
        experts = [bank.down[e] @ (F.silu(bank.gate[e] @ token) * (bank.up[e] @ token)) for e in chosen]
        wanted.append(sum(w * y for w, y in zip(weights, experts, strict=True)))
    torch.testing.assert_close(layer(x), torch.stack(wanted))


def test_there_is_no_balance_loss():
    made = model()
    with moecore.record(made) as recording:
        made.loss(windows())
    assert len(recording) == 2
    assert float(moecore.balance_loss(recording)) == 0


def test_a_dense_model_costs_what_the_experts_do():
    dense, sparse = model(num_experts=1), model()
    assert dense.moe_layers == []
    assert dense.ffns[0].up_proj.out_features == sparse.config.top_k * sparse.moe_layers[0].experts.hidden
    assert dense.loss(windows()).isfinite()


def test_a_dense_twin_is_a_model_of_one_expert():
    twin = MoiraiMoE(TINY, dense=True)
    assert twin.config.num_experts == 1
    assert twin.state_dict().keys() == model(num_experts=1).state_dict().keys()


@pytest.mark.parametrize(("length", "starts"), [(12, [0, 4, 8]), (10, [0, 2, 6]), (3, [0, 0])])
def test_where_routed_tokens_begin(length, starts):
    made, given = model(), windows(length, 8, futr=1, hist=1)
    with moecore.record(made) as recording:
        assert made.trace(given).tolist() == starts * 3
    assert [routing.lead for routing in recording] == [(3, 3 * len(starts))] * 2


def test_rotation_is_relative_and_leaves_half_of_the_width():
    x, y, time = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.arange(9)
    assert torch.equal(rotate(x, time)[..., 8:], x[..., 8:])
    assert not torch.allclose(rotate(x, time)[:, 1:, :8], x[:, 1:, :8])
    inner = rotate(x, time) @ rotate(y, time).mT
    torch.testing.assert_close(inner, rotate(x, time + 50) @ rotate(y, time + 50).mT, rtol=0, atol=1e-4)


def test_samples_of_the_first_patch_follow_the_mixture():
    made, given = model(), windows(horizon=0, batch=2)
    paths = made.sample(given, P, num_samples=4000)
    grid = make_grid(given, P)
    with torch.no_grad():
        mixture = made.head(made.encoder(grid.target)[:, -1])
    wanted = grid.scale.restore(mixture.sample((4000,)).transpose(0, 1))
    levels = (0.1, 0.5, 0.9)
    ours, theirs = sample_quantiles(paths, levels), sample_quantiles(wanted, levels)
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.15)


def test_quantiles_interpolate():
    paths, levels = torch.randn(2, 11, 3), (0.05, 0.5, 0.33, 0.999)
    torch.testing.assert_close(sample_quantiles(paths, levels), paths.quantile(torch.tensor(levels), 1).transpose(0, 1))


def test_forecasts():
    made, given = model(num_samples=40), windows(18, 0)
    torch.manual_seed(3)
    first = made.forecast(given, 10, (0.9, 0.1, 0.5))
    torch.manual_seed(3)
    paths = made.sample(given, 10)
    assert first.quantiles.shape == (3, 3, 10)
    assert torch.equal(first.mean, first.quantiles[:, 2])
    assert torch.equal(first.quantiles, sample_quantiles(paths, (0.9, 0.1, 0.5)))
    assert (first.quantiles[:, 0] > first.quantiles[:, 1]).all()
    assert made.forecast(given, 1).quantiles is None
    assert not torch.equal(made.forecast(given, 10).mean, first.mean)  # the generator has moved on


def test_a_forecast_does_not_look_at_the_future():
    made, given = model(), windows(futr=1)
    other = dataclasses.replace(given, future=None)
    assert torch.equal(forecast(made, given, 12), forecast(made, other, 12))


def test_large_batches_go_in_parts(monkeypatch):
    monkeypatch.setattr("apps.timeseries.models.moirai_moe.MAX_PATHS", 10)
    made, given = model(), windows(futr=1, batch=5)
    calls = []
    made.head.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    assert forecast(made, given, P).shape == (5, 5, P)
    assert calls == [2, 2, 1]


@pytest.mark.parametrize("ahead", [True, False])
def test_gradients_reach_every_weight(ahead):
    made, given = model(known_ahead=ahead, top_k=4), windows(24, 16, futr=1, hist=1, batch=8)
    given.past[:, 3] = NAN
    made.loss(given).backward()
    unreached = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    made, given = copy.deepcopy(model(num_experts=1)).to(dtype), windows(futr=1)._map(lambda t: t.float())
    exact = model(num_experts=1)
    exact.load_state_dict(made.state_dict())
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert made.loss(given).item() == pytest.approx(exact.loss(given).item(), abs=tolerance)
    assert forecast(made, given).dtype == torch.float32
    assert forecast(made, given).isfinite().all()


def test_autocast_leaves_scale_and_likelihood_alone():
    made, given = MoiraiMoE(TINY).eval(), windows(futr=1)._map(lambda t: t.float() + 1000)
    plain = made.loss(given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = made.loss(given)
        tokens = make_grid(given, P).tokens
        assert made.encoder.embed(tokens.values, tokens.observed).dtype == torch.float32
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(plain.item(), abs=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k=5: between 1 and num_experts=4"),
        ({"num_heads": 8}, "num_heads=8: must leave an even width of at least 4 per head"),
        ({"max_context": 0}, "max_context=0"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **changes)


def test_it_learns_sine_waves():
    config = dataclasses.replace(TINY, patch_size=8, d_model=32, num_layers=1, num_samples=50)
    made = MoiraiMoE(config)
    optimizer = torch.optim.AdamW(made.parameters(), 5e-3)

    def batch(size: int) -> Windows:
        phase, period = torch.rand(size, 1) * 6.3, 12 + 12 * torch.rand(size, 1)
        x = 5 + 3 * torch.sin(phase + 6.2832 * torch.arange(80) / period) + 0.1 * torch.randn(size, 80)
        return Windows(x[:, :64], x[:, 64:])

    for _ in range(100):
        optimizer.zero_grad()
        made.loss(batch(32)).backward()
        optimizer.step()
    made.eval()
    test = batch(64)
    predicted = made.forecast(test, 16, (0.1, 0.9))
    naive = (test.past[:, -1:] - test.future).abs().mean()
    error = (predicted.mean - test.future).abs().mean()
    assert error < 0.4 * naive
    inside = (predicted.quantiles[:, 0] <= test.future) & (test.future <= predicted.quantiles[:, 1])
    assert 0.6 < inside.float().mean() < 0.97
