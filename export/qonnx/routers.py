"""Which products of a prepared graph decide on experts: routers and gates."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from export.qonnx.prepare import PRODUCTS

if TYPE_CHECKING:
    import onnx

DECISIONS = ("TopK", "ArgMax", "Softmax")


def find_routers(proto: onnx.ModelProto) -> frozenset[str]:
    """Outputs of products with constants that reach a decision before any other product, and of what only feeds these.

    Softmax of attention does not count: what it reads is a product of two activations. That of a classifier does.

    Args:
        proto: as `export.qonnx.prepare.prepare` gives it.
    """
    constants = {one.name for one in proto.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in proto.graph.node:
        for name in node.input:
            readers[name].append(node)
    routers: set[str] = set()
    for node in reversed(proto.graph.node):  # what is fed first
        if node.op_type not in PRODUCTS or node.input[1] not in constants:
            continue
        ends = _ends(node.output[0], readers)
        decides = any(end.op_type in DECISIONS for end in ends)
        feeds = bool(ends) and all(end.output[0] in routers for end in ends)
        if decides or feeds:
            routers.add(node.output[0])
    return frozenset(routers)


def _ends(name: str, readers: dict[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """Products and decisions that a tensor reaches without passing another."""
    ends, waiting, seen = [], [name], {name}
    while waiting:
        for node in readers[waiting.pop()]:
            if node.op_type in (*PRODUCTS, *DECISIONS):
                ends.append(node)
                continue
            fresh = [one for one in node.output if one not in seen]
            waiting += fresh
            seen.update(fresh)
    return ends
