"""Weights of M³ViT's backbone under the names of the published code, both ways."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import moecore
from apps.errors import UserError
from moecore.errors import ConfigError


def to_published(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights under the names and in the layouts of the published code.

    Dense parts go by timm's names. An MoE layer has `mlp.gate.{task}.w_gate`, `[D, E]`, or `mlp.gate.w_gate`, `[D, E]`
    or `[D + G, E]` with a task embedding; `mlp.experts.htoh4` and `.h4toh`, `[E, F, D]` and `[E, D, F]` with biases.
    The task embedding is `gate_task_represent`.

    Raises:
        ConfigError: if the model holds a weight that has no published name.
    """
    return {name: view.clone(memory_format=torch.contiguous_format) for name, view in _published_views(model).items()}


@torch.no_grad()
def load_published(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into the model; see `to_published` for their names.

    Raises:
        UserError: for a weight that is missing, unexpected or of another shape; the model is then as it was.
        ConfigError: if the model holds a weight that has no published name.
    """
    views = _published_views(model)
    for problem, names in (
        ("is missing", [name for name in views if name not in state]),
        ("is no weight of this model", [name for name in state if name not in views]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"published weights: {names[0]} {problem}{more}")
    for name, view in views.items():
        if state[name].shape != view.shape:
            theirs, ours = tuple(state[name].shape), tuple(view.shape)
            raise UserError(f"published weights: {name} has shape {theirs}, where this model takes {ours}")
    for name, view in views.items():
        view.copy_(state[name])


_EXPERTS = {
    "experts.up": "experts.htoh4.weight",
    "experts.up_bias": "experts.htoh4.bias",
    "experts.down": "experts.h4toh.weight",
    "experts.down_bias": "experts.h4toh.bias",
}
"""Weights of a layer's experts, by our names, and the published ones; the layouts are the same."""
_GATE, _EMBEDDING = "router.score.weight", "router.score.embed."


def _published_views(model: nn.Module) -> dict[str, Tensor]:
    """Published name -> view of the model's own weight in the published layout: to copy from, and to copy into."""
    layers = [name for name, module in model.named_modules() if isinstance(module, moecore.MoE)]
    views: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        part = name if layer is None else name.removeprefix(f"{layer}.")
        if layer is None:
            views[name] = weight
        elif part in _EXPERTS:
            views[f"{layer}.{_EXPERTS[part]}"] = weight
        elif part == _GATE and weight.dim() == 3:
            views |= {f"{layer}.gate.{task}.w_gate": gate.t() for task, gate in enumerate(weight)}  # [D, E] each
        elif part == _GATE:
            views[f"{layer}.gate.w_gate"] = weight.t()  # [D, E]
        elif part.startswith(_EMBEDDING):  # one for all layers, which each of them lists
            views[f"gate_task_represent.{part.removeprefix(_EMBEDDING)}"] = weight
        else:
            raise ConfigError("model", name, "has no published name; build the layers with m3vit_moe")
    return views


def backbone_part(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights of the backbone in a published state, without those of decoders; None if it has no published experts.

    Published checkpoints hold the backbone as `backbone.*`, behind `module.` where several GPUs trained it.
    """
    names = {name: name.removeprefix("module.").removeprefix("backbone.") for name in state}
    if not any(name.endswith("experts.htoh4.weight") for name in names.values()):
        return None
    parts = ("blocks.", "patch_embed.", "pos_embed", "cls_token", "gate_task_represent.")
    return {name: state[full] for full, name in names.items() if name.startswith(parts)}
