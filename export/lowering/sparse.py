"""Sparse: each expert multiplies the tokens it was sent and no others; standard operators, exact, any batch.

Slots are sorted by expert, the rows split into as many pieces as there are experts (some may be empty), every piece
runs its products, and the results go back through the inverse permutation. No node adds into shared memory, so the
same graph runs in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.lowering.dense import lower_dense
from export.lowering.expert import hidden_units, own_weights, run_expert, table_weights
from export.lowering.node import Emitter, Experts

_FEW_SLOTS = 4
"""Slots per token up to which they are added one by one."""
MANY = 32
"""Experts from which on a call of few tokens is worth a way of its own."""
_COPIED_PER_EXPERT = 4096
"""Weights that onnxruntime copies in the time that one more expert without tokens takes (about a microsecond)."""


@dataclass(frozen=True)
class Sorted:
    """Slots sorted by expert; P = T * K."""

    order: str
    """[P] slot numbers, by expert, empty ones last."""
    token: str
    """[P] token of each."""
    counts: str
    """[E] slots of every expert; [E + 1] where slots may be empty."""
    pairs: str
    """[1] P."""


def sort_slots(emit: Emitter, node: Experts) -> Sorted:
    """Who goes where."""
    flat = emit.op("Reshape", node.expert, emit.constant([-1]))  # [P]
    pairs = emit.op("Shape", flat)
    _, order = emit.ops("TopK", flat, pairs, outputs=2, largest=0, axis=0)
    token = emit.op("Div", order, emit.constant(node.top_k)) if node.top_k > 1 else order
    zeros = emit.constant(np.zeros(node.num_experts + (node.slots == "some")))
    ones = emit.op("Expand", emit.constant([1]), pairs)
    counts = emit.op("ScatterElements", zeros, flat, ones, axis=0, reduction="add")
    return Sorted(order, token, counts, pairs)


def combine(emit: Emitter, node: Experts, sent: Sorted, outputs: str) -> str:
    """Outputs `[P, O]` sorted by expert -> weighted sum per token `[T, O]`."""
    numbers = emit.op("Range", emit.constant(0), emit.op("Squeeze", sent.pairs), emit.constant(1))
    inverse = emit.op("ScatterElements", sent.order, sent.order, numbers, axis=0)
    if node.top_k == 1:
        return emit.op("Mul", emit.op("Gather", outputs, inverse), node.weight)
    places = emit.op("Reshape", inverse, emit.constant([-1, node.top_k]))  # [T, K]
    if node.top_k <= _FEW_SLOTS:
        return _slot_by_slot(emit, node, places, outputs)
    slots = emit.op("Gather", outputs, places)  # [T, K, O]
    weighted = emit.op("Mul", slots, emit.op("Unsqueeze", node.weight, emit.constant([2])))
    return emit.op("ReduceSum", weighted, emit.constant([1]), keepdims=0)


def _slot_by_slot(emit: Emitter, node: Experts, places: str, outputs: str) -> str:
    """The weighted sum as one addition per slot, which is quicker than a sum over a short dimension."""
    columns, weights = (
        emit.ops("Split", one, outputs=node.top_k, axis=1, num_outputs=node.top_k) for one in (places, node.weight)
    )
    total, second = "", emit.constant([1])
    for column, weight in zip(columns, weights, strict=True):
        y = emit.op("Mul", emit.op("Gather", outputs, emit.op("Squeeze", column, second)), weight)
        total = emit.op("Add", total, y) if total else y
    return total


def silence(emit: Emitter, node: Experts, rows: str) -> str:
    """What the experts of empty slots say: rows `[n, D]` -> zeros `[n, O]`."""
    shape = emit.op("Concat", emit.op("Shape", rows, start=0, end=1), emit.constant([node.down.shape[1]]), axis=0)
    return emit.op("Expand", emit.constant(np.zeros((1, 1)), dtype=node.down.dtype), shape)


def lower_sparse(emit: Emitter, node: Experts) -> str:
    """The layer; returns the name of its output.

    With very many experts a call of few tokens takes another way: it copies the weights of the chosen, which costs
    less than passing by all the others.
    """
    if node.slots == "every":
        return lower_dense(emit, node)
    limit = node.num_experts * _COPIED_PER_EXPERT // node.up[0].size
    if node.num_experts < MANY or limit < node.top_k:
        return lower_by_expert(emit, node)
    tables = table_weights(emit, node)
    few, many = emit.inner("few"), emit.inner("many")
    branches = {
        "then_branch": few.branch(_by_slot(few, node, tables), node.up.dtype),
        "else_branch": many.branch(_by_expert(many, node, _pieces(emit, node, tables)), node.up.dtype),
    }
    return emit.op("If", emit.op("LessOrEqual", emit.op("Size", node.expert), emit.constant(limit)), **branches)


def lower_by_expert(emit: Emitter, node: Experts) -> str:
    """The layer, however many experts it has, in two-dimensional weights: what quantisation needs."""
    return lower_dense(emit, node) if node.slots == "every" else _by_expert(emit, node, own_weights(emit, node))


def _by_expert(emit: Emitter, node: Experts, weights: list[dict[str, str]]) -> str:
    sent = sort_slots(emit, node)
    rows = emit.op("Gather", node.x, sent.token)  # [P, D]
    pieces = emit.ops("Split", rows, sent.counts, outputs=node.num_experts + (node.slots == "some"), axis=0)
    outputs = [run_expert(emit, node, rows, own) for rows, own in zip(pieces, weights, strict=False)]
    if node.slots == "some":
        outputs.append(silence(emit, node, pieces[-1]))
    return combine(emit, node, sent, emit.op("Concat", *outputs, axis=0))


def _pieces(emit: Emitter, node: Experts, tables: dict[str, str]) -> list[dict[str, str]]:
    """Weights of every expert as slices of the tables, which onnxruntime cuts once, when it loads the file."""
    count, first = node.num_experts, emit.constant([0])
    cut: dict[str, list[str]] = {}
    for kind, table in tables.items():
        slices = emit.ops("Split", table, outputs=count, axis=0, num_outputs=count)
        cut[kind] = [emit.op("Squeeze", one, first) for one in slices]
    return [{kind: names[expert] for kind, names in cut.items()} for expert in range(count)]


def _by_slot(emit: Emitter, node: Experts, tables: dict[str, str]) -> str:
    """The weights of each slot's expert side by side, `[T, K, in, out]`, times its token."""
    expert = node.expert
    if node.slots == "some":  # whose combine weight is zero
        expert = emit.op("Min", expert, emit.constant([node.num_experts - 1]))

    def linear(x: str, kind: str) -> str:
        y = emit.op("MatMul", x, emit.op("Gather", tables[kind], expert))  # [T, K, 1, out]
        bias = tables.get(f"{kind}_bias")
        if bias is None:
            return y
        own = emit.op("Unsqueeze", emit.op("Gather", bias, expert), emit.constant([2]))
        return emit.op("Add", y, own)

    x = emit.op("Unsqueeze", node.x, emit.constant([1, 2]))  # [T, 1, 1, D]
    slots = emit.op("Squeeze", linear(hidden_units(emit, node, linear, x), "down"), emit.constant([2]))  # [T, K, O]
    weighted = emit.op("Mul", slots, emit.op("Unsqueeze", node.weight, emit.constant([2])))
    return emit.op("ReduceSum", weighted, emit.constant([1]), keepdims=0)
