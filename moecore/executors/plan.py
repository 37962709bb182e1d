"""From an assignment to rows sorted by expert, and back: dispatch and combine without atomics.

Row r of the dispatched tensor is the r-th pair in order of experts. Both directions are gathers: dispatch reads the
token of every row, combine sums the rows of every token (`embedding_bag` with one bag per token). So are their
backward passes; index-adds, which are slow on a CPU and not deterministic on a GPU, do not occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moecore.routing import Assignment


@dataclass(frozen=True, eq=False)
class Plan:
    """Where every row comes from and goes to. P rows, one per filled slot, sorted by expert."""

    token: Int[Tensor, " P"]
    """Token of each row."""
    expert: Int[Tensor, " P"]
    """Expert of each row, ascending."""
    counts: Int[Tensor, " E"]
    """Rows per expert."""
    row: Int[Tensor, " P"]
    """Row of each pair, pairs in order of tokens."""
    bag: Int[Tensor, " P"]
    """Token of each pair, in order of tokens."""
    offsets: Int[Tensor, " T"]
    """Where each token's pairs begin."""
    pair: Int[Tensor, " P"] | None
    """Position of each pair, in order of tokens, in the flattened weights; None when that is the order itself."""

    def weights(self, weights: Float[Tensor, "*pairs"]) -> Float[Tensor, " P"]:
        """Combine weights of the filled slots in order of tokens."""
        flat = weights.reshape(-1)
        return flat if self.pair is None else flat.index_select(0, self.pair)


def make_plan(assignment: Assignment) -> Plan:
    """Sort an assignment's pairs by expert."""
    if assignment.complete:
        return _complete_plan(assignment)
    token, expert, pair = _pairs_by_token(assignment)
    expert, order = expert.sort(stable=True)
    row = torch.empty_like(order)
    row.scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Plan(
        token=token[order],
        expert=expert,
        counts=_count(expert, assignment.num_experts),
        row=row,
        bag=token,
        offsets=_offsets(token, assignment),
        pair=pair,
    )


def _complete_plan(assignment: Assignment) -> Plan:
    """Every expert takes every token: row = expert * T + token, nothing to sort."""
    tokens, experts = assignment.num_tokens, assignment.num_experts
    ids = torch.arange(tokens, device=assignment.expert.device)
    every = torch.arange(experts, device=ids.device)
    bag = ids.repeat_interleave(experts)
    return Plan(
        token=ids.repeat(experts),
        expert=every.repeat_interleave(tokens),
        counts=torch.full((experts,), tokens, device=ids.device),
        row=(every * tokens + ids[:, None]).reshape(-1),
        bag=bag,
        offsets=ids * experts,
        pair=None,
    )


def _pairs_by_token(assignment: Assignment) -> tuple[Tensor, Tensor, Tensor | None]:
    """token, expert, position in the flattened weights, in order of tokens, filled slots only."""
    token, expert = assignment.tokens().reshape(-1), assignment.expert.reshape(-1)
    if assignment.token is None and assignment.valid is None:
        return token, expert, None
    if assignment.valid is not None:
        pair = assignment.valid.reshape(-1).nonzero().squeeze(1)
        token, expert = token[pair], expert[pair]
    else:
        pair = torch.arange(token.numel(), device=token.device)
    if assignment.token is not None:
        token, order = token.sort(stable=True)
        expert, pair = expert[order], pair[order]
    return token, expert, pair


def _count(index: Int[Tensor, " P"], size: int) -> Int[Tensor, " size"]:
    counts = torch.zeros(size, dtype=torch.long, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))


def _offsets(token: Int[Tensor, " P"], assignment: Assignment) -> Int[Tensor, " T"]:
    tokens = assignment.num_tokens
    if assignment.token is None and assignment.valid is None:
        return torch.arange(tokens, device=token.device) * assignment.expert.shape[1]
    counts = _count(token, tokens)
    return counts.cumsum(0) - counts


def bag_sum(rows: Float[Tensor, "P W"], plan: Plan, weights: Float[Tensor, " P"] | None = None) -> Float[Tensor, "T W"]:
    """Sum, weighted or not, of each token's rows. `weights` are in order of tokens."""
    return sum_rows(rows, plan.row, plan.offsets, weights)


def sum_rows(rows: Tensor, row: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Float[Tensor, "T W"]:
    """`bag_sum` on bare tensors."""
    if row.numel() == 0:
        return rows.new_zeros(offsets.numel(), rows.shape[1])
    return F.embedding_bag(row, rows, offsets, mode="sum", per_sample_weights=weights)


def dot_rows(grad: Float[Tensor, "T W"], rows: Float[Tensor, "P W"], plan: Plan) -> Float[Tensor, " P"]:
    """Inner product of each pair's row with its token's gradient, in order of tokens, in one pass."""
    if plan.row.numel() == 0:
        return rows.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.contiguous(), rows, plan.row, plan.offsets, plan.bag, 0
    )


class Dispatch(torch.autograd.Function):
    """Tokens [T, W] -> rows [P, W]."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Plan) -> Tensor:
        """Gather."""
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Sum of each token's rows."""
        return bag_sum(grad.contiguous(), ctx.plan), None


class Combine(torch.autograd.Function):
    """Rows [P, W] and weights [P] in order of tokens -> tokens [T, W]."""

    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
        """Weighted sum of each token's rows."""
        ctx.plan = plan
        ctx.save_for_backward(rows, weights)
        return bag_sum(rows, plan, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gather, and one inner product per pair."""
        rows, weights = ctx.saved_tensors
        plan = ctx.plan
        by_row = torch.empty_like(weights).scatter_(0, plan.row, weights)
        grad_rows = grad.index_select(0, plan.token) * by_row[:, None] if ctx.needs_input_grad[0] else None
        grad_weights = dot_rows(grad, rows, plan) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weights, None
