"""Dense: every expert on every token, unchosen ones weighted zero; static shapes, for tools that need them."""

from __future__ import annotations

from export.lowering.expert import own_weights, run_expert, weight_table
from export.lowering.node import Emitter, Experts


def lower_dense(emit: Emitter, node: Experts) -> str:
    """The layer at E / K times the cost of the sparse form; returns the name of its output."""
    columns = [weight_table(emit, node)]
    if node.num_experts > 1:
        columns = emit.ops("Split", *columns, outputs=node.num_experts, axis=1, num_outputs=node.num_experts)
    total = ""
    for column, own in zip(columns, own_weights(emit, node), strict=True):
        y = emit.op("Mul", run_expert(emit, node, node.x, own), column)
        total = emit.op("Add", total, y) if total else y
    return total
