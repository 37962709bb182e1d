"""One expert in standard operators, and what several lowerings share around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from export.errors import ExportError
from export.lowering.node import Emitter, Experts

ACTIVATIONS: dict[str, Callable[[Emitter, str], str]] = {
    "gelu": lambda emit, x: emit.op("Gelu", x),
    "gelu_tanh": lambda emit, x: emit.op("Gelu", x, approximate="tanh"),
    "silu": lambda emit, x: emit.op("Mul", x, emit.op("Sigmoid", x)),
    "relu": lambda emit, x: emit.op("Relu", x),
    "relu2": lambda emit, x: _square(emit, emit.op("Relu", x)),
    "tanh": lambda emit, x: emit.op("Tanh", x),
    "sigmoid": lambda emit, x: emit.op("Sigmoid", x),
    "identity": lambda emit, x: x,
}
"""Activations of `moecore.ACTIVATIONS` in ONNX, by the same names."""


def _square(emit: Emitter, x: str) -> str:
    return emit.op("Mul", x, x)


def activation(name: str, layer: str) -> Callable[[Emitter, str], str]:
    """How to emit an activation.

    Raises:
        ExportError: for one without an ONNX form here.
    """
    if name not in ACTIVATIONS:
        raise ExportError(f"{layer}: activation {name!r} has no ONNX form; use one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def run_expert(emit: Emitter, node: Experts, rows: str, weights: Mapping[str, str]) -> str:
    """Rows `[n, D]` through one expert.

    Args:
        emit: takes the nodes.
        node: whose expert it is.
        rows: their name; there may be none.
        weights: names of the expert's matrices, `[in, out]`, and biases.

    Returns:
        Name of the output `[n, O]`.
    """

    def linear(x: str, kind: str) -> str:
        bias = weights.get(f"{kind}_bias")
        return emit.op("Gemm", x, weights[kind], *([bias] if bias else []))

    return linear(hidden_units(emit, node, linear, rows), "down")


def hidden_units(emit: Emitter, node: Experts, linear: Callable[[str, str], str], x: str) -> str:
    """Activated hidden units; `linear(x, kind)` emits the products."""
    act = activation(node.activation, node.layer)
    hidden = linear(x, "up")
    return act(emit, hidden) if node.gate is None else emit.op("Mul", act(emit, linear(x, "gate")), hidden)


def own_weights(emit: Emitter, node: Experts) -> list[dict[str, str]]:
    """Two-dimensional weights of every expert as constants of their own, which quantisation needs."""
    tables = turned(node)
    return [
        {kind: emit.constant(table[expert], f"{kind}.{expert}", table.dtype) for kind, table in tables.items()}
        for expert in range(node.num_experts)
    ]


def table_weights(emit: Emitter, node: Experts) -> dict[str, str]:
    """Weights of all experts in one constant per kind, `[E, in, out]` and `[E, out]`."""
    return {kind: emit.constant(table, kind, table.dtype) for kind, table in turned(node).items()}


def turned(node: Experts) -> dict[str, np.ndarray]:
    """Matrices as `[E, in, out]`, biases as `[E, out]`."""
    return {k: table if k.endswith("bias") else table.swapaxes(1, 2) for k, table in node.tables().items()}


def weight_table(emit: Emitter, node: Experts) -> str:
    """Combine weights `[T, K]` -> `[T, E]`, zero where an expert was not chosen."""
    if node.slots == "every":
        return node.weight
    numbers = emit.constant(np.arange(node.num_experts))
    hit = emit.op("Equal", emit.op("Unsqueeze", node.expert, emit.constant([2])), numbers)  # [T, K, E]
    weight = emit.op("Unsqueeze", node.weight, emit.constant([1]))  # [T, 1, K]
    table = emit.op("MatMul", weight, emit.op("CastLike", hit, node.weight))  # [T, 1, E]
    return emit.op("Squeeze", table, emit.constant([1]))
