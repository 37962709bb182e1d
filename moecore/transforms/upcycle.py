"""From a dense FFN to experts: copies of it (upcycling), or parts of it (splitting)."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from moecore.build import FFNShape
from moecore.errors import require
from moecore.experts import ExpertBank, MLPBank
from moecore.ffn import DenseFFN
from moecore.layer import MoE


@torch.no_grad()
def upcycle(ffn: DenseFFN, layer: MoE, noise: float = 0.0, generator: torch.Generator | None = None) -> MoE:
    """Initialise a layer's experts from a dense FFN (sparse upcycling, arXiv 2212.05055).

    Each token is to pass, through its shared expert and its top-k routed ones, every hidden unit of the FFN once:

    * The shared expert, if there is one, takes the first units of the FFN.
    * If a routed expert has room for all the remaining units, every expert is a copy of them. Then, as long as combine
      weights sum to one (for select "top_p" set `weight_options={"renormalize": True}`), the layer equals the FFN
      exactly at step 0. With `top_k=1` the weight is the raw probability, about 1 / E at first: the routed part then
      starts that much smaller.
    * If experts are smaller, the remaining units are cut into slices that fill the experts in turn, and the slices'
      output is scaled up so that its mean over experts is that of the FFN: a start, not an identity.

    Args:
        ffn: what `moecore.find_ffns` read.
        layer: a layer with a `MLPBank` or `GLUBank` of the same kind (gated or not).
        noise: relative Gaussian noise on the copies, to break their symmetry (0.0: exact copies).
        generator: for the noise.

    Raises:
        ConfigError: if the bank cannot hold the FFN's kind of units: a gate or none, its biases, its activation.
    """
    first = 0
    if layer.shared is not None:
        shared = _plain_bank(layer.shared.bank)
        first = shared.hidden
        require(
            first < ffn.hidden,
            "shared_hidden",
            first,
            f"must leave some of the FFN's {ffn.hidden} hidden units to the routed experts",
        )
        _fill(ffn, shared, _slices(0, first, 1, shared.hidden), share=1.0, bias=1.0)
    bank = _plain_bank(layer.experts)
    left = ffn.hidden - first
    if bank.hidden >= left:
        # Units beyond the FFN's are twins of its first ones; halving both outputs keeps the sum.
        units = _slices(first, left, bank.num_experts, bank.hidden, same=True)
        _fill(ffn, bank, units, share=1.0, bias=0.0 if layer.shared is not None else 1.0)
    else:
        units = _slices(first, left, bank.num_experts, bank.hidden)
        _fill(ffn, bank, units, share=left / bank.hidden, bias=0.0 if layer.shared is not None else 1.0)
    if noise:
        for weight in (bank.up, bank.gate, bank.down):
            if weight is not None:
                weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator).to(weight))
    return layer


@torch.no_grad()
def split(ffn: DenseFFN, bank: MLPBank) -> MLPBank:
    """Cut a dense FFN into experts of consecutive hidden units (MoEfication, arXiv 2110.01786, random split).

    With every expert on and every combine weight 1 (`weight="constant"`) the sum of the experts is the FFN.

    Raises:
        ConfigError: unless the experts' hidden units add up to the FFN's and are of its kind (see `upcycle`).
    """
    total = bank.num_experts * bank.hidden
    require(
        total == ffn.hidden,
        "hidden",
        bank.hidden,
        f"{bank.num_experts} experts must share {ffn.hidden} units",
    )
    _fill(
        ffn,
        bank,
        _slices(0, ffn.hidden, bank.num_experts, bank.hidden),
        share=1.0,
        bias=1.0 / bank.num_experts,
    )
    return bank


def _plain_bank(bank: ExpertBank) -> MLPBank:
    require(isinstance(bank, MLPBank), "experts", type(bank).__name__, "upcycling fills MLP and GLU banks only")
    return bank


def _slices(first: int, count: int, experts: int, size: int, same: bool = False) -> Int[Tensor, "E F"]:
    """Which hidden units each expert takes: all the same ones, or consecutive slices, wrapping around."""
    start = torch.zeros(experts, 1, dtype=torch.long) if same else torch.arange(experts)[:, None] * size
    return first + (start + torch.arange(size)) % count


def _check_kind(ffn: DenseFFN, bank: MLPBank) -> None:
    """Units may be copied only into experts that compute the same with them."""
    theirs = ffn.shape()
    activation = bank.activation_name or bank.activation
    own = FFNShape(bank.hidden, bank.gate is not None, activation, bank.up_bias is not None)
    for field, fits, what in (
        ("glu", own.glu == theirs.glu, f"has {'a' if theirs.glu else 'no'} gate"),
        ("bias", own.bias or not theirs.bias, "has biases"),
        ("activation", own.activation == theirs.activation, f"uses {theirs.activation}"),
    ):
        require(fits, field, getattr(own, field), f"the FFN {what}; leave {field} null, or use init=random")


def _fill(ffn: DenseFFN, bank: MLPBank, units: Int[Tensor, "E F"], share: float, bias: float) -> None:
    """Copy hidden units into experts, their output scaled by `share`, the output bias by `bias`.

    A unit that occurs several times in one expert has its output divided among its copies.
    """
    _check_kind(ffn, bank)
    units = units.to(ffn.up.device)
    copies = (units[:, :, None] == units[:, None, :]).sum(-1).to(ffn.down.dtype)  # [E, F]
    bank.up.copy_(ffn.up[units])
    bank.down.copy_((ffn.down.t()[units] * (share / copies)[..., None]).transpose(1, 2))
    if ffn.gate is not None:
        bank.gate.copy_(ffn.gate[units])
    for own, theirs in ((bank.up_bias, ffn.up_bias), (bank.gate_bias, ffn.gate_bias)):
        if own is not None:
            own.copy_(theirs[units]) if theirs is not None else own.zero_()
    if bank.down_bias is not None:
        bank.down_bias.copy_(ffn.down_bias * bias) if ffn.down_bias is not None else bank.down_bias.zero_()
