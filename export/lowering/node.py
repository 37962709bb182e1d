"""The mixture of experts as one opaque ONNX node: how it leaves PyTorch, how it is read, how nodes take its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from export.errors import ExportError
from moecore.executors.dense import run_dense
from moecore.experts import FFN, ExpertBank, MixedBank, SegmentBank
from moecore.routing import Assignment

if TYPE_CHECKING:
    import onnx

DOMAIN, OPERATOR = "moecore", "Experts"
LAYER = "moecore.layer"
"""Key of a node's metadata under which the name of its module stands."""
_WEIGHTS = ("up", "down", "gate", "up_bias", "down_bias", "gate_bias")


def run_opaque(x: Tensor, bank: ExpertBank, assignment: Assignment, weights: Tensor) -> Tensor:
    """An executor for tracing: plain FFN experts become one node `moecore::Experts`, any others their dense form.

    Args:
        x: tokens `[T, D]`, or units of several tokens `[T, L, D]`.
        bank: the experts.
        assignment: who works on what.
        weights: combine weights in the shape of `assignment.expert`.
    """
    if assignment.token is not None:
        return run_dense(x, bank, assignment, weights)
    expert, weight = assignment.expert, weights
    if assignment.valid is not None:
        expert = expert.masked_fill(~assignment.valid, bank.num_experts)
        weight = weight.masked_fill(~assignment.valid, 0.0)
    if not isinstance(bank, MixedBank):
        return _run_bank(x, bank, expert, weight, "every" if assignment.complete else _slots(assignment))
    total, start = None, 0
    for part in bank.banks:
        inside = (expert >= start) & (expert < start + part.num_experts)
        own = torch.where(inside, expert - start, part.num_experts)
        y = _run_bank(x, part, own, weight.masked_fill(~inside, 0.0), "some")
        total, start = y if total is None else total + y, start + part.num_experts
    return total


def _slots(assignment: Assignment) -> str:
    return "full" if assignment.valid is None else "some"


def _run_bank(x: Tensor, bank: ExpertBank, expert: Tensor, weight: Tensor, slots: str) -> Tensor:
    """One bank on tokens; `expert` is E where a slot is empty."""
    if isinstance(bank, SegmentBank):
        return _run_bank(x.flatten(1), bank.mlp, expert, weight, slots).reshape(x.shape)
    ffn = bank.ffn()
    if ffn is None:
        valid = expert < bank.num_experts
        kept = Assignment(expert.clamp(max=bank.num_experts - 1), expert.shape[0], bank.num_experts, valid=valid)
        return run_dense(x, bank, kept, weight)
    if x.dim() == 2:
        return _opaque(x, expert, weight, ffn, slots)
    units, length, width = x.shape
    expert, weight = (each[:, None].expand(-1, length, -1).reshape(units * length, -1) for each in (expert, weight))
    return _opaque(x.reshape(-1, width), expert, weight, ffn, slots).reshape(units, length, -1)


def _opaque(x: Tensor, expert: Tensor, weight: Tensor, ffn: FFN, slots: str) -> Tensor:
    tensors = [getattr(ffn, name) for name in _WEIGHTS]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        (x, expert, weight.to(x.dtype), *tensors),
        {"activation": ffn.activation, "slots": slots},
        dtype=x.dtype,
        shape=(x.shape[0], ffn.down.shape[1]),
        version=1,
    )


@dataclass(frozen=True)
class Experts:
    """An opaque node, read: names of what flows in and out, weights as arrays."""

    name: str
    """Of the node."""
    layer: str
    """Of the module."""
    x: str
    expert: str
    weight: str
    output: str
    top_k: int
    """K, slots per token."""
    activation: str
    slots: str
    """full: each slot holds an expert; some: a slot may be empty, which is expert E; every: each token passes every
    expert, in order."""
    up: np.ndarray
    """[E, F, D]."""
    down: np.ndarray
    """[E, O, F]."""
    gate: np.ndarray | None
    """[E, F, D]."""
    up_bias: np.ndarray | None
    """[E, F]."""
    down_bias: np.ndarray | None
    """[E, O]."""
    gate_bias: np.ndarray | None
    """[E, F]."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    def tables(self) -> dict[str, np.ndarray]:
        """Weights by name, those it has."""
        return {name: getattr(self, name) for name in _WEIGHTS if getattr(self, name) is not None}


def is_opaque(node: onnx.NodeProto) -> bool:
    """Whether a node is a mixture of experts."""
    return node.domain == DOMAIN and node.op_type == OPERATOR


def read_experts(proto: onnx.ModelProto) -> Iterator[Experts]:
    """The opaque nodes of a graph, in its order.

    Raises:
        ExportError: if the weights of one are computed in the graph, or its slots are not known in number.
    """
    from onnx import numpy_helper

    nodes = [node for node in proto.graph.node if is_opaque(node)]
    wanted = {name for node in nodes for name in node.input[3:]}
    arrays = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer if one.name in wanted}
    shapes = {one.name: one.type.tensor_type.shape.dim for one in (*proto.graph.value_info, *proto.graph.input)}
    for node in nodes:
        layer = layer_of(node)
        for name in filter(None, node.input[3:]):
            if name not in arrays:
                raise ExportError(f"{layer}: weights of experts are computed from inputs; only fixed weights export")
        given = {kind: arrays.get(name) for kind, name in zip(_WEIGHTS, [*node.input[3:], *[""] * 6], strict=False)}
        slots = shapes.get(node.input[1], ())
        if len(slots) != 2 or not slots[1].dim_value:
            raise ExportError(f"{layer}: the number of slots per token is not known; select a fixed top_k")
        attributes = {one.name: one for one in node.attribute}
        yield Experts(
            name=node.name,
            layer=layer,
            x=node.input[0],
            expert=node.input[1],
            weight=node.input[2],
            output=node.output[0],
            top_k=slots[1].dim_value,
            activation=attributes["activation"].s.decode(),
            slots=attributes["slots"].s.decode(),
            **given,
        )


def layer_of(node: onnx.NodeProto) -> str:
    """Name of the module that a node came from."""
    return next((one.value for one in node.metadata_props if one.key == LAYER), "") or node.name


@dataclass
class Emitter:
    """Nodes and weights that take the place of one opaque node.

    Args:
        prefix: of all names.
        layer: module that the nodes belong to.
    """

    prefix: str
    layer: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    _count: int = 0

    def op(self, kind: str, *inputs: str, to: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, named `to` if given; returns its name."""
        return self.ops(kind, *inputs, outputs=[to] if to else 1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, outputs: int | list[str] = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node; returns the names of its outputs."""
        from onnx import helper

        self._count += 1
        stem = f"{self.prefix}/{kind}_{self._count}"
        names = [f"{stem}:{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        node = helper.make_node(kind, list(inputs), names, name=stem, domain=domain, **attributes)
        if self.layer:
            node.metadata_props.add(key=LAYER, value=self.layer)
        self.nodes.append(node)
        return names

    def constant(self, value: Any, name: str = "", dtype: Any = np.int64) -> str:
        """Add an array, integers by default; returns its name."""
        from onnx import numpy_helper

        self._count += 1
        name = f"{self.prefix}/{name or f'constant_{self._count}'}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def branch(self, output: str, dtype: Any) -> onnx.GraphProto:
        """What was emitted as a branch of an `If`."""
        from onnx import helper

        given = helper.make_tensor_value_info(output, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
        return helper.make_graph(self.nodes, self.prefix, [], [given])

    def inner(self, tag: str) -> Emitter:
        """One for the nodes of a branch or a loop's body; its weights belong to the whole graph."""
        self._count += 1
        return Emitter(f"{self.prefix}/{tag}_{self._count}", self.layer, [], self.initializers)
