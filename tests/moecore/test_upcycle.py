"""From a dense FFN to experts, without changing what it computes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import moecore
from moecore.executors.layouts import SingleLayout

D, H = 12, 24
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class GLU(nn.Module):
    """A gated FFN with biases everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def dense(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    ffns = {
        "mlp": lambda: nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.0), nn.Linear(H, D)),
        "mlp_relu_nobias": lambda: nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D, bias=False)),
        "mlp_leaky": lambda: nn.Sequential(nn.Linear(D, H), nn.LeakyReLU(0.2), nn.Linear(H, D)),
        "glu": GLU,
    }
    model = nn.Sequential(ffns[kind]().to(dtype))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)  # anew: values that only `dtype` holds
    return model


def upcycled(model: nn.Module, **options) -> nn.Module:
    """The model with its one FFN replaced, its router made to have opinions."""
    moecore.replace_ffn(model, "all", moecore.MoEConfig(**{"num_experts": 4, "top_k": 2, **options}))
    nn.init.normal_(model[0].router.score.weight)
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[theirs.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shared_hidden", [0, 8])
@pytest.mark.parametrize("hidden", ["the_rest", "the_ffns", "more"])
@pytest.mark.parametrize("kind", ["mlp", "mlp_relu_nobias", "mlp_leaky", "glu"])
def test_step_zero_equals_the_dense_model(kind, hidden, shared_hidden, dtype):
    """Copies, also larger than what they copy, beside a shared expert or not."""
    model, x = dense(kind, dtype), torch.randn(3, 5, D, dtype=dtype)
    expected = model(x)
    width = {"the_rest": H - shared_hidden, "the_ffns": H, "more": 2 * H + 7}[hidden]
    close(upcycled(model, hidden=width, shared_hidden=shared_hidden)(x), expected)


@pytest.mark.parametrize("weight", ["softmax", "softmax_chosen", "sigmoid", "decoupled"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_k": 4},
        {"select": "top_p", "select_options": {"min_k": 2}, "weight_options": {"renormalize": True}},
        {"unit": "sequence"},
        {"unit": 2},
    ],
    ids=str,
)
def test_any_routing_with_weights_that_sum_to_one_is_exact(options, weight):
    model, x = dense("mlp", torch.float64), torch.randn(3, 5, D, dtype=torch.float64)
    expected = model(x)
    if weight not in ("softmax", "decoupled"):
        options = {name: value for name, value in options.items() if name != "weight_options"}
    close(upcycled(model, hidden=H, weight=weight, **options)(x), expected)


def test_weights_that_do_not_sum_to_one_are_not():
    model, x = dense("mlp"), torch.randn(3, 5, D)
    expected = model(x)
    assert not torch.allclose(upcycled(model, hidden=H, weight_options={"renormalize": False})(x), expected, atol=1e-3)


@pytest.mark.parametrize("shared_hidden", [0, 8])
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_small_experts_average_to_the_dense_model(kind, shared_hidden):
    """Slices of the FFN: with every expert on at equal weight they make it whole."""
    model, x = dense(kind, torch.float64), torch.randn(7, D, dtype=torch.float64)
    expected = model(x)
    hidden = (H - shared_hidden) // 2  # 4 experts cover every unit twice
    moecore.replace_ffn(
        model, "all", moecore.MoEConfig(num_experts=4, top_k=4, hidden=hidden, shared_hidden=shared_hidden)
    )
    nn.init.zeros_(model[0].router.score.weight)
    close(model(x), expected)


def test_small_experts_hold_different_units():
    model = dense("mlp")
    up = model[0][0].weight.detach().clone()
    bank = upcycled(model, hidden=H // 4)[0].experts
    assert torch.equal(bank.up.detach().flatten(0, 1), up)


def test_shared_expert_takes_the_first_units():
    model = dense("mlp")
    up, down_bias = model[0][0].weight.detach().clone(), model[0][3].bias.detach().clone()
    moe = upcycled(model, hidden=H - 8, shared_hidden=8)[0]
    assert torch.equal(moe.shared.bank.up[0], up[:8])
    assert torch.equal(moe.experts.up[2], up[8:])
    assert torch.equal(moe.shared.bank.down_bias[0], down_bias)
    assert moe.experts.down_bias.abs().sum() == 0


def test_gradients_at_step_zero_add_up_to_the_dense_ones():
    model, x = dense("mlp", torch.float64), torch.randn(9, D, dtype=torch.float64)
    model(x).square().sum().backward()
    up = model[0][0].weight.grad
    moe = upcycled(model, hidden=H)
    moe(x).square().sum().backward()
    close(moe[0].experts.up.grad.sum(0), up)


def test_noise_breaks_symmetry_reproducibly():
    model, x = dense("glu"), torch.randn(9, D)
    ffn = moecore.find_ffns(model)[0]
    expected = model(x)

    def noisy(noise: float) -> moecore.MoE:
        layer = moecore.MoE.build(D, num_experts=4, top_k=2, hidden=H, glu=True, bias=True, activation="silu")
        return moecore.upcycle(ffn, layer, noise=noise, generator=torch.Generator().manual_seed(1))

    plain, first, second = noisy(0.0).experts, noisy(0.1).experts, noisy(0.1).experts
    assert torch.equal(plain.up[0], plain.up[1])
    for name in ("up", "gate", "down"):
        one, two = getattr(first, name), getattr(second, name)
        assert torch.equal(one, two)
        assert not torch.equal(one[0], one[1])
        added = (one - getattr(plain, name)).std() / getattr(plain, name).std()
        assert added.item() == pytest.approx(0.1, rel=0.1)
    assert 1e-4 < (noisy(0.1)(x) - expected).abs().max() < 0.5


def test_upcycling_copies_rather_than_shares():
    model = dense("mlp")
    ffn = moecore.find_ffns(model)[0]
    before = ffn.up.clone()
    layer = moecore.MoE.build(D, num_experts=2, top_k=1, hidden=H)
    moecore.upcycle(ffn, layer)
    with torch.no_grad():
        layer.experts.up.zero_()
    assert torch.equal(ffn.up, before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("experts", [1, 3, 8, H])
@pytest.mark.parametrize("kind", ["mlp", "mlp_relu_nobias", "mlp_leaky", "glu"])
def test_split_with_every_expert_on_equals_the_dense_ffn(kind, experts, dtype):
    model, x = dense(kind, dtype), torch.randn(9, D, dtype=dtype)
    ffn = moecore.find_ffns(model)[0]
    shape = ffn.shape()
    layer = moecore.MoE.build(
        D,
        num_experts=experts,
        top_k=experts,
        hidden=H // experts,
        weight="constant",
        glu=shape.glu,
        bias=shape.bias,
    ).to(dtype)
    cls = moecore.GLUBank if shape.glu else moecore.MLPBank
    layer.experts = cls(experts, D, H // experts, activation=shape.activation, bias=shape.bias).to(dtype)
    moecore.split(ffn, layer.experts)
    close(layer(x), model(x))


def test_split_experts_are_consecutive_units():
    model, x = dense("mlp"), torch.randn(9, D)
    ffn = moecore.find_ffns(model)[0]
    bank = moecore.split(ffn, moecore.MLPBank(3, D, 8))
    for e in range(3):
        units = slice(8 * e, 8 * e + 8)
        hidden = F.gelu(F.linear(x, ffn.up[units], ffn.up_bias[units]))
        expected = F.linear(hidden, ffn.down[:, units], ffn.down_bias / 3)
        torch.testing.assert_close(bank(x, SingleLayout(e)), expected)


@pytest.mark.parametrize("bias", [(True, False), (False, True)], ids=["up", "down"])
def test_biases_on_one_map_only_are_kept(bias):
    model, x = nn.Sequential(timm.layers.Mlp(D, H, bias=bias)), torch.randn(9, D)
    nn.init.normal_(model[0].fc1.bias if bias[0] else model[0].fc2.bias)
    expected = model(x)
    close(upcycled(model, hidden=H)(x), expected)


def test_experts_with_biases_take_over_an_ffn_without():
    model, x = dense("mlp_relu_nobias"), torch.randn(9, D)
    expected = model(x)
    close(upcycled(model, hidden=H, bias=True)(x), expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mlp", {"bias": False}, "bias=False: the FFN has biases; leave bias null, or use init=random"),
        ("glu", {"bias": False}, "bias=False: the FFN has biases; leave bias null, or use init=random"),
        ("mlp", {"activation": "gelu_tanh"}, "activation='gelu_tanh': the FFN uses gelu; leave activation null"),
        ("glu", {"activation": "gelu"}, "activation='gelu': the FFN uses silu; leave activation null"),
        ("mlp_leaky", {"activation": "relu"}, r"activation='relu': the FFN uses LeakyReLU\(negative_slope=0.2\)"),
        ("mlp_relu_nobias", {"glu": True}, "glu=True: the FFN has no gate; leave glu null"),
    ],
)
def test_experts_that_compute_something_else_are_not_filled(kind, options, message):
    for shared_hidden in (0, 8):
        with pytest.raises(moecore.ConfigError, match=f"^{message}"):
            upcycled(dense(kind), shared_hidden=shared_hidden, hidden=H, **options)
    moecore.replace_ffn(dense(kind), "all", moecore.MoEConfig(**options), init="random")


def test_split_refuses_experts_that_compute_something_else():
    ffn = moecore.find_ffns(dense("mlp_leaky"))[0]
    moecore.split(ffn, moecore.MLPBank(3, D, 8, activation=ffn.activation))
    with pytest.raises(moecore.ConfigError, match=r"^activation=LeakyReLU\(negative_slope=0.1\): the FFN uses Leaky"):
        moecore.split(ffn, moecore.MLPBank(3, D, 8, activation=nn.LeakyReLU(0.1)))
    with pytest.raises(moecore.ConfigError, match=r"^bias=False: the FFN has biases"):
        moecore.split(ffn, moecore.MLPBank(3, D, 8, activation=ffn.activation, bias=False))


def test_split_must_use_every_unit():
    ffn = moecore.find_ffns(dense("mlp"))[0]
    with pytest.raises(moecore.ConfigError, match=r"^hidden=7: 3 experts must share 24 units"):
        moecore.split(ffn, moecore.MLPBank(3, D, 7))
    with pytest.raises(moecore.ConfigError, match=r"^glu=True: the FFN has no gate"):
        moecore.split(ffn, moecore.GLUBank(3, D, 8))


def test_upcycling_refuses_what_it_cannot_fill():
    ffn = moecore.find_ffns(dense("mlp"))[0]
    router = moecore.MoE.build(D, num_experts=2).router
    with pytest.raises(moecore.ConfigError, match=r"^experts='ConstantBank': upcycling fills MLP and GLU banks only"):
        moecore.upcycle(ffn, moecore.MoE(router, moecore.ConstantBank(2, D)))
    layer = moecore.MoE(router, moecore.MLPBank(2, D, H), moecore.SharedExpert(moecore.ConstantBank(1, D)))
    with pytest.raises(moecore.ConfigError, match=r"^experts='ConstantBank': upcycling fills MLP and GLU banks only"):
        moecore.upcycle(ffn, layer)
    for shared in (H, H + 1):
        layer = moecore.MoE.build(D, num_experts=2, hidden=4, shared_hidden=shared)
        with pytest.raises(moecore.ConfigError, match=rf"^shared_hidden={shared}: must leave some of the FFN's 24"):
            moecore.upcycle(ffn, layer)
