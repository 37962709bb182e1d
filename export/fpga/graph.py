"""An ONNX graph read for compilation: static shapes, constants computed, views found, parts that belong together fused.

Several graphs of one structure, one per task, become one whose constants have a variant for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.fpga.calibrate import FloatGraph, Observed, Values, boundless
from export.lowering.node import layer_of

if TYPE_CHECKING:
    import onnx

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout")
"""Operators that only give other names or shapes to the same elements."""
FINITE = ("IsNaN", "IsInf")
"""Tests that fixed point makes constant: it has neither NaN nor infinity."""
NEAREST = "export as onnx or onnx-int8"


@dataclass(frozen=True)
class Node:
    """An operation on named tensors."""

    op: str
    name: str
    inputs: tuple[str, ...]
    """Empty names for operands that are not given."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(attribute, default)


@dataclass
class Graph:
    """What is compiled."""

    nodes: list[Node]
    constants: dict[str, np.ndarray]
    """[variants, *shape]: one variant for all tasks, or one for each."""
    inputs: list[str]
    outputs: list[str]
    views: dict[str, str]
    """Other names of the same elements."""
    observed: dict[str, Observed]

    def base(self, name: str) -> str:
        """The name that a view stands for."""
        while name in self.views:
            name = self.views[name]
        return name

    def is_constant(self, name: str) -> bool:
        """Whether a tensor does not depend on inputs."""
        return self.base(name) in self.constants

    def constant(self, name: str) -> np.ndarray:
        """[variants, *shape] of a constant."""
        array = self.constants[self.base(name)]
        return array if name in self.constants else array.reshape(len(array), *self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of any tensor."""
        return self.constants[name].shape[1:] if name in self.constants else self.observed[name].shape

    def kind(self, name: str) -> str:
        """Of the NumPy type: f, i, u or b."""
        return self.constants[name].dtype.kind if name in self.constants else self.observed[name].kind


def read(graph: FloatGraph, observed: dict[str, Observed], first: Values) -> Graph:
    """A graph without what is constant and what leads nowhere.

    Args:
        graph: the float model.
        observed: of all its tensors.
        first: values of one run, of which those that depend on no input are constants.
    """
    constants = {name: array[None] for name, array in graph.constants.items()}
    result = Graph([], constants, graph.inputs, graph.outputs, {}, observed)
    for proto in graph.proto.graph.node:
        node = _node(proto)
        if _never_changes(node, result) or _is_special(node, result):
            for name in filter(None, node.outputs):
                constants[name] = boundless(np.asarray(first[name]))[None]
        elif (source := _view_of(node, result)) is not None:
            result.views[node.outputs[0]] = source
        else:
            result.nodes.append(node)
    _prune(result)
    return result


def _node(proto: onnx.NodeProto) -> Node:
    from onnx import helper

    values = {one.name: helper.get_attribute_value(one) for one in proto.attribute}
    values = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    return Node(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), values, layer_of(proto))


def _never_changes(node: Node, graph: Graph) -> bool:
    given = [name for name in node.inputs if name]
    fixed = [graph.constant(name) for name in given if graph.is_constant(name)]
    if len(fixed) == len(given):
        return True
    if node.op == "And":
        return any(not array.any() for array in fixed)
    return node.op == "Or" and any(array.all() for array in fixed)


def _is_special(node: Node, graph: Graph) -> bool:
    """Whether a node tests for NaN or infinity, which holds for nothing in fixed point.

    Raises:
        ExportError: if it held for something in calibration.
    """
    fixed = [graph.constant(name) for name in node.inputs if name and graph.is_constant(name)]
    infinite = any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in fixed)
    if node.op not in FINITE and not (node.op == "Equal" and infinite):
        return False
    if graph.observed[node.outputs[0]].high > 0:
        where = node.origin or node.name or node.outputs[0]
        raise ExportError(f"{where}: {node.op} held in calibration; fixed point has no NaN or infinity; {NEAREST}")
    return True


def _view_of(node: Node, graph: Graph) -> str | None:
    """The tensor whose elements a node gives unchanged."""
    if node.op in VIEWS:
        return node.inputs[0]
    if node.op in ("Cast", "CastLike"):
        before, after = graph.kind(node.inputs[0]), graph.kind(node.outputs[0])
        return node.inputs[0] if before == after or before == "b" or (before in "iu" and after in "iuf") else None
    if node.op == "Where" and graph.is_constant(node.inputs[0]):
        condition = graph.constant(node.inputs[0])
        taken = node.inputs[1] if condition.all() else node.inputs[2]
        if condition.all() or not condition.any():
            return taken if graph.shape(taken) == graph.shape(node.outputs[0]) else None
    if node.op == "Pad" and graph.is_constant(node.inputs[1]) and not graph.constant(node.inputs[1]).any():
        return node.inputs[0]
    if node.op == "Expand" and np.prod(graph.shape(node.inputs[0])) == np.prod(graph.shape(node.outputs[0])):
        return node.inputs[0]
    return None


def _prune(graph: Graph) -> None:
    """Leave out nodes whose outputs nobody reads."""
    needed = {graph.base(name) for name in graph.outputs}
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(graph.base(name) for name in node.inputs if name)
    graph.nodes = kept[::-1]


def uses(graph: Graph) -> Counter[str]:
    """How often each tensor is read; an output of the model counts as read once more."""
    read_by = Counter(graph.base(name) for node in graph.nodes for name in node.inputs if name)
    return read_by + Counter(graph.base(name) for name in graph.outputs)


def merge(graphs: Sequence[Graph], tasks: Sequence[str]) -> Graph:
    """Graphs of one structure as one; constants that differ get a variant for each.

    Raises:
        ExportError: where they differ in more than constants.
    """
    whole = graphs[0]
    if len(graphs) == 1:
        return whole
    variants: dict[str, list[np.ndarray]] = {}
    for graph, task in zip(graphs, tasks, strict=True):
        names = _match(whole, graph, f"task {task}: its graph")
        for name in whole.constants:
            if name in names:
                variants.setdefault(name, []).append(graph.constants[names[name]][0])
        for name, other in names.items():
            if name in whole.observed and other in graph.observed:
                whole.observed[name].join(graph.observed[other])
    for name, arrays in variants.items():
        equal = all(np.array_equal(arrays[0], array, equal_nan=array.dtype.kind == "f") for array in arrays[1:])
        whole.constants[name] = np.stack(arrays[:1] if equal else arrays)
    return whole


def _match(whole: Graph, graph: Graph, what: str) -> dict[str, str]:
    """Names of one graph -> names of another of the same structure."""
    names = dict(zip(whole.inputs, graph.inputs, strict=False))
    if len(whole.nodes) != len(graph.nodes) or len(whole.outputs) != len(graph.outputs):
        raise ExportError(f"{what} has {len(graph.nodes)} layers, the first one's {len(whole.nodes)}; {_APART}")
    for one, other in zip(whole.nodes, graph.nodes, strict=True):
        if one.op != other.op or one.attributes != other.attributes or len(one.inputs) != len(other.inputs):
            raise ExportError(f"{what} has {other.op} ({other.name}) where the first has {one.op}; {_APART}")
        for mine, theirs in zip((*one.inputs, *one.outputs), (*other.inputs, *other.outputs), strict=True):
            if mine and whole.shape(mine) != graph.shape(theirs):
                raise ExportError(
                    f"{what} has {theirs} of shape {graph.shape(theirs)}, not {whole.shape(mine)}; {_APART}"
                )
            names |= {mine: theirs, whole.base(mine): graph.base(theirs)} if mine else {}
        for inner in [*whole.observed]:
            if inner.startswith(f"{one.outputs[0]}:"):
                names[inner] = inner.replace(one.outputs[0], other.outputs[0], 1)
    return names


_APART = "export the tasks one by one, or the part that they share"
