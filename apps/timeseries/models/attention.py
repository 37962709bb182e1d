"""Attention over the patches of a window, order told by rotation."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from apps.timeseries.models.rotary import apply_rotary


class Attention(nn.Module):
    """Self-attention in which several query heads share a head of keys and values.

    Grouped-query attention (arXiv 2305.13245) with rotary positions (arXiv 2104.09864).

    Args:
        width: D.
        heads: of queries.
        kv_heads: of keys and values; divides `heads`.
        dropout: on attention weights, in training.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.head_dim = width // heads
        self.query = nn.Linear(width, heads * self.head_dim, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(self, x: Float[Tensor, "B P D"], mask: Bool[Tensor, "B P"] | None = None) -> Float[Tensor, "B P D"]:
        """[B, P, D] -> [B, P, D]; keys where the mask is false are not attended to."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, P, D / heads]
            for project in (self.query, self.key, self.value)
        )
        query, key = apply_rotary(query, key)
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(y.transpose(1, 2).flatten(2))
