"""Operations that ONNX spells out and hardware does as one: linear with bias, RMS norm, SiLU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from export.fpga.graph import Graph, Node, uses


def fuse(graph: Graph) -> Graph:
    """The same graph with fewer nodes."""
    for rule in (_linear, _rms_norm, _scaled_norm, _silu):
        _apply(graph, rule)
    return graph


Rule = Callable[["Finder", Node], tuple[Node, list[Node]] | None]
"""What takes the place of a node, and the nodes that vanish with it."""


class Finder:
    """Who made a tensor, and whether anybody else reads it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.nodes for name in node.outputs}
        self.uses: Counter[str] = uses(graph)

    def alone(self, name: str, *ops: str) -> Node | None:
        """The maker of a tensor if it is one of some operators, and nobody else reads the tensor."""
        base = self.graph.base(name)
        node = self.makers.get(base)
        return node if node is not None and node.op in ops and self.uses[base] == 1 else None

    def scalar(self, name: str) -> float | None:
        """The one value of a constant."""
        if not self.graph.is_constant(name):
            return None
        array = self.graph.constant(name)
        return float(array.reshape(-1)[0]) if array.size == 1 else None


def _apply(graph: Graph, rule: Rule) -> None:
    finder = Finder(graph)
    found: dict[int, Node] = {}
    gone: set[int] = set()
    for node in graph.nodes:
        match = rule(finder, node)
        if match and not gone.intersection(map(id, match[1])):
            found[id(node)] = match[0]
            gone.update(map(id, match[1]))
    graph.nodes = [found.get(id(node), node) for node in graph.nodes if id(node) not in gone]


def _linear(finder: Finder, node: Node) -> tuple[Node, list[Node]] | None:
    """MatMul with a constant matrix, then Add of a constant vector."""
    if node.op != "Add":
        return None
    graph = finder.graph
    for product, bias in (node.inputs, node.inputs[::-1]):
        made = finder.alone(product, "MatMul")
        if made is None or not graph.is_constant(bias) or not graph.is_constant(made.inputs[1]):
            continue
        weight, vector = graph.shape(made.inputs[1]), graph.shape(bias)
        fits = len(weight) == 2 and int(np.prod(vector)) == weight[1] and vector[-1:] == weight[1:]
        if fits and graph.shape(node.outputs[0]) == graph.shape(product):
            return Node("Linear", made.name, (*made.inputs, bias), node.outputs, {}, made.origin), [made]
    return None


def _rms_norm(finder: Finder, node: Node) -> tuple[Node, list[Node]] | None:
    """`x * rsqrt(mean(x^2) + eps)`, or divided by the root."""
    if node.op not in ("Mul", "Div"):
        return None
    pairs = (node.inputs, node.inputs[::-1]) if node.op == "Mul" else (node.inputs,)
    for x, factor in pairs:
        found = _root_mean_square(finder, x, factor, node.op)
        if found is not None:
            epsilon, gone = found
            width = finder.graph.shape(x)[-1]
            finder.graph.constants.setdefault(f"ones.{width}", np.ones((1, width), np.float32))
            attributes = {"epsilon": epsilon, "axis": -1}
            made = Node("RMSNormalization", node.name, (x, f"ones.{width}"), node.outputs, attributes, node.origin)
            return made, gone
    return None


def _scaled_norm(finder: Finder, node: Node) -> tuple[Node, list[Node]] | None:
    """An RMS norm, then Mul with a constant per column."""
    if node.op != "Mul":
        return None
    graph = finder.graph
    for normal, scale in (node.inputs, node.inputs[::-1]):
        made = finder.alone(normal, "RMSNormalization")
        if made is None or not graph.is_constant(scale) or graph.shape(normal) != graph.shape(node.outputs[0]):
            continue
        size = int(np.prod(graph.shape(scale)))
        if size == 1 or graph.shape(scale)[-1:] == graph.shape(normal)[-1:] == (size,):
            product = f"{node.outputs[0]}.scale"
            own = graph.constant(made.inputs[1])
            factor = graph.constant(scale)
            graph.constants[product] = own * factor.reshape(len(factor), -1)
            return Node(made.op, made.name, (made.inputs[0], product), node.outputs, made.attributes, made.origin), [
                made
            ]
    return None


def _root_mean_square(finder: Finder, x: str, factor: str, op: str) -> tuple[float, list[Node]] | None:
    """Epsilon and the nodes, if a factor (or divisor) of x is the root of its mean square."""
    gone: list[Node] = []

    def step(name: str, *ops: str) -> Node | None:
        found = finder.alone(name, *ops)
        if found is not None:
            gone.append(found)
        return found

    if op == "Mul":
        reciprocal = step(factor, "Reciprocal")
        if reciprocal is None:
            return None
        factor = reciprocal.inputs[0]
    chain = step(factor, "Sqrt")
    total = chain and step(chain.inputs[0], "Add")
    if total is None:
        return None
    graph = finder.graph
    for mean, epsilon in (total.inputs, total.inputs[::-1]):
        value, found = finder.scalar(epsilon), finder.alone(mean, "ReduceMean")
        square = found and finder.alone(found.inputs[0], "Pow", "Mul")
        if value is None or square is None or not _over_last(finder, found):
            continue
        squared = finder.scalar(square.inputs[1]) == 2 if square.op == "Pow" else len(set(square.inputs)) == 1
        if squared and graph.base(square.inputs[0]) == graph.base(x):
            return value, [*gone, found, square]
    return None


def _over_last(finder: Finder, node: Node) -> bool:
    axes = finder.graph.constant(node.inputs[1])[0].tolist() if len(node.inputs) > 1 else node.get("axes")
    rank = len(finder.graph.shape(node.inputs[0]))
    return axes is not None and [axis % rank for axis in axes] == [rank - 1]


def _silu(finder: Finder, node: Node) -> tuple[Node, list[Node]] | None:
    """`x * sigmoid(x)`."""
    if node.op != "Mul":
        return None
    for x, factor in (node.inputs, node.inputs[::-1]):
        sigmoid = finder.alone(factor, "Sigmoid")
        if sigmoid is not None and finder.graph.base(sigmoid.inputs[0]) == finder.graph.base(x):
            return Node("Silu", node.name, (x,), node.outputs, {}, node.origin), [sigmoid]
    return None
