"""Greedy multi-resolution rollout of Time-MoE, each point decoded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.errors import UserError
from apps.timeseries.models.base import observed
from apps.timeseries.models.timemoe_layers import LayerCache

if TYPE_CHECKING:
    from apps.timeseries.models.timemoe import TimeMoE

TOKENS = 2048
"""Points decoded at once on a CPU, as far as rows divide: their activations stay in its caches."""


class Decoder:
    """Predicts by the largest head that fits what is left, and feeds the points back.

    Args:
        model: its weights.
        use_cache: keep keys and values; otherwise the whole sequence is decoded at every step.
    """

    def __init__(self, model: TimeMoE, use_cache: bool = True) -> None:
        self.model, self.use_cache = model, use_cache

    def __call__(self, context: Float[Tensor, "B L"], horizon: int) -> Float[Tensor, "B H"]:
        """[B, L] -> [B, H].

        Raises:
            UserError: if the points to decode are more than the model's positions, or there is no context.
        """
        steps, context = self.steps(horizon), _without_padding(context)
        length = context.shape[1]
        needed = length + horizon - steps[-1].out_features
        limit = self.model.config.max_positions
        room = limit - needed + length
        if needed > limit:
            raise UserError(
                f"context={length} points and horizon={horizon}: {needed} to decode, but this model takes {limit}; "
                + (f"give at most {room} points of context" if room > 0 else "ask for fewer points")
            )
        if length == 0:
            raise UserError("context=0 points: give at least one")
        if len(context) == 0:
            return context.new_empty(0, horizon)
        return self._cached(context, steps) if self.use_cache else self._anew(context, steps)

    def steps(self, horizon: int) -> list[nn.Linear]:
        """Head of each step: those of 64 and 32 points for 96, eleven times 64 and twice 8 for 720."""
        steps: list[nn.Linear] = []
        while horizon > 0:
            steps.append(self.model.head_for(horizon))
            horizon -= steps[-1].out_features
        return steps

    def _cached(self, context: Float[Tensor, "B L"], steps: list[nn.Linear]) -> Float[Tensor, "B H"]:
        model, (batch, length) = self.model, context.shape
        seen = observed(context)
        ragged = not bool(seen.all())
        first = seen.long().argmax(1, keepdim=True) if ragged else None
        fed = length + sum(head.out_features for head in steps[:-1])
        caches = self._caches(context, fed) if len(steps) > 1 else None
        new = steps[0](self._prefill(context, caches))
        parts = [new]
        for head in steps[1:]:
            if ragged:
                seen = torch.cat([seen, seen.new_ones(batch, new.shape[1])], 1)
            known = {"seen": seen, "first": first} if ragged else {}
            new = head(model.decode(new, caches=caches, last=True, **known).hidden[:, 0])
            parts.append(new)
        return torch.cat(parts, 1).to(context.dtype)

    def _prefill(self, context: Float[Tensor, "B L"], caches: list[LayerCache] | None) -> Float[Tensor, "B D"]:
        """Decode the context into the caches, a few rows at a time; hidden state of the last point."""
        rows = max(1, TOKENS // context.shape[1]) if context.is_cpu else len(context)
        parts = []
        for i in range(0, len(context), rows):
            own = None if caches is None else [cache.rows(i, i + rows) for cache in caches]
            parts.append(self.model.decode(context[i : i + rows], caches=own, last=True).hidden[:, 0])
        for cache in caches or ():
            cache.length = context.shape[1]
        return torch.cat(parts)

    def _caches(self, context: Float[Tensor, "B L"], size: int) -> list[LayerCache]:
        attention = self.model.blocks[0].attention
        shape = (len(context), attention.kv_heads, size, attention.head_dim)
        options = {"device": context.device, "dtype": attention.out.weight.dtype}
        return [LayerCache(torch.empty(shape, **options), torch.empty(shape, **options)) for _ in self.model.blocks]

    def _anew(self, context: Float[Tensor, "B L"], steps: list[nn.Linear]) -> Float[Tensor, "B H"]:
        parts: list[Tensor] = []
        for head in steps:
            hidden = self.model.decode(torch.cat([context, *parts], 1), last=True).hidden[:, 0]
            parts.append(head(hidden).to(context.dtype))
        return torch.cat(parts, 1)


def _without_padding(context: Float[Tensor, "B L"]) -> Float[Tensor, "b l"]:
    """Without what all rows miss on the left; at least the last point stays."""
    seen = observed(context).any(0)
    return context[:, int(seen.long().argmax()) if bool(seen.any()) else -1 :]
