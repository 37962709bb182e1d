"""Models for one task, cut out of M³ViT: one gate per layer, one head, and only the experts that the gates choose."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import moecore
from apps.vision.models.m3vit import M3ViT, Slice
from moecore.errors import require
from moecore.transforms.prune import KeptSelection, prune


@dataclass
class Usage:
    """How a layer's experts were used by one task."""

    chosen: Bool[Tensor, " E"]
    """Experts that some token chose."""
    weight: Float[Tensor, " E"]
    """Combine weights of each expert, summed over the tokens that chose it."""
    near: Bool[Tensor, " E"]
    """Experts whose probability was within the margin of a chosen one's, on some token."""
    tokens: int = 0


def moe_layers(model: nn.Module) -> dict[str, moecore.MoE]:
    """The MoE layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, moecore.MoE)}


@torch.no_grad()
def usage(
    model: M3ViT, task: str, batches: Iterable[Float[Tensor, "B C H W"]], margin: float = 0.0
) -> dict[str, Usage]:
    """Which experts a task's gates choose in each layer, and which they nearly choose.

    Args:
        model: is put into eval mode.
        task: of the gates.
        batches: images.
        margin: in probability.
    """
    model.eval()
    found: dict[str, Usage] = {}
    for images in batches:
        with moecore.record(model) as recording:
            model(images.to(model.mean.device), [task])
        for routing in recording:
            experts = routing.assignment.num_experts
            none = torch.zeros(experts, dtype=torch.bool)
            seen = found.setdefault(routing.name, Usage(none, none.double(), none.clone()))
            assignment, probs = routing.assignment, routing.probs[:, :experts]
            last = probs.masked_fill(~assignment.chosen(), 2.0).amin(-1, keepdim=True)  # [T, 1]
            seen.near |= (probs >= last - margin).any(0).cpu()
            seen.chosen |= (assignment.load() > 0).cpu()
            seen.weight += assignment.dense(routing.weights).sum(0).double().cpu()
            seen.tokens += assignment.num_tokens
    return found


def choose_experts(
    model: M3ViT, task: str, batches: Iterable[Float[Tensor, "B C H W"]] | None, margin: float, min_share: float
) -> Slice:
    """Which experts a model for one task is to hold; see `M3ViT.for_task`.

    Every layer keeps at least as many as a token uses.
    """
    model.refuse_unknown(task)
    require(margin >= 0, "margin", margin, "is a difference of probabilities: 0 or more")
    require(0 <= min_share < 1, "min_share", min_share, "is a share of the weights, in [0, 1)")
    layers = moe_layers(model)
    if batches is None:
        return Slice(task, {name: list(range(layer.experts.num_experts)) for name, layer in layers.items()}, {})
    kept, shares, tokens = {}, {}, 0
    found = usage(model, task, batches, margin)
    require(not layers or bool(found), "batches", "none", "calibration needs at least one batch of images")
    for name, seen in found.items():
        share = seen.weight / seen.weight.sum().clamp(min=1e-12)
        keep = (seen.chosen | seen.near) if margin > 0 else seen.chosen.clone()
        if min_share > 0:
            keep &= share >= min_share
        keep[share.argsort(descending=True, stable=True)[: layers[name].router.select.max_slots]] = True
        kept[name], tokens = torch.nonzero(keep).flatten().tolist(), seen.tokens
        shares[name] = share.tolist()
    return Slice(task, kept, shares, tokens)


def slice_model(model: M3ViT, chosen: Slice) -> M3ViT:
    """A model that holds only what a slice names; the whole one stays as it is.

    Args:
        model: the whole one.
        chosen: task and experts.
    """
    number = model.spec.names.index(chosen.task)
    spec = dataclasses.replace(model.spec, tasks=(model.spec.tasks[number],))
    small = M3ViT(model.config, spec, _pruned(model.backbone, chosen, number), model.decoder.only(chosen.task))
    small.slice = chosen
    return small.to(model.mean.device).train(model.training)


def _pruned(backbone: nn.Module, chosen: Slice, number: int) -> nn.Module:
    """A copy of the backbone with pruned layers in place of the whole ones, which are never copied."""
    layers = moe_layers(backbone)
    pruned = {name: prune(layer, chosen.experts[f"backbone.{name}"], task=number) for name, layer in layers.items()}
    memo = {id(layer): pruned[name] for name, layer in layers.items()}
    return copy.deepcopy(backbone, memo)


def leaving(small: M3ViT, recording: moecore.Recording) -> dict[str, Bool[Tensor, "B N"]]:
    """Per layer which tokens would have gone to an expert left out, had it been there.

    Args:
        small: a model for one task.
        recording: of it, by `moecore.record`.
    """
    layers, left = moe_layers(small), {}
    for routing in recording:
        select = layers[routing.name].router.select
        scores = routing.scores
        gone = (
            select.leaves(scores) if isinstance(select, KeptSelection) else torch.zeros(len(scores), dtype=torch.bool)
        )
        left[routing.name] = gone.view(routing.lead)
    return left
