"""Centroids of what a dense model's FFNs see, and the sparse model that starts from both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import moecore
from apps.errors import ConfigError, UserError
from apps.timeseries.model_settings import MoiraiMoEConfig
from apps.timeseries.models import centroids as module
from apps.timeseries.models.base import Windows
from apps.timeseries.models.centroids import (
    ffn_inputs,
    fit_centroids,
    initialise_from_dense,
    start_from_dense,
)
from apps.timeseries.models.moirai_moe import MoiraiMoE

CONFIG = MoiraiMoEConfig(
    patch_size=4, d_model=16, d_ff=16, num_layers=2, num_heads=2, num_experts=5, num_samples=5, dropout=0.5
)


@pytest.fixture
def dense() -> MoiraiMoE:
    return MoiraiMoE(CONFIG, dense=True)


def batches(count: int = 3, size: int = 8) -> list[Windows]:
    waves = torch.sin(torch.arange(40) * torch.rand(count, size, 1) * 2) + 0.1 * torch.randn(count, size, 40)
    return [Windows(x[:, :32], x[:, 32:]) for x in waves]


def test_what_an_ffn_sees_is_the_normalised_output_of_attention(dense):
    (given,) = batches(1)
    seen = ffn_inputs(dense, given)
    assert seen.shape == (2, 8 * 10, 16)
    torch.testing.assert_close(seen.square().mean(-1), torch.ones(2, 80), rtol=1e-3, atol=0)  # norms of fresh models
    assert dense.training  # as it was
    assert torch.equal(seen, ffn_inputs(dense, given))  # without dropout all the same
    assert not any(ffn._forward_pre_hooks for ffn in dense.ffns)


def test_a_router_sees_the_same(dense):
    (given,) = batches(1)
    sparse = MoiraiMoE(CONFIG)
    seen = ffn_inputs(sparse, given)
    with moecore.record(sparse.eval()) as recording:
        sparse.loss(given)
    centres = sparse.moe_layers[0].router.score.centroids
    nearest = torch.cdist(seen[0], centres).argmin(1).view(8, 10)[:, :9]  # the loss has no use for the last patch
    assert torch.equal(recording[0].assignment.expert[:, 0].view(8, 9), nearest)


def test_missing_patches_are_not_clustered(dense):
    (given,) = batches(1)
    given.past[3, 4:12] = torch.nan
    assert ffn_inputs(dense, given).shape[1] == 8 * 10 - 2


def test_centroids_are_means_of_their_tokens(dense):
    data = batches()
    fitted = fit_centroids(dense, data, 5)
    assert fitted.shape == (2, 5, 16)
    for layer, centres in zip(torch.cat([ffn_inputs(dense, batch) for batch in data], 1), fitted, strict=True):
        nearest = torch.cdist(layer, centres).argmin(1)
        means = torch.stack([layer[nearest == e].mean(0) for e in range(5)])
        torch.testing.assert_close(means, centres, rtol=0, atol=0.02)


def test_the_seed_decides(dense):
    data = batches()
    assert torch.equal(fit_centroids(dense, data, 5, seed=1), fit_centroids(dense, iter(data), 5, seed=1))
    assert not torch.equal(fit_centroids(dense, data, 5, seed=1), fit_centroids(dense, data, 5, seed=2))


def test_tokens_are_drawn_evenly_from_all_batches(dense, monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 60)
    seen: list[Tensor] = []

    class Spy(module.KMeans):
        def fit(self, x):
            seen.append(torch.from_numpy(x))
            return super().fit(x)

    monkeypatch.setattr(module, "KMeans", Spy)
    data = batches(6)
    fit_centroids(dense, data, 5)
    assert [len(x) for x in seen] == [60, 60]
    share = [(torch.cdist(seen[0], ffn_inputs(dense, batch)[0]).min(1).values < 5e-3).sum() for batch in data]
    assert sum(share) == 60
    assert min(share) >= 2


def test_too_few_patches(dense):
    flat = Windows(torch.full((4, 8), 3.0))
    with pytest.raises(UserError, match="num_experts=5: the data hold only 2 distinct patches"):
        fit_centroids(dense, [flat], 5)
    with pytest.raises(UserError, match="only 0 distinct"):
        fit_centroids(dense, [], 5)


def test_experts_as_wide_as_the_ffn_start_as_it(dense):
    (given,) = batches(1)
    sparse = MoiraiMoE(dataclasses.replace(CONFIG, d_ff=2 * CONFIG.d_ff))
    fitted = fit_centroids(dense, [given], 5)
    start_from_dense(sparse, dense, fitted)
    assert torch.equal(torch.stack([layer.router.score.centroids for layer in sparse.moe_layers]), fitted)
    torch.testing.assert_close(sparse.eval().loss(given), dense.eval().loss(given))


def test_training_goes_on_where_the_dense_model_stopped(dense):
    torch.manual_seed(1)
    data = batches(25)
    optimizer = torch.optim.AdamW(dense.eval().parameters(), 3e-3)
    for given in data:
        optimizer.zero_grad()
        dense.loss(given).backward()
        optimizer.step()
    sparse = MoiraiMoE(CONFIG).eval()
    fresh = sparse.loss(data[0]).item()
    assert initialise_from_dense(sparse, dense.state_dict(), data[:5]) is sparse
    start, stop = sparse.loss(data[0]).item(), dense.loss(data[0]).item()
    assert start - stop < 0.3 * (fresh - stop)
    optimizer = torch.optim.AdamW(sparse.parameters(), 3e-3)
    for given in data:
        optimizer.zero_grad()
        sparse.loss(given).backward()
        optimizer.step()
    assert sparse.loss(data[0]).item() < start


def test_weights_of_another_model_are_one_line():
    sparse = MoiraiMoE(CONFIG)
    others = [MoiraiMoE(CONFIG)]
    others += [MoiraiMoE(dataclasses.replace(CONFIG, **size), dense=True) for size in ({"d_ff": 8}, {"num_layers": 3})]
    for other in others:
        with pytest.raises(UserError, match="centroids_from: not the weights of a dense run") as caught:
            initialise_from_dense(sparse, other.state_dict(), batches(1))
        assert "\n" not in str(caught.value)


def test_models_that_do_not_fit(dense):
    centres = torch.randn(2, 5, 16)
    for sparse, message in (
        (dense, "num_experts=1: must be at least 2"),
        (MoiraiMoE(dataclasses.replace(CONFIG, d_model=32)), "d_model=32: must be 16"),
        (
            MoiraiMoE(dataclasses.replace(CONFIG, num_experts=4)),
            r"centroids=\(2, 5, 16\): must have shape \(2, 4, 16\)",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            start_from_dense(sparse, dense, centres)
    with pytest.raises(ConfigError, match="num_experts=5: of the dense model must be 1"):
        start_from_dense(MoiraiMoE(CONFIG), MoiraiMoE(CONFIG), centres)
