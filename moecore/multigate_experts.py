"""Many small experts over one input, computed together: a matrix product per layer, whatever the number of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecore.activations import resolve_activation
from moecore.errors import require


def draw_linear(weight: Float[Tensor, "E U D"], bias: Float[Tensor, "E U"] | None) -> None:
    """Fresh weights of E linear maps, as `nn.Linear` draws them."""
    bound = 1 / math.sqrt(weight.shape[2])
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm that also trains on a single row, the rest of an epoch: by the running statistics, as it has none."""

    def forward(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        """[B, C] -> [B, C]."""
        if self.training and x.shape[0] == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


class ExpertStack(nn.Module):
    """E experts, MLPs of equal sizes: linear, normalisation if asked for, activation, dropout, layer by layer.

    The first layer of all experts is one product `[B, D] x [D, E U]`, further ones are batched over experts; so is the
    first if each expert has an input of its own, `[B, E, D]`, as the towers of several tasks have.

    Args:
        num_experts: E.
        width: D.
        units: units U of each layer; the last is the output O.
        activation: a name of `moecore.ACTIVATIONS`.
        norm: BatchNorm before the activation, over the batch, per expert and unit (HoME's experts, with silu).
        dropout: after each activation.
        bias: of the linear layers.
        linear: the last layer is no more than that: without normalisation, activation and dropout.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        units: Sequence[int],
        activation: str = "relu",
        norm: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        linear: bool = False,
    ) -> None:
        super().__init__()
        require(num_experts >= 1, "num_experts", num_experts, "must be at least 1")
        require(len(units) >= 1 and min(units) >= 1, "units", list(units), "give at least one layer of at least 1 unit")
        require(0 <= dropout < 1, "dropout", dropout, "must lie in [0, 1)")
        self.num_experts, self.width, self.units = num_experts, width, tuple(units)
        sizes = [width, *units]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(num_experts, out, into)) for into, out in zip(sizes, units, strict=False)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, out)) for out in units if bias)
        active = units[:-1] if linear else units
        self.num_active = len(active)
        self.norms = nn.ModuleList(BatchNorm(num_experts * out) for out in active if norm)
        self.activation = resolve_activation(activation)[1]
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @property
    def out_width(self) -> int:
        """O."""
        return self.units[-1]

    def reset_parameters(self) -> None:
        """As `nn.Linear` draws them."""
        for i, weight in enumerate(self.weights):
            draw_linear(weight, self.biases[i] if len(self.biases) else None)

    def forward(self, x: Float[Tensor, "B D"] | Float[Tensor, "B E D"]) -> Float[Tensor, "B E O"]:
        """Outputs of all experts, for one input or one each."""
        for i, weight in enumerate(self.weights):
            bias = self.biases[i] if len(self.biases) else None
            x = self._first(x, weight, bias) if x.dim() == 2 else self._further(x, weight, bias)  # [B, E, U]
            if i >= self.num_active:
                return x
            if len(self.norms):
                x = self.norms[i](x.flatten(1)).view(x.shape)
            x = self.dropout(self.activation(x))
        return x

    def _first(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "B E U"]:
        flat = nn.functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return flat.view(x.shape[0], self.num_experts, weight.shape[1])

    @staticmethod
    def _further(x: Tensor, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "B E U"]:
        x, weight = x.transpose(0, 1), weight.transpose(1, 2)  # [E, B, U], [E, U, U']
        y = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)
        return y.transpose(0, 1)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.num_experts} experts, {self.width} -> {' -> '.join(map(str, self.units))}"
