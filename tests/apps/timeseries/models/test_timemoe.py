"""Time-MoE: rollout with and without cache, missing values, packed series, losses; numbers against the published code
are in tests/parity."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import moecore
from apps.errors import ConfigError, UserError
from apps.timeseries.forecasting import forecast_windows
from apps.timeseries.model_settings import TimeMoEConfig
from apps.timeseries.models.base import Forecast, Windows, instance_scale
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.models.timemoe_decoding import Decoder
from apps.timeseries.models.timemoe_loss import aux_loss, horizon_losses, huber, normalize_packed, targets

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 4, "num_experts": 4}
NAN = torch.nan


def config(**changes) -> TimeMoEConfig:
    return TimeMoEConfig(**{**SIZES, "normalize": "none", **changes})


def sharp(model: TimeMoE) -> TimeMoE:
    """Larger weights than fresh ones have, so that attention and experts matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.eval()


@pytest.fixture(params=[{}, {"num_kv_heads": 2}, {"num_experts": 0}], ids=["moe", "grouped", "dense"])
def model(request) -> TimeMoE:
    return sharp(TimeMoE(config(**request.param)))


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("horizon", "steps"),
    [(96, [64, 32]), (192, [64] * 3), (336, [64] * 5 + [8] * 2), (720, [64] * 11 + [8] * 2), (7, [1] * 7)],
)
def test_steps_take_the_largest_head_that_fits(horizon, steps):
    assert [head.out_features for head in Decoder(TimeMoE(config())).steps(horizon)] == steps


@pytest.mark.parametrize("horizon", [1, 6, 41, 96, 131])
def test_cached_equals_uncached_and_a_loop_over_heads(model, horizon):
    context = torch.randn(3, 70)
    cached = model.forecast(context, horizon)
    close(cached, model.forecast(context, horizon, use_cache=False))
    sequence = context
    while (left := horizon + 70 - sequence.shape[1]) > 0:
        points = max(p for p in model.config.horizons if p <= left)
        with torch.no_grad():
            sequence = torch.cat([sequence, model.head_outputs(sequence)[points][:, -1]], 1)
    close(cached, sequence[:, 70:])
    assert cached.std(0).min() > 1e-4


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("normalize", ["none", "instance"])
def test_padding_on_the_left_changes_nothing(model, use_cache, normalize):
    model.config = dataclasses.replace(model.config, normalize=normalize)
    context = 3 + 2 * torch.randn(4, 60)
    lengths = [60, 1, 33, 59]
    padded = context.clone()
    for row, length in enumerate(lengths):
        padded[row, : 60 - length] = NAN
    together = model.forecast(padded, 100, use_cache=use_cache)
    for row, length in enumerate(lengths):
        alone = model.forecast(context[row : row + 1, 60 - length :], 100, use_cache=use_cache)
        close(together[row : row + 1], alone)


def test_a_gap_is_no_key_but_takes_its_time(model):
    context = torch.randn(2, 30)
    gap, cut = context.clone(), torch.cat([context[:, :10], context[:, 15:]], 1)
    gap[:, 10:15] = NAN
    other = context.clone()
    other[:, 10:15] += 100  # what is missing cannot be seen
    other = other.masked_fill(gap.isnan(), NAN)
    ours = model.forecast(gap, 80)
    assert ours.isfinite().all()
    assert torch.equal(ours, model.forecast(other, 80))
    assert (ours - model.forecast(cut, 80)).abs().max() > 1e-3  # time goes on
    assert (ours - model.forecast(gap.nan_to_num(0.0), 80)).abs().max() > 1e-3  # and it is no zero
    close(ours, model.forecast(gap, 80, use_cache=False))


def test_nobody_sees_later_points_or_missing_ones(model):
    x = torch.randn(1, 20)
    x[0, 5] = NAN
    changed = x.clone()
    changed[0, 12:] += 1
    with torch.no_grad():
        before, after = model.decode(x).hidden, model.decode(changed).hidden
    close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-4


def test_inputs_stay_as_they_are(model):
    context = torch.randn(2, 40)
    context[0, :7], context[1, 20] = NAN, NAN
    before, windows = context.clone(), Windows(context, torch.randn(2, 64))
    model.forecast(context, 70)
    model.loss(windows)
    model.trace(windows)
    assert torch.equal(context.nan_to_num(9), before.nan_to_num(9))


def test_what_forecast_takes_and_gives():
    model = sharp(TimeMoE(config(normalize="instance")))
    past = 50 + 10 * torch.randn(2, 40)
    given = model.forecast(Windows(past), 9)
    assert isinstance(given, Forecast)
    assert torch.equal(given.mean, model.forecast(past, 9))
    scale = instance_scale(past)
    plain = sharp(TimeMoE(config()))
    plain.load_state_dict(model.state_dict())
    close(given.mean, scale.restore(plain.forecast(scale.normalize(past), 9)), 1e-4)
    constant = model.forecast(torch.full((1, 20), 7.0), 5)
    assert constant.isfinite().all()
    assert model.forecast(torch.full((1, 20), NAN), 5).isfinite().all()
    assert model.forecast(torch.empty(0, 20), 5).shape == (0, 5)


def test_contexts_that_end_with_a_gap_are_refused_and_bridged_by_the_app(model):
    past = torch.randn(3, 30)
    past[1, -4:] = NAN
    with pytest.raises(UserError, match="row 1 ends with a missing value"):
        model.forecast(past, 10)
    bridged = forecast_windows(model, Windows(past), 10).mean
    close(bridged[1:2], model.forecast(past[1:2, :-4], 14)[:, 4:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_longer_than_the_positions(use_cache):
    model = TimeMoE(config(max_positions=100)).eval()
    padded = torch.cat([torch.full((1, 50), NAN), torch.randn(1, 100)], 1)
    assert model.forecast(padded, 64, use_cache=use_cache).shape == (1, 64)  # padding takes no position
    model.forecast(torch.randn(1, 36), 96, use_cache=use_cache)
    with pytest.raises(UserError, match=r"context=37 points and horizon=96: 101 .* takes 100; give at most 36"):
        model.forecast(torch.randn(1, 37), 96, use_cache=use_cache)
    with pytest.raises(UserError, match=r"context=5 points and horizon=200.*ask for fewer points"):
        model.forecast(torch.randn(1, 5), 200, use_cache=use_cache)
    with pytest.raises(UserError, match=r"context=0 points"):
        model.forecast(torch.randn(1, 0), 5, use_cache=use_cache)
    with pytest.raises(ConfigError, match="horizon=0"):
        model.forecast(torch.randn(1, 5), 0, use_cache=use_cache)
    with pytest.raises(UserError, match="context=128 points: this model takes 100"):
        model.loss(Windows(torch.randn(1, 65), torch.randn(1, 64)))


def test_packed_series_are_as_if_alone(model):
    first, second = torch.randn(1, 25), torch.randn(1, 40)
    packed = torch.cat([first, second], 1)
    segments = torch.tensor([[0] * 25 + [1] * 40])
    with torch.no_grad():
        hidden = model.decode(packed, segments).hidden
        close(hidden[:, :25], model.decode(first).hidden)
        close(hidden[:, 25:], model.decode(second).hidden)


def naive_losses(model: TimeMoE, pieces: list[torch.Tensor]) -> dict[int, float]:
    """Mean over pairs of an observed position and an observed target of the same series, one by one."""
    found = {}
    for points in model.config.horizons:
        losses = []
        for piece in pieces:
            with torch.no_grad():
                said = model.head_outputs(piece[None, :-1])[points][0]
            for t in range(len(piece) - 1):
                for k in range(points):
                    if t + 1 + k < len(piece) and piece[t].isfinite() and piece[t + 1 + k].isfinite():
                        e = float((said[t, k] - piece[t + 1 + k]).abs())
                        losses.append(e * e / 2 if e <= 2 else 2 * (e - 1))
        found[points] = sum(losses) / max(len(losses), 1)
    return found


def test_losses_count_what_is_observed_within_one_series():
    model = sharp(TimeMoE(config(horizons=(1, 8))))
    first, second = 3 * torch.randn(12), 3 * torch.randn(15)
    first[4], second[:3] = NAN, NAN
    sequence, segments = torch.cat([first, second])[None], torch.tensor([[3] * 12 + [0] * 15])
    with torch.no_grad():
        hidden = model.decode(sequence[:, :-1], segments[:, :-1]).hidden
        ours = horizon_losses(model.heads, hidden, sequence, segments)
    expected = naive_losses(model, [first, second])
    assert [float(loss) for loss in ours] == pytest.approx(list(expected.values()), rel=1e-5)


def test_loss_is_the_mean_over_heads_and_the_balance_of_observed_points():
    model = sharp(TimeMoE(config()))
    past, future = torch.randn(3, 50), torch.randn(3, 64)
    past[0, :30], future[2, 40:] = NAN, NAN
    sequence = torch.cat([past, future], 1)
    with moecore.record(model) as recording:
        hidden = model.decode(sequence[:, :-1]).hidden
    seen = sequence[:, :-1].isfinite().flatten()
    probs = torch.cat([r.scores.softmax(-1)[seen] for r in recording])
    experts = torch.cat([r.assignment.expert[seen] for r in recording])
    per_choice = torch.nn.functional.one_hot(experts, 4).float().mean(0)  # [K, E]
    balance = 4 * (per_choice * probs.mean(0)).sum()
    close(aux_loss(recording, sequence[:, :-1].isfinite()), balance)
    losses = horizon_losses(model.heads, hidden, sequence)
    close(model.loss(Windows(past, future)), sum(losses) / 4 + 0.02 * balance)
    padded = Windows(torch.cat([torch.full((3, 20), NAN), past], 1), future)
    close(model.loss(padded), model.loss(Windows(past, future)))


def test_the_loss_turns_linear_where_it_is_told_to():
    windows = Windows(5 * torch.randn(2, 20), 5 * torch.randn(2, 8))
    losses = []
    for delta in (1e-3, 2e-3):
        torch.manual_seed(0)
        losses.append(sharp(TimeMoE(config(huber_delta=delta, aux_loss=0.0))).loss(windows).item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-2)  # delta |error| for errors far above delta
    with pytest.raises(ConfigError, match="huber_delta=0: must be positive"):
        config(huber_delta=0)


def test_even_routing_has_a_balance_loss_of_top_k():
    model = TimeMoE(config(num_experts=8, top_k=3))
    for block in model.blocks:
        torch.nn.init.zeros_(block.ffn.router.score.weight)
    with moecore.record(model) as recording:
        model.decode(torch.randn(2, 30))
    assert float(aux_loss(recording).detach()) == pytest.approx(3, rel=1e-5)


def test_an_enclosing_recording_sees_every_layer_and_adds_nothing():
    model = TimeMoE(config()).train()
    with moecore.record(model) as recording:
        model.loss(Windows(torch.randn(2, 20), torch.randn(2, 64)))
    assert list(recording.by_layer()) == ["blocks.0.ffn", "blocks.1.ffn"]
    assert float(moecore.balance_loss(recording)) == 0
    positions = model.trace(Windows(torch.randn(2, 20)))
    assert torch.equal(positions, torch.arange(20))


def test_nothing_to_learn_from_gives_zero_with_gradients():
    model = TimeMoE(config(normalize="instance")).train()
    for windows in (Windows(torch.full((2, 10), NAN), torch.full((2, 64), NAN)), Windows(torch.randn(2, 1))):
        loss = model.loss(windows)
        loss.backward()
        assert loss.item() == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)


def test_training_gives_the_gradients_of_evaluation():
    """What training does to save memory changes no number."""
    windows, grads = Windows(torch.randn(2, 30), torch.randn(2, 64)), []
    model = sharp(TimeMoE(config()))
    for training in (False, True):
        model.train(training).zero_grad()
        loss = model.loss(windows)
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        close(grads[1][name], grad)
        assert grad.abs().sum() > 0 or ".experts." in name, name


def test_packed_series_are_scaled_apart():
    sequence = torch.tensor([[1.0, 3.0, NAN, 10.0, 10.0], [5.0, 7.0, 9.0, NAN, NAN]])
    segments = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 3, 3]])
    scaled = normalize_packed(sequence, segments)
    high = 1.5**0.5
    expected = torch.tensor([[-1.0, 1.0, NAN, 0.0, 0.0], [-high, 0.0, high, NAN, NAN]])
    torch.testing.assert_close(scaled, expected, equal_nan=True)
    model = sharp(TimeMoE(config(normalize="instance")))
    plain = sharp(TimeMoE(config()))
    plain.load_state_dict(model.state_dict())
    close(
        model.loss(Windows(sequence[:, :2], sequence[:, 2:], segments=segments)),
        plain.loss(Windows(scaled[:, :2], scaled[:, 2:], segments=segments)),
    )


def test_published_loss_without_a_mask_counts_zeros_past_the_end():
    labels, predicted = torch.tensor([[1.0, 5.0]]), torch.zeros(1, 2, 2)
    assert targets(labels, 2).tolist() == [[[1.0, 5.0], [5.0, 0.0]]]
    assert float(huber(predicted, targets(labels, 2))) == pytest.approx((0.5 + 8 + 8 + 0) / 4)


def test_dense_twin_costs_what_the_experts_do():
    sparse, dense = TimeMoE.from_config(config()), TimeMoE.from_config(config(), dense=True)
    windows = torch.randn(1, 50)

    class Pass(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.decode(x).hidden

    active = [moecore.count_cost(Pass(model), windows).macs for model in (sparse, dense)]
    routers = 2 * 50 * 16 * (4 + 1)  # the experts' and the shared one's gate, which no FFN has
    assert active[0] - routers == active[1]


@pytest.mark.parametrize(("preset", "count"), [("50m", 113_352_192), ("200m", 453_196_800), ("ultra", 2_416_545_792)])
def test_presets_have_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        model = TimeMoE(TimeMoEConfig(preset=preset))
    assert sum(p.numel() for p in model.parameters()) == count
