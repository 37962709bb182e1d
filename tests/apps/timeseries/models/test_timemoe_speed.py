"""Time-MoE: what saves time and memory changes no number but by the precision that was asked for."""

from __future__ import annotations

import copy

import pytest
import torch

import moecore
from apps.errors import ConfigError
from apps.timeseries.model_settings import TimeMoEConfig
from apps.timeseries.models import timemoe_decoding, timemoe_layers
from apps.timeseries.models.base import Windows
from apps.timeseries.models.timemoe import TimeMoE

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}


def make(**changes) -> TimeMoE:
    torch.manual_seed(0)
    model = TimeMoE.from_config(TimeMoEConfig(**SIZES, num_experts=4, horizons=(1, 8), **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # so that attention and experts matter
    return model.eval()


def ragged(rows: int, length: int) -> torch.Tensor:
    x = 3 + torch.randn(rows, length)
    x[0, : length // 2] = torch.nan
    x[1, length // 3 : length // 2] = torch.nan
    return x


@pytest.mark.parametrize("context", [torch.randn(3, 50), ragged(3, 50)], ids=["whole", "ragged"])
def test_queries_in_blocks_give_what_all_at_once_do(monkeypatch, context):
    model = make(normalize="none")
    monkeypatch.setattr(timemoe_layers, "QUERIES", 16)
    with torch.no_grad():
        blocks = model.decode(context).hidden
    whole = model.decode(context).hidden.detach()  # with gradients nothing is in blocks or in place
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 70, 100, 10_000])
def test_rows_decoded_apart_give_the_same_forecasts(monkeypatch, tokens):
    model, context = make(normalize="none"), ragged(5, 50)
    expected = model.forecast(context, 23, use_cache=False)
    monkeypatch.setattr(timemoe_decoding, "TOKENS", tokens)
    torch.testing.assert_close(model.forecast(context, 23), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_last_point_alone_is_the_last_of_all():
    model, context = make(normalize="none"), ragged(3, 30)
    with moecore.record(model) as recording:
        last = model.decode(context, last=True).hidden
    torch.testing.assert_close(last, model.decode(context).hidden[:, -1:], rtol=1e-5, atol=1e-5)
    assert [routing.scores.shape[0] for routing in recording] == [90, 90, 3]


def test_states_that_are_kept_stay():
    """Blocks work in place; the states handed out are not overwritten."""
    model, context = make(normalize="none"), torch.randn(2, 20)
    with torch.no_grad():
        states = model.decode(context, keep_states=True).states
    for ours, expected in zip(states, model.decode(context, keep_states=True).states, strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-5)
    assert (states[0] - states[1]).abs().max() > 0.1


def test_bfloat16_weights_keep_values_and_residuals_in_float32():
    exact = make(normalize="none")
    half = make(normalize="none", precision="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    context = torch.full((2, 40), 1000.0) + torch.randn(2, 40)
    with torch.no_grad():
        ours, expected = (model.embed(context) for model in (half.float(), exact))
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)
        half = half.bfloat16()
        assert (half.embed(context).diff(dim=1) != 0).any(-1).all()  # bfloat16 values would be 1000 or 1004
        outputs = half.decode(context, keep_states=True)
    assert all(state.dtype == torch.float32 for state in outputs.states)
    context = ragged(3, 80)
    ours, expected = half.forecast(context, 16), exact.forecast(context, 16)
    assert ours.dtype == torch.float32
    error = float((ours - expected).abs().max() / expected.abs().max())
    assert 0 < error < 0.1
    cached = half.forecast(context, 23)
    error = float((cached - half.forecast(context, 23, use_cache=False)).abs().max() / cached.abs().max())
    assert error < 0.05


def test_bfloat16_weights_are_not_trained():
    with pytest.raises(ConfigError, match=r"^precision='bfloat16': is for forecasts; train with float32$"):
        make(precision="bfloat16").loss(Windows(torch.randn(2, 20), torch.randn(2, 8)))


@pytest.mark.parametrize("dense", [False, True])
def test_precision_is_of_the_dense_twin_too(dense):
    config = TimeMoEConfig(**SIZES, precision="bfloat16")
    assert {p.dtype for p in TimeMoE.from_config(config, dense).parameters()} == {torch.bfloat16}


def kept_bytes(model: TimeMoE, windows: Windows) -> tuple[int, torch.Tensor]:
    """Bytes of what is kept for the backward pass, weights aside, and the loss."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.loss(windows)
    return sum(kept.values()), loss


def test_blocks_computed_again_give_the_same_gradients_from_less():
    windows = Windows(ragged(4, 100), torch.randn(4, 8))
    plain, again = make().train(), make(checkpoint_blocks=True).train()
    with moecore.record(again) as recording:
        (much, expected), (little, loss) = (kept_bytes(model, windows) for model in (plain, again))
    assert little < much / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert len(list(recording)) == 3  # computing again is not routing again
    for (name, ours), own in zip(again.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, own.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_copy_in_bfloat16_leaves_the_original():
    model = make(normalize="none")
    before = copy.deepcopy(model.state_dict())
    copy.deepcopy(model).bfloat16().forecast(torch.randn(2, 30), 9)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
