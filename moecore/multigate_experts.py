"""Many small experts over one input, computed together: a matrix product per layer, whatever the number of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecore.activations import resolve_activation
from moecore.errors import require
from moecore.factorized import FactorizedInput, linear


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

    reads_input = True
    """Whether the first layer reads inputs as they are; if not, `first` is not all that happens to them."""

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

    @property
    def first(self) -> tuple[Float[Tensor, "C D"], Float[Tensor, " C"] | None]:
        """First layer of all experts as one linear map, C = E U: weight and bias."""
        return self.weights[0].flatten(0, 1), self.biases[0].flatten() if len(self.biases) else None

    def forward(self, x: Float[Tensor, "B D"] | Float[Tensor, "B E D"] | FactorizedInput) -> Float[Tensor, "B E O"]:
        """Outputs of all experts, for one input or one each."""
        if isinstance(x, Tensor) and x.dim() == 3:
            return self._go_on(self._batched(x, 0))
        return self.go_on(linear(x, *self.first))

    def go_on(self, y: Float[Tensor, "B C"]) -> Float[Tensor, "B E O"]:
        """Outputs of all experts, from what the map `first` gave."""
        return self._go_on(y.view(y.shape[0], self.num_experts, self.units[0]))

    def _go_on(self, x: Float[Tensor, "B E U"]) -> Float[Tensor, "B E O"]:
        for i in range(len(self.weights)):
            if i > 0:
                x = self._batched(x, i)
            if i >= self.num_active:
                break
            if len(self.norms):
                x = self.norms[i](x.flatten(1)).view(x.shape)
            x = self.dropout(self.activation(x))
        return x

    def _batched(self, x: Float[Tensor, "B E _"], layer: int) -> Float[Tensor, "B E U"]:
        x, weight = x.transpose(0, 1), self.weights[layer].transpose(1, 2)  # [E, B, _], [E, _, U]
        y = torch.baddbmm(self.biases[layer][:, None], x, weight) if len(self.biases) else torch.bmm(x, weight)
        return y.transpose(0, 1)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.num_experts} experts, {self.width} -> {' -> '.join(map(str, self.units))}"
