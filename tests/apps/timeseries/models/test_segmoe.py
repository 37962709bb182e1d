"""Seg-MoE: experts per segment of patches, recomputed by hand; heads, missing values, rollouts, dense twins."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

import moecore
from apps.timeseries.model_settings import SegMoEConfig
from apps.timeseries.models.base import Windows
from apps.timeseries.models.segmoe import SeasonalMap, SegMoE
from apps.timeseries.models.segmoe_blocks import Block, segment_moe

L, H, S = 24, 6, 4
SMALL = SegMoEConfig(
    patch_size=4, d_model=8, d_ff=6, num_layers=2, num_heads=2, num_kv_heads=1, segments=(2, 4), num_experts=3
)
PLAIN = dataclasses.replace(SMALL, seasonal=False)


def make(config: SegMoEConfig = PLAIN, context: int = L, block: int = H, season: int = 1, dense: bool = False):
    """A model whose weights are all away from zero, in eval mode."""
    model = SegMoE(config, context, block, season, dense).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def changed(**changes) -> SegMoEConfig:
    return dataclasses.replace(PLAIN, **changes)


# Layers


@torch.no_grad()
def test_one_layer_recomputed_by_hand():
    """Segments of 4 over 6 patches: the second is padded with zeros. Router sees a segment flat; its raw probability
    weighs the one expert that each patch then passes alone; the shared expert and its gate see the segment whole."""
    layer = segment_moe(changed(temperature=0.5), 4).eval()
    layer.router.score.weight.normal_()
    layer.shared.gate.weight.normal_()
    x = torch.randn(3, 6, 8)
    found = layer(x)
    bank, shared = layer.experts, layer.shared
    used = set()
    for sample in range(3):
        padded = torch.cat([x[sample], torch.zeros(2, 8)])
        for first in (0, 4):
            segment = padded[first : first + 4]
            logits = layer.router.score.weight @ segment.flatten() / 0.5
            probability = logits.exp() / logits.exp().sum()
            expert = int(probability.argmax())
            used.add(expert)
            gate = 1 / (1 + math.exp(-float(shared.gate.weight[0] @ segment.flatten())))
            hidden = F.gelu(shared.bank.mlp.up[0] @ segment.flatten() + shared.bank.mlp.up_bias[0])
            whole = (shared.bank.mlp.down[0] @ hidden + shared.bank.mlp.down_bias[0]).view(4, 8)
            for place in range(4):
                if first + place >= 6:
                    continue
                hidden = F.gelu(bank.up[expert] @ segment[place] + bank.up_bias[expert])
                routed = bank.down[expert] @ hidden + bank.down_bias[expert]
                expected = probability[expert] * routed + gate * whole[place]
                torch.testing.assert_close(found[sample, first + place], expected, rtol=1e-4, atol=1e-5)
    assert len(used) > 1


def test_several_experts_per_segment_share_their_weight():
    layer = segment_moe(changed(top_k=2, shared=False), 2).eval()
    with torch.no_grad():
        layer.router.score.weight.normal_()
    with moecore.record(layer) as recording:
        layer(torch.randn(2, 6, 8))
    (routing,) = recording
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(6))
    assert routing.assignment.chosen().sum(1).tolist() == [2] * 6


def test_segments_of_one_patch_are_tokens():
    by_segment = segment_moe(PLAIN, 1).eval()
    shared = moecore.SharedExpert(moecore.MLPBank(1, 8, 6), gated=True)
    shared.bank.load_state_dict(by_segment.shared.bank.mlp.state_dict())
    shared.gate.load_state_dict(by_segment.shared.gate.state_dict())
    by_token = moecore.MoE(by_segment.router, by_segment.experts, shared).eval()
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(by_segment(x), by_token(x))


@pytest.mark.parametrize(
    ("routed", "shared", "mixes"),
    [("token", False, False), ("token", True, True), ("segment", False, True), ("segment", True, True)],
)
def test_which_experts_let_the_patches_of_a_segment_see_each_other(routed, shared, mixes):
    layer = segment_moe(changed(routed=routed, shared=shared, num_experts=1), 3).eval()  # one expert: no decision
    x = torch.randn(2, 6, 8)
    other = x.clone()
    other[:, 1] += 1
    moved = (layer(x) != layer(other)).any(-1)
    assert bool(moved[:, 1].all())
    assert bool(moved[:, [0, 2]].all()) == mixes
    assert not bool(moved[:, 3:].any())  # the next segment is another matter


def test_every_layer_routes_segments_of_its_own_length():
    model = make(changed(segments=(2, 4), num_layers=3))
    with moecore.record(model) as recording:
        starts = model.trace(Windows(torch.randn(5, L)))
    assert [routing.lead for routing in recording] == [(5, 3), (5, 2), (5, 2)]  # 6 patches; the last segment is padded
    assert [routing.assignment.num_tokens for routing in recording] == [15, 10, 10]
    assert model.segment_lengths() == {"blocks.0.ffn": 2, "blocks.1.ffn": 4, "blocks.2.ffn": 4}
    assert starts.tolist() == [0, 4, 8, 12, 16, 20]
    assert all(routing.aux_loss == {"switch": 0.02} for routing in recording)


def test_a_trace_of_other_contexts_says_where_patches_begin():
    model = make(context=22)  # the first patch misses two points
    assert model.trace(Windows(torch.randn(1, 22))).tolist() == [-2, 2, 6, 10, 14, 18]
    assert model.trace(Windows(torch.randn(1, 30))).tolist() == [6, 10, 14, 18, 22, 26]


def test_paths_are_dropped_for_whole_windows_and_more_so_in_later_blocks():
    config = changed(drop_path=0.5, num_layers=3)
    assert [Block(config, layer, dense=False).drop_path for layer in range(3)] == [0, 0.25, 0.5]
    block = Block(config, 2, dense=False).train()
    branch = block._drop(torch.ones(4000, 3, 8))
    kept = branch.flatten(1)
    assert kept.unique().tolist() == [0, 2]
    assert bool((kept == kept[:, :1]).all())
    assert kept[:, 0].mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(block.eval()._drop(torch.ones(2, 3, 8)), torch.ones(2, 3, 8))


def test_training_draws_and_evaluation_does_not():
    model, windows = make(), Windows(torch.randn(4, L), torch.randn(4, H))
    assert torch.equal(model.loss(windows), model.loss(windows))
    model.train()
    assert not torch.equal(model.loss(windows), model.loss(windows))


# Loss


def normalised(past: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    mean, std = past.mean(1, keepdim=True), past.std(1, correction=0, keepdim=True)
    return [(x - mean) / std for x in (past, *others)]


@pytest.mark.parametrize("loss", ["mae", "huber"])
def test_the_direct_head_learns_from_the_block_alone(loss):
    model = make(changed(loss=loss))
    windows = Windows(5 + 3 * torch.randn(4, L), 5 + 9 * torch.randn(4, H))
    past, future = normalised(windows.past, windows.future)
    error = (model(past) - future).abs()
    expected = error if loss == "mae" else torch.where(error < 2, 0.5 * error**2, 2 * (error - 1))
    assert model(past).shape == (4, H)
    torch.testing.assert_close(model.loss(windows), expected.mean())


def test_the_published_head_learns_from_the_input_one_block_later_too():
    model = make(changed(head="shift", loss="huber"))
    windows = Windows(5 + 3 * torch.randn(4, L), 5 + 9 * torch.randn(4, H))
    past, future = normalised(windows.past, windows.future)
    output = model(past)
    assert output.shape == (4, L)  # every point of the context, one block later
    error = (output - torch.cat([past[:, H:], future], 1)).abs()
    expected = torch.where(error < 2, 0.5 * error**2, 2 * (error - 1)).mean()
    torch.testing.assert_close(model.loss(windows), expected)
    forecast = model.forecast(windows, H).mean
    mean, std = windows.past.mean(1, keepdim=True), windows.past.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(forecast, output[:, -H:] * std + mean)


def test_the_published_head_unpatches_each_patch_by_itself():
    model = make(changed(head="shift"), context=L)
    hidden = {}
    model.dropout.register_forward_hook(lambda module, args, output: hidden.update(x=output))
    output = model(torch.randn(1, L))
    weight, bias = model.head.weight[:, 0], model.head.bias  # [D, patch]
    for patch in range(6):
        expected = hidden["x"][0, patch] @ weight + bias
        torch.testing.assert_close(output[0, 4 * patch : 4 * patch + 4], expected)


def test_the_published_head_cannot_give_more_than_it_sees():
    with pytest.raises(moecore.ConfigError, match=r"^block=25: must not exceed data.context=24 with head=shift"):
        SegMoE(changed(head="shift"), L, 25)


@pytest.mark.parametrize("head", ["direct", "shift"])
def test_what_was_not_observed_is_not_learned_from(head):
    model = make(changed(head=head))
    past, future = torch.randn(3, L), torch.randn(3, H)
    future[0, 2:] = torch.nan
    future[1] = torch.nan
    loss = model.loss(Windows(past, future))
    other = torch.where(torch.isnan(future), torch.nan, future)
    assert torch.equal(loss, model.loss(Windows(past, other)))
    (context, target) = normalised(past, future)
    if head == "shift":
        target = torch.cat([context[:, H:], target], 1)
    error = (model(context) - target).abs()
    torch.testing.assert_close(loss, error[torch.isfinite(error)].mean())
    nothing = model.loss(Windows(torch.full((2, L), torch.nan), torch.full((2, H), torch.nan)))
    nothing.backward()
    assert nothing == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_short_future_is_learned_from():
    model = make()
    windows = Windows(torch.randn(2, L), torch.randn(2, H))
    padded = torch.cat([windows.future[:, :4], torch.full((2, 2), torch.nan)], 1)
    torch.testing.assert_close(
        model.loss(Windows(windows.past, windows.future[:, :4])), model.loss(Windows(windows.past, padded))
    )


def test_the_loss_may_be_the_mean_of_those_at_several_horizons():
    windows = Windows(torch.randn(4, L), torch.randn(4, H))
    model = make(changed(loss_horizons=(2, 3, 6)))
    past, future = normalised(windows.past, windows.future)
    error = (model(past) - future).abs()
    expected = (error[:, :2].mean() + error[:, :3].mean() + error.mean()) / 3
    torch.testing.assert_close(model.loss(windows), expected)


# Contexts


@pytest.mark.parametrize("head", ["direct", "shift"])
@pytest.mark.parametrize("season", [1, S])
def test_forecasts_follow_units(head, season):
    model = make(dataclasses.replace(SMALL, head=head), season=season)
    windows = Windows(torch.randn(3, L))
    forecast = model.forecast(windows, 9).mean
    other = model.forecast(Windows(1000 * windows.past - 77), 9).mean
    torch.testing.assert_close(other, 1000 * forecast - 77, rtol=1e-4, atol=0.05)


@pytest.mark.parametrize("head", ["direct", "shift"])
def test_longer_horizons_are_rolled_out_block_by_block(head):
    model = make(changed(head=head))
    windows = Windows(torch.randn(2, L))
    (context,) = normalised(windows.past)
    mean, std = windows.past.mean(1, keepdim=True), windows.past.std(1, correction=0, keepdim=True)
    blocks = []
    for _ in range(3):
        blocks.append(model(context)[:, -H:])
        context = torch.cat([context[:, H:], blocks[-1]], 1)  # what was predicted is context for the next
    torch.testing.assert_close(model.forecast(windows, 14).mean, torch.cat(blocks, 1)[:, :14] * std + mean)
    torch.testing.assert_close(model.forecast(windows, 2).mean, (blocks[0] * std + mean)[:, :2])


def test_blocks_may_be_longer_than_contexts():
    model = make(context=8, block=20)
    assert model.forecast(Windows(torch.randn(2, 8)), 50).mean.shape == (2, 50)


@pytest.mark.parametrize("head", ["direct", "shift"])
def test_contexts_of_other_lengths(head):
    """Of longer ones the last points count, shorter ones miss their beginning."""
    model = make(changed(head=head))
    past = torch.randn(2, 40)
    past[:, :16] *= 100
    torch.testing.assert_close(model.forecast(Windows(past), 7).mean, model.forecast(Windows(past[:, -L:]), 7).mean)
    short = past[:, -10:]
    padded = torch.cat([torch.full((2, L - 10), torch.nan), short], 1)
    found = model.forecast(Windows(short), 7).mean
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, model.forecast(Windows(padded), 7).mean)
    future = torch.randn(2, H)
    torch.testing.assert_close(model.loss(Windows(past, future)), model.loss(Windows(past[:, -L:], future)))


def test_a_missing_value_counts_as_the_mean_until_it_is_learned_to_mean_more():
    model = SegMoE(PLAIN, L, H).eval()
    (context,) = normalised(torch.randn(2, L))
    gaps = context.clone()
    gaps[:, [3, 9, 10]] = torch.nan
    as_mean = torch.where(torch.isnan(gaps), 0.0, gaps)
    torch.testing.assert_close(model(gaps), model(as_mean))
    with torch.no_grad():
        model.missing.weight.normal_()
    assert not torch.allclose(model(gaps), model(as_mean))
    assert torch.equal(model(gaps), model(torch.where(torch.isnan(gaps), torch.inf, gaps)))  # infinite is not a value


def test_a_patch_without_any_value_is_no_key():
    """With one patch per segment, nothing but attention lets other patches see it."""
    model = make(changed(segments=(1,), num_layers=1))
    hidden = []
    model.norm.register_forward_hook(lambda module, args, output: hidden.append(output))
    context = torch.randn(2, L)
    context[:, 8:12] = torch.nan  # the third patch
    context[1, 0] = torch.nan  # one point of the first
    model(context)
    with torch.no_grad():
        model.missing.weight.mul_(torch.tensor([1.0, 3, 3, 3]))  # changes the third patch's token, not the first's
    model(context)
    before, after = hidden
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(before[:, others], after[:, others])
    assert not torch.allclose(before[:, 2], after[:, 2])


@pytest.mark.parametrize("head", ["direct", "shift"])
def test_windows_in_a_batch_are_strangers(head):
    model = make(dataclasses.replace(SMALL, head=head), season=S)
    past = torch.randn(3, L)
    past[1, 4:9] = torch.nan
    past[2, :20] = torch.nan
    together = model.forecast(Windows(past), 8).mean
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model.forecast(Windows(past[row : row + 1]), 8).mean)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e6])
def test_constant_and_empty_contexts_are_finite(value):
    model = make(SMALL, season=S)
    past = torch.full((2, L), value)
    past[1, : L - 1] = torch.nan  # a single value
    windows = Windows(past, torch.full((2, H), value))
    found = model.forecast(windows, 9).mean
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[0] - value, model.forecast(Windows(past * 0), 9).mean[0], rtol=1e-3, atol=0.1)
    model.loss(windows).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    empty = model.forecast(Windows(torch.full((1, L), torch.nan)), 9).mean
    assert bool(empty.isfinite().all())


# Seasons


def test_a_fresh_model_says_the_mean_of_the_seasons():
    model = SegMoE(SMALL, L, H, season=S).eval()
    past = torch.randn(2, L)
    phase = past.view(2, -1, S).mean(1)
    torch.testing.assert_close(model.forecast(Windows(past), H).mean, phase[:, torch.arange(H) % S])


def test_seasons_are_mapped_by_one_matrix_for_all_phases():
    layer = SeasonalMap(22, 6, S)  # five whole seasons and two points before them
    with torch.no_grad():
        layer.map.weight.normal_()
    assert layer.map.weight.shape == (2, 5)
    context = torch.randn(3, 22)
    found = layer(context)
    turns = context[:, 2:].view(3, 5, S)
    for step in range(6):
        expected = turns[:, :, step % S] @ layer.map.weight[step // S]
        torch.testing.assert_close(found[:, step], expected)


def test_a_missing_season_is_the_mean_of_the_others_at_its_phase():
    layer = SeasonalMap(12, 4, S)
    context = torch.randn(1, 12)
    gaps = context.clone()
    gaps[0, [1, 2, 6, 10]] = torch.nan  # one of three at phase 1, all three at phase 2
    filled = gaps.clone()
    filled[0, 1] = (context[0, 5] + context[0, 9]) / 2
    filled[0, [2, 6, 10]] = 0.0
    torch.testing.assert_close(layer(gaps), layer(filled))


@pytest.mark.parametrize("season", [1, 13, 100])
def test_without_two_seasons_in_the_context_the_map_is_a_full_one(season):
    layer = SeasonalMap(L, H, season)
    assert layer.map.weight.shape == (H, L)
    assert SeasonalMap(L, H, 12).map.weight.shape == (1, 2)


def test_twins_forecast_and_learn():
    model = SegMoE(SMALL, L, H, S, dense=True)
    model.loss(Windows(torch.randn(2, L), torch.randn(2, H))).backward()
    assert model.eval().forecast(Windows(torch.randn(2, L)), 9).mean.shape == (2, 9)
    assert model.segment_lengths() == {}
