"""The dense twin, for timing alone: one FFN of equal active multiply-adds where a mixture was, and no router."""

from __future__ import annotations

import dataclasses

import numpy as np

from export.lowering.expert import own_weights, run_expert
from export.lowering.node import Emitter, Experts


def lower_twin(emit: Emitter, node: Experts) -> str:
    """An FFN with the hidden units of the first K experts; what leads to the router is left without a reader."""
    first = {kind: table[: node.top_k] for kind, table in node.tables().items()}
    for kind, table in first.items():
        if kind == "down":
            first[kind] = np.concatenate(list(table), 1)[None]  # [1, O, K*F]
        elif kind == "down_bias":
            first[kind] = table[:1]
        else:
            first[kind] = table.reshape(1, -1, *table.shape[2:])  # [1, K*F, D]
    twin = dataclasses.replace(node, **first)
    return run_expert(emit, twin, node.x, own_weights(emit, twin)[0])
