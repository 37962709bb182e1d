"""The routing record, and the router that makes it: score, adjust, select, weight.

T tokens (or segments, or whole samples: whatever is routed as one), E experts, K slots per token, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moecore.context import Context


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which experts work on which tokens: a list of (token, expert) pairs.

    Token-choice routers give a grid, `expert [T, K]`, whose row number is the token (`token` is None).
    Anything else, expert choice for one, gives a flat list, `expert [P]` and `token [P]`.
    """

    expert: Int[Tensor, "*pairs"]
    num_tokens: int
    num_experts: int
    token: Int[Tensor, " P"] | None = None
    valid: Bool[Tensor, "*pairs"] | None = None
    """False where a slot is empty (masked, dropped, null). None: every slot counts."""
    dropped: Bool[Tensor, "*pairs"] | None = None
    """True where a capacity took away what the router had chosen."""
    complete: bool = False
    """True when the grid is every expert in order for every token, so that nothing need be sorted."""

    def tokens(self) -> Int[Tensor, "*pairs"]:
        """Token index of every pair, in the shape of `expert`."""
        if self.token is not None:
            return self.token
        rows = torch.arange(self.num_tokens, device=self.expert.device)
        return rows[:, None].expand(self.expert.shape)  # [T, K]

    def pairs(self, weights: Float[Tensor, "*pairs"]) -> tuple[Tensor, Tensor, Tensor]:
        """The flat form: token [P], expert [P], weight [P], empty slots left out."""
        flat = self.tokens().reshape(-1), self.expert.reshape(-1), weights.reshape(-1)
        if self.valid is None:
            return flat
        keep = self.valid.reshape(-1)
        return tuple(part[keep] for part in flat)

    def load(self) -> Int[Tensor, " E"]:
        """Number of pairs each expert works on."""
        expert = self.expert.reshape(-1)
        if self.valid is not None:
            expert = expert.masked_fill(~self.valid.reshape(-1), self.num_experts)
        # One bucket more than there are experts takes the empty slots: no size depends on data.
        counts = torch.zeros(self.num_experts + 1, dtype=torch.long, device=expert.device)
        return counts.scatter_add(0, expert, torch.ones_like(expert))[: self.num_experts]

    def gather(self, table: Float[Tensor, "T E"]) -> Float[Tensor, "*pairs"]:
        """`table[token, expert]` for every pair."""
        return table.gather(1, self.expert) if self.token is None else table[self.token, self.expert]

    def spread(self, per_token: Float[Tensor, " T"]) -> Float[Tensor, "*pairs"]:
        """`per_token[token]` for every pair, in a shape that broadcasts against `expert`."""
        return per_token[:, None] if self.token is None else per_token[self.token]

    def total(self, per_pair: Float[Tensor, "*pairs"]) -> Float[Tensor, " T"]:
        """Sum over the pairs of each token."""
        if self.token is None:
            return per_pair.sum(-1)
        return per_pair.new_zeros(self.num_tokens).index_add(0, self.token, per_pair)

    def dense(self, weights: Float[Tensor, "*pairs"]) -> Float[Tensor, "T E"]:
        """Combine weights as a matrix, zero where an expert was not chosen."""
        if self.complete:
            return weights
        if self.valid is not None:
            weights = weights.masked_fill(~self.valid, 0.0)
        if self.token is None:
            table = weights.new_zeros(self.num_tokens, self.num_experts)
            return table.scatter_add(1, self.expert, weights)
        table = weights.new_zeros(self.num_tokens * self.num_experts)
        index = self.token * self.num_experts + self.expert
        return table.scatter_add(0, index, weights).view(self.num_tokens, self.num_experts)

    def chosen(self) -> Bool[Tensor, "T E"]:
        """Matrix of who was chosen."""
        ones = torch.ones(self.expert.shape, device=self.expert.device)
        return self.dense(ones) > 0


@dataclass(frozen=True, eq=False)
class Scores:
    """What a score module returns when a bare `[T, E]` tensor does not say enough."""

    value: Float[Tensor, "T E"]
    clean: Float[Tensor, "T E"] | None = None
    """The scores without noise."""
    noise_std: Float[Tensor, "T E"] | None = None
    """Standard deviation of the noise, for the smooth load estimate."""


@dataclass(frozen=True, eq=False)
class Routing:
    """What one MoE layer decided in one call; balance losses and metrics are functions of it."""

    scores: Float[Tensor, "T E"]
    assignment: Assignment
    weights: Float[Tensor, "*pairs"]
    activation: Callable[[Tensor], Tensor]
    """Turns scores into probabilities (softmax, normalised sigmoid, ...)."""
    clean: Float[Tensor, "T E"] | None = None
    noise_std: Float[Tensor, "T E"] | None = None
    lead: tuple[int, ...] = ()
    """Shape of what was routed before it was flattened to T: (batch, positions) as a rule."""
    name: str = ""
    """The layer's name inside the recorded model."""
    aux_loss: Mapping[str, float] = field(default_factory=dict)
    """The layer's own mix of balance losses, name -> coefficient."""
    controller: nn.Module | None = None
    """The balance controller of the layer's router, if it has one."""
    task: int | Tensor | None = None
    """The task it was decided for, as the context named it: for all tokens, or for each."""

    @property
    def probs(self) -> Float[Tensor, "T E"]:
        """Router probabilities, rows summing to one."""
        return self.activation(self.scores)

    def fractions(self) -> Float[Tensor, " E"]:
        """Fraction of all slots that each expert received; null experts share what stayed empty."""
        load = self.assignment.load().to(self.scores.dtype)
        nulls = self.scores.shape[1] - self.assignment.num_experts
        if nulls:
            empty = self.assignment.expert.numel() - load.sum()
            load = torch.cat([load, (empty / nulls).expand(nulls)])
        return load / load.sum().clamp(min=1)


class Router(nn.Module):
    """Score, adjust for balance, select, weight. Knows nothing of what the experts are.

    Args:
        score: maps tokens `[T, D]` to scores `[T, E]` (see `moecore.scores`).
        select: maps scores to an `Assignment` (see `moecore.selection`).
        weight: maps scores and assignment to combine weights (see `moecore.weighting`).
        balance: optional controller that shifts the scores for selection only (see `moecore.controllers`).
        capacity: optional limit on the pairs per expert during training (see `moecore.selection.Capacity`).
    """

    def __init__(
        self,
        score: nn.Module,
        select: nn.Module,
        weight: nn.Module,
        balance: nn.Module | None = None,
        capacity: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.score, self.select, self.weight = score, select, weight
        self.balance, self.capacity = balance, capacity

    def forward(self, x: Float[Tensor, "T D"], context: Context | None = None) -> Routing:
        """Route tokens `[T, D]`. The arithmetic is float32 (float64 for float64 input), autocast or not."""
        context = context or Context()
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            scores = self.score(x, context)
            if isinstance(scores, Tensor):
                scores = Scores(scores)
            adjusted = scores.value.detach()
            if self.balance is not None:
                adjusted = self.balance.adjust(adjusted, self.weight.activation)
            if context.allowed is not None:
                nulls = getattr(self.select, "num_null", 0)  # the mask is of experts; doing nothing is always allowed
                allowed = nn.functional.pad(context.allowed, (0, nulls), value=True) if nulls else context.allowed
                adjusted = adjusted.masked_fill(~allowed, float("-inf"))
            assignment = self.select(adjusted, context)
            if self.capacity is not None and self.training:
                assignment = self.capacity(assignment, scores.value.detach())
            weights = self.weight(scores.value, assignment, x)
        return Routing(
            scores=scores.value,
            assignment=assignment,
            weights=weights,
            activation=self.weight.activation,
            clean=scores.clean,
            noise_std=scores.noise_std,
            controller=self.balance,
        )
