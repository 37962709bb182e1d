"""Static graphs in the few forms that quantised dataflow tools read: products with two-dimensional constants."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from export.hls4ml.reader import evaluate

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("MatMul", "Conv")
"""Operators whose inputs are quantised, once a graph is prepared."""


def prepare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph in which constants are folded and linear layers are `MatMul` and `Add`.

    Products that several parts of a graph share (experts and gates of a mixture that read the same input) are made
    apart, as are the experts of a batched product; batch norm that follows a product becomes part of it.

    Args:
        proto: static, of one sample, without opaque nodes.
    """
    import onnx

    form = _Form(proto)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    del made.graph.node[:], made.graph.initializer[:], made.graph.value_info[:]
    made.graph.node.extend(form.nodes)
    used = {name for node in form.nodes for name in node.input}
    made.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(one, order="C"), name)
        for name, one in form.constants.items()
        if name in used
    )
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


class _Form:
    """Nodes and constants of the prepared graph."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        import onnx
        from onnx import numpy_helper

        self.constants = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        graph = onnx.shape_inference.infer_shapes(proto).graph
        self.shapes = {
            one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim]
            for one in (*graph.value_info, *graph.input, *graph.output)
        }
        outputs = {one.name for one in proto.graph.output}
        nodes = [node for node in proto.graph.node if not self._fold(node)]
        readers = Counter(name for node in nodes for name in node.input)
        self.only: dict[str, onnx.NodeProto] = {}
        """Tensor -> the one node that reads it."""
        for node in nodes:
            self.only |= {name: node for name in node.input if readers[name] == 1 and name not in outputs}
        self.gone: set[str] = set()
        """First outputs of nodes that became part of a product."""
        for node in nodes:
            if node.output[0] not in self.gone and not self._linear(node):
                self.nodes.append(node)

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Keep what a node gives as constants, if it always gives the same; says whether it does."""
        if not all(not name or name in self.constants for name in node.input):
            return False
        self.constants |= dict(zip(node.output, evaluate(node, self._given(node)), strict=True))
        return True

    def _given(self, node: onnx.NodeProto) -> list[np.ndarray | None]:
        return [self.constants.get(name) for name in node.input]

    def _linear(self, node: onnx.NodeProto) -> bool:
        """Write a linear layer anew; says whether the node is one."""
        if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in self.constants:
            return False
        from onnx import helper

        options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if options.get("transA"):
            return False
        _, weight, *bias = self._given(node)
        weight = options.get("alpha", 1.0) * (weight.T if options.get("transB") else weight)
        if weight.ndim != 2:
            return weight.ndim == 3 and self._batched(node, weight)
        shift = None
        if bias and bias[0] is not None:
            if bias[0].size not in (1, weight.shape[1]):
                return False
            shift = options.get("beta", 1.0) * np.broadcast_to(bias[0].reshape(-1), weight.shape[1:])
        weight, shift, name = self._absorb(weight, shift, node.output[0])
        reader = self.only.get(name)
        if reader is not None and reader.op_type == "Split" and self._parts_last_axis(reader):
            self._apart(node.input[0], weight, shift, reader)
        else:
            self._product(node.input[0], weight, shift, name, node)
        return True

    def _parts_last_axis(self, split: onnx.NodeProto) -> bool:
        axis = next((one.i for one in split.attribute if one.name == "axis"), 0)
        return len(split.output) > 1 and axis in (-1, len(self.shapes[split.input[0]]) - 1)

    def _absorb(self, weight: np.ndarray, shift: np.ndarray | None, name: str) -> tuple:
        """Constants added after a product, and batch norm."""
        from onnx import helper

        width = weight.shape[1]
        while (reader := self.only.get(name)) is not None:
            others = [self.constants.get(one) for one in reader.input if one != name]
            known = bool(others) and all(one is not None for one in others)
            if known and reader.op_type == "Add" and others[0].shape in ((width,), (1, width)):
                shift = others[0].reshape(-1) + (0 if shift is None else shift)
            elif known and reader.op_type == "BatchNormalization" and len(self.shapes[name]) == 2:
                scale, bias, mean, variance = others
                options = {one.name: helper.get_attribute_value(one) for one in reader.attribute}
                scale = scale / np.sqrt(variance + options.get("epsilon", 1e-5))
                weight, shift = weight * scale, ((0 if shift is None else shift) - mean) * scale + bias
            else:
                break
            name = reader.output[0]
            self.gone.add(name)
        return weight, shift, name

    def _apart(self, x: str, weight: np.ndarray, shift: np.ndarray | None, split: onnx.NodeProto) -> None:
        """A product of its own for every part that a product is split into."""
        sizes = self.constants[split.input[1]] if len(split.input) > 1 else None
        count = len(split.output)
        edges = np.cumsum(sizes)[:-1] if sizes is not None else count
        parts = np.split(weight, edges, 1)
        shifts = [None] * count if shift is None else np.split(shift, edges)
        for name, own, own_shift in zip(split.output, parts, shifts, strict=True):
            self._product(x, *self._absorb(own, own_shift, name), split)
        self.gone.add(split.output[0])

    def _batched(self, node: onnx.NodeProto, weight: np.ndarray) -> bool:
        """`[E, M, K]` times `[E, K, N]`, expert by expert; says whether it is that."""
        x, name = node.input[0], node.output[0]
        count = len(weight)
        if self.shapes[x][:-2] != [count]:
            return False
        shift, reader = [None] * count, self.only.get(name)
        if reader is not None and reader.op_type == "Add":
            (added,) = (self.constants.get(one) for one in reader.input if one != name)
            if added is not None and added.shape == (count, 1, weight.shape[2]):
                shift, name = added[:, 0], reader.output[0]
                self.gone.add(name)
        rows, made = ([f"{name}/{what}{i}" for i in range(count)] for what in ("row", "expert"))
        self._node("Split", [x], rows, axis=0, num_outputs=count)
        for expert in range(count):
            self._product(rows[expert], weight[expert], shift[expert], made[expert], node)
        self._node("Concat", made, [name], axis=0)
        return True

    def _product(
        self, x: str, weight: np.ndarray, shift: np.ndarray | None, name: str, origin: onnx.NodeProto | None
    ) -> None:
        product = name if shift is None else f"{name}/product"
        self.constants[f"{name}/weight"] = weight.astype(np.float32)
        self._node("MatMul", [x, f"{name}/weight"], [product], origin)
        if shift is not None:
            self.constants[f"{name}/bias"] = np.asarray(shift, np.float32)
            self._node("Add", [product, f"{name}/bias"], [name], origin)

    def _node(
        self, kind: str, inputs: list[str], outputs: list[str], origin: onnx.NodeProto | None = None, **options: int
    ) -> None:
        from onnx import helper

        node = helper.make_node(kind, inputs, outputs, f"{kind}/{outputs[0]}", **options)
        if origin is not None:
            node.metadata_props.extend(origin.metadata_props)
        self.nodes.append(node)
