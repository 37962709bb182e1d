"""Reading and rewriting graphs: fixed arrays by name, constants folded, nodes replaced, what nobody reads dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_WEIGHT_INPUTS = {"MatMul": (1,), "Gemm": (1, 2), "Conv": (1, 2), "ConvTranspose": (1, 2), "Gather": (0,)}
"""Which inputs of an operator are weights, and offsets after them."""


class Weights:
    """The fixed float32 arrays of a graph.

    Args:
        graph: whose initialisers they are.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        from onnx import TensorProto

        self._protos = {one.name: one for one in graph.initializer if one.data_type == TensorProto.FLOAT}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one; of an array that is not fixed or not of floats, none at all."""
        return tuple(self._protos[name].dims) if name in self._protos else ()

    def array(self, name: str) -> np.ndarray:
        """One by name."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self._protos[name])


def weight_inputs(node: onnx.NodeProto) -> list[str]:
    """Names of the weights of a product, convolution or lookup, and of its offset if it has one; else none."""
    places = () if node.domain else _WEIGHT_INPUTS.get(node.op_type, ())
    return [node.input[place] for place in places if place < len(node.input) and node.input[place]]


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put nodes in place of those of a graph, and drop nodes and arrays that nothing reads.

    Args:
        graph: changed in place.
        nodes: in any order; those of the graph may be among them.
    """
    import onnx

    read = {one.name for one in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(_in_order(nodes)):
        if read.intersection(node.output):
            kept.append(node)
            read.update(_reads(node))
    copies = onnx.GraphProto()
    copies.node.extend(reversed(kept))
    copies.initializer.extend(one for one in graph.initializer if one.name in read)
    graph.ClearField("node")
    graph.ClearField("initializer")
    graph.node.MergeFrom(copies.node)
    graph.initializer.MergeFrom(copies.initializer)


def _in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes such that each stands after those whose outputs it reads."""
    maker = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    needs = {place: [maker[name] for name in _reads(node) if name in maker] for place, node in enumerate(nodes)}
    return [nodes[place] for place in TopologicalSorter(needs).static_order()]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node reads, those inside its branches and bodies among them."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (one.name for one in graph.output)


def fold_weights(proto: onnx.ModelProto) -> None:
    """Compute weights that the graph puts together from fixed arrays, in place: quantisers see initialisers alone."""
    import onnx
    from onnx import numpy_helper

    from export.measure import session_of

    graph = proto.graph
    fixed, made = {one.name for one in graph.initializer}, set[str]()
    for node in graph.node:
        if node.input and all(name in fixed or not name for name in _reads(node)):
            fixed.update(node.output)
            made.update(node.output)
    wanted = sorted({name for node in graph.node for name in weight_inputs(node)} & made)
    if not wanted:
        return
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    part.graph.ClearField("input")
    part.graph.ClearField("output")
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    replace_nodes(part.graph, list(part.graph.node))
    arrays = dict(zip(wanted, session_of(part).run(wanted, {}), strict=True))
    graph.initializer.extend(numpy_helper.from_array(array, f"{name}.folded") for name, array in arrays.items())
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in arrays:
                node.input[place] = f"{name}.folded"
    replace_nodes(graph, list(graph.node))
