"""Which products become integers, all brought to one form; the weights of other operators stored in eight bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from export.lowering import lower
from export.lowering.node import LAYER, Emitter, layer_of
from export.lowering.sparse import lower_by_expert
from export.quantize.graph import Weights, fold_weights, replace_nodes, weight_inputs

if TYPE_CHECKING:
    import onnx

NARROW = 16
"""Matrices with fewer inputs or outputs stay float32: gates, heads of few classes; integers do not speed them up."""
SMALL = 4096
"""Weights of convolutions, lookups and batched products stay float32 where they are fewer."""
LEVELS = 127
"""Codes of stored weights on either side of zero."""
_ROUTING = re.compile(r"(^|\.)(router|gates)(\.|$)")
"""Modules that decide who works: `router` of an MoE layer, `gates` of several tasks; `gate` is part of gated FFNs."""
_EXPERT = re.compile(r"^(experts_\d+/\w+)\.\d+$")
"""Weights of one expert as the lowering names them, `experts_7/up.0`; all but the number is the part they play."""


@dataclass(frozen=True)
class Product:
    """A `MatMul` or `Gemm` by a fixed matrix, or a convolution with fixed weights, to be quantised."""

    node: str
    """Its name."""
    x: str
    """What it multiplies; only products read that."""
    part: str
    """What the same matrices of all experts of a layer have in common; `x` for any other matrix."""
    y: str = ""
    """What comes out, if that must be quantised too: only so are there integer kernels for convolutions."""


def by_expert(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a traced graph in standard operators, each expert with matrices of its own."""
    lowered = lower(proto, lower_by_expert)
    lowered.graph.ClearField("value_info")  # lists shapes of weights too, at which quantisers stumble
    return lowered


def routes(node: onnx.NodeProto) -> bool:
    """Whether a node is part of a router or a gate, by its module or by the weights that it reads."""
    layers = [one.value for one in node.metadata_props if one.key == LAYER]
    return any(_ROUTING.search(name) for name in (*layers, *weight_inputs(node)))


def prepare(proto: onnx.ModelProto, taken: Sequence[str] = ("MatMul",)) -> tuple[onnx.ModelProto, list[Product]]:
    """A copy of a traced graph, ready for a quantiser of products.

    Products read their input through an `Identity`, one for all that share it, so that routers beside them and
    residual paths do not read what was quantised. Lookups, batched products and other convolutions keep float32
    arithmetic and have their weights stored in eight bits: a table's rows are looked up as they are, the others unfold
    once, when onnxruntime loads the file.

    Args:
        proto: as `export.trace.trace` gives it.
        taken: operators that the quantiser takes, of MatMul, Gemm and Conv; `Gemm` becomes `MatMul` and `Add` if not.

    Returns:
        The graph, and the products in it to be quantised: neither of routers nor narrow, and no patch embedding, which
        costs little and whose error every layer would see.
    """
    lowered = by_expert(proto)
    fold_weights(lowered)
    form = _Form(Weights(lowered.graph), frozenset(taken))
    for node in lowered.graph.node:
        form.take(node)
    lowered.graph.initializer.extend(form.emit.initializers)
    replace_nodes(lowered.graph, form.emit.nodes)
    return lowered, form.products


@dataclass
class _Form:
    """Nodes taken one after the other, and what they became."""

    weights: Weights
    taken: frozenset[str]
    emit: Emitter = field(default_factory=lambda: Emitter("quantized"))
    products: list[Product] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    """What several nodes share: inputs of products, matrices turned, weights stored; by the name they had."""

    def take(self, node: onnx.NodeProto) -> None:
        weight, *offset = weight_inputs(node) or [""]
        shape = self.weights.shape(weight)
        self.emit.layer = layer_of(node)
        if routes(node):
            self.emit.nodes.append(node)
        elif _is_product(node, shape):
            self._multiply(node, weight, offset)
        elif "Conv" in self.taken and _is_convolution(node, shape):
            self._convolve(node)
        elif _is_table(node, shape):
            self._look_up(node, weight)
        elif _is_kernel(node, shape):
            self._unfold(node, weight)
        else:
            self.emit.nodes.append(node)

    def _multiply(self, node: onnx.NodeProto, weight: str, offset: list[str]) -> None:
        x, part, attributes = self._port(node.input[0]), _EXPERT.match(weight), _attributes(node)
        emit = self.emit
        # what is added need not be fixed: the exporter makes one `Gemm` of a shared expert and what routed ones gave
        if node.op_type in self.taken and all(map(self.weights.shape, offset)):
            emit.op(node.op_type, x, *node.input[1:], to=node.output[0], **attributes)
            name = emit.nodes[-1].name
        else:
            if attributes.get("transB"):
                turned = self.weights.array(weight).T
                weight = self._once(weight, lambda: emit.constant(turned, f"{weight}.T", np.float32))
            y = emit.op("MatMul", x, weight, to=None if offset else node.output[0])
            name = emit.nodes[-1].name
            if offset:
                emit.op("Add", y, *offset, to=node.output[0])
        self.products.append(Product(name, x, part[1] if part else x))

    def _convolve(self, node: onnx.NodeProto) -> None:
        x = self._port(node.input[0])
        y = self.emit.op("Conv", x, *node.input[1:], **_attributes(node))
        self.products.append(Product(self.emit.nodes[-1].name, x, x, y))
        self.emit.op("Identity", y, to=node.output[0])

    def _port(self, source: str) -> str:
        return self._once(f"{source}:", lambda: self.emit.op("Identity", source))

    def _look_up(self, node: onnx.NodeProto, weight: str) -> None:
        """Rows of codes, times a scale per column: every row adds to the same sums, so all share its precision."""
        codes, scale = self._stored(weight, axes=(0,))
        rows = self.emit.op("Gather", codes, node.input[1])
        self.emit.op("Mul", self._float(rows), scale, to=node.output[0])

    def _unfold(self, node: onnx.NodeProto, weight: str) -> None:
        """Weights as a product of codes and scales per output channel, which onnxruntime computes in advance."""
        rank = len(self.weights.shape(weight))
        channel = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type)
        axes = (rank - 2,) if channel is None else tuple(axis for axis in range(rank) if axis != channel)

        def emit() -> str:
            codes, scale = self._stored(weight, axes)
            return self.emit.op("Mul", self._float(codes), scale)

        node.input[1] = self._once(weight, emit)
        self.emit.nodes.append(node)

    def _stored(self, weight: str, axes: tuple[int, ...]) -> tuple[str, str]:
        """Names of the codes of an array and of their scales, one for all along the axes."""
        array = self.weights.array(weight)
        scale = np.abs(array).max(axes, keepdims=True) / LEVELS
        codes = np.rint(array / np.where(scale > 0, scale, 1))
        emit = self.emit
        name = self._once(f"{weight}:codes", lambda: emit.constant(codes, f"{weight}.codes", np.int8))
        return name, self._once(f"{weight}:scale", lambda: emit.constant(scale, f"{weight}.scale", np.float32))

    def _float(self, codes: str) -> str:
        from onnx import TensorProto

        return self.emit.ops("Cast", codes, to=TensorProto.FLOAT)[0]

    def _once(self, key: str, emit: Callable[[], str]) -> str:
        if key not in self.made:
            self.made[key] = emit()
        return self.made[key]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _is_product(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """Whether a node multiplies rows by a matrix of this shape and does no more than add an offset."""
    if node.op_type not in ("MatMul", "Gemm") or len(shape) != 2 or min(shape) < NARROW:
        return False
    scaled = _attributes(node)
    return scaled.get("alpha", 1) == 1 and scaled.get("beta", 1) == 1 and not scaled.get("transA")


def _is_convolution(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """Whether a node convolves with weights of this shape, in windows that overlap: unlike a patch embedding's."""
    if node.op_type != "Conv" or len(shape) < 3 or min(shape[0], np.prod(shape[1:])) < NARROW:
        return False
    strides = _attributes(node).get("strides", [1])
    return max(strides) == 1 or list(strides) != list(shape[2:])


def _is_table(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """Whether a node looks up rows of a table of this shape, a large one."""
    rows = node.op_type == "Gather" and _attributes(node).get("axis", 0) == 0
    return rows and len(shape) == 2 and np.prod(shape) >= SMALL


def _is_kernel(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """Whether a node convolves, or multiplies batch by batch, with weights of this shape, large ones."""
    return node.op_type in ("MatMul", "Conv", "ConvTranspose") and len(shape) > 2 and np.prod(shape) >= SMALL
