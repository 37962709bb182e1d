"""Expert banks: what each expert computes, however its weights are stacked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moecore
from moecore.executors.layouts import EveryLayout, SingleLayout
from moecore.routing import Assignment

E, D, H, O, T = 4, 6, 10, 3, 7  # noqa: E741


def one(bank: moecore.ExpertBank, expert: int, x: torch.Tensor) -> torch.Tensor:
    return bank(x, SingleLayout(expert))


def linears(bank: moecore.MLPBank, expert: int) -> dict[str, nn.Linear]:
    """One expert's maps as `nn.Linear`."""
    maps = {}
    for name in ("up", "gate", "down"):
        weight, bias = getattr(bank, name), getattr(bank, f"{name}_bias")
        if weight is not None:
            maps[name] = nn.Linear(weight.shape[2], weight.shape[1], bias=bias is not None)
            maps[name].weight = nn.Parameter(weight[expert].detach().clone())
            if bias is not None:
                maps[name].bias = nn.Parameter(bias[expert].detach().clone())
    return maps


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_width", [None, O])
def test_mlp_experts_are_stacks_of_linear_maps(bias, out_width):
    bank = moecore.MLPBank(E, D, H, activation="relu", bias=bias, out_width=out_width)
    x = torch.randn(T, D)
    for e in range(E):
        maps = linears(bank, e)
        torch.testing.assert_close(one(bank, e, x), maps["down"](maps["up"](x).relu()))
    assert bank.out_width == (out_width or D)
    assert bank.up.shape == (E, H, D)
    assert bank.down.shape == (E, out_width or D, H)
    assert bank.gate is None
    assert (bank.up_bias is not None) == bias


@pytest.mark.parametrize("bias", [True, False])
def test_glu_experts_are_gated_stacks_of_linear_maps(bias):
    bank = moecore.GLUBank(E, D, H, bias=bias)
    x = torch.randn(T, D)
    for e in range(E):
        maps = linears(bank, e)
        torch.testing.assert_close(one(bank, e, x), maps["down"](F.silu(maps["gate"](x)) * maps["up"](x)))
    assert bank.gate.shape == bank.up.shape == (E, H, D)


@pytest.mark.parametrize(
    ("bank", "parameters"),
    [
        (moecore.MLPBank(E, D, H), E * (2 * D * H + H + D)),
        (moecore.GLUBank(E, D, H), E * 3 * D * H),
        (moecore.SegmentBank(E, 5, D, H), E * (2 * 5 * D * H + H + 5 * D)),
        (moecore.ConstantBank(E, D), 2 * E * D),
        (moecore.ConstantBank(E, D, "zero"), 0),
        (moecore.MixedBank([moecore.GLUBank(1, D, H), moecore.ConstantBank(2, D, "copy")]), 3 * D * H),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_number_of_parameters(bank, parameters):
    assert sum(p.numel() for p in bank.parameters()) == parameters


def test_initialised_as_linear_maps_are():
    bank = moecore.MLPBank(64, 16, 64)
    for weight, columns in ((bank.up, 16), (bank.up_bias, 16), (bank.down, 64), (bank.down_bias, 64)):
        assert weight.abs().max() <= columns**-0.5
        assert weight.std().item() == pytest.approx((3 * columns) ** -0.5, rel=0.1)
    assert not torch.equal(bank.up[0], bank.up[1])


def test_all_experts_at_once_equal_one_by_one():
    x = torch.randn(T, D)
    banks = [moecore.MLPBank(E, D, H), moecore.GLUBank(E, D, H, bias=True), moecore.ConstantBank(E, D)]
    for bank in [*banks, moecore.MixedBank(banks)]:
        every = bank(x[None], EveryLayout())
        assert every.shape == (bank.num_experts, T, D)
        for e in range(bank.num_experts):
            torch.testing.assert_close(every[e], one(bank, e, x))


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_dropout_in_training_only(executor):
    bank = moecore.MLPBank(E, 8, 8, dropout=0.5)
    draws = 2000  # of the same token, through each expert
    x, weights = torch.randn(8).expand(draws * E, 8), torch.ones(draws * E, 1)
    assignment = Assignment(torch.arange(E).repeat_interleave(draws)[:, None], draws * E, E)
    run = lambda: moecore.EXECUTORS[executor](x, bank, assignment, weights)  # noqa: E731
    expected = torch.stack([one(bank.eval(), e, x[:1])[0] for e in range(E)])
    torch.testing.assert_close(run(), expected.repeat_interleave(draws, 0))
    bank.train()
    outputs = run().view(E, draws, 8)
    assert (outputs.std(1) > 0).all()
    torch.testing.assert_close(outputs.mean(1), expected, rtol=0, atol=0.05)


def test_fast_path_is_offered_when_nothing_random_or_foreign_stands_in_the_way():
    assert moecore.MLPBank(E, D, H).ffn().activation == "gelu"
    assert moecore.GLUBank(E, D, H).ffn().gate is not None
    assert moecore.MLPBank(E, D, H, activation=nn.PReLU()).ffn() is None
    bank = moecore.MLPBank(E, D, H, dropout=0.1)
    assert bank.ffn() is None
    assert bank.eval().ffn() is not None
    assert moecore.ConstantBank(E, D).ffn() is None


def test_constant_experts_follow_their_formulas():
    x = torch.randn(T, D)
    assert torch.equal(one(moecore.ConstantBank(2, D, "zero"), 1, x), torch.zeros(T, D))
    assert torch.equal(one(moecore.ConstantBank(2, D, "copy"), 1, x), x)
    bank = moecore.ConstantBank(2, D)
    nn.init.normal_(bank.vector)
    nn.init.normal_(bank.mix)
    for e in range(2):
        a = torch.sigmoid(x @ bank.mix[e])[:, None]
        torch.testing.assert_close(one(bank, e, x), a * x + (1 - a) * bank.vector[e])


def test_mixed_bank_numbers_experts_through():
    parts = [moecore.MLPBank(2, D, H), moecore.ConstantBank(1, D, "zero"), moecore.GLUBank(3, D, H)]
    bank, x = moecore.MixedBank(parts), torch.randn(T, D)
    assert bank.num_experts == 6
    for e, (part, own) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]):
        torch.testing.assert_close(one(bank, e, x), one(parts[part], own, x))


def test_mixed_bank_wants_equal_widths():
    with pytest.raises(moecore.ConfigError, match=r"^banks=.*must all have the same input and output width"):
        moecore.MixedBank([moecore.MLPBank(1, D, H), moecore.MLPBank(1, D, H, out_width=O)])


def test_segment_experts_mix_their_tokens():
    bank = moecore.SegmentBank(E, 3, D, H)
    x = torch.randn(T, 3, D)
    y = one(bank, 2, x)
    torch.testing.assert_close(y, one(bank.mlp, 2, x.flatten(1)).view(T, 3, D))
    moved = x.clone()
    moved[:, 2] += 1
    assert not torch.allclose(one(bank, 2, moved)[:, 0], y[:, 0])
    token_wise = moecore.MLPBank(E, D, H)
    assert torch.equal(one(token_wise, 2, moved)[:, 0], one(token_wise, 2, x)[:, 0])


def test_segment_experts_drop_hidden_units_in_training_only():
    bank = moecore.SegmentBank(E, 3, D, H, dropout=0.5)
    x = torch.randn(1, 3, D)
    expected = one(bank.eval(), 1, x)
    draws = torch.cat([one(bank.train(), 1, x.expand(2000, 3, D))])
    assert (draws.std(0) > 0).all()
    torch.testing.assert_close(draws.mean(0), expected[0], rtol=0, atol=0.06)
    assert bank.mlp.dropout == 0.5


def test_a_shared_expert_of_segments_is_gated_by_the_whole_segment():
    shared = moecore.SharedExpert(moecore.SegmentBank(1, 3, D, H), gated=True)
    assert shared.gate.in_features == 3 * D
    x, onto = torch.randn(T, 3, D), torch.randn(T, 3, D)
    with torch.no_grad():
        shared.gate.weight.normal_()
        found = shared(x, onto.clone())
        for segment in range(T):
            share = 1 / (1 + torch.exp(-(shared.gate.weight[0] * x[segment].flatten()).sum()))
            own = one(shared.bank, 0, x[segment : segment + 1])[0]
            torch.testing.assert_close(found[segment], onto[segment] + share * own)
    token = moecore.SharedExpert(moecore.MLPBank(1, D, H), gated=True)
    assert token.gate.in_features == D
    gates = token.gate(x).sigmoid()
    assert gates.shape == (T, 3, 1)  # one per token
    torch.testing.assert_close(token(x, onto.clone()), onto + gates * one(token.bank, 0, x))


def test_segment_experts_refuse_another_length():
    with pytest.raises(ValueError, match=r"segment length 4: this bank takes segments of 3 tokens"):
        one(moecore.SegmentBank(E, 3, D, H), 0, torch.randn(T, 4, D))
    moe = moecore.MoE(moecore.MoE.build(D, num_experts=E).router, moecore.SegmentBank(E, 3, D, H), unit=4)
    with pytest.raises(ValueError, match=r"segment length 4"):
        moe(torch.randn(2, 8, D))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moecore.MLPBank(0, D, H), "num_experts=0: must be at least 1"),
        (lambda: moecore.MLPBank(E, 0, H), "width=0: must be at least 1"),
        (lambda: moecore.GLUBank(E, D, 0), "hidden=0: must be at least 1"),
        (lambda: moecore.SegmentBank(E, 0, D, H), "length=0: must be at least 1"),
        (lambda: moecore.ConstantBank(E, D, "one"), "kind='one': choose one of constant, copy, zero"),
        (lambda: moecore.SoftMoE(moecore.MLPBank(E, D, H), slots=0), "slots=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(moecore.ConfigError, match=f"^{message}$"):
        make()


def test_print_shows_the_sizes():
    assert "num_experts=4, width=6, hidden=10, activation=gelu, bias=True" in repr(moecore.MLPBank(E, D, H))
