"""Quantisers put into a prepared graph: QONNX's `Quant` nodes, or pairs of `QuantizeLinear` and `DequantizeLinear`.

QONNX: Pappalardo et al. 2022, arXiv 2206.07527. `Quant` takes a value, a scale, a zero point and a bit width, and gives
`scale * clip(round(value / scale))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.qonnx.prepare import PRODUCTS
from moecore.errors import choice, require

if TYPE_CHECKING:
    import onnx

DOMAIN = "qonnx.custom_op.general"
QDQ_BITS = 8
"""What `QuantizeLinear` of opset 20 has."""


@dataclass(frozen=True)
class Settings:
    """How a graph is quantised.

    Args:
        dialect: "qonnx", `Quant` nodes of any width; "qdq", ONNX's own operators, 8 bits.
        weight_bits: of weights, 2 to 16.
        activation_bits: of what products read, per tensor, 2 to 16.
        router_bits: of both in routers and gates, whose rounding would send samples to other experts; "qdq" leaves
            these in float.
        per_channel: a step for each output channel of the weights; false: one for all, which hls4ml's reader needs.
        margin: largest value that activations must hold, as a multiple of the largest seen on calibration data.
    """

    dialect: str = "qonnx"
    weight_bits: int = 8
    activation_bits: int = 8
    router_bits: int = 16
    per_channel: bool = True
    margin: float = 1.1

    def __post_init__(self) -> None:
        choice("dialect", self.dialect, ("qonnx", "qdq"))
        require(self.margin >= 1, "margin", self.margin, "must be at least 1")
        for name in ("weight_bits", "activation_bits", "router_bits"):
            value = getattr(self, name)
            require(2 <= value <= 16, name, value, "must lie between 2 and 16")
            if self.dialect == "qdq" and name != "router_bits":
                require(value == QDQ_BITS, name, value, "qdq has 8 bits only; choose dialect qonnx")


@dataclass(frozen=True)
class Range:
    """Least and largest value of a tensor on calibration data."""

    least: float
    largest: float

    @property
    def signed(self) -> bool:
        """Whether it has negative values."""
        return self.least < 0

    def scale(self, bits: int) -> float:
        """Step between codes of a width, symmetric around 0."""
        steps = 2 ** (bits - 1) - 1 if self.signed else 2**bits - 1
        return max(abs(self.least), abs(self.largest), 1e-8) / steps


def weight_scales(weight: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Step of each output channel `[N]`, so that the largest weight is the largest code of a narrow range."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return np.maximum(np.abs(weight).max(others), 1e-8) / (2 ** (bits - 1) - 1)


def quantise(
    proto: onnx.ModelProto, ranges: Mapping[str, Range], routers: frozenset[str], settings: Settings
) -> onnx.ModelProto:
    """A copy of a prepared graph with quantisers before all products.

    Args:
        proto: as `prepare` gives it.
        ranges: of every tensor that a product reads and that is no constant.
        routers: outputs of the products that decide on experts.
        settings: dialect and widths.
    """
    import onnx
    from onnx import helper

    emit = _Emitter(proto, ranges, settings)
    for node in proto.graph.node:
        if node.op_type in PRODUCTS:
            emit.product(node, node.output[0] in routers)
        else:
            emit.nodes.append(node)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(emit.nodes)
    used = {name for node in emit.nodes for name in node.input}
    made.graph.initializer.extend(
        onnx.numpy_helper.from_array(one, name) for name, one in emit.constants.items() if name in used
    )
    if settings.dialect == "qonnx":
        made.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    made.graph.value_info.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in emit.shapes.items()
    )
    return made


class _Emitter:
    """Nodes and constants of the quantised graph."""

    def __init__(self, proto: onnx.ModelProto, ranges: Mapping[str, Range], settings: Settings) -> None:
        from onnx import numpy_helper

        self.constants = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
        self.known = {
            one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim]
            for one in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
        }
        self.ranges, self.settings = ranges, settings
        self.nodes: list[onnx.NodeProto] = []
        self.shapes: dict[str, list[int]] = {}
        """Of what quantisers give."""

    def product(self, node: onnx.NodeProto, router: bool) -> None:
        """Add a product, its inputs quantised."""
        import onnx

        settings = self.settings
        made = onnx.NodeProto()
        made.CopyFrom(node)
        if not (router and settings.dialect == "qdq"):
            for place, name in enumerate(node.input[:2]):
                constant = name in self.constants
                bits = (
                    settings.router_bits if router else settings.weight_bits if constant else settings.activation_bits
                )
                # A step per output channel: row of a kernel or of a matrix on the left, column of one on the right.
                axis = 0 if node.op_type == "Conv" else -2 if place == 0 else -1
                made.input[place] = self._weight(name, bits, axis) if constant else self._activation(name, bits)
        self.nodes.append(made)

    def _activation(self, name: str, bits: int) -> str:
        found = self.ranges[name]
        scale = np.array(self.settings.margin * found.scale(bits), np.float32)
        return self._quantised(name, scale, bits, signed=found.signed, axis=None)

    def _weight(self, name: str, bits: int, axis: int) -> str:
        weight = self.constants[name]
        axis %= weight.ndim
        scale = weight_scales(weight, bits, axis).astype(np.float32)
        if not self.settings.per_channel:
            scale = np.full_like(scale, scale.max())
        return self._quantised(name, scale, bits, signed=True, axis=axis)

    def _quantised(self, name: str, scale: np.ndarray, bits: int, signed: bool, axis: int | None) -> str:
        """Name of the quantised tensor; what several products read is quantised once."""
        made = f"{name}/q{bits}"
        if made in self.shapes:
            return made
        value = self.constants.get(name)
        self.shapes[made] = list(value.shape) if value is not None else self.known[name]
        if self.settings.dialect == "qonnx":
            self._quant(name, made, scale, bits, signed, axis)
        else:
            self._qdq(name, made, scale, signed, axis)
        return made

    def _quant(self, name: str, made: str, scale: np.ndarray, bits: int, signed: bool, axis: int | None) -> None:
        if axis is not None and not self.settings.per_channel:
            scale = scale[0]
        elif axis is not None:
            scale = scale.reshape([-1 if i == axis else 1 for i in range(self.constants[name].ndim)])
        given = [name, self._constant(f"{made}/scale", scale)]
        given += [self._constant(f"{made}/zero", np.float32(0)), self._constant(f"{made}/bits", np.float32(bits))]
        options = {"signed": int(signed), "narrow": int(axis is not None), "rounding_mode": "ROUND"}
        self._node("Quant", given, made, domain=DOMAIN, **options)

    def _qdq(self, name: str, made: str, scale: np.ndarray, signed: bool, axis: int | None) -> None:
        kind = np.int8 if signed else np.uint8
        given = [self._constant(f"{made}/scale", scale), self._constant(f"{made}/zero", np.zeros(scale.shape, kind))]
        if axis is None:
            self._node("QuantizeLinear", [name, *given], f"{made}/codes")
            self._node("DequantizeLinear", [f"{made}/codes", *given], made)
            return
        weight = self.constants[name]
        steps = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        codes = self._constant(f"{made}/codes", np.round(weight / steps).astype(np.int8))
        self._node("DequantizeLinear", [codes, *given], made, axis=axis)

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def _node(self, kind: str, inputs: list[str], output: str, domain: str = "", **options: object) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], f"{kind}/{output}", domain=domain, **options))
