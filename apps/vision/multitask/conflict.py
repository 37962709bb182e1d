"""Whether tasks pull shared weights in opposite directions: cosines of their gradients, per layer and per expert.

T tasks, E experts, P pairs of different tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apps.progress import track
from moecore import ExpertBank, MoE
from moecore.errors import require

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Conflict:
    """Cosines of the tasks' mean gradients on what the blocks of a backbone share; NaN where a task has no gradient.

    Layers are `block 0 attention`, `block 0 ffn` (the dense FFN, or all experts as one) and, where an MoE layer has a
    shared expert, `block 0 shared expert`. For the ffn of an MoE layer and tasks i and j,

        cosine of the bank = agreement within its experts * overlap

    where `within_experts` weighs the experts' cosines by their products of gradient norms, and the overlap says how
    much the two tasks use the same experts: 1 if in equal proportions, 0 if none. MoE can thus lower conflict in two
    ways, and the cosine of the bank alone does not tell them apart.
    """

    tasks: tuple[str, ...]
    layers: dict[str, Float[Tensor, "T T"]]
    """Cosines per layer."""
    norms: dict[str, Float[Tensor, " T"]]
    """Norms of the gradients per layer."""
    experts: dict[str, Float[Tensor, "E T T"]]
    """Cosines per expert, of the layers that are banks; NaN for an expert that not both tasks use."""
    expert_norms: dict[str, Float[Tensor, "E T"]]
    """Norms of the gradients per expert."""

    def within_experts(self) -> dict[str, Float[Tensor, "T T"]]:
        """Per bank the mean cosine of its experts, weighted by the product of the two tasks' gradient norms there."""
        return {
            layer: (_products(norms) * self.experts[layer].nan_to_num()).sum(0) / _products(norms).sum(0)
            for layer, norms in self.expert_norms.items()
        }

    def overlap(self) -> dict[str, Float[Tensor, "T T"]]:
        """Per bank how much two tasks' gradients lie on the same experts, 0 to 1: cosine of their norms per expert."""
        return {layer: _cosines(norms.t() @ norms) for layer, norms in self.expert_norms.items()}

    def users(self) -> dict[str, Int[Tensor, " E"]]:
        """Per bank how many tasks have a gradient on each expert: 0 unused, 1 exclusive, more shared."""
        return {layer: (norms > 0).sum(1) for layer, norms in self.expert_norms.items()}

    def pair_means(self) -> Float[Tensor, "T T"]:
        """Cosine of every two tasks, the mean over the ffn of all blocks."""
        undefined = torch.full((len(self.tasks), len(self.tasks)), math.nan, dtype=torch.float64)
        return torch.stack([undefined, *self._ffns().values()]).nanmean(0)

    def scalars(self) -> dict[str, float]:
        """Figures by name; NaN for the mean of nothing.

        `ffn_cosine` and `attention_cosine` are means over layers and pairs of tasks, `*_negative` the share of those
        below 0, `ffn_cosine/<task>-<task>` means over layers. With MoE layers: `expert_cosine` is the mean over banks
        and pairs of `within_experts`, `expert_negative` the share below 0 of all experts' pairs, `expert_overlap` the
        mean overlap, and `exclusive_experts` and `unused_experts` are shares of all experts.
        """
        found: dict[str, float] = {}
        for part in ("ffn", "attention"):
            pairs = _together(between(values) for name, values in self.layers.items() if name.endswith(part))
            found |= {f"{part}_cosine": _mean(pairs), f"{part}_negative": _negative(pairs)}
        if self.experts:
            users = torch.cat(list(self.users().values())).double()
            found |= {
                "expert_cosine": _mean(_together(map(between, self.within_experts().values()))),
                "expert_negative": _negative(_together(map(between, self.experts.values()))),
                "expert_overlap": _mean(_together(map(between, self.overlap().values()))),
                "exclusive_experts": float((users == 1).double().mean()),
                "unused_experts": float((users == 0).double().mean()),
            }
        pairs = zip(combinations(self.tasks, 2), between(self.pair_means()).tolist(), strict=True)
        return found | {f"ffn_cosine/{first}-{second}": value for (first, second), value in pairs}

    def _ffns(self) -> dict[str, Float[Tensor, "T T"]]:
        return {name: values for name, values in self.layers.items() if name.endswith("ffn")}


def between(cosines: Float[Tensor, "*E T T"]) -> Float[Tensor, "*E P"]:
    """Those of the P pairs of different tasks, in the order of `itertools.combinations`."""
    first, second = torch.triu_indices(cosines.shape[-1], cosines.shape[-1], 1)
    return cosines[..., first, second]


def measure_conflict(
    model: nn.Module,
    losses: Callable[[Batch], Mapping[str, Float[Tensor, ""]]],
    batches: Iterable[Batch],
    tasks: Sequence[str],
    progress: bool = True,
) -> Conflict:
    """Compare the gradients of the tasks' losses on the attention and the FFNs of all blocks.

    Cosines are those of mean gradients over all batches: where the tasks would go on the data as a whole. The mean of
    the cosines of single batches, which is what a step of training meets (Yu et al., "Gradient Surgery for Multi-Task
    Learning", arXiv 2001.06782), is drawn to 0 by the noise of small batches, most of all at single experts, and knows
    no pair of tasks whose labels never meet in one batch. Noise does not vanish here either: compare models on the
    same batches.

    Routers are left out: gates of single tasks are not shared, and a dense FFN has none. So are frozen parameters.
    The model is in evaluation mode meanwhile, without noise and dropout; gradients that parameters hold stay.

    Args:
        model: with `backbone.blocks`, each with `attn` and `mlp`, which is a dense FFN or a `moecore.MoE`.
        losses: batch -> loss of each task; a task that is missing or has a loss of 0 has no labels in the batch.
        batches: to take the mean over.
        tasks: to compare.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: for fewer than two tasks, no batches, or a backbone that is frozen.
    """
    require(len(tasks) >= 2, "tasks", ",".join(tasks), "conflict is between two tasks at least")
    groups = _shared_parameters(model)
    parameters = [parameter for group in groups.values() for parameter in group.parameters]
    require(len(parameters) > 0, "model", type(model).__name__, "has no trainable block, on which tasks could conflict")
    with _evaluating(model):
        shown = track(batches, "gradients of the tasks", progress)
        gradients = _mean_gradients(parameters, losses, shown, tasks)
    layers, norms, experts, expert_norms = {}, {}, {}, {}
    remaining = [iter(task) for task in gradients]
    for name, group in groups.items():
        own = [[next(task) for _ in group.parameters] for task in remaining]
        products = _inner_products(own, group.experts or 1)  # [E, T, T]
        if group.experts:
            experts[name], expert_norms[name] = _cosines(products), _norms(products)
        layers[name], norms[name] = _cosines(products.sum(0)), _norms(products.sum(0))
    return Conflict(tuple(tasks), layers, norms, experts, expert_norms)


@dataclass(frozen=True)
class _Group:
    """Trainable parameters of one layer."""

    parameters: list[nn.Parameter]
    experts: int | None = None
    """E, if all parameters are stacks of so many experts."""


def _shared_parameters(model: nn.Module) -> dict[str, _Group]:
    """Layer -> its parameters, without layers that have none to train."""
    groups: dict[str, _Group] = {}
    for i, block in enumerate(model.backbone.blocks):
        parts = {"attention": block.attn, "ffn": block.mlp}
        if isinstance(block.mlp, MoE):
            parts |= {"ffn": block.mlp.experts, "shared expert": block.mlp.shared}
        for part, module in parts.items():
            own = [] if module is None else [p for p in module.parameters() if p.requires_grad]
            experts = module.num_experts if isinstance(module, ExpertBank) else None
            if own:
                groups[f"block {i} {part}"] = _Group(own, experts)
    return groups


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def _mean_gradients(
    parameters: Sequence[nn.Parameter],
    losses: Callable[[Batch], Mapping[str, Float[Tensor, ""]]],
    batches: Iterable[Batch],
    tasks: Sequence[str],
) -> list[list[Tensor]]:
    """Per task and parameter, over the batches that have labels for the task."""
    sums = [[torch.zeros_like(parameter) for parameter in parameters] for _ in tasks]
    counts = [0] * len(tasks)
    seen = 0
    for batch in batches:
        seen += 1
        found = losses(batch)
        for number, task in enumerate(tasks):
            loss = found.get(task)
            if loss is None or not loss.requires_grad or not bool(loss.detach() != 0):
                continue
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for total, grad in zip(sums[number], grads, strict=True):
                if grad is not None:
                    total += grad
            counts[number] += 1
    require(seen > 0, "batches", seen, "it takes at least one to measure conflict")
    return [[total.div_(max(count, 1)) for total in task] for task, count in zip(sums, counts, strict=True)]


def _inner_products(gradients: Sequence[Sequence[Tensor]], parts: int) -> Float[Tensor, "E T T"]:
    """Of every two tasks' gradients, for each of E equal parts of all parameters."""
    total = torch.zeros(parts, len(gradients), len(gradients), dtype=torch.float64)
    for of_tasks in zip(*gradients, strict=True):  # one parameter
        rows = torch.stack([grad.reshape(parts, -1).cpu().double() for grad in of_tasks], 1)  # [E, T, size]
        total += rows @ rows.mT
    return total


def _norms(products: Float[Tensor, "*E T T"]) -> Float[Tensor, "*E T"]:
    return products.diagonal(dim1=-2, dim2=-1).sqrt()


def _products(norms: Float[Tensor, "*E T"]) -> Float[Tensor, "*E T T"]:
    return norms[..., :, None] * norms[..., None, :]


def _cosines(products: Float[Tensor, "*E T T"]) -> Float[Tensor, "*E T T"]:
    """From inner products; NaN where a task has no gradient."""
    return (products / _products(_norms(products))).clamp(-1, 1)


def _together(pairs: Iterable[Float[Tensor, "*E P"]]) -> Float[Tensor, " N"]:
    """All cosines that are defined."""
    values = torch.cat([torch.empty(0, dtype=torch.float64), *(each.flatten() for each in pairs)])
    return values[~values.isnan()]


def _mean(values: Float[Tensor, " N"]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _negative(values: Float[Tensor, " N"]) -> float:
    return _mean((values < 0).double())


def compare(moe: Conflict, dense: Conflict) -> list[dict[str, Any]]:
    """A row per block: mean cosine between tasks in the dense FFN, the whole bank and within experts, and more.

    Args:
        moe: of a model with MoE layers; what only banks have is NaN for its dense blocks.
        dense: of the dense model beside it, for the same tasks and of the same depth.

    Raises:
        ValueError: if tasks or blocks differ.
    """
    ffns, theirs = moe._ffns(), dense._ffns()
    if moe.tasks != dense.tasks or ffns.keys() != theirs.keys():
        raise ValueError(
            f"conflict of {', '.join(moe.tasks)} in {len(ffns)} blocks: "
            f"beside it, {', '.join(dense.tasks)} in {len(theirs)}"
        )
    return [_row(moe, dense, layer) for layer in ffns]


def _row(moe: Conflict, dense: Conflict, layer: str) -> dict[str, Any]:
    none = torch.full_like(moe.layers[layer], math.nan)
    bank, ffn = (_together([between(conflict.layers[layer])]) for conflict in (moe, dense))
    within, overlap = (_together([between(found.get(layer, none))]) for found in (moe.within_experts(), moe.overlap()))
    experts = _together([between(moe.experts.get(layer, none))])
    users = moe.users().get(layer)
    return {
        "block": int(layer.split()[1]),
        "dense ffn": _mean(ffn),
        "whole bank": _mean(bank),
        "within experts": _mean(within),
        "overlap": _mean(overlap),
        "dense ffn, pairs below 0": _negative(ffn),
        "whole bank, pairs below 0": _negative(bank),
        "within experts, pairs below 0": _negative(experts),
        "exclusive experts": math.nan if users is None else float((users == 1).double().mean()),
    }
