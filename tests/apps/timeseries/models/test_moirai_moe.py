"""Moirai-MoE: what may see what, what is missing, how it is routed, sampled and trained."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moecore
from apps.errors import ConfigError
from apps.timeseries.model_settings import MoiraiMoEConfig
from apps.timeseries.models.base import Windows
from apps.timeseries.models.moirai_encoder import PathEncoder, rotate
from apps.timeseries.models.moirai_moe import MoiraiMoE, sample_quantiles
from apps.timeseries.models.moirai_tokens import make_grid

P = 4
TINY = MoiraiMoEConfig(
    patch_size=P, d_model=16, d_ff=16, num_layers=2, num_heads=2, num_experts=4, num_samples=5, dropout=0.0
)
NAN = math.nan


def model(**changes) -> MoiraiMoE:
    """In double precision, with biases that tell variates apart."""
    made = MoiraiMoE(dataclasses.replace(TINY, **changes)).double().eval()
    for block in made.encoder.blocks:
        torch.nn.init.normal_(block.attention.variate_bias)
    return made


def windows(length: int = 20, horizon: int = 12, futr: int = 0, hist: int = 0, batch: int = 3) -> Windows:
    n = length + horizon
    return Windows(
        past=torch.randn(batch, length).double(),
        future=torch.randn(batch, horizon).double() if horizon else None,
        futr=torch.randn(batch, n, futr).double() if futr else None,
        hist=torch.randn(batch, length, hist).double() if hist else None,
    )


def forecast(made: MoiraiMoE, given: Windows, horizon: int = 10) -> Tensor:
    torch.manual_seed(7)
    return made.sample(given, horizon)


def hidden(made: MoiraiMoE, given: Windows) -> tuple[Tensor, Tensor]:
    """Hidden states of all tokens, and when each is known."""
    tokens = make_grid(given, P, ahead=made.config.known_ahead).tokens
    with torch.no_grad():
        return made.encoder(tokens), tokens.clock


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


def test_a_missing_patch_is_as_good_as_none():
    """Missing at the start, or as padding: what is left gives the same forecast."""
    made, given = model(), windows(futr=1, hist=1)
    short = Windows(given.past[:, 7:], given.future, given.futr[:, 7:], given.hist[:, 7:])
    gaps = {name: getattr(given, name).clone() for name in ("past", "futr", "hist")}
    for values in gaps.values():
        values[:, :7] = NAN
    gapped = dataclasses.replace(given, **gaps)
    torch.testing.assert_close(made.loss(gapped), made.loss(short))
    torch.testing.assert_close(forecast(made, gapped), forecast(made, short))


def test_a_covariate_that_is_missing_throughout_is_none():
    made, given = model(), windows(futr=2, hist=1)
    with_gap = torch.cat([given.futr, torch.full_like(given.futr[..., :1], NAN)], -1)
    torch.testing.assert_close(made.loss(given), made.loss(dataclasses.replace(given, futr=with_gap)))


def test_a_missing_point_is_not_a_point_at_the_mean():
    made, given = model(), windows(batch=1)
    missing = given.past.clone()
    missing[:, 9] = NAN
    at_mean = missing.clone()
    at_mean[:, 9] = missing.nanmean()
    grids = [make_grid(dataclasses.replace(given, past=past), P) for past in (missing, at_mean)]
    assert torch.equal(
        grids[0].tokens.values[:, 2], torch.where(grids[0].tokens.observed[:, 2], grids[0].tokens.values[:, 2], 0)
    )
    embedded = [made.encoder.embed(grid.tokens.values[:, 2], grid.tokens.observed[:, 2]) for grid in grids]
    assert not torch.allclose(*embedded)
    made.encoder.embed.missing.weight.data.zero_()
    scaled = [made.encoder.embed(grids[0].tokens.values[:, 2], grid.tokens.observed[:, 2]) for grid in grids]
    assert torch.equal(*scaled)


def test_missing_points_have_no_likelihood():
    """A gap in the last patch is the same as a shorter horizon."""
    made, given = model(), windows(horizon=8)
    future = given.future.clone()
    future[:, 6:] = NAN
    gapped = made.loss(dataclasses.replace(given, future=future))
    torch.testing.assert_close(gapped, made.loss(dataclasses.replace(given, future=given.future[:, :6])))
    assert not torch.isclose(gapped, made.loss(given))


@pytest.mark.parametrize("future", [True, False])
def test_nothing_to_learn_from(future):
    given = Windows(torch.full((2, 9), NAN), torch.full((2, 5), NAN) if future else None)
    made = model().float()
    loss = made.loss(given)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())
    assert made.head.project.weight.grad is not None


def test_a_short_context_without_future():
    made = model()
    assert made.loss(Windows(torch.randn(2, 3).double())) == 0
    assert made.loss(Windows(torch.randn(2, 5).double())) != 0


def test_packed_series_do_not_see_each_other():
    """Two series in one row, borders on and off the grid of patches, are as two rows."""
    made = model()
    first, second = torch.randn(1, 12).double(), 100 + 9 * torch.randn(1, 18).double()
    segments = torch.tensor([[0] * 12 + [1] * 18])
    x = torch.cat([first, second], 1)
    packed = made.loss(Windows(x[:, :24], x[:, 24:], segments=segments))
    apart = [made.loss(Windows(first)), made.loss(Windows(second[:, :12], second[:, 12:]))]
    points = [8, 14]
    wanted = sum(n * loss for n, loss in zip(points, apart, strict=True)) / sum(points)
    torch.testing.assert_close(packed, wanted)


@pytest.mark.parametrize("length", [20, 18])
def test_packed_series_that_share_a_patch(length):
    made, given = model(), windows(length, 12, batch=1)
    border = length - 10  # in the middle of a patch
    segments = (torch.arange(length + 12) >= border).long()[None]
    other = dataclasses.replace(given, past=given.past.clone())
    other.past[:, :border] = 5.0 + 3 * torch.randn(1, border).double()
    before, clock = hidden(made, dataclasses.replace(given, segments=segments))
    after, _ = hidden(made, dataclasses.replace(other, segments=segments))
    later = clock >= 2  # the shared patch, which is the second series', and what follows
    torch.testing.assert_close(before[:, later], after[:, later], rtol=0, atol=1e-12)
    assert not torch.allclose(before, after)


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


@pytest.mark.parametrize(("factor", "offset"), [(3.0, 0.0), (1e-7, 1e-6), (1e5, -4e6)])
def test_forecasts_scale_with_the_series(factor, offset):
    made, given = model(), windows(futr=1)
    scaled = dataclasses.replace(given, past=factor * given.past + offset, futr=7 * given.futr - 2)
    torch.testing.assert_close(forecast(made, scaled), factor * forecast(made, given) + offset, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [0.0, 7.0, 0.1, -1e6])
def test_constant_series_and_covariates(constant):
    made = MoiraiMoE(TINY)
    given = windows(futr=1, hist=1)._map(lambda t: t.float())
    flat = Windows(*(torch.full_like(t, constant) for t in (given.past, given.future, given.futr, given.hist)))
    loss = made.loss(flat)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)
    grid = make_grid(flat, P)
    torch.testing.assert_close(grid.scale.restore(grid.target.values.flatten(1)), torch.full((3, 32), constant))
    assert grid.tokens.values.abs().max() < 0.2
    assert made.forecast(flat, 9).mean.isfinite().all()


def test_a_future_beyond_all_bounds():
    made = MoiraiMoE(TINY)
    given = Windows(torch.zeros(2, 16), torch.full((2, 8), 1e30))
    loss = made.loss(given)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


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
        assert torch.equal(make_grid(given, P).tokens.values, make_grid(given, P).tokens.values.float())
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
    config = dataclasses.replace(TINY, patch_size=8, d_model=32, num_samples=50)
    made = MoiraiMoE(config)
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)

    def batch(size: int) -> Windows:
        phase, period = torch.rand(size, 1) * 6.3, 12 + 12 * torch.rand(size, 1)
        x = 5 + 3 * torch.sin(phase + 6.2832 * torch.arange(80) / period) + 0.1 * torch.randn(size, 80)
        return Windows(x[:, :64], x[:, 64:])

    for _ in range(150):
        optimizer.zero_grad()
        made.loss(batch(32)).backward()
        optimizer.step()
    made.eval()
    test = batch(64)
    predicted = made.forecast(test, 16, (0.1, 0.9))
    naive = (test.past[:, -1:] - test.future).abs().mean()
    error = (predicted.mean - test.future).abs().mean()
    assert error < 0.25 * naive
    inside = (predicted.quantiles[:, 0] <= test.future) & (test.future <= predicted.quantiles[:, 1])
    assert 0.6 < inside.float().mean() < 0.97
