"""Fewer experts: a layer that holds only some of them, and gates of several tasks reduced to that of one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moecore.context import Context
from moecore.errors import require
from moecore.experts import ExpertBank, MLPBank
from moecore.layer import MoE
from moecore.routing import Assignment, Router
from moecore.scores import LinearScore
from moecore.scores_conditioned import PerTaskScore, TaskConditionedScore
from moecore.selection import Selection


class KeptSelection(Selection):
    """A selection among the experts that were kept; scores still come for all.

    A token that would go elsewhere takes the best of those kept, and `leaves` tells which tokens those are.

    Args:
        inner: of the whole layer.
        keep: numbers of the experts kept, ascending.
    """

    def __init__(self, inner: Selection, keep: Sequence[int]) -> None:
        super().__init__(len(keep), inner.max_slots)
        self.inner = inner
        number = torch.full((inner.num_experts,), -1)
        number[list(keep)] = torch.arange(len(keep))
        self.register_buffer("keep", torch.tensor(list(keep)))  # [kept], number in the whole layer
        self.register_buffer("number", number)  # [E], number among those kept, or -1

    def forward(self, scores: Float[Tensor, "T E"], context: Context) -> Assignment:
        """[T, E] scores of all experts -> an assignment of those kept, by their new numbers."""
        assignment = self.inner(scores.masked_fill(self.number < 0, float("-inf")), context)
        return replace(
            assignment, expert=self.number[assignment.expert].clamp(min=0), num_experts=self.num_experts, complete=False
        )

    def leaves(self, scores: Float[Tensor, "T E"]) -> Bool[Tensor, " T"]:
        """Whether a token would have gone to an expert that is not here."""
        chosen = self.inner(scores, Context()).chosen()  # [T, E]
        return (chosen & (self.number < 0)).any(-1)

    def whole(self, assignment: Assignment) -> Assignment:
        """An assignment by the numbers of the whole layer."""
        return replace(assignment, expert=self.keep[assignment.expert], num_experts=len(self.number))


class KeptWeighting(nn.Module):
    """Weights as in the whole layer: probabilities are over all experts, those that are gone included."""

    def __init__(self, inner: nn.Module, select: KeptSelection) -> None:
        super().__init__()
        self.inner = inner
        self._select = (select,)  # in a tuple: it is the router's module, not a part of this one

    @property
    def activation(self):
        """Scores -> probabilities."""
        return self.inner.activation

    def forward(self, scores: Float[Tensor, "T E"], assignment: Assignment, x: Float[Tensor, "T D"]) -> Tensor:
        """Combine weights in the shape of `assignment.expert`."""
        return self.inner(scores, self._select[0].whole(assignment), x)


def prune(layer: MoE, keep: Sequence[int], task: int | None = None) -> MoE:
    """A copy of a layer that holds only some of its experts; the layer itself stays as it is.

    On tokens whose experts are all kept, outputs are those of the whole layer.

    Args:
        layer: with a bank of MLP or GLU experts.
        keep: numbers of the experts to keep.
        task: make the gate of this task the only one, where the layer has one per task or is conditioned on it; the
            copy then needs no `routing_context`.

    Raises:
        ConfigError: for numbers out of range, fewer experts than a token uses, or a layer of another kind.
    """
    select, bank = layer.router.select, layer.experts
    keep = sorted(set(keep))
    inside = bool(keep) and keep[0] >= 0 and keep[-1] < bank.num_experts
    require(inside, "keep", keep, f"must be numbers between 0 and {bank.num_experts - 1}")
    require(len(keep) >= select.max_slots, "keep", keep, f"a token uses {select.max_slots} experts; keep as many")
    by_rank = not (select.sees_batch or select.needs_logits or select.num_null or isinstance(select, KeptSelection))
    require(by_rank, "select", type(select).__name__, "only layers whose tokens choose by rank can be pruned: top-k")
    router = layer.router
    kept = KeptSelection(copy.deepcopy(select), keep)
    score = copy.deepcopy(router.score) if task is None else score_of_task(router.score, task)
    weight = KeptWeighting(copy.deepcopy(router.weight), kept)
    pruned = Router(score, kept, weight, copy.deepcopy(router.balance)).to(bank.up)
    shared = copy.deepcopy(layer.shared)
    return MoE(pruned, _taken(bank, keep), shared, layer.unit, layer.pool, layer.executor, layer.aux_loss).train(
        layer.training
    )


@torch.no_grad()
def _taken(bank: ExpertBank, keep: Sequence[int]) -> ExpertBank:
    """A copy of a bank with only these experts."""
    require(isinstance(bank, MLPBank), "experts", type(bank).__name__, "pruning takes MLP and GLU banks only")
    bias = bank.up_bias is not None
    taken = type(bank)(len(keep), bank.width, bank.hidden, bank.activation, bias, bank.dropout, bank.out_width)
    taken.activation_name, taken.activation = bank.activation_name, bank.activation
    for name, parameter in bank.named_parameters():
        setattr(taken, name, nn.Parameter(parameter[list(keep)].clone(), parameter.requires_grad))
    return taken


@torch.no_grad()
def score_of_task(score: nn.Module, task: int) -> nn.Module:
    """The gate of one task: a plain linear map of the token, without the noise of training.

    Of a gate per task it is that task's; of a task-conditioned one the embedding of the task becomes a bias. Any other
    score does not know the task and is copied.
    """
    if isinstance(score, PerTaskScore):
        weight, bias = score.weight[task], None
    elif isinstance(score, TaskConditionedScore):
        width = score.weight.shape[1] - score.embed().shape[1]
        weight, bias = score.weight[:, :width], score.weight[:, width:] @ score.embed()[task]
    else:
        return copy.deepcopy(score)
    linear = LinearScore(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear
