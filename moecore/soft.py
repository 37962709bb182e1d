"""Soft MoE: experts work on slots, each a mixture of all tokens; fully differentiable, nothing to balance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moecore.errors import require
from moecore.executors.layouts import EveryLayout
from moecore.experts import ExpertBank


class SoftMoE(nn.Module):
    """Every expert processes `slots` weighted averages of a sample's tokens (arXiv 2308.00951, algorithms 1 and 2).

    A layer of its own beside `MoE`: there are no assignments, so nothing here is recorded. Mixes positions, hence not
    for causal models.

    Args:
        experts: any bank of `moecore.experts`.
        slots: slots per expert; tokens / experts keeps the cost of the dense FFN.
    """

    def __init__(self, experts: ExpertBank, slots: int = 1) -> None:
        super().__init__()
        require(slots >= 1, "slots", slots, "must be at least 1")
        self.experts, self.slots = experts, slots
        count = experts.num_experts * slots
        self.phi = nn.Parameter(torch.randn(experts.width, count) / math.sqrt(experts.width))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N O"]:
        """[B, N, D] -> [B, N, O]."""
        with torch.autocast(x.device.type, enabled=False):  # slot logits in float32, like any router
            seen = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
            logits = seen @ (self.scale * F.normalize(self.phi, dim=0)).to(seen.dtype)  # [B, N, E*S]
        dispatch, combine = logits.softmax(1).to(x.dtype), logits.softmax(2).to(x.dtype)
        slots = torch.einsum("bnd,bnm->mbd", x, dispatch)  # [E*S, B, D]
        rows = slots.unflatten(0, (self.experts.num_experts, self.slots)).flatten(1, 2)  # [E, S*B, D]
        out = self.experts(rows, EveryLayout()).unflatten(1, (self.slots, x.shape[0])).flatten(0, 1)
        return torch.einsum("mbo,bnm->bno", out, combine.to(out.dtype))
