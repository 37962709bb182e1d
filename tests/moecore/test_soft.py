"""Soft MoE against the formulas of its paper."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moecore
from moecore.executors.layouts import SingleLayout

B, N, D, E = 3, 7, 8, 4


def by_hand(layer: moecore.SoftMoE, x: torch.Tensor) -> torch.Tensor:
    """Algorithms 1 and 2 of arXiv 2308.00951, slot by slot."""
    phi = layer.scale * layer.phi / layer.phi.norm(dim=0, keepdim=True)
    y = []
    for sample in x:
        logits = (sample / sample.norm(dim=1, keepdim=True)) @ phi  # [N, E*S]
        dispatch, combine = logits.exp() / logits.exp().sum(0), logits.exp() / logits.exp().sum(1, keepdim=True)
        slots = torch.einsum("nd,nm->md", sample, dispatch)
        out = [layer.experts(slots[m : m + 1], SingleLayout(m // layer.slots))[0] for m in range(slots.shape[0])]
        y.append(torch.einsum("mo,nm->no", torch.stack(out), combine))
    return torch.stack(y)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("bank", ["mlp", "glu", "mlp_wide", "constant"])
def test_follows_its_formula_with_gradients(bank, slots):
    banks = {
        "mlp": lambda: moecore.MLPBank(E, D, 5),
        "glu": lambda: moecore.GLUBank(E, D, 5),
        "mlp_wide": lambda: moecore.MLPBank(E, D, 5, out_width=11),
        "constant": lambda: moecore.ConstantBank(E, D),
    }
    layer = moecore.SoftMoE(banks[bank](), slots).double()
    with torch.no_grad():
        layer.scale.fill_(1.7)
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), by_hand(layer, x)
    assert y.shape == (B, N, layer.experts.out_width)
    torch.testing.assert_close(y, expected)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_order_of_tokens_only_permutes_the_output():
    layer, x = moecore.SoftMoE(moecore.MLPBank(E, D, 5), 2), torch.randn(B, N, D)
    order = torch.randperm(N)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_samples_do_not_see_each_other_but_positions_do():
    layer, x = moecore.SoftMoE(moecore.MLPBank(E, D, 5)), torch.randn(B, N, D)
    y = layer(x)
    torch.testing.assert_close(layer(x[1:2]), y[1:2])
    moved = x.clone()
    moved[:, 0] += 1
    assert not torch.allclose(layer(moved)[:, 1], y[:, 1])


class Products(TorchDispatchMode):
    """Remembers the dtype of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def test_slot_logits_are_float32_under_autocast():
    layer, x = moecore.SoftMoE(moecore.MLPBank(E, D, 5)), torch.randn(B, N, D)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        y = layer(x)
    assert products.dtypes[0] == torch.float32
    assert set(products.dtypes[1:]) == {torch.bfloat16}
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.02)


def test_every_parameter_learns():
    layer = moecore.SoftMoE(moecore.MLPBank(E, D, 5), 2)
    (layer(torch.randn(B, N, D)) * torch.randn(B, N, D)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_length_of_tokens_does_not_move_the_mixing():
    """Logits are of normalised tokens: with linear experts the layer is then homogeneous."""
    layer = moecore.SoftMoE(moecore.MLPBank(E, D, 5, activation="identity", bias=False))
    x = torch.randn(B, N, D)
    torch.testing.assert_close(layer(x * 4), layer(x) * 4)
