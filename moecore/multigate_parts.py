"""What HoME puts around its experts: gates on features, and residual gates of experts on themselves.

HoME: Hierarchy of Multi-Gate Experts, Wang et al. 2024, arXiv 2408.05430.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecore.errors import require


class FeatureGate(nn.Module):
    """Features weighted elementwise, for one reader of its own: `v * sum_l a_l(v) 2 sigmoid(v B_l A_l)`.

    L low-rank maps share the work, mixed by a softmax over them. With fresh weights all factors are close to 1.

    Args:
        width: D.
        rank: r of each map.
        num_maps: L; 1 needs no mixture.
    """

    def __init__(self, width: int, rank: int = 16, num_maps: int = 2) -> None:
        super().__init__()
        require(rank >= 1, "rank", rank, "must be at least 1")
        require(num_maps >= 1, "num_maps", num_maps, "must be at least 1")
        self.down = nn.Parameter(torch.empty(width, num_maps * rank).normal_(std=width**-0.5))
        self.up = nn.Parameter(torch.empty(num_maps, rank, width).normal_(std=0.01))
        self.mix = nn.Linear(width, num_maps, bias=False) if num_maps > 1 else None

    def forward(self, v: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """[B, D] -> [B, D]."""
        maps, rank, _ = self.up.shape
        low = (v @ self.down).view(-1, maps, rank).transpose(0, 1)  # [L, B, r]
        factors = 2 * torch.bmm(low, self.up).sigmoid()  # [L, B, D]
        if self.mix is None:
            return v * factors[0]
        shares = self.mix(v).softmax(-1)  # [B, L]
        return v * torch.einsum("bl,lbd->bd", shares, factors)


class SelfGate(nn.Module):
    """Residual mixture of a task's (or group's) own experts: `sum_e s_e(v) f_e`, added to what its gate gave.

    It lets a gradient reach own experts that the softmax has turned away from.

    Args:
        width: D of what the gate reads.
        num_experts: E; s is a sigmoid if one, else a softmax.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)

    def forward(self, v: Float[Tensor, "B D"], outputs: Float[Tensor, "B E O"]) -> Float[Tensor, "B O"]:
        """Mixture of the experts' outputs."""
        logits = self.gate(v)
        shares = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)
        return torch.bmm(shares[:, None], outputs).squeeze(1)
