"""Routed experts of LDL-MoE: an MLP each, an activation, and a weighted mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

import moecore
from apps.timeseries.model_settings import LDLMoEConfig
from moecore.experts import ExpertBank, Layout, MLPBank
from moecore.routing import Router
from moecore.scores import LinearScore
from moecore.selection import TopK
from moecore.weighting import Softmax

Activation = Callable[[Tensor], Tensor]
"""What an expert computes for a step -> what may be averaged over experts."""


class ActivatedBank(ExpertBank):
    """Experts that each give some numbers for every step: an MLP, then an activation.

    The output ends with a 1, so that a weighted sum of experts tells the sum of their weights.

    Args:
        num_experts: E.
        width: D.
        hidden: F, hidden units per expert.
        steps: H.
        numbers: P, of the MLP's output per step.
        activate: turns them into R numbers.
        gives: R, by default P.
        dropout: on hidden units, in training.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        steps: int,
        numbers: int,
        activate: Activation,
        gives: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_experts, width, steps * (gives or numbers) + 1)
        self.steps, self.numbers, self.activate = steps, numbers, activate
        self.mlp = MLPBank(num_experts, width, hidden, dropout=dropout, out_width=steps * numbers)

    def forward(self, x: Float[Tensor, "*R D"], layout: Layout) -> Float[Tensor, "*S O"]:
        """[R, D] -> [R, H R + 1]."""
        raw = self.mlp(x, layout).unflatten(-1, (self.steps, self.numbers))
        values = self.activate(raw).flatten(-2)
        return torch.cat([values, torch.ones_like(values[..., :1])], -1)


class Experts(moecore.MoE):
    """Windows go to their top-k experts, whose numbers are averaged by the gate's softmax.

    Args:
        config: experts per layer, and how many a window uses.
        steps: H.
        numbers, activate, gives: as for `ActivatedBank`.
    """

    def __init__(
        self, config: LDLMoEConfig, steps: int, numbers: int, activate: Activation, gives: int | None = None
    ) -> None:
        width, count, top = config.d_model, config.num_experts, config.top_k
        bank = ActivatedBank(count, width, config.d_ff, steps, numbers, activate, gives, config.dropout)
        router = Router(LinearScore(width, count), TopK(count, top), Softmax(width, count, top))
        super().__init__(router, bank, aux_loss={"switch": config.aux_loss})

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B H R"]:
        """[B, D] -> [B, H, R], at least in float32.

        A single expert per window comes with its probability as weight, through which the router learns; the value is
        divided by it, the gradient is not.
        """
        y = super().forward(x)
        y = y if y.dtype == torch.float64 else y.float()
        mean = y[:, :-1] / y[:, -1:].detach()
        return mean.unflatten(1, (self.experts.steps, -1))


def encoder(inputs: int, width: int, dropout: float) -> nn.Sequential:
    """Contexts and where they miss values, side by side [B, 2 L] -> [B, D]."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.GELU(),
        nn.LayerNorm(width),
    )


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
