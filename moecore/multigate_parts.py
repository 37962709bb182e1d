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
        num_readers: N gates at once, each with maps of its own; None: one.
    """

    def __init__(self, width: int, rank: int = 16, num_maps: int = 2, num_readers: int | None = None) -> None:
        super().__init__()
        require(rank >= 1, "rank", rank, "must be at least 1")
        require(num_maps >= 1, "num_maps", num_maps, "must be at least 1")
        require(num_readers is None or num_readers >= 1, "num_readers", num_readers, "must be at least 1, or None")
        self.num_maps, self.num_readers = num_maps, num_readers
        total = num_maps * (num_readers or 1)
        self.down = nn.Parameter(torch.empty(width, total * rank).normal_(std=width**-0.5))
        self.up = nn.Parameter(torch.empty(total, rank, width).normal_(std=0.01))
        self.mix = nn.Linear(width, total, bias=False) if num_maps > 1 else None

    def forward(self, v: Float[Tensor, "B D"]) -> Float[Tensor, "B D"] | Float[Tensor, "B N D"]:
        """[B, D] -> [B, D], or [B, N, D] for N readers."""
        rank, width = self.up.shape[1:]
        rows, maps, readers = v.shape[0], self.num_maps, self.num_readers or 1
        low = (v @ self.down).view(rows, readers, maps, rank).transpose(0, 1)  # [N, B, L, r]
        up = self.up.view(readers, maps, rank, width)
        shares = [2.0] * maps
        if self.mix is not None:
            mixed = 2 * self.mix(v).view(rows, readers, maps).softmax(-1)
            shares = mixed.transpose(0, 1)[..., None].unbind(2)  # [N, B, 1] of each map
        # Map by map: a slice of one large product would be filled with zeros in the backward pass.
        factors = sum(torch.bmm(low[:, :, i], up[:, i]).sigmoid() * shares[i] for i in range(maps))  # [N, B, D]
        gated = v * factors
        return gated[0] if self.num_readers is None else gated.transpose(0, 1)


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
