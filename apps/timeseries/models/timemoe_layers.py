"""Layers of Time-MoE: gated point embedding, causal attention with a cache, experts with a gated shared one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.timeseries.model_settings import TimeMoEConfig
from apps.timeseries.models.rotary import rotate
from moecore.experts import GLUBank
from moecore.routing import Router
from moecore.scores import LinearScore
from moecore.selection import TopK
from moecore.weighting import Softmax

EPS = 1e-6
"""Of the root mean square norms."""


class PointEmbedding(nn.Module):
    """A value as a token, `silu(gate x) * emb x`: a missing one, taken as 0, is the zero token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb, self.gate = nn.Linear(1, width, bias=False), nn.Linear(1, width, bias=False)

    def forward(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """[B, N] -> [B, N, D]."""
        x = x[..., None]
        return F.silu(self.gate(x)) * self.emb(x)


@dataclass
class LayerCache:
    """Keys and values of one layer, in buffers made once for the longest sequence to come."""

    key: Float[Tensor, "B G M d"]
    value: Float[Tensor, "B G M d"]
    length: int = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new ones behind the old; returns all so far."""
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]


class Attention(nn.Module):
    """Causal attention; queries, keys and values have biases, the output has none."""

    def __init__(self, config: TimeMoEConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.kv_heads, self.dropout = config.num_kv_heads or config.num_heads, config.attention_dropout
        self.head_dim = width // self.heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, self.kv_heads * self.head_dim)
        self.value = nn.Linear(width, self.kv_heads * self.head_dim)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 N M"] | None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B N D"]:
        """[B, N, D] -> [B, N, D].

        Args:
            x: tokens.
            rotation: cosines and sines of their positions.
            mask: which of the M tokens so far each may attend to; None: all before it.
            cache: of what came before; the tokens are added to it.
        """
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache.append(key, value)
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and query.shape[2] > 1,
        )
        return self.out(y.transpose(1, 2).flatten(2))


class GLU(nn.Module):
    """SwiGLU, the FFN of the dense variant."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """[..., D] -> [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then experts, each normalised before and added to its input."""

    def __init__(self, config: TimeMoEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
        self.attention = Attention(config)
        self.ffn = sparse_ffn(config) if config.num_experts else GLU(width, config.intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 N M"] | None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B N D"]:
        """[B, N, D] -> [B, N, D]; arguments as of `Attention`."""
        x = x + self.attention(self.norm1(x), rotation, mask, cache)
        return x + self.ffn(self.norm2(x))


def sparse_ffn(config: TimeMoEConfig) -> moecore.MoE:
    """Top-k of SwiGLU experts by raw softmax weights, plus a shared expert behind a sigmoid gate.

    A routed expert has 1 / top_k of the FFN's hidden units, the shared one all of them. The balance loss spans layers
    and is the model's; the layer's own mix is empty.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    experts, top = config.num_experts, config.top_k
    router = Router(LinearScore(width, experts), TopK(experts, top), Softmax(width, experts, top, renormalize=False))
    shared = moecore.SharedExpert(GLUBank(1, width, hidden), gated=True)
    return moecore.MoE(router, GLUBank(experts, width, hidden // top), shared, aux_loss={})


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Every matrix normal with the published deviation, every bias zero."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def causal_mask(allowed: Bool[Tensor, "B M"], new: int, segments: Tensor | None = None) -> Bool[Tensor, "B 1 N M"]:
    """Which tokens the last `new` of M may attend to: observed ones before them, of their own segment, and themselves.

    Args:
        allowed: observed tokens.
        new: N.
        segments: number of the packed series each token belongs to, `[B, M]`.
    """
    total = allowed.shape[1]
    at = torch.arange(total, device=allowed.device)
    rows = at[total - new :, None]
    mask = (at <= rows) & allowed[:, None]  # [B, N, M]
    if segments is not None:
        mask &= segments[:, None] == segments[:, total - new :, None]
    return (mask | (at == rows))[:, None]  # a token without any other attends to itself: softmax needs something
