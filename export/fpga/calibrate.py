"""The float graph on calibration inputs: every intermediate tensor, and from these the range of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.errors import ExportError
from export.lowering.node import DOMAIN, is_opaque
from moecore.activations import ACTIVATIONS

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Values = dict[str, np.ndarray]
"""Tensors by name."""
INSIDE = ("up", "gate", "act", "product", "down")
"""Stages inside a mixture of experts, observed under `inside(output, stage)`."""
FAR = 16.0
"""Infinities stand for this much more than twice the largest finite value: beyond what softmax or a choice can tell."""


BOUNDLESS = 1e30
"""Values this far out mean infinity: masks hold the lowest number there is."""


def boundless(values: np.ndarray) -> np.ndarray:
    """Floating-point values with those that mean infinity made so."""
    if values.dtype.kind != "f":
        return values
    far = np.abs(values) >= BOUNDLESS
    return np.where(far, np.copysign(np.inf, values), values).astype(values.dtype) if far.any() else values


def inside(output: str, stage: str) -> str:
    """Name of a stage inside the mixture of experts that gives `output`."""
    return f"{output}:{stage}"


@dataclass
class Observed:
    """What one tensor looked like."""

    shape: tuple[int, ...]
    kind: str
    """Of its NumPy type: f, i, u or b."""
    low: float = math.inf
    """Least finite value."""
    high: float = -math.inf
    infinite: bool = False
    missing: bool = False
    """NaN was seen."""

    def add(self, values: np.ndarray) -> None:
        """Widen by the values of one run."""
        if not values.size:
            return
        if values.dtype.kind == "f":
            values = boundless(values)
            finite = values[np.isfinite(values)]
            if len(finite) < values.size:
                self.missing |= bool(np.isnan(values).any())
                self.infinite |= bool(np.isinf(values).any())
            values = finite
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def join(self, other: Observed) -> None:
        """Widen by what another graph's tensor looked like."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.infinite |= other.infinite

    @property
    def infinity(self) -> float:
        """What stands for infinity in this tensor."""
        return 2 * max(-self.low, self.high, 0.0) + FAR

    @property
    def reach(self) -> tuple[float, float]:
        """The range that a format has to hold: zero, what was seen, and what is added to the stand-in of infinity."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if not self.infinite:
            return low, high
        far = self.infinity + max(-low, high)
        return -far, far


@dataclass
class _Segment:
    """Nodes between two mixtures of experts, or one mixture."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    session: onnxruntime.InferenceSession | None = None
    outputs: list[str] = field(default_factory=list)


class FloatGraph:
    """An ONNX graph with opaque experts, run by onnxruntime in pieces; the experts between them by NumPy.

    Args:
        proto: static shapes.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.proto = proto
        self.constants: Values = {one.name: boundless(numpy_helper.to_array(one)) for one in proto.graph.initializer}
        self.inputs = [one.name for one in proto.graph.input if one.name not in self.constants]
        self.outputs = [one.name for one in proto.graph.output]
        self._segments = [_Segment()]
        for node in proto.graph.node:
            if is_opaque(node):
                self._segments += [_Segment([node]), _Segment()]
            else:
                self._segments[-1].nodes.append(node)

    def run(self, feed: Mapping[str, np.ndarray]) -> Values:
        """All tensors of one run, weights excepted.

        Raises:
            ExportError: for inputs that do not fit.
        """
        self._check(feed)
        values: Values = {name: np.asarray(feed[name]) for name in self.inputs}
        for segment in self._segments:
            if not segment.nodes:
                continue
            if is_opaque(segment.nodes[0]):
                values |= self._run_experts(segment.nodes[0], values)
                continue
            if segment.session is None:
                self._open(segment, values)
            needed = {one.name: values[one.name] for one in segment.session.get_inputs()}
            values |= dict(zip(segment.outputs, segment.session.run(segment.outputs, needed), strict=True))
        return values

    def _check(self, feed: Mapping[str, np.ndarray]) -> None:
        for one in self.proto.graph.input:
            if one.name not in self.inputs:
                continue
            if one.name not in feed:
                raise ExportError(f"calibration: no input {one.name!r}; give {', '.join(self.inputs)}")
            wanted = [dim.dim_value for dim in one.type.tensor_type.shape.dim]
            if 0 in wanted:
                raise ExportError(f"{one.name}: a dimension is dynamic; trace the model with static shapes, batch 1")
            if list(np.shape(feed[one.name])) != wanted:
                raise ExportError(f"{one.name}: calibration has shape {list(np.shape(feed[one.name]))}, not {wanted}")

    def _open(self, segment: _Segment, values: Values) -> None:
        import onnxruntime
        from onnx import helper

        made = {name for node in segment.nodes for name in node.output if name}
        used = {name for node in segment.nodes for name in _used(node)} - made
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape)
            for name in sorted(used & values.keys())
        ]
        weights = [one for one in self.proto.graph.initializer if one.name in used]
        segment.outputs = sorted(made)
        outputs = [helper.make_empty_tensor_value_info(name) for name in segment.outputs]
        graph = helper.make_graph(segment.nodes, "segment", inputs, outputs, weights)
        versions = [one for one in self.proto.opset_import if one.domain != DOMAIN]
        model = helper.make_model(graph, opset_imports=versions, functions=self.proto.functions)
        model.ir_version = self.proto.ir_version
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        segment.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _run_experts(self, node: onnx.NodeProto, values: Values) -> Values:
        """The node's output, and its stages: rows of all experts one behind the other."""
        known = self.constants | values
        names = [*node.input, *[""] * (9 - len(node.input))]
        x, expert, weight, up, down, gate, up_bias, down_bias, gate_bias = (known.get(name) for name in names)
        act = ACTIVATIONS[next(one.s.decode() for one in node.attribute if one.name == "activation")]
        output = np.zeros((len(x), down.shape[1]), np.float32)
        stages: dict[str, list[np.ndarray]] = {stage: [] for stage in INSIDE}
        for number in range(len(up)):
            token, slot = np.nonzero(expert == number)
            hidden = _linear(x[token], up, up_bias, number)
            stages["up"].append(hidden)
            if gate is not None:
                gates = _linear(x[token], gate, gate_bias, number)
                acted = act(torch.from_numpy(gates)).numpy()
                stages["gate"].append(gates)
                stages["act"].append(acted)
                hidden = acted * hidden
                stages["product"].append(hidden)
            else:
                hidden = act(torch.from_numpy(hidden)).numpy()
                stages["act"].append(hidden)
            y = _linear(hidden, down, down_bias, number)
            stages["down"].append(y)
            np.add.at(output, token, y * weight[token, slot, None])
        found = {inside(node.output[0], stage): np.concatenate(parts) for stage, parts in stages.items() if parts}
        return {node.output[0]: output, **found}


def _used(node: onnx.NodeProto) -> Iterable[str]:
    """Names a node reads, those in its branches too."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _used(inner)


def _linear(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, number: int) -> np.ndarray:
    product = rows @ weight[number].T
    return product if bias is None else product + bias[number]


def observe(graph: FloatGraph, calibration: Sequence[Mapping[str, np.ndarray]]) -> tuple[dict[str, Observed], Values]:
    """Ranges of all tensors over calibration inputs.

    Args:
        graph: the float model.
        calibration: inputs of single runs.

    Returns:
        What each tensor looked like; and the values of the first run.

    Raises:
        ExportError: without inputs, or for inputs with NaN.
    """
    if not calibration:
        raise ExportError("calibration: no inputs; ranges of activations are chosen from at least one")
    seen: dict[str, Observed] = {}
    first: Values = {}
    for feed in calibration:
        for name in graph.inputs:
            if np.asarray(feed.get(name, 0)).dtype.kind == "f" and not np.isfinite(feed[name]).all():
                raise ExportError(
                    f"{name}: calibration holds missing or infinite values; fixed point has none, fill them"
                )
        values = graph.run(feed)
        first = first or values
        for name, value in values.items():
            seen.setdefault(name, Observed(value.shape, value.dtype.kind)).add(value)
    return seen, first
