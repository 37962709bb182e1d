"""Graphs without what says nothing: identities, constants held twice, nodes and operator sets that nobody reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def simplify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, shorter; names of inputs, outputs and of what other nodes compute stay."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    model = ir.from_proto(proto)
    for step in (
        common.IdentityEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    return ir.to_proto(model)
