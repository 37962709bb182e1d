"""The accelerator's tensors: names, shapes and types, and their values from published weights of M³ViT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from export.edge_moe.fixed import ATTENTION_BIAS, BIAS, LINEAR, NORM, PATCH, POSITION, Fixed
from export.edge_moe.settings import ACCELERATOR
from export.errors import ExportError

LAYERS, MOE_LAYERS = ACCELERATOR["layers"], ACCELERATOR["moe_layers"]
DENSE_LAYERS = tuple(i for i in range(LAYERS) if i not in MOE_LAYERS)
D, E, F, H = (ACCELERATOR[name] for name in ("width", "experts", "expert_hidden", "dense_hidden"))
N, PATCH_SIZE = ACCELERATOR["tokens"], ACCELERATOR["patch_size"]
GOLDEN = f"l{LAYERS - 1}_x_post_moe"
"""The activation that the published testbench compares."""

Tensors = dict[str, np.ndarray]
"""The accelerator's tensors by name, float32."""


@dataclass(frozen=True)
class Spec:
    """One tensor of the accelerator."""

    shape: tuple[int, ...]
    fixed: Fixed
    source: str
    """Published name of the weight it comes from."""


ATTENTION = {
    "norm1_weight": ((D,), NORM, "norm1.weight"),
    "norm1_bias": ((D,), NORM, "norm1.bias"),
    "qkv_weight": ((3 * D, D), LINEAR, "attn.qkv.weight"),
    "qkv_bias": ((3 * D,), ATTENTION_BIAS, "attn.qkv.bias"),
    "attn_proj_weight": ((D, D), LINEAR, "attn.proj.weight"),
    "attn_proj_bias": ((D,), ATTENTION_BIAS, "attn.proj.bias"),
    "norm2_weight": ((D,), NORM, "norm2.weight"),
    "norm2_bias": ((D,), NORM, "norm2.bias"),
}
DENSE = {
    "fc1_weight": ((H, D), LINEAR, "mlp.fc1.weight"),
    "fc1_bias": ((H,), BIAS, "mlp.fc1.bias"),
    "fc2_weight": ((D, H), LINEAR, "mlp.fc2.weight"),
    "fc2_bias": ((D,), BIAS, "mlp.fc2.bias"),
}
MOE = {
    "htoh4_weight": ((E, F, D), LINEAR, "mlp.experts.htoh4.weight"),
    "htoh4_bias": ((E, F), BIAS, "mlp.experts.htoh4.bias"),
    "h4toh_weight": ((E, D, F), LINEAR, "mlp.experts.h4toh.weight"),
    "h4toh_bias": ((E, D), BIAS, "mlp.experts.h4toh.bias"),
}
"""Tensors of a layer without its number: shape, type, and published name inside the block."""


def specs(num_tasks: int) -> dict[str, Spec]:
    """All tensors by name, gates for so many tasks among them."""
    found = {
        "patch_embed_weight": Spec((D, 3, PATCH_SIZE, PATCH_SIZE), PATCH, "patch_embed.proj.weight"),
        "patch_embed_bias": Spec((D,), BIAS, "patch_embed.proj.bias"),
        "pos_embed": Spec((N, D), POSITION, "pos_embed"),
    }
    for i in range(LAYERS):
        for name, (shape, fixed, source) in (ATTENTION | (MOE if i in MOE_LAYERS else DENSE)).items():
            found[f"l{i}_{name}"] = Spec(shape, fixed, f"blocks.{i}.{source}")
    for i in MOE_LAYERS:
        for task in range(num_tasks):
            found[gate_name(i, task)] = Spec((E, D), LINEAR, f"blocks.{i}.mlp.gate.{task}.w_gate")
    return found


def gate_name(layer: int, task: int) -> str:
    """Name of the gate of a task, `[E, D]`: the transpose of the published weight."""
    return f"l{layer}_w_gate_T_task{task}"


def accelerator_tensors(
    weights: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float], num_tasks: int
) -> Tensors:
    """The accelerator's tensors from published weights.

    Gates are transposed, the class token is added to row 0 of the positions, and the patch embedding takes pixels as
    the kernel has them. A gate that all tasks share becomes the same table for each of them.

    Args:
        weights: of the backbone, by published names: `cls_token`, `blocks.0.attn.qkv.weight`, ...,
            `blocks.1.mlp.gate.0.w_gate` `[D, E]` or, shared, `blocks.1.mlp.gate.w_gate`.
        mean: per channel, subtracted by the model from pixels in [0, 1].
        std: per channel, divides what is left.
        num_tasks: tables of gates to write.

    Raises:
        ExportError: for a weight that is missing, of another shape, or has no place in the accelerator.
    """
    left = {name: np.asarray(weight.detach().cpu().double()) for name, weight in weights.items()}
    shared = {f"blocks.{i}.mlp.gate.w_gate": i for i in MOE_LAYERS if f"blocks.{i}.mlp.gate.w_gate" in left}
    for name, i in shared.items():
        gate = left.pop(name)
        left |= {f"blocks.{i}.mlp.gate.{task}.w_gate": gate for task in range(num_tasks)}
    cls_token = _taken(left, "cls_token", (1, 1, D))[0, 0]
    found: dict[str, np.ndarray] = {}
    for name, spec in specs(num_tasks).items():
        if "_w_gate_T_" in name:
            found[name] = _taken(left, spec.source, (D, E)).T
        elif name == "pos_embed":
            found[name] = _taken(left, spec.source, (1, N, D))[0].copy()
            found[name][0] += cls_token
        else:
            found[name] = _taken(left, spec.source, spec.shape)
    if left:
        raise ExportError(f"{next(iter(left))}: has no place in the accelerator; export as onnx or fpga instead")
    found["patch_embed_weight"], found["patch_embed_bias"] = fold_pixels(
        found["patch_embed_weight"], found["patch_embed_bias"], np.asarray(mean, float), np.asarray(std, float)
    )
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def _taken(left: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight, which is then no longer left."""
    if name not in left:
        raise ExportError(f"{name}: is missing; the accelerator takes {shape}, zeros for a bias that there is not")
    value = left.pop(name)
    if value.shape != shape:
        raise ExportError(f"{name}: has shape {value.shape}; the accelerator takes {shape}")
    return value


def fold_pixels(
    weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The patch embedding of bytes / 256 that equals one of `(bytes / 255 - mean) / std`.

    Exact at every patch, as there is no padding around which 0 would mean something else.

    Args:
        weight: `[D, 3, P, P]`.
        bias: `[D]`.
        mean: `[3]`.
        std: `[3]`.

    Returns:
        Weight and bias, float64.
    """
    scaled = weight / std[:, None, None]  # [D, 3, P, P]
    return scaled * (256 / 255), bias - np.einsum("dcij,c->d", scaled, mean)


def stacked(tensors: Tensors, num_tasks: int) -> Tensors:
    """Tensors of all layers in one, as the accelerator's host program takes them.

    Only `moe_w_gate_per_task`, `[tasks, MoE layers, E, D]`, has a published name. The others are named like the files
    of one layer without its number, those of MoE layers behind `moe_`.
    """
    found = {name: tensors[name] for name in ("patch_embed_weight", "patch_embed_bias", "pos_embed")}
    for names, layers, prefix in ((ATTENTION, range(LAYERS), ""), (DENSE, DENSE_LAYERS, ""), (MOE, MOE_LAYERS, "moe_")):
        found |= {prefix + name: np.stack([tensors[f"l{i}_{name}"] for i in layers]) for name in names}
    gates = [[tensors[gate_name(i, task)] for i in MOE_LAYERS] for task in range(num_tasks)]
    return found | {"moe_w_gate_per_task": np.array(gates)}
