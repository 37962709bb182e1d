"""Models for one task."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import moecore
from apps.errors import ConfigError, UserError
from apps.vision.models.m3vit import M3ViT, Slice
from apps.vision.models.task_slice import leaving, moe_layers, slice_model
from tests.apps.vision.models.test_m3vit_model import MOE, SPEC, config, model

LAYERS = ["backbone.blocks.1.mlp", "backbone.blocks.3.mlp"]


def images(seed: int, count: int = 4, contrast: float = 30.0) -> torch.Tensor:
    """Every patch of another colour, far outside [0, 1]: an untrained model sees no difference between paler ones."""
    colors = contrast * torch.randn(count, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    return colors.repeat_interleave(8, 2).repeat_interleave(8, 3)


def far_apart(seed: int = 0, **changes) -> M3ViT:
    """Gates with a preference that no token changes much: each task uses few experts."""
    made = model(seed=seed, **changes)
    for layer in moe_layers(made).values():
        weight = layer.router.score.weight
        nn.init.normal_(weight, std=0.02)
    return made


@pytest.mark.parametrize("decoder", ["light", "upsample", "task_expert"])
@pytest.mark.parametrize("score", ["per_task", "task_conditioned", "linear"])
@torch.no_grad()
def test_equal_on_images_that_keep_inside(decoder, score):
    whole = model(decoder, moe=dataclasses.replace(MOE, score=score))
    seen = images(0)
    small = whole.for_task("depth", [seen])
    ours, theirs = small(seen)["depth"], whole(seen)["depth"]
    assert (ours - theirs).abs().max() <= 1e-6
    assert small.spec.names == ("depth",)
    assert not small.task_aware


@torch.no_grad()
def test_it_holds_what_calibration_chose_and_nothing_else():
    whole, seen = model(), images(0, 1, contrast=1.0)
    with moecore.record(whole) as recording:
        whole(seen, ["normals"])
    chosen = {r.name: r.assignment.expert.unique().tolist() for r in recording}
    assert any(len(experts) < 6 for experts in chosen.values()), "the test needs an expert that is never chosen"
    small = whole.for_task("normals", [seen])
    assert small.slice.experts == chosen
    for name, layer in moe_layers(small).items():
        assert layer.experts.up.shape[0] == len(chosen[name])
        assert layer.router.score.weight.shape == (6, 24)
    gone = [name for name in small.state_dict() if any(task in name for task in SPEC.names if task != "normals")]
    assert not gone
    parameters = sum(p.numel() for p in small.parameters())
    lost = sum(6 - len(experts) for experts in chosen.values()) * sum(p[0].numel() for p in layer.experts.parameters())
    gates = 2 * 4 * 6 * 24
    heads = sum(p.numel() for task, head in whole.decoder.heads.items() if task != "normals" for p in head.parameters())
    assert parameters == sum(p.numel() for p in whole.parameters()) - lost - gates - heads


@torch.no_grad()
def test_tokens_that_leave_are_counted():
    whole, new = model(), images(5)
    with moecore.record(whole) as recording:
        whole(new, ["edges"])
    first = next(r for r in recording if r.name == LAYERS[0])  # later layers see other tokens
    load = first.assignment.load()
    gone = int(load.masked_fill(load == 0, 10**6).argmin())  # an expert that some tokens choose
    kept = [expert for expert in range(6) if expert != gone]
    small = slice_model(whole, Slice("edges", {LAYERS[0]: kept, LAYERS[1]: kept}, {}))
    with moecore.record(small) as recording:
        small(new)
    expected = (first.assignment.expert == gone).any(1).view(4, 24)
    assert torch.equal(leaving(small, recording)[LAYERS[0]], expected)
    assert 0 < expected.sum() < expected.numel()


@torch.no_grad()
def test_a_margin_keeps_more_and_a_share_less():
    whole, seen = far_apart(), images(0, 1)
    counts = {}
    for name, options in {
        "plain": {},
        "margin": {"margin": 0.02},
        "all": {"margin": 1.0},
        "less": {"min_share": 0.3},
    }.items():
        small = whole.for_task("semseg", [seen], **options)
        counts[name] = sum(map(len, small.slice.experts.values()))
    assert counts["less"] <= counts["plain"] <= counts["margin"] <= counts["all"] == 12
    assert counts["less"] >= 4, "a token needs two experts in each of two layers"
    assert counts["less"] < counts["all"]


@torch.no_grad()
def test_shares_are_those_of_calibration():
    whole, seen = model(), images(1)
    small = whole.for_task("depth", [seen[:2], seen[2:]])
    with moecore.record(whole) as recording:
        whole(seen, ["depth"])
    for routing in recording:
        total = torch.zeros(6, dtype=torch.double)
        for experts, weights in zip(routing.assignment.expert, routing.weights, strict=True):
            total[experts] += weights.double()
        assert small.slice.shares[routing.name] == pytest.approx((total / total.sum()).tolist())
    assert small.slice.tokens == 4 * 24


@torch.no_grad()
def test_without_calibration_all_experts_stay():
    whole, seen = model(), images(3)
    small = whole.for_task("classification")
    assert small.slice.experts == {layer: [*range(6)] for layer in LAYERS}
    assert (small(seen)["classification"] - whole(seen)["classification"]).abs().max() <= 1e-6


@torch.no_grad()
def test_the_whole_model_stays_as_it_is():
    whole, seen = model(), images(2)
    before = whole(seen)
    small = whole.for_task("depth", [seen])
    for p in small.parameters():
        p.zero_()
    after = whole(seen)
    assert all(torch.equal(before[task], after[task]) for task in SPEC.names)


@torch.no_grad()
def test_one_task_costs_a_fifth_of_five_passes():
    """Multiply-adds against all five tasks as published, a backbone pass for each."""
    whole = model(share_prefix=False)
    x = whole.example_input()
    share = moecore.count_cost(whole.for_task("depth"), x).macs / moecore.count_cost(whole, x).macs
    assert share <= 0.25


def test_a_dense_model_is_cut_down_to_its_head():
    dense = M3ViT(config(moe_layers="none"), SPEC).eval()
    small = dense.for_task("depth", [images(0)])
    assert small.slice.experts == {}
    assert torch.equal(small(images(1))["depth"], dense(images(1))["depth"])


def test_errors():
    whole = model()
    with pytest.raises(UserError, match=r"^task=parts: this model has"):
        whole.for_task("parts", [images(0)])
    with pytest.raises(ConfigError, match=r"^margin=-1"):
        whole.for_task("depth", [images(0)], margin=-1)
    with pytest.raises(ConfigError, match=r"^min_share=1"):
        whole.for_task("depth", [images(0)], min_share=1)
    with pytest.raises(ConfigError, match=r"^batches='none'"):
        whole.for_task("depth", [])
