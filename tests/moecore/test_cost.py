"""Parameters and multiply-adds against counts made by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import moecore
from moecore.build import FFNShape

SIZE, PATCH, D, F, DEPTH, CLASSES, B = 32, 8, 16, 64, 3, 10, 2
N = (SIZE // PATCH) ** 2 + 1  # class token
ATTENTION = N * 4 * D * D + 2 * N * N * D  # q, k, v, out; scores and mixing
FFN = N * 2 * D * F
ENDS = (N - 1) * 3 * PATCH**2 * D + D * CLASSES  # patch embedding and head
FFN_PARAMS = 2 * D * F + D + F


def vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=D, depth=DEPTH, num_heads=4, mlp_ratio=F / D, num_classes=CLASSES
    )


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_dense_vit_with_its_attention_matmuls(fused):
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    cost = moecore.count_cost(model, torch.randn(B, 3, SIZE, SIZE))
    assert cost.macs == cost.all_experts_macs == B * (ENDS + DEPTH * (ATTENTION + FFN))
    assert cost.total_params == cost.active_params == params(model)


@pytest.mark.parametrize(("experts", "k", "hidden"), [(4, 2, None), (8, 1, 24), (4, 4, 16)])
@pytest.mark.parametrize("shared", [0, 16])
def test_vit_with_moe(shared, experts, k, hidden):
    model = vit()
    dense = params(model)
    config = moecore.MoEConfig(num_experts=experts, top_k=k, hidden=hidden, shared_hidden=shared)
    moecore.replace_ffn(model, "last-2", config, init="random")
    cost = moecore.count_cost(model, torch.randn(B, 3, SIZE, SIZE))

    h = hidden or (F - shared) // k
    one, router, beside = N * 2 * D * h, N * D * experts, N * 2 * D * shared
    rest = ENDS + DEPTH * ATTENTION + FFN
    assert cost.macs == B * (rest + 2 * (k * one + router + beside))
    assert cost.all_experts_macs == B * (rest + 2 * (experts * one + router + beside))

    expert_params = 2 * D * h + h + D
    extra = D * experts + (2 * D * shared + shared + D if shared else 0)
    assert cost.total_params == params(model) == dense + 2 * (experts * expert_params + extra - FFN_PARAMS)
    assert cost.active_params == dense + 2 * (k * expert_params + extra - FFN_PARAMS)


def test_default_width_of_experts_keeps_the_ffns_multiply_adds():
    model = vit()
    x = torch.randn(B, 3, SIZE, SIZE)
    before = moecore.count_cost(model, x).macs
    moecore.replace_ffn(model, "all", moecore.MoEConfig(num_experts=8, top_k=2))
    assert moecore.count_cost(model, x).macs == before + B * DEPTH * N * D * 8  # the routers


def test_gated_experts_for_a_plain_ffn_are_narrower_by_their_third_matrix():
    gated = moecore.MoE.build(48, num_experts=4, top_k=2, glu=True, bias=False)
    plain = moecore.MoE.build(48, num_experts=4, top_k=2, bias=False)
    x = torch.randn(5, 48)
    assert gated.experts.hidden == 4 * 48 * 2 // 3 // 2
    assert moecore.count_cost(gated, x).macs == moecore.count_cost(plain, x).macs
    config, glu = moecore.MoEConfig(top_k=2, glu=False), FFNShape(hidden=64, glu=True)
    assert moecore.build_moe(config, D, glu).experts.hidden == 64 * 3 // 2 // 2


def test_glu_experts_have_three_matrices():
    moe = moecore.MoE.build(D, num_experts=4, top_k=2, hidden=8, glu=True, bias=False)
    cost = moecore.count_cost(moe, torch.randn(5, D))
    assert cost.macs == 5 * (2 * 3 * D * 8 + 4 * D)
    assert cost.total_params == 4 * 3 * D * 8 + 4 * D
    assert cost.active_params == 2 * 3 * D * 8 + 4 * D


def test_slots_left_empty_cost_nothing():
    moe = moecore.MoE.build(D, num_experts=4, top_k=2, hidden=8, select="null_top_k")
    nn.init.normal_(moe.router.score.weight)
    x = torch.randn(50, D)
    with moecore.record(moe) as recording:
        moe(x)
    pairs = recording[0].assignment.load().sum().item()
    cost = moecore.count_cost(moe, x)
    assert 0 < pairs < 100
    assert cost.macs == pairs * 2 * D * 8 + 50 * D * 8
    bank = params(moe.experts)
    assert cost.active_params == pytest.approx(params(moe) - bank * (1 - pairs / 50 / 4), abs=1)


def test_routed_samples_cost_all_their_tokens():
    moe = moecore.MoE.build(D, num_experts=4, top_k=2, hidden=8, unit="sequence")
    cost = moecore.count_cost(moe, torch.randn(3, 7, D))
    assert cost.macs == 3 * 7 * 2 * 2 * D * 8 + 3 * D * 4
    assert cost.all_experts_macs == 3 * 7 * 4 * 2 * D * 8 + 3 * D * 4


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    moe = moecore.MoE.build(D, num_experts=4, executor="grouped_mm", dropout=0.1).train(training)
    moecore.count_cost(moe, torch.randn(3, D))
    assert moe.training == training
    assert moe.executor == "grouped_mm"
    assert moe._recorder is None

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = moe

        def forward(self, x):
            self.moe(x)
            raise RuntimeError("on purpose")

    model = Broken().train(training)
    with pytest.raises(RuntimeError, match="on purpose"):
        moecore.count_cost(model, torch.randn(3, D))
    assert model.training == training
    assert moe.executor == "grouped_mm"


def test_parts_in_another_mode_stay_in_it():
    model = nn.Sequential(nn.Dropout(0.5), moecore.MoE.build(D, num_experts=4))
    model.train()[0].eval()
    moecore.count_cost(model, torch.randn(3, D))
    assert [m.training for m in (model, *model)] == [True, False, True]


def test_names_for_tables():
    cost = moecore.count_cost(moecore.MoE.build(D, num_experts=4), torch.randn(3, D))
    assert cost.scalars() == {
        "params_total": cost.total_params,
        "params_active": cost.active_params,
        "multiply_adds": cost.macs,
        "multiply_adds_all_experts": cost.all_experts_macs,
    }
