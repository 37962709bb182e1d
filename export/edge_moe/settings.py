"""What the accelerator has compiled in, and the refusal of models that differ from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import moecore
from export.errors import ExportError
from moecore.scores import LinearScore, NoisyScore
from moecore.scores_conditioned import PerTaskScore
from moecore.selection import TopK
from moecore.weighting import Softmax

ACCELERATOR: dict[str, Any] = {
    "image_size": (3, 128, 256),
    "patch_size": 16,
    "tokens": 129,
    "class_token": True,
    "width": 192,
    "layers": 12,
    "moe_layers": (1, 3, 5, 7, 9, 11),
    "heads": 3,
    "attention_scale": 0.125,
    "qkv_bias": True,
    "dense_hidden": 768,
    "activation": "gelu",
    "norm_eps": 1e-6,
    "final_norm": False,
    "experts": 16,
    "top_k": 2,
    "expert_hidden": 384,
    "expert_activation": "gelu",
    "expert_bias": True,
    "gated_experts": False,
    "shared_expert": False,
    "gate": "linear without bias",
    "selection": "top_k",
    "weighting": "softmax over all experts, not renormalised",
    "selection_bias": False,
    "routed_unit": "token",
}
"""Setting -> the only value that the accelerator takes."""


def require_settings(found: Mapping[str, Any]) -> None:
    """Refuse a model that differs from what the accelerator has compiled in.

    Args:
        found: settings of the model by the names of `ACCELERATOR`; those left out are not looked at.

    Raises:
        ExportError: for the first that differs: setting, value, and the value that the accelerator takes.
    """
    for name, wanted in ACCELERATOR.items():
        value = found.get(name, wanted)
        same = math.isclose(value, wanted) if isinstance(wanted, float) else value == wanted
        if not same:
            raise ExportError(f"{name}={value}: the accelerator takes {wanted}; export as onnx or fpga instead")


def moe_settings(layer: moecore.MoE) -> dict[str, Any]:
    """Settings of an MoE layer by the names of `ACCELERATOR`."""
    router, bank = layer.router, layer.experts
    ffn = bank.ffn()
    return {
        "experts": bank.num_experts,
        "top_k": router.select.max_slots,
        "expert_hidden": None if ffn is None else ffn.up.shape[1],
        "expert_activation": type(bank).__name__ if ffn is None else ffn.activation,
        "expert_bias": ffn is not None and ffn.up_bias is not None,
        "gated_experts": ffn is not None and ffn.gate is not None,
        "shared_expert": layer.shared is not None,
        "gate": _gate(router.score),
        "selection": "top_k" if type(router.select) is TopK else type(router.select).__name__,
        "weighting": _weighting(router.weight),
        "selection_bias": router.balance is not None,
        "routed_unit": layer.unit,
    }


def _gate(score: Any) -> str:
    """One linear map, for each task or for all, or what else it is."""
    if isinstance(score, LinearScore):
        if score.bias is not None:
            return "linear with bias"
        if score.temperature != 1:
            return f"linear with temperature {score.temperature}"
    elif not isinstance(score, PerTaskScore | NoisyScore):
        return type(score).__name__
    return ACCELERATOR["gate"]


def _weighting(weight: Any) -> str:
    """How chosen experts are weighted, in words."""
    if type(weight) is not Softmax:
        return type(weight).__name__
    if weight.renormalize:
        return "softmax over all experts, renormalised"
    return ACCELERATOR["weighting"] if weight.scale == 1 else f"softmax times {weight.scale}"
