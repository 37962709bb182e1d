"""Who is chosen: scores -> `Assignment`. Selections hold no parameters and compute no gradients."""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecore.context import Context
from moecore.errors import require
from moecore.routing import Assignment


class Selection(nn.Module):
    """Base of all selections."""

    sees_batch = False
    """True when a token's experts depend on the other tokens of the batch."""
    needs_logits = False
    """True when the selection reads its input as logits, so that a balance bias must be added to logits."""
    raw_weights = False
    """True when the published method weights by raw probabilities: `build_router` then leaves softmax weights so."""
    num_null = 0
    """How many of the router's columns are null experts, beyond the experts of the bank."""

    def __init__(self, num_experts: int, max_slots: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.max_slots = max_slots
        """K, the most experts a token can have."""

    def extra_repr(self) -> str:
        """Experts and slots, for `print(model)`."""
        return f"num_experts={self.num_experts}, max_slots={self.max_slots}"


def top_indices(scores: Float[Tensor, "T E"], k: int) -> Int[Tensor, "T k"]:
    """Indices of the k largest scores of each row, largest first; of equals the first wins, as long as k is 1 or 2."""
    if k > 2 or torch.compiler.is_exporting():  # runtimes' top-k is one operator, and there the first of equals wins
        return scores.topk(k, -1).indices
    # One or two maxima are cheaper than topk on a CPU (and max than argmax), and break ties the same way everywhere.
    first = scores.max(-1, keepdim=True).indices
    if k == 1:
        return first
    second = scores.scatter(1, first, float("-inf")).max(-1, keepdim=True).indices
    return torch.cat([first, second], 1)


def _grid(scores: Tensor, expert: Tensor, context: Context) -> Assignment:
    """An assignment from a grid of experts; slots of masked experts are empty."""
    valid = None
    if context.allowed is not None:
        valid = scores.gather(1, expert).isfinite()
        valid[:, 1:] &= expert[:, 1:] != expert[:, :-1]  # with one expert left, the second best is it again
    return Assignment(expert, scores.shape[0], scores.shape[1], valid=valid)


class TopK(Selection):
    """The k best experts of each token (Shazeer et al. 2017, arXiv 1701.06538)."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts, top_k)

    def forward(self, scores: Float[Tensor, "T E"], context: Context) -> Assignment:
        """[T, E] scores -> grid [T, K]."""
        if self.max_slots == self.num_experts and context.allowed is None:
            every = torch.arange(self.num_experts, device=scores.device).expand(scores.shape)
            return Assignment(every, scores.shape[0], self.num_experts, complete=True)
        return _grid(scores, top_indices(scores, self.max_slots), context)


class GroupedTopK(Selection):
    """The k / G best experts within each of G equal groups, so that groups (devices) are loaded equally.

    MoGE, arXiv 2505.21411.
    """

    def __init__(self, num_experts: int, top_k: int, num_groups: int = 2) -> None:
        super().__init__(num_experts, top_k)
        require(num_groups >= 1, "num_groups", num_groups, "must be at least 1")
        require(num_experts % num_groups == 0, "num_groups", num_groups, f"must divide num_experts={num_experts}")
        require(top_k % num_groups == 0, "num_groups", num_groups, f"must divide top_k={top_k}")
        self.num_groups = num_groups

    def forward(self, scores: Float[Tensor, "T E"], context: Context) -> Assignment:
        """[T, E] scores -> grid [T, K], K / G columns per group."""
        size = self.num_experts // self.num_groups
        best = top_indices(scores.reshape(-1, size), self.max_slots // self.num_groups)  # [T*G, K/G]
        best = best.view(scores.shape[0], self.num_groups, -1)
        first = torch.arange(self.num_groups, device=scores.device)[:, None] * size
        return _grid(scores, (best + first).flatten(1), context)


class TopP(Selection):
    """The fewest experts whose probabilities reach p, at least `min_k` and at most `top_k` of them.

    "Harder tasks need more experts", arXiv 2403.07652. As published the chosen experts weigh their raw probabilities,
    the default of `build_router`; renormalised, a token with one expert would give it the constant weight 1, from
    which the router learns nothing. Upcycling is exact only with `weight_options={"renormalize": True}`.
    """

    needs_logits = True
    raw_weights = True

    def __init__(self, num_experts: int, top_k: int, top_p: float = 0.5, min_k: int = 1) -> None:
        super().__init__(num_experts, top_k)
        require(0 < top_p <= 1, "top_p", top_p, "must lie in (0, 1]")
        require(1 <= min_k <= top_k, "min_k", min_k, f"must lie between 1 and top_k={top_k}")
        self.top_p, self.min_k = top_p, min_k

    def forward(self, scores: Float[Tensor, "T E"], context: Context) -> Assignment:
        """[T, E] logits -> grid [T, K] with a varying number of filled slots."""
        probs, expert = scores.softmax(-1).topk(self.max_slots, -1)
        before = probs.cumsum(-1) - probs  # probability mass of the better experts
        valid = before < self.top_p
        valid[:, : self.min_k] = True
        assignment = _grid(scores, expert, context)
        if assignment.valid is not None:
            valid = valid & assignment.valid
        return dataclasses.replace(assignment, valid=valid)


class NullTopK(Selection):
    """Top-k among the experts and `num_null` null experts that do nothing, so that easy tokens use fewer.

    AdaMoE, arXiv 2406.13233. The router scores `num_experts + num_null` columns; a null slot stays empty.
    """

    def __init__(self, num_experts: int, top_k: int, num_null: int | None = None) -> None:
        super().__init__(num_experts, top_k)
        self.num_null = num_experts if num_null is None else num_null
        require(self.num_null >= 1, "num_null", num_null, "must be at least 1")

    def forward(self, scores: Float[Tensor, "T EN"], context: Context) -> Assignment:
        """[T, E + null] scores -> grid [T, K] with null slots empty."""
        expert = top_indices(scores, self.max_slots)
        valid = scores.gather(1, expert).isfinite() & (expert < self.num_experts)
        valid[:, 1:] &= expert[:, 1:] != expert[:, :-1]  # as in `_grid`
        return Assignment(expert.clamp(max=self.num_experts - 1), scores.shape[0], self.num_experts, valid=valid)


class ExpertChoice(Selection):
    """Each expert takes its best tokens: load is perfectly even, tokens get 0 to E experts.

    Zhou et al. 2022, arXiv 2202.09368. An expert takes `T * top_k / E` tokens. This sees the whole batch, future
    positions included; in `eval()` each token therefore takes its own `top_k` best experts, so that a prediction
    never depends on its neighbours. Set `eval_sees_batch=True` for the published behaviour.

    As published the chosen experts weigh their raw probabilities, the default of `build_router`. An expert then counts
    the same for a token in training and in eval, whoever else took that token; renormalised it would not.
    """

    sees_batch = True
    raw_weights = True

    def __init__(self, num_experts: int, top_k: int, eval_sees_batch: bool = False) -> None:
        super().__init__(num_experts, top_k)
        self.eval_sees_batch = eval_sees_batch
        self.per_token = TopK(num_experts, top_k)
        """The fallback that sees one token only: acting, causal decoding, export."""

    def for_export(self) -> TopK:
        """The per-token form.

        Raises:
            ConfigError: where predictions are made by the whole batch.
        """
        remedy = "routes by the whole batch, which has no exported form; false is the per-token form that has one"
        require(not self.eval_sees_batch, "eval_sees_batch", True, remedy)
        return self.per_token

    def forward(self, scores: Float[Tensor, "T E"], context: Context) -> Assignment:
        """[T, E] scores -> flat pairs in training, grid [T, K] in eval."""
        if not (self.training or self.eval_sees_batch):
            return self.per_token(scores, context)
        tokens = scores.shape[0]
        capacity = min(tokens, math.ceil(tokens * self.max_slots / self.num_experts))
        best, token = scores.t().topk(capacity, -1)  # [E, C]
        expert = torch.arange(self.num_experts, device=scores.device)[:, None].expand_as(token)
        valid = best.isfinite().flatten() if context.allowed is not None else None
        return Assignment(expert.flatten(), tokens, self.num_experts, token=token.flatten(), valid=valid)


class Threshold(Selection):
    """Every expert whose score exceeds a threshold; with threshold 0 and ReLU weights this is ReMoE's gate.

    ReMoE, arXiv 2412.14711. The threshold alone decides: `top_k` is what `moecore.SparsityController` steers the mean
    number of active experts to. The `min_k` best experts are always taken (0 in ReMoE: a token may use none).
    """

    needs_logits = True

    def __init__(self, num_experts: int, top_k: int, threshold: float = 0.0, min_k: int = 0) -> None:
        super().__init__(num_experts, num_experts)
        require(0 <= min_k <= num_experts, "min_k", min_k, f"must lie between 0 and num_experts={num_experts}")
        self.threshold, self.min_k = threshold, min_k

    def forward(self, scores: Float[Tensor, "T E"], context: Context) -> Assignment:
        """[T, E] scores -> grid [T, E] with the passing slots filled."""
        valid = scores > self.threshold
        if self.min_k:
            valid = valid.scatter(1, scores.topk(self.min_k, -1).indices, True) & scores.isfinite()
        every = torch.arange(self.num_experts, device=scores.device).expand(scores.shape)
        return Assignment(every, scores.shape[0], self.num_experts, valid=valid)


class Capacity(nn.Module):
    """Drops what an expert is sent beyond `factor` times its even share, least probable pairs first.

    Training only; the drop rate is part of `routing_metrics`. The priority is that of V-MoE, arXiv 2106.05974.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        require(factor > 0, "capacity_factor", factor, "must be positive (None means dropless)")
        self.factor = factor

    def forward(self, assignment: Assignment, scores: Float[Tensor, "T E"]) -> Assignment:
        """The same assignment with the excess marked `dropped` and no longer `valid`."""
        expert = assignment.expert.reshape(-1)
        valid = torch.ones_like(expert, dtype=torch.bool) if assignment.valid is None else assignment.valid.reshape(-1)
        capacity = math.ceil(self.factor * expert.numel() / assignment.num_experts)
        priority = assignment.gather(scores.softmax(-1)).reshape(-1).masked_fill(~valid, -1.0)
        order = priority.argsort(descending=True, stable=True)
        order = order[expert[order].argsort(stable=True)]  # by expert, best first
        sizes = torch.bincount(expert, minlength=assignment.num_experts)
        start = (sizes.cumsum(0) - sizes)[expert[order]]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device) - start
        dropped = valid & (rank >= capacity)
        shape = assignment.expert.shape
        return dataclasses.replace(
            assignment, valid=(valid & ~dropped).view(shape), dropped=dropped.view(shape), complete=False
        )


SELECTIONS: dict[str, type[Selection]] = {
    "top_k": TopK,
    "grouped_top_k": GroupedTopK,
    "top_p": TopP,
    "null_top_k": NullTopK,
    "expert_choice": ExpertChoice,
    "threshold": Threshold,
}
"""Selections by the name that configurations use; each is built as `cls(num_experts, top_k, **options)`."""
