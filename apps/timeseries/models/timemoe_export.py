"""Time-MoE as functions of tensors alone, for exporters: the pass over a context, and the cached decoding step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apps.timeseries.models.base import instance_scale
from apps.timeseries.models.rotary import rotary_table
from apps.timeseries.models.timemoe_layers import causal_mask

if TYPE_CHECKING:
    from apps.timeseries.models.timemoe import TimeMoE


class ContextPass(nn.Module):
    """Contexts -> the next points by the largest head, as `TimeMoE.forecast` gives them for that horizon."""

    def __init__(self, model: TimeMoE) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Float[Tensor, "B L"]) -> Float[Tensor, "B p"]:
        """[B, L] -> [B, p]; NaN where a value is missing, and on the left of shorter contexts."""
        scale = instance_scale(context) if self.model.config.normalize == "instance" else None
        values = context if scale is None else scale.normalize(context)
        points = self.model.heads[-1](self.model.decode(values, last=True).hidden[:, 0])
        return points if scale is None else scale.restore(points)


class TensorCache:
    """Keys and values of one layer as tensors that grow, for graphs that own no buffers."""

    def __init__(self, key: Float[Tensor, "B G M d"], value: Float[Tensor, "B G M d"]) -> None:
        self.key, self.value = key, value

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New ones behind the old; returns all so far."""
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        return self.key, self.value


class CachedStep(nn.Module):
    """Points that come after those of a cache -> what every head says next, and the cache with them added.

    Points are as the layers see them: normalise before the first step and restore after the last where the model does
    (`config.normalize`). All count as observed. The first step takes the whole context and a cache of M = 0 points
    (`empty`), each further one what was predicted.
    """

    def __init__(self, model: TimeMoE) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        points: Float[Tensor, "B n"],
        keys: Float[Tensor, "layers B G M d"],
        values: Float[Tensor, "layers B G M d"],
    ) -> tuple[Float[Tensor, "B p"], Float[Tensor, "layers B G K d"], Float[Tensor, "layers B G K d"]]:
        """One step.

        Args:
            points: n new ones.
            keys: of the M points so far, in all layers.
            values: likewise.

        Returns:
            Predictions of all heads side by side in the order of `config.horizons`; keys and values of the K = M + n
            points.
        """
        model, past, total = self.model, keys.shape[3], keys.shape[3] + points.shape[1]
        head_dim = model.blocks[0].attention.head_dim
        rotation = rotary_table(torch.arange(past, total, device=points.device), head_dim, model.config.rope_theta)
        every = torch.ones(1, total, dtype=torch.bool, device=points.device)
        mask = causal_mask(every, points.shape[1])
        caches = [TensorCache(key, value) for key, value in zip(keys, values, strict=True)]
        hidden = model.embed(points)
        for block, cache in zip(model.blocks, caches, strict=True):
            hidden = block(hidden, rotation, mask, cache, block is model.blocks[-1])  # of the last, the last point
        hidden = model.norm(hidden[:, 0])
        predictions = torch.cat([head(hidden) for head in model.heads], -1)
        return predictions, torch.stack([c.key for c in caches]), torch.stack([c.value for c in caches])

    def empty(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of no points, for the first step of B rows."""
        attention, like = self.model.blocks[0].attention, self.model.norm.weight
        none = like.new_empty(len(self.model.blocks), rows, attention.kv_heads, 0, attention.head_dim)
        return none, none.clone()


class FixedStep(nn.Module):
    """`CachedStep` of one point with shapes that never change, for accelerators.

    Keys and values lie in buffers of C points, of which the first `position` count; what lies behind them is not looked
    at. The host writes the new ones to where the point stands.

    Args:
        model: whose weights it shares.
        capacity: C.
    """

    def __init__(self, model: TimeMoE, capacity: int) -> None:
        super().__init__()
        self.model, self.capacity = model, capacity
        places = torch.arange(capacity + 1)
        cos, sin = rotary_table(places, model.blocks[0].attention.head_dim, model.config.rope_theta)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        points: Float[Tensor, "B 1"],
        keys: Float[Tensor, "B layers G C d"],
        values: Float[Tensor, "B layers G C d"],
        position: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B p"], Float[Tensor, "B layers G 1 d"], Float[Tensor, "B layers G 1 d"]]:
        """One step.

        Args:
            points: the next one of each row, as `CachedStep` takes them.
            keys: of the points before it, in all layers.
            values: likewise.
            position: how many points were before it, at most C.

        Returns:
            Predictions of all heads side by side; keys and values of the point.
        """
        model = self.model
        rotation = self.cos[position][:, None, None], self.sin[position][:, None, None]  # [B, 1, 1, d]
        seen = (self.places < position[:, None]) | (self.places == self.capacity)  # the point itself comes last
        mask = torch.where(seen, 0.0, -torch.inf)[:, None, None]  # [B, 1, 1, C + 1]
        caches = [TensorCache(key, value) for key, value in zip(keys.unbind(1), values.unbind(1), strict=True)]
        hidden = model.embed(points)
        for block, cache in zip(model.blocks, caches, strict=True):
            hidden = block(hidden, rotation, mask, cache)
        hidden = model.norm(hidden[:, 0])
        predictions = torch.cat([head(hidden) for head in model.heads], -1)
        new = (torch.stack(parts, 1)[..., -1:, :] for parts in zip(*((c.key, c.value) for c in caches), strict=True))
        return predictions, *new


def step_module(model: TimeMoE, cached: bool = False) -> nn.Module:
    """A module of tensors alone that shares the model's weights, in eval mode.

    Args:
        model: is put into eval mode with it.
        cached: the decoding step instead of the pass over a context.
    """
    return (CachedStep(model) if cached else ContextPass(model)).eval()
