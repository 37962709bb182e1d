"""The MLPs of `moecore.ExpertStack` for sparse gates: a bank that computes each expert for the rows that chose it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moecore.activations import resolve_activation
from moecore.errors import require
from moecore.experts import ExpertBank, Layout
from moecore.multigate_experts import draw_linear


class StackBank(ExpertBank):
    """E experts, MLPs of equal sizes: linear, normalisation if asked for, activation, dropout, layer by layer.

    Rows come to an expert in other company in every batch, so normalisation is per row (LayerNorm), not over the batch.

    Args:
        num_experts: E.
        width: D.
        units: units of each layer; the last is the output O.
        activation: a name of `moecore.ACTIVATIONS`.
        norm: LayerNorm before the activation, with a scale and a shift per expert.
        dropout: after each activation.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        units: Sequence[int],
        activation: str = "relu",
        norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        require(len(units) >= 1 and min(units) >= 1, "units", list(units), "give at least one layer of at least 1 unit")
        super().__init__(num_experts, width, units[-1])
        require(0 <= dropout < 1, "dropout", dropout, "must lie in [0, 1)")
        self.activation, self.dropout = resolve_activation(activation)[1], dropout
        sizes = list(itertools.pairwise([width, *units]))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, out, into)) for into, out in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, out)) for _, out in sizes)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(num_experts, out)) for _, out in sizes if norm)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            draw_linear(weight, bias)

    def forward(self, x: Float[Tensor, "*R D"], layout: Layout) -> Float[Tensor, "*S O"]:
        """[R, D] -> [R, O]."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if len(self.scales):  # the layer's bias is the shift
                x = F.layer_norm(layout.linear(x, weight, None), weight.shape[1:2])
                x = x * layout.pick(self.scales[i], x).to(x.dtype) + layout.pick(bias, x).to(x.dtype)
            else:
                x = layout.linear(x, weight, bias)
            x = F.dropout(self.activation(x), self.dropout, self.training)
        return x
