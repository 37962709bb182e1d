"""Rules for norms, softmax, reductions and the best of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from export.fpga.formats import INDEX, Fixed, Requantise, bits_of
from export.fpga.graph import Node
from export.fpga.lower.builder import Builder
from export.fpga.lower.functions import segments
from export.fpga.ops.base import strides_of
from export.fpga.ops.rows import Cumulate, Norm, Reduce, Softmax, TopK

SQUARES = 60
"""Bits of a sum of squares."""
GUARD = 8
"""Bits that deviations have at most beyond what is normalised."""
UNIT = 20
"""Bits behind the binary point of normalised values."""
EXPONENTIAL = 26
"""Bits behind the binary point of exp(x - max), at most."""
RECIPROCAL = 60
"""A row's sum of these divides 2^60."""


def lower_norm(build: Builder, node: Node) -> None:
    """Layer norm and RMS norm over the last dimensions."""
    x, scale, bias = (*node.inputs, "")[:3]
    shape, name = build.shape(x), node.outputs[0]
    axis = node.get("axis", -1) % len(shape)
    inner = math.prod(shape[axis:])
    source, form = build.operand(x)
    epsilon = float(node.get("epsilon", 1e-5))
    room = (SQUARES - math.log2(max(epsilon, 1e-30))) / 2 - form.fraction - 1  # where epsilon itself would not fit
    guard = min((SQUARES - math.ceil(math.log2(inner))) // 2 - form.width, math.floor(room), GUARD)
    factor = np.broadcast_to((array := build.graph.constant(scale)).reshape(len(array), -1), (len(array), inner))
    codes, factors = build.constant(scale, factor)
    fraction = UNIT + factors.fraction
    if bias:
        given = build.graph.constant(bias)
        given = np.broadcast_to(given.reshape(len(given), -1), (len(given), inner))
        bias_codes, biases = build.constant(bias, given, fraction)
        shift = fraction - biases.fraction
    else:
        bias_codes, shift = build.zeros(inner), 0
    result = build.result(name, fraction)
    rule = build.rule(fraction, result)
    normal = math.ceil(1.5 * math.sqrt(inner) * (1 << UNIT))  # rounding of small variances included
    total = normal * build.largest(codes) + (build.largest(bias_codes) << shift)
    op = Norm(
        math.prod(shape[:axis]),
        inner,
        node.op == "LayerNormalization",
        guard,
        math.floor(math.ldexp(epsilon, 2 * (form.fraction + guard)) + 0.5),
        UNIT,
        shift,
        build.accumulator(bits_of(total), rule),
        rule,
    )
    build.layer(op, [source, codes, bias_codes], name, result)


def lower_softmax(build: Builder, node: Node) -> None:
    """Over any dimension."""
    x, name = node.inputs[0], node.outputs[0]
    shape = build.shape(x)
    axis = node.get("axis", -1) % len(shape)
    if axis == len(shape) - 1:
        source, _ = build.operand(x)
        softmax(build, source, math.prod(shape[:-1]), shape[-1], name, shape)
        return
    order = [*(a for a in range(len(shape)) if a != axis), axis]
    source = build.transposed(x, order, f"{name}.turned")
    turned = [shape[a] for a in order]
    softmax(build, source, math.prod(turned[:-1]), turned[-1], f"{name}.rows", turned)
    _turn_back(build, f"{name}.rows", name, turned, order)


def _turn_back(build: Builder, source: str, output: str, turned: Sequence[int], order: Sequence[int]) -> None:
    strides = dict(zip(order, strides_of(turned), strict=True))
    build.move(source, output, build.shape(output), [strides[a] for a in range(len(order))])


def softmax(build: Builder, source: str, rows: int, inner: int, output: str, shape: Sequence[int]) -> None:
    """A layer over rows."""
    form = build.program.format(source)
    fraction = min(build.width + 2, EXPONENTIAL)
    reach = (fraction + 1) * math.log(2)
    # Differences from the largest take one bit more than the format has.
    wide = Fixed(form.width + 1, form.integer + 1)
    _, shift, count = segments(0.0, reach, wide, build.settings.table_bits)
    values = np.exp(-wide.decode(np.arange(count + 1, dtype=np.int64) << shift))
    values[-1] = 0.0  # what is masked weighs nothing
    table = Fixed(fraction + 2, 2)
    codes = build.codes("table.softmax", table.encode(values)[None], table, "tables")
    result = build.result(output, bounds=(0.0, 1.0))
    rule = build.rule(RECIPROCAL, result)
    bits = build.accumulator(RECIPROCAL + 2, rule)
    exponential = Requantise(shift, fraction + 2)
    op = Softmax(rows, inner, shift, count, exponential, RECIPROCAL, bits, rule)
    build.layer(op, [source, codes], output, result, shape)


REDUCTIONS = {
    "ReduceSum": "sum",
    "ReduceMean": "mean",
    "ReduceL2": "l2",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ArgMax": "argmax",
    "ArgMin": "argmin",
    "GlobalAveragePool": "mean",
}


def lower_reduce(build: Builder, node: Node) -> None:
    """Over any dimensions; those that are not neighbours are brought together first."""
    x, output = node.inputs[0], node.outputs[0]
    shape = build.shape(x)
    axes = _axes(build, node, len(shape))
    if node.get("select_last_index", 0):
        raise build.refuse("with select_last_index")
    source, form = build.operand(x)
    first, last = axes[0], axes[-1]
    if axes != list(range(first, last + 1)):
        order = [*(a for a in range(len(shape)) if a not in axes), *axes]
        source = build.transposed(x, order, f"{output}.turned")
        sizes = (math.prod(shape[a] for a in order[: -len(axes)]), math.prod(shape[a] for a in axes), 1)
    else:
        sizes = (math.prod(shape[:first]), math.prod(shape[first : last + 1]), math.prod(shape[last + 1 :]))
    reduce(build, REDUCTIONS[node.op], source, form, sizes, output)


def _axes(build: Builder, node: Node, rank: int) -> list[int]:
    if node.op == "GlobalAveragePool":
        return list(range(2, rank))
    if node.op in ("ArgMax", "ArgMin"):
        return [node.get("axis", 0) % rank]
    given = build.static(node.inputs[1]).tolist() if len(node.inputs) > 1 and node.inputs[1] else node.get("axes")
    return sorted(axis % rank for axis in given) if given else list(range(rank))


def reduce(build: Builder, function: str, source: str, form: Fixed, sizes: tuple[int, int, int], output: str) -> None:
    """A layer over the middle of `sizes`."""
    inner, shift, bits, made = sizes[1], 0, form.width, form.fraction
    result = form
    if function in ("argmax", "argmin"):
        result, made = INDEX, 0
    elif function == "sum":
        bits = bits_of(inner << (form.width - 1))
        result = build.result(output, form.fraction)
    elif function == "l2":
        squares = bits_of(inner << (2 * form.width - 2))
        shift = max(0, min(SQUARES + 2 - squares, 2 * build.result(output).fraction + 2 - 2 * form.fraction)) & ~1
        bits, made = squares + shift, form.fraction + shift // 2
        result = build.result(output, made)
    elif function == "mean":
        result = build.result(output)
        shift = max(0, min(result.fraction - form.fraction, 60 - form.width - inner.bit_length()))
        made = form.fraction + shift
        result = build.result(output, made)
        bits = form.width + inner.bit_length() + shift + 2
    rule = build.rule(made, result)
    op = Reduce(function, *sizes, shift, build.accumulator(bits, rule), rule)
    build.layer(op, [source], output, result)


def lower_topk(build: Builder, node: Node) -> None:
    """The largest along the last dimension."""
    x, count = node.inputs[0], int(build.static(node.inputs[1]).item())
    shape = build.shape(x)
    if node.get("axis", -1) % len(shape) != len(shape) - 1 or not node.get("largest", 1):
        raise build.refuse("over another dimension than the last, or of the least,")
    source, form = build.operand(x)
    after = (*shape[:-1], count)
    outputs = [(name or f"{node.name}.{i}", after, (form, INDEX)[i]) for i, name in enumerate(node.outputs)]
    build.layers(TopK(math.prod(shape[:-1]), shape[-1], count), [source], outputs)


def lower_cumulate(build: Builder, node: Node) -> None:
    """Running sums."""
    x, output = node.inputs[0], node.outputs[0]
    shape = build.shape(x)
    axis = int(build.static(node.inputs[1]).item()) % len(shape)
    if node.get("reverse", 0):
        raise build.refuse("from the end")
    source, form = build.operand(x)
    result = build.result(output, form.fraction)
    rule = build.rule(form.fraction, result)
    bits = bits_of(shape[axis] << (form.width - 1))
    sizes = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
    op = Cumulate(*sizes, bool(node.get("exclusive", 0)), build.accumulator(bits, rule), rule)
    build.layer(op, [source], output, result)


RULES = {
    "LayerNormalization": lower_norm,
    "RMSNormalization": lower_norm,
    "Softmax": lower_softmax,
    **dict.fromkeys(REDUCTIONS, lower_reduce),
    "TopK": lower_topk,
    "CumSum": lower_cumulate,
}
