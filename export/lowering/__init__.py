"""From opaque mixtures of experts to operators that runtimes have; one form per file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from export.errors import ExportError
from export.lowering.dense import lower_dense
from export.lowering.loop import lower_loop
from export.lowering.node import DOMAIN, Emitter, Experts, is_opaque, read_experts
from export.lowering.ort_moe import MICROSOFT, lower_ort_moe, lower_qmoe
from export.lowering.sparse import lower_sparse
from export.simplify import simplify

if TYPE_CHECKING:
    import onnx

Lowering = Callable[[Emitter, Experts], str]
"""Emits the nodes that take the place of one opaque node, and says what their output is."""
LOWERINGS: dict[str, Lowering] = {
    "sparse": lower_sparse,
    "dense": lower_dense,
    "loop": lower_loop,
    "ort_moe": lower_ort_moe,
    "qmoe": lower_qmoe,
    "qmoe4": partial(lower_qmoe, bits=4),
}
"""Lowerings by name."""


def lower(proto: onnx.ModelProto, form: str | Lowering) -> onnx.ModelProto:
    """A copy of a graph without opaque nodes.

    Args:
        proto: as `export.onnx.trace` gives it.
        form: a name of `LOWERINGS`, or such a function.

    Raises:
        ExportError: if a layer cannot take the form.
    """
    import onnx

    lowering = LOWERINGS.get(form) if isinstance(form, str) else form
    if lowering is None:
        raise ExportError(f"experts={form!r}: choose one of {', '.join(sorted(LOWERINGS))}")
    experts = {node.name: node for node in read_experts(proto)}
    gone = {name for node in proto.graph.node if is_opaque(node) for name in node.input[3:]}
    kept = {name for node in proto.graph.node if not is_opaque(node) for name in node.input}
    lowered = onnx.ModelProto()
    lowered.CopyFrom(proto)
    graph = lowered.graph
    _keep(graph.initializer, [one for one in graph.initializer if one.name not in gone - kept])
    nodes: list[onnx.NodeProto] = []
    for number, node in enumerate(graph.node):
        if not is_opaque(node):
            nodes.append(node)
            continue
        opaque = experts[node.name]
        emit = Emitter(f"experts_{number}", opaque.layer)
        emit.op("Identity", lowering(emit, opaque), to=opaque.output)
        nodes += emit.nodes
        graph.initializer.extend(emit.initializers)
    _keep(graph.node, nodes)
    _declare_domains(lowered)
    return simplify(lowered)


def _keep(field: object, wanted: list) -> None:
    """What a repeated field of a message holds from now on."""
    copies = [type(one).FromString(one.SerializeToString()) for one in wanted]
    del field[:]
    field.extend(copies)


def _declare_domains(proto: onnx.ModelProto) -> None:
    """The operator sets that the nodes use."""
    from onnx import helper

    known = [one for one in proto.opset_import if one.domain not in (DOMAIN, MICROSOFT)]
    used = any(node.domain == MICROSOFT for node in proto.graph.node)
    _keep(proto.opset_import, [*known, *([helper.make_opsetid(MICROSOFT, 1)] if used else [])])
