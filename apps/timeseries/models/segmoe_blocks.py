"""Blocks of Seg-MoE: attention, then experts per segment."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

import moecore
from apps.timeseries.model_settings import SegMoEConfig
from apps.timeseries.models.attention import Attention
from moecore.routing import Router
from moecore.scores import LinearScore
from moecore.selection import TopK
from moecore.weighting import Softmax


class Norm(nn.RMSNorm):
    """RMS norm in the precision of its weights, also under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """[B, P, D] -> [B, P, D]."""
        return super().forward(x.to(self.weight.dtype))


class Block(nn.Module):
    """Attention, then experts, each normalised before and dropped as a path at random.

    Args:
        config: sizes and experts.
        layer: number of the block, which decides on its segments and how often its paths are dropped.
        dense: a plain FFN of equal active multiply-adds instead of the MoE layer.
    """

    def __init__(self, config: SegMoEConfig, layer: int, dense: bool) -> None:
        super().__init__()
        width = config.d_model
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attention = Attention(width, config.num_heads, config.num_kv_heads, dropout=config.dropout)
        segment = config.segments[min(layer, len(config.segments) - 1)]
        self.ffn = dense_twin(config, segment) if dense else segment_moe(config, segment)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = config.drop_path * layer / max(config.num_layers - 1, 1)

    def forward(self, x: Float[Tensor, "B P D"], mask: Bool[Tensor, "B P"] | None) -> Float[Tensor, "B P D"]:
        """[B, P, D] -> [B, P, D]; keys where the mask is false are not attended to."""
        x = x + self._drop(self.attention(self.norm1(x), mask))
        return x + self._drop(self.dropout(self.ffn(self.norm2(x))))

    def _drop(self, branch: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """Leave the branch out of some windows altogether, in training."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep).div_(keep)


def segment_moe(config: SegMoEConfig, segment: int) -> moecore.MoE:
    """One routing decision per segment of `segment` patches, made from all of them at once."""
    width, hidden, experts = config.d_model, config.d_ff, config.num_experts
    score = LinearScore(segment * width, experts, temperature=config.temperature, dropout=config.router_dropout)
    router = Router(score, TopK(experts, config.top_k), Softmax(width, experts, config.top_k))
    if config.routed == "segment":
        bank = moecore.SegmentBank(experts, segment, width, segment * hidden, dropout=config.dropout)
    else:
        bank = moecore.MLPBank(experts, width, hidden, dropout=config.dropout)
    shared = None
    if config.shared:
        whole = moecore.SegmentBank(1, segment, width, segment * hidden, dropout=config.dropout)
        shared = moecore.SharedExpert(whole, gated=True)
    return moecore.MoE(router, bank, shared, unit=segment, pool="flatten", aux_loss={"switch": config.aux_loss})


def dense_twin(config: SegMoEConfig, segment: int) -> nn.Module:
    """An FFN on patches with the multiply-adds that a patch uses of the MoE layer."""
    routed = config.top_k * (segment if config.routed == "segment" else 1)
    hidden = config.d_ff * (routed + (segment if config.shared else 0))
    up, down = nn.Linear(config.d_model, hidden), nn.Linear(hidden, config.d_model)
    return nn.Sequential(up, nn.GELU(), nn.Dropout(config.dropout), down)
