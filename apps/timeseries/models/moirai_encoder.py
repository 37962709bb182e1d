"""Moirai-MoE's encoder: any-variate attention and experts by distance to centroids (arXiv 2410.10469).

B windows, N tokens, D width, H heads, W width of a head. Sample paths grow behind a context that is encoded once: S
paths per window, M tokens per step and path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from apps.timeseries.model_settings import MoiraiMoEConfig
from apps.timeseries.models.moirai_tokens import Tokens
from moecore.build import build_moe
from moecore.config import MoEConfig

EPS = 1e-5
"""Of all norms."""


class Norm(nn.RMSNorm):
    """RMS norm in the precision of its weights, also under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """[..., D] -> [..., D]."""
        return super().forward(x.to(self.weight.dtype))


def rotate(x: Float[Tensor, "*B N W"], time: Int[Tensor, " N"], base: float = 10000.0) -> Float[Tensor, "*B N W"]:
    """Rotary positions (arXiv 2104.09864) in the first half of a head's width; neighbours are a pair, as published."""
    width = x.shape[-1] // 4 * 2
    theta = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = time[:, None] * theta  # [N, W / 4]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0:width:2], x[..., 1:width:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., width:]], -1)


def visible(tokens: Tokens) -> Bool[Tensor, "B N N"]:
    """Which keys (last) each query sees: those known by its time, of its own series, not wholly missing; and itself."""
    mask = (tokens.clock[None, :] <= tokens.clock[:, None]) & tokens.valid[:, None, :]
    if tokens.segments is not None:
        mask = mask & (tokens.segments[:, :, None] == tokens.segments[:, None, :])
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


@dataclass
class Cache:
    """Keys and values of one layer: of the context, and of what each sample path added."""

    context: tuple[Float[Tensor, "B H N W"], Float[Tensor, "B H N W"]]
    paths: tuple[Float[Tensor, "B H S M W"], Float[Tensor, "B H S M W"]] | None = None

    def append(self, key: Float[Tensor, "B H S M W"], value: Float[Tensor, "B H S M W"]) -> None:
        """Add a step to every path."""
        if self.paths is not None:
            key, value = torch.cat([self.paths[0], key], 3), torch.cat([self.paths[1], value], 3)
        self.paths = key, value


class AnyVariateAttention(nn.Module):
    """Attention over all variates at once; a learned bias per head tells the own variate from others.

    Moirai, arXiv 2402.02592, with normalised queries and keys.

    Args:
        width: D.
        heads: H.
        dropout: on attention weights, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = (Norm(width // heads) for _ in range(2))
        self.variate_bias = nn.Parameter(torch.zeros(2, heads))
        """Row 0: for keys of another variate; row 1: of the same."""

    def forward(
        self, x: Float[Tensor, "B N D"], tokens: Tokens, mask: Bool[Tensor, "B N N"], caches: list[Cache] | None = None
    ) -> Float[Tensor, "B N D"]:
        """[B, N, D] -> [B, N, D]; adds its keys and values to `caches`, if given."""
        query, key, value = self._project(x, tokens.time)  # [B, H, N, W]
        if caches is not None:
            caches.append(Cache((key, value)))
        bias = self._bias(tokens.variate, tokens.variate).to(query.dtype)
        bias = bias.masked_fill(~mask[:, None], -torch.inf)  # [B, H, N, N]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))

    def extend(
        self,
        x: Float[Tensor, "B S M D"],
        cache: Cache,
        time: Int[Tensor, " M"],
        variates: tuple[Int[Tensor, " M"], Int[Tensor, " K"]],
        mask: Bool[Tensor, "B M K"],
    ) -> Float[Tensor, "B S M D"]:
        """Attend from new tokens of every path to the context, which paths share, and to the path itself.

        Args:
            x: the new tokens.
            cache: of the context and the paths so far; the step is added.
            time: patch numbers of the new tokens.
            variates: of the new tokens, and of all K keys, context first.
            mask: which of the K keys each new token sees.
        """
        query, key, value = self._project(x, time)  # [B, H, S, M, W]
        cache.append(key, value)
        (shared_key, shared_value), (own_key, own_value) = cache.context, cache.paths
        count = shared_key.shape[2]
        rows = query.flatten(2, 3) @ shared_key.mT  # [B, H, S M, N]
        scores = torch.cat([rows.unflatten(2, query.shape[2:4]), query @ own_key.mT], -1)  # [B, H, S, M, K]
        scores = scores / query.shape[-1] ** 0.5 + self._bias(*variates).to(scores.dtype)[:, None]
        weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        shared = weights[..., :count].flatten(2, 3) @ shared_value  # [B, H, S M, W]
        y = shared.view(query.shape) + weights[..., count:] @ own_value
        return self.out(y.permute(0, 2, 3, 1, 4).flatten(3))

    def _project(self, x: Float[Tensor, "B *S N D"], time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, heads behind the batch: [B, H, *S, N, W]."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).movedim(-2, 1) for project in (self.query, self.key, self.value)
        )
        return rotate(self.query_norm(query), time), rotate(self.key_norm(key), time), value

    def _bias(self, query: Int[Tensor, " M"], key: Int[Tensor, " K"]) -> Float[Tensor, "H M K"]:
        same = query[:, None] == key
        other, own = self.variate_bias[:, :, None, None]
        return torch.where(same, own, other)


class SwiGLU(nn.Module):
    """The FFN of a dense model, bias-free (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn, self.dropout = nn.SiLU(), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """[..., D] -> [..., D]."""
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


def make_ffn(config: MoiraiMoEConfig) -> nn.Module:
    """Experts chosen by distance to centroids, or in a dense model a plain FFN of equal active multiply-adds."""
    if config.num_experts == 1:
        return SwiGLU(config.d_model, config.top_k * config.d_ff, config.dropout)
    moe = MoEConfig(
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden=config.d_ff,
        glu=True,
        activation="silu",
        bias=False,
        dropout=config.dropout,
        score="centroid",
        score_options={"prefer": config.prefer},
        weight="softmax_chosen",
        aux_loss={},
    )
    return build_moe(moe, config.d_model)


class Block(nn.Module):
    """Attention, then experts, each behind a norm and beside a residual."""

    def __init__(self, config: MoiraiMoEConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (Norm(config.d_model) for _ in range(2))
        self.attention = AnyVariateAttention(config.d_model, config.num_heads, config.dropout)
        self.ffn = make_ffn(config)

    def forward(self, x: Tensor, *args: object) -> Float[Tensor, "B N D"]:
        """[B, N, D] -> [B, N, D]; arguments as `AnyVariateAttention.forward`."""
        x = x + self.attention(self.norm1(x), *args)
        return x + self.ffn(self.norm2(x))

    def extend(self, x: Tensor, *args: object) -> Float[Tensor, "B S M D"]:
        """[B, S, M, D] -> [B, S, M, D]; arguments as `AnyVariateAttention.extend`."""
        x = x + self.attention.extend(self.norm1(x), *args)
        return x + self.ffn(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Two layers with a SiLU between, beside a linear map; every missing point adds a learned vector.

    Args:
        patch_size: P.
        width: D.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(patch_size, width), nn.Linear(width, width)
        self.residual = nn.Linear(patch_size, width)
        self.missing = nn.Linear(patch_size, width, bias=False)

    def forward(self, values: Float[Tensor, "*N P"], observed: Bool[Tensor, "*N P"]) -> Float[Tensor, "*N D"]:
        """[..., P] -> [..., D]."""
        values = values.to(self.inner.weight.dtype)
        missing = self.missing((~observed).to(values.dtype))
        x = self.outer(F.silu(self.inner(values))) + self.residual(values) + missing
        return x.to(values.dtype)  # the residual stream keeps its precision under autocast


class Encoder(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, config: MoiraiMoEConfig) -> None:
        super().__init__()
        self.embed = PatchEmbedding(config.patch_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = Norm(config.d_model)

    def forward(self, tokens: Tokens, caches: list[Cache] | None = None) -> Float[Tensor, "B N D"]:
        """Hidden states of all tokens; adds one cache per layer to `caches`, if given."""
        x, mask = self.embed(tokens.values, tokens.observed), visible(tokens)
        for block in self.blocks:
            x = block(x, tokens, mask, caches)
        return self.norm(x)


class PathEncoder:
    """Encodes the steps of sample paths behind a context.

    Args:
        encoder: with its weights.
        context: tokens up to the last patch of the context.
    """

    def __init__(self, encoder: Encoder, context: Tokens) -> None:
        self.encoder, self.caches = encoder, []
        self.context = encoder(context, self.caches)
        """Hidden states of the context, [B, N, D]."""
        self._variate, self._valid = context.variate, context.valid

    def extend(self, values: Float[Tensor, "B S M P"], step: Tokens) -> Float[Tensor, "B S M D"]:
        """Hidden states of the next patch of every path.

        Args:
            values: M tokens per path.
            step: the same tokens as far as paths share them: what is observed, when, of which variate.
        """
        batch, count = step.valid.shape
        self._variate = torch.cat([self._variate, step.variate])
        valid = torch.cat([self._valid, step.valid], 1)
        mask = valid[:, None].expand(batch, count, valid.shape[1]).clone()
        mask[:, :, -count:] |= torch.eye(count, dtype=torch.bool, device=mask.device)
        self._valid = valid
        x = self.encoder.embed(values, step.observed[:, None].expand(values.shape))
        for block, cache in zip(self.encoder.blocks, self.caches, strict=True):
            x = block.extend(x, cache, step.time, (step.variate, self._variate), mask)
        return self.encoder.norm(x)
