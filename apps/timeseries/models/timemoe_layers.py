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
QUERIES = 64
"""Queries attended to keys at once in CPU inference: keys after them are left out instead of masked."""


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Of residuals, norms and heads beside weights of `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _cpu_inference(x: Tensor) -> bool:
    """Where memory is worth reusing by hand."""
    return x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_exporting()


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (arXiv 1910.07467) of full-precision tokens, given out in the dtype of the weight."""

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """[..., D] -> [..., D]."""
        return self.full(x).to(self.weight.dtype)

    def full(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """The same in the dtype of `x`."""
        if not _cpu_inference(x):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()  # the library's takes more passes
        return (x * square.div_(x.shape[-1]).add_(self.eps).rsqrt_()).mul_(self.weight)


class PointEmbedding(nn.Module):
    """A value as a token, `silu(gate x) * emb x`: a missing one, taken as 0, is the zero token.

    In full precision whatever the weights have: bfloat16 would keep three digits of a value.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb, self.gate = nn.Linear(1, width, bias=False), nn.Linear(1, width, bias=False)

    def forward(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """[B, N] -> [B, N, D]."""
        gate, emb = (layer.weight[:, 0].to(x.dtype) for layer in (self.gate, self.emb))
        x = x[..., None]
        return F.silu(gate * x) * (emb * x)


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

    def rows(self, start: int, stop: int) -> LayerCache:
        """Of some of the sequences, in the same buffers."""
        return LayerCache(self.key[start:stop], self.value[start:stop], self.length)


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
        last: bool = False,
    ) -> Float[Tensor, "B N D"]:
        """[B, N, D] -> [B, N, D].

        Args:
            x: tokens.
            rotation: cosines and sines of their positions.
            mask: which of the M tokens so far each may attend to, or what is added to its products; None: all before
                it.
            cache: of what came before; the tokens are added to it.
            last: give the last token only, `[B, 1, D]`.
        """
        key, value = rotate(self._heads(self.key(x)), *rotation), self._heads(self.value(x))
        if cache is not None:
            key, value = cache.append(key, value)
        if last:
            x, rotation = x[:, -1:], tuple(part[..., -1:, :] for part in rotation)
            mask = None if mask is None else mask[..., -1:, :]
        query = rotate(self._heads(self.query(x)), *rotation)
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        y = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "B N E"]) -> Float[Tensor, "B H N d"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def blockwise(x: Float[Tensor, "B N"]) -> bool:
    """Whether `attend` will take the queries of N points in blocks, for which it wants a mask to add."""
    return x.shape[1] > QUERIES and _cpu_inference(x)


def as_added(mask: Bool[Tensor, "*B N M"], dtype: torch.dtype) -> Float[Tensor, "*B N M"]:
    """0 where the mask is true, minus infinity elsewhere: made once for all layers."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def attend(
    query: Float[Tensor, "B H N d"],
    key: Float[Tensor, "B H M d"],
    value: Float[Tensor, "B H M d"],
    mask: Tensor | None,
    dropout: float,
) -> Float[Tensor, "B H N d"]:
    """Causal attention of the last N of M tokens, who sees whom in the mask (None: everyone before)."""
    new, past = query.shape[2], key.shape[2] - query.shape[2]
    if mask is None or new <= QUERIES or not _cpu_inference(query):
        causal = mask is None and new > 1
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
    y = query.new_empty(query.shape[0], new, *query.shape[1::2]).transpose(1, 2)
    for i in range(0, new, QUERIES):
        j = min(i + QUERIES, new)
        seen = past + j
        part = query[:, :, i:j], key[:, :, :seen], value[:, :, :seen]
        y[:, :, i:j] = F.scaled_dot_product_attention(*part, mask[..., i:j, :seen])
    return y


class GLU(nn.Module):
    """SwiGLU, the FFN of the dense variant."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """[..., D] -> [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Head(nn.Linear):
    """The next points, in full precision."""

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T p"]:
        """[..., D] -> [..., p]."""
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    """Attention, then experts, each normalised before and added to its input."""

    def __init__(self, config: TimeMoEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = RMSNorm(width, eps=EPS), RMSNorm(width, eps=EPS)
        self.attention = Attention(config)
        self.ffn = sparse_ffn(config) if config.num_experts else GLU(width, config.intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 N M"] | None,
        cache: LayerCache | None = None,
        last: bool = False,
    ) -> Float[Tensor, "B N D"]:
        """[B, N, D] -> [B, N, D]; arguments as of `Attention`. Without gradients `x` is used up."""
        y = self.attention(self.norm1(x), rotation, mask, cache, last)
        x = _add(x[:, -1:] if last else x, y)
        return _add(x, self.ffn(self.norm2(x)))


def _add(x: Tensor, y: Tensor) -> Tensor:
    return x.add_(y) if _cpu_inference(x) else x + y


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
