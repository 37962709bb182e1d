"""onnxruntime's own operators `MoE` and `QMoE` (domain com.microsoft), where they mean what our experts mean.

Both select and weight by themselves: their input is logits, of which they take the k largest and a softmax over these.
Given `log w` for the chosen experts and a very low number elsewhere, that softmax is `w / sum(w)`, so any router
goes in; the output times `sum(w)` is the layer's.
"""

from __future__ import annotations

import numpy as np

from export.errors import ExportError
from export.lowering.node import Emitter, Experts

MICROSOFT = "com.microsoft"
_NEVER = -1e30
_NAMES = {"gelu_tanh": "gelu", "silu": "silu", "relu": "relu", "identity": "identity"}
"""Activations of ours -> of the operators; their gelu is the tanh form."""
BLOCK = 32
"""Weights that share a scale at 4 bits."""


def why_not(node: Experts) -> str | None:
    """Why the operators cannot take a layer, or None if they can."""
    if node.gate is not None and node.activation != "silu":
        return f"gated experts with activation {node.activation!r} (silu alone)"
    if node.gate is None and node.activation not in _NAMES:
        return f"activation {node.activation!r} (one of {', '.join(sorted(_NAMES))})"
    if node.down.shape[1] != node.up.shape[2]:
        return "experts whose output is not as wide as their input"
    return None


def lower_ort_moe(emit: Emitter, node: Experts) -> str:
    """The layer in float32; returns the name of its output."""
    logits, total = _logits(emit, node)
    first, bias, down, down_bias = _merged(node)
    weights = [_optional(emit, name, one) for name, one in (("fc1", first), ("fc1_bias", bias))]
    weights += [_optional(emit, name, one) for name, one in (("fc2", down), ("fc2_bias", down_bias))]
    y = emit.op("MoE", node.x, logits, *weights, domain=MICROSOFT, **_attributes(node))
    return emit.op("Mul", y, total)


def lower_qmoe(emit: Emitter, node: Experts, bits: int = 8) -> str:
    """The layer with weights of 8 bits, a scale per output channel, or of 4 bits, a scale per 32 weights."""
    logits, total = _logits(emit, node)
    first, bias, down, down_bias = _merged(node)
    names: list[str] = []
    for name, table, offset in (("fc1", first, bias), ("fc2", down, down_bias)):
        codes, scales = quantize(table, bits)
        names += [emit.constant(codes, name, np.uint8), emit.constant(scales, f"{name}_scales", np.float32)]
        names.append(_optional(emit, f"{name}_bias", offset))
    blocks = {"block_size": BLOCK} if bits == 4 else {}
    attributes = {"expert_weight_bits": bits, **blocks, **_attributes(node)}
    return emit.op("Mul", emit.op("QMoE", node.x, logits, *names, domain=MICROSOFT, **attributes), total)


def quantize(table: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes of weights `[E, out, in]`, and their scales.

    Returns:
        uint8 codes, zero at the middle, `[E, out, in]` or at 4 bits two in a byte, `[E, out, in / 2]`, the first in the
        low half; scales `[E, out]`, or at 4 bits `[E, out, in / 32]`.

    Raises:
        ExportError: at 4 bits, if the width is no multiple of 32.
    """
    experts, out, width = table.shape
    if bits == 4 and width % BLOCK:
        raise ExportError(f"experts of width {width}: 4 bits take multiples of {BLOCK}; use 8 bits")
    grouped = table.reshape(experts, out, -1, BLOCK if bits == 4 else width)  # [E, out, B, in / B]
    middle = 1 << (bits - 1)
    scales = np.maximum(np.abs(grouped).max(-1, keepdims=True) / (middle - 1), 1e-12)
    codes = (np.rint(grouped / scales) + middle).clip(0, 2 * middle - 1).astype(np.uint8).reshape(table.shape)
    if bits == 8:
        return codes, scales[:, :, 0, 0]
    return codes[..., ::2] | codes[..., 1::2] << 4, scales[..., 0]


def _logits(emit: Emitter, node: Experts) -> tuple[str, str]:
    """Logits `[T, E]` whose softmax over the k largest is the combine weights over their sum; that sum `[T, 1]`."""
    if reason := why_not(node):
        raise ExportError(f"{node.layer}: onnxruntime's operator does not take {reason}; use sparse")
    total = emit.op("ReduceSum", node.weight, emit.constant([1]), keepdims=1)
    said = emit.op("Log", node.weight)
    if node.slots == "every":
        return emit.op("Max", said, emit.constant([_NEVER], dtype=node.up.dtype)), total
    expert, columns = node.expert, node.num_experts + (node.slots == "some")
    rows = emit.op("Concat", emit.op("Shape", node.x, start=0, end=1), emit.constant([columns]), axis=0)
    never = emit.op("Expand", emit.constant(np.full((1, 1), _NEVER), dtype=node.up.dtype), rows)
    said = emit.op("Max", said, emit.constant([_NEVER], dtype=node.up.dtype))  # the logarithm of an empty slot
    logits = emit.op("ScatterElements", never, expert, said, axis=1)
    if node.slots == "some":
        ends = (emit.constant([0]), emit.constant([node.num_experts]), emit.constant([1]))
        logits = emit.op("Slice", logits, *ends)
    return logits, total


def _merged(node: Experts) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
    """First weights and biases, gate and up rows in turn where experts are gated; second weights and biases."""
    if node.gate is None:
        return node.up, node.up_bias, node.down, node.down_bias
    first = np.stack([node.gate, node.up], 2).reshape(node.num_experts, -1, node.up.shape[2])
    bias = None if node.up_bias is None else np.stack([node.gate_bias, node.up_bias], 2).reshape(node.num_experts, -1)
    return first, bias, node.down, node.down_bias


def _optional(emit: Emitter, name: str, table: np.ndarray | None) -> str:
    return "" if table is None else emit.constant(table, name, table.dtype)


def _attributes(node: Experts) -> dict[str, int | str | float]:
    shared = {"k": node.top_k, "normalize_routing_weights": 1}
    if node.gate is not None:
        return {
            **shared,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
    return {**shared, "activation_type": _NAMES[node.activation]}
