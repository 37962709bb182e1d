"""From a static ONNX graph to operations on elements."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.hls4ml.elements import ACTIVATIONS, PAIRS, Elements, Operation, Symbolic
from export.lowering.node import LAYER

if TYPE_CHECKING:
    import onnx

Tensor = np.ndarray | Symbolic
VIEWS = frozenset(
    (
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Slice",
        "Split",
        "Concat",
        "Expand",
        "Identity",
        "Tile",
    )
)
"""ONNX operators that only move elements."""
FPGA = "use --format fpga"
ROUTED = f"chooses experts per sample, which hls4ml has no layers for; {FPGA}, or gates that mix all experts (MMoE)"
REFUSALS = {
    "TopK": ROUTED,
    "ArgMax": ROUTED,
    "Experts": ROUTED,
    "ScatterND": ROUTED,
    "Gather": "looks rows of a table up by an input; embeddings stay on the host, so export what comes after them",
    "Gelu": f"hls4ml has no GELU; train with relu, silu or tanh, or {FPGA}",
    "Conv": f"this project takes vectors; export what follows the convolutions, or {FPGA}",
}


class Reader:
    """Reads a graph node by node.

    Attributes:
        elements: the operations found.
        inputs: name -> ids of a graph input, in the order of its elements.
        outputs: name -> ids of a graph output.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.elements = Elements()
        self.tensors: dict[str, Tensor] = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
        self.inputs: dict[str, np.ndarray] = {}
        for one in proto.graph.input:
            if one.name not in self.tensors:
                self._input(one)
        for node in proto.graph.node:
            self._read(node)
        self.outputs = {one.name: self._output(one.name) for one in proto.graph.output}

    def _input(self, info: onnx.ValueInfoProto) -> None:
        shape = [axis.dim_value for axis in info.type.tensor_type.shape.dim]
        if not shape or min(shape) < 1 or shape[0] != 1:
            raise ExportError(f"input {info.name}: shape {shape} is not that of one sample; trace with a batch of 1")
        ids = self.elements.add(Operation("input", info.name, int(np.prod(shape))))
        self.inputs[info.name] = ids
        self.tensors[info.name] = Symbolic.of(ids.reshape(shape))

    def _output(self, name: str) -> np.ndarray:
        found = self.tensors[name]
        if not isinstance(found, Symbolic) or found.known.any():
            raise ExportError(f"output {name}: is the same for every input; leave it out of the model")
        return found.ids.ravel()

    def _read(self, node: onnx.NodeProto) -> None:
        from onnx import helper

        given = [self.tensors.get(name) if name else None for name in node.input]
        options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if not any(isinstance(one, Symbolic) for one in given):
            made = evaluate(node, given)
        elif node.op_type in VIEWS or _moves(node, given, options):
            made = self._view(node, given)
        elif node.op_type in HANDLERS:
            made = [HANDLERS[node.op_type](self, node, given, options)]
        else:
            reason = REFUSALS.get(node.op_type, f"hls4ml has no layer for it; {FPGA}")
            raise ExportError(f"{place(node)} ({node.op_type}): {reason}")
        for name, one in zip(node.output, made, strict=False):
            constant = isinstance(one, Symbolic) and one.known.all()
            self.tensors[name] = one.values if constant else one

    def _view(self, node: onnx.NodeProto, given: list[Tensor | None]) -> list[Tensor]:
        moved = [Symbolic.constant(one) if _is_data(node, i, one) else one for i, one in enumerate(given)]
        ids = evaluate(node, [one.ids if isinstance(one, Symbolic) else one for one in moved])
        values = evaluate(node, [one.values if isinstance(one, Symbolic) else one for one in moved])
        return [Symbolic(*pair) for pair in zip(ids, values, strict=True)]

    # What becomes operations

    def dense(self, x: Symbolic, weight: np.ndarray, bias: np.ndarray | None, name: str) -> Symbolic:
        """`[..., K]` times `[K, N]` -> `[..., N]`."""
        made = np.empty((*x.shape[:-1], weight.shape[1]), np.int64)
        for row in np.ndindex(x.shape[:-1]):
            known, shift = x.known[row], np.zeros(weight.shape[1])
            shift = shift + x.values[row][known] @ weight[known] + (0 if bias is None else bias)
            own = {"weight": weight[~known].T.astype(np.float64), "bias": shift}
            made[row] = self.elements.add(Operation("dense", name, len(shift), (x.ids[row][~known],), own))
        return Symbolic.of(made)

    def affine(self, x: Symbolic, scale: np.ndarray, shift: np.ndarray, name: str) -> Symbolic:
        """`x * scale + shift`, part of the layer that gives x where that is linear."""
        shape = np.broadcast_shapes(x.shape, scale.shape, shift.shape)
        x, scale, shift = x.broadcast(shape), np.broadcast_to(scale, shape), np.broadcast_to(shift, shape)
        ids, known = x.ids.copy(), x.known
        values = np.where(known, np.where(known, x.values, 0) * scale + shift, 0.0)
        owners = np.where(known, -1, self.elements.owners(ids))
        for number in np.unique(owners[~known]):
            mask = owners == number
            ids[mask] = self._affine(int(number), x.ids[mask], scale[mask], shift[mask], name)
        return Symbolic(ids, values)

    def _affine(self, number: int, ids: np.ndarray, scale: np.ndarray, shift: np.ndarray, name: str) -> np.ndarray:
        """Of elements `[N]` of one operation."""
        before, rows = self.elements.operations[number], ids - self.elements.starts[number]
        if before.kind == "dense":
            weight, bias = before.weights["weight"][rows], before.weights["bias"][rows]
            own = {"weight": weight * scale[:, None], "bias": bias * scale + shift}
            return self.elements.add(Operation("dense", before.name, len(ids), before.inputs, own))
        return self.elements.add(Operation("affine", name, len(ids), (ids,), {"scale": scale, "bias": shift}))

    def pair(self, kind: str, a: Symbolic, b: Symbolic, name: str) -> Symbolic:
        """Elementwise, of two tensors that broadcast; a factor for a whole row is a mixture of one."""
        if a.known.any() or b.known.any():
            raise ExportError(f"{name} ({kind}): mixes constants and values in one tensor; {FPGA}")
        shape = np.broadcast_shapes(a.shape, b.shape)
        if kind == "multiply" and shape[-1:] > (1,) and 1 in (*a.shape[-1:], *b.shape[-1:]):
            factor, row = (a, b) if a.shape[-1] == 1 else (b, a)
            row = row.broadcast((*np.broadcast_shapes(row.shape[:-1], shape[:-1]), shape[-1]))
            return self.mix(factor.reshape(*factor.shape, 1), row.reshape(*row.shape[:-1], 1, -1), name).reshape(*shape)
        a, b = a.broadcast(shape), b.broadcast(shape)
        size = int(np.prod(shape))
        ids = self.elements.add(Operation(kind, name, size, (a.ids.ravel(), b.ids.ravel())))
        return Symbolic.of(ids.reshape(shape))

    def each(self, kind: str, x: Symbolic, name: str, **weights: np.ndarray) -> Symbolic:
        """An activation."""
        if x.known.any():
            raise ExportError(f"{name} ({kind}): mixes constants and values in one tensor; {FPGA}")
        ids = self.elements.add(Operation(kind, name, x.ids.size, (x.ids.ravel(),), weights))
        return Symbolic.of(ids.reshape(x.shape))

    def softmax(self, x: Symbolic, name: str) -> Symbolic:
        """Over the last axis; logits of -inf, of what a gate does not see, get weight 0."""
        ids, values = x.ids.copy(), np.zeros(x.shape)
        for row in np.ndindex(x.shape[:-1]):
            seen = ~x.known[row]
            if np.isfinite(x.values[row][~seen]).any():
                raise ExportError(f"{name} (softmax): has constant logits; {FPGA}")
            count = int(seen.sum())
            if count == 1:
                ids[row], values[row] = -1, seen
            else:
                ids[row][seen] = self.elements.add(Operation("softmax", name, count, (x.ids[row][seen],)))
        return Symbolic(ids, values)

    def mix(self, a: Symbolic, b: Symbolic, name: str) -> Symbolic:
        """`[..., M, K]` times `[..., K, N]`, both computed: mixtures of experts' outputs by gates."""
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = a.broadcast((*batch, *a.shape[-2:])), b.broadcast((*batch, *b.shape[-2:]))
        made = np.empty((*a.shape[:-1], b.shape[-1]), np.int64)
        for row in np.ndindex(a.shape[:-1]):
            known, ids, values = a.known[row], a.ids[row], b.ids[row[:-1]]
            if a.values[row][known].any() or b.known[row[:-1]].any():
                raise ExportError(f"{name} (MatMul): has constants among what it mixes; {FPGA}")
            made[row] = self.elements.add(Operation("mix", name, b.shape[-1], (ids[~known], values[~known])))
        return Symbolic.of(made)

    def layer_norm(self, x: Symbolic, scale: np.ndarray, bias: np.ndarray, epsilon: float, name: str) -> Symbolic:
        """Over the last axis."""
        own = {"scale": scale.astype(np.float64), "bias": bias.astype(np.float64), "epsilon": np.array(epsilon)}
        made = np.empty(x.shape, np.int64)
        for row in np.ndindex(x.shape[:-1]):
            made[row] = self.elements.add(Operation("layernorm", name, x.shape[-1], (x.ids[row],), own))
        return Symbolic.of(made)


Handler = Callable[[Reader, Any, list, dict], Symbolic]


def evaluate(node: onnx.NodeProto, given: list[np.ndarray | None]) -> list[np.ndarray]:
    """What a node gives for constants."""
    from onnx.reference import ReferenceEvaluator

    feeds = {name: one for name, one in zip(node.input, given, strict=True) if name}
    return [np.asarray(one) for one in ReferenceEvaluator(node).run(None, feeds)]


def place(node: onnx.NodeProto) -> str:
    """Name of the module that a node was traced from, or its own."""
    return next((one.value for one in node.metadata_props if one.key == LAYER), node.name or node.op_type)


def _is_data(node: onnx.NodeProto, index: int, given: Tensor | None) -> bool:
    """Whether a constant input of a view is moved itself, not a shape or an index."""
    return isinstance(given, np.ndarray) and (node.op_type == "Concat" or index == 0)


def _moves(node: onnx.NodeProto, given: list[Tensor | None], options: dict) -> bool:
    if node.op_type == "Gather":
        return isinstance(given[1], np.ndarray)
    return node.op_type == "Cast" and options["to"] in (1, 11)  # between float and double


def _gemm(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    x, weight, *bias = given
    if not isinstance(x, Symbolic) or not isinstance(weight, np.ndarray) or options.get("transA", 0):
        raise ExportError(f"{place(node)} (Gemm): is not a linear layer; {FPGA}")
    weight = options.get("alpha", 1.0) * (weight.T if options.get("transB", 0) else weight)
    shift = options.get("beta", 1.0) * bias[0] if bias and bias[0] is not None else None
    return reader.dense(x, weight, shift, place(node))


def _matmul(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    a, b = given
    if isinstance(a, Symbolic) and isinstance(b, Symbolic):
        return reader.mix(a, b, place(node))
    if isinstance(a, np.ndarray):  # (b' a')'
        made = _product(reader, b.moved(-2), np.swapaxes(a, -1, -2), place(node))
        return made.moved(-2)
    return _product(reader, a, b, place(node))


def _product(reader: Reader, x: Symbolic, weight: np.ndarray, name: str) -> Symbolic:
    """`[..., M, K]` times constants `[..., K, N]`."""
    batch = np.broadcast_shapes(x.shape[:-2], weight.shape[:-2])
    if not batch:
        return reader.dense(x, weight, None, name)
    x, weight = x.broadcast((*batch, *x.shape[-2:])), np.broadcast_to(weight, (*batch, *weight.shape[-2:]))
    rows = [reader.dense(Symbolic(x.ids[i], x.values[i]), weight[i], None, name).ids for i in np.ndindex(batch)]
    return Symbolic.of(np.stack(rows).reshape(*batch, *rows[0].shape))


def _pair(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    kind = node.op_type
    if len(given) != 2:
        raise ExportError(f"{place(node)} ({kind}): hls4ml takes two tensors at a time; {FPGA}")
    a, b = given
    if isinstance(a, Symbolic) and isinstance(b, Symbolic):
        if kind == "Div":
            raise ExportError(f"{place(node)} (Div): hls4ml does not divide by what is computed; {FPGA}")
        return reader.pair(PAIRS[kind], a, b, place(node))
    x, number = (a, b) if isinstance(a, Symbolic) else (b, a)
    number = number.astype(np.float64)
    one, zero, first = np.ones(()), np.zeros(()), x is a
    if kind == "Add":
        return reader.affine(x, one, number, place(node))
    if kind == "Sub":
        return reader.affine(x, one if first else -one, -number if first else number, place(node))
    if kind == "Mul" or (kind == "Div" and first):
        return reader.affine(x, number if kind == "Mul" else 1 / number, zero, place(node))
    raise ExportError(f"{place(node)} ({kind}): hls4ml has no layer for it with a constant; {FPGA}")


def _activation(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    default = {"Elu": 1.0, "LeakyRelu": 0.01}.get(node.op_type)
    own = {} if default is None else {"alpha": np.array(options.get("alpha", default))}
    return reader.each(ACTIVATIONS[node.op_type], given[0], place(node), **own)


def _softmax(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    axis = options.get("axis", -1)
    made = reader.softmax(given[0].moved(axis), place(node))
    return Symbolic(np.moveaxis(made.ids, -1, axis), np.moveaxis(made.values, -1, axis))


def _batch_norm(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    x, *parameters = given
    scale, bias, mean, variance = (one.astype(np.float64) for one in parameters)
    scale = scale / np.sqrt(variance + options.get("epsilon", 1e-5))
    shape = (-1, *[1] * (len(x.shape) - 2))  # channels are axis 1
    return reader.affine(x, scale.reshape(shape), (bias - mean * scale).reshape(shape), place(node))


def _layer_norm(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    x, scale, *bias = given
    if options.get("axis", -1) not in (-1, len(x.shape) - 1):
        raise ExportError(f"{place(node)} (LayerNormalization): hls4ml normalises the last axis only; {FPGA}")
    shift = bias[0] if bias and bias[0] is not None else np.zeros(scale.shape)
    return reader.layer_norm(x, scale, shift, options.get("epsilon", 1e-5), place(node))


def _reduce(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    x = given[0]
    axes = given[1] if len(given) > 1 and given[1] is not None else options.get("axes", range(len(x.shape)))
    axes = sorted(int(axis) % len(x.shape) for axis in axes)
    kept = [size for axis, size in enumerate(x.shape) if axis not in axes]
    order = [axis for axis in range(len(x.shape)) if axis not in axes] + axes
    flat = Symbolic(x.ids.transpose(order), x.values.transpose(order)).reshape(int(np.prod(kept)), -1)  # [kept, summed]
    count = flat.shape[1]
    if flat.shape[0] == 1:
        made = reader.dense(flat, np.ones((count, 1)), None, place(node))
    else:
        parts = [Symbolic(flat.ids[:, i], flat.values[:, i]) for i in range(count)]
        made = functools.reduce(lambda a, b: reader.pair("add", a, b, place(node)), parts)
    if node.op_type == "ReduceMean":
        made = reader.affine(made, np.array(1 / count), np.zeros(()), place(node))
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)] if options.get("keepdims", 1) else kept
    return made.reshape(*shape)


def _negative(reader: Reader, node: onnx.NodeProto, given: list, options: dict) -> Symbolic:
    return reader.affine(given[0], -np.ones(()), np.zeros(()), place(node))


HANDLERS: dict[str, Handler] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Softmax": _softmax,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "ReduceSum": _reduce,
    "ReduceMean": _reduce,
    "Neg": _negative,
    "Div": _pair,
    **dict.fromkeys(PAIRS, _pair),
    **dict.fromkeys(ACTIVATIONS, _activation),
}
"""ONNX operators that become operations."""
