"""Rules for arithmetic with broadcasting, comparisons, choices, clamps and quotients."""

from __future__ import annotations

import math

import numpy as np

from export.fpga.formats import FLAG, INDEX, Fixed, Requantise
from export.fpga.graph import Node
from export.fpga.lower.builder import FREE, Builder, Limit, Operand, align, aligned_bits
from export.fpga.ops.base import broadcast_strides, nest
from export.fpga.ops.pointwise import Binary, Divide, Select, Unary

FINER = 2
"""Bits behind the binary point that a constant has beyond what it is added to."""
NAMES = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Max": "max",
    "Min": "min",
    "Equal": "equal",
    "Less": "less",
    "LessOrEqual": "less_equal",
    "Greater": "greater",
    "GreaterOrEqual": "greater_equal",
    "And": "and",
    "Or": "or",
    "Xor": "xor",
}
TESTS = ("equal", "less", "less_equal", "greater", "greater_equal", "and", "or", "xor")
ROOT_BITS = 61
"""Bits of a number whose root is taken."""


def loops(build: Builder, output: str, *operands: str) -> tuple[tuple[int, ...], ...]:
    """Sizes of a nest of loops over an output, and the strides of each operand in it."""
    shape = build.shape(output)
    found = nest(shape, *(broadcast_strides(build.shape(name), shape) for name in operands))
    if found is None:
        raise build.refuse(f"over {len(shape)} dimensions")
    return found


def lower_binary(build: Builder, node: Node) -> None:
    """Sums, products, extremes, comparisons, logic."""
    if len(node.inputs) != 2:
        raise build.refuse(f"of {len(node.inputs)} operands")
    binary(build, NAMES[node.op], node.inputs[0], node.inputs[1], node.outputs[0])


def binary(build: Builder, function: str, left: str, right: str, output: str) -> None:
    """One function of two tensors of the graph."""
    (a, form_a), (b, form_b) = _operands(build, function, left, right, output)
    if function == "mul":
        shift_a = shift_b = 0
        fraction, bits = form_a.fraction + form_b.fraction, form_a.width + form_b.width
    else:
        fraction = align(form_a, form_b)
        shift_a, shift_b = form_a.fraction - fraction, form_b.fraction - fraction
        bits = max(aligned_bits(form_a, fraction), aligned_bits(form_b, fraction)) + (function in ("add", "sub"))
    result = FLAG if function in TESTS else build.result(output, fraction)
    rule = Requantise(0, result.width) if function in TESTS else build.rule(fraction, result)
    sizes, *strides = loops(build, output, left, right)
    op = Binary(function, sizes, *strides, shift_a, shift_b, build.accumulator(bits, rule), rule)
    build.layer(op, [a, b], output, result)


def _operands(build: Builder, function: str, left: str, right: str, output: str) -> list[Operand]:
    """Both; a constant beside an activation no finer, and no further away, than can matter."""
    found = {name: build.operand(name) for name in (left, right) if not build.graph.is_constant(name)}
    if not found or function == "mul":
        return [found.get(name) or build.operand(name) for name in (left, right)]
    finest, limit = max(form.fraction for _, form in found.values()), FREE
    if function in TESTS:
        limit = Limit.outside(next(iter(found.values()))[1])
    else:
        wanted = build.result(output)
        finest, infinity = max(finest, wanted.fraction), build.observed(output).infinity
        limit = Limit.outside(wanted, infinity) if function in ("max", "min") else Limit(infinity)
    return [found.get(name) or build.operand(name, finest + FINER, limit=limit) for name in (left, right)]


def lower_div(build: Builder, node: Node) -> None:
    """A quotient of activations, or a product with the reciprocal of a constant."""
    left, right = node.inputs
    output = node.outputs[0]
    if build.graph.kind(output) != "f":
        raise build.refuse("of whole numbers")
    if build.graph.is_constant(right):
        divisor = build.graph.constant(right).astype(np.float64)
        if not divisor.all():
            raise build.refuse("by zero")
        reciprocal = f"{build.graph.base(right)}.reciprocal"
        build.graph.constants[reciprocal] = (1 / divisor).reshape(len(divisor), *build.shape(right))
        binary(build, "mul", left, reciprocal, output)
        return
    divide(build, left, right, output)


def divide(build: Builder, left: str, right: str, output: str) -> None:
    """Integer division, rounded."""
    (a, form_a), (b, form_b) = build.operand(left), build.operand(right)
    result = build.result(output)
    # The quotient's binary point needs a shift of either operand; what does not fit makes the result coarser.
    most = ROOT_BITS - form_a.width + form_a.fraction - form_b.fraction
    result = Fixed(result.width, max(result.integer, result.width - most))
    shift = result.fraction - form_a.fraction + form_b.fraction
    rule = Requantise(0, result.width, build.settings.wrap)
    bits = max(form_a.width + max(shift, 0), form_b.width + max(-shift, 0), result.width + 1) + 1
    sizes, *strides = loops(build, output, left, right)
    op = Divide(sizes, *strides, max(shift, 0), max(-shift, 0), build.accumulator(bits, rule), rule)
    build.layer(op, [a, b], output, result)


def lower_reciprocal(build: Builder, node: Node) -> None:
    """One divided by it."""
    build.graph.constants["one"] = np.ones((1, 1), np.float32)
    divide(build, "one", node.inputs[0], node.outputs[0])


def lower_pow(build: Builder, node: Node) -> None:
    """Squares and roots; other powers are tables."""
    from export.fpga.lower.functions import function

    exponent = build.static(node.inputs[1]).reshape(-1)
    if exponent.size != 1:
        raise build.refuse("with an exponent for each element")
    power = float(exponent[0])
    if power == 2:
        binary(build, "mul", node.inputs[0], node.inputs[0], node.outputs[0])
    elif power == 0.5:
        root(build, node)
    else:
        function(build, node, lambda x: np.power(x, power), f"power {power:g}")


def lower_select(build: Builder, node: Node) -> None:
    """Where."""
    condition, left, right = node.inputs
    output = node.outputs[0]
    choice, _ = build.operand(condition)
    seen = build.observed(output)
    wanted = build.result(output)
    limit = Limit.outside(wanted, seen.infinity)
    parts = [build.operand(name, wanted.fraction, limit=limit) for name in (left, right)]
    result = build.result(output, max(form.fraction for _, form in parts))
    sizes, *strides = loops(build, output, condition, left, right)
    op = Select(sizes, *strides, *(build.shifted(form, result) for _, form in parts))
    build.layer(op, [choice, *(codes for codes, _ in parts)], output, result)


def unary(build: Builder, function: str, name: str, output: str, result: Fixed | None = None, **changes: int) -> None:
    """A function of one tensor; by default the result keeps its format."""
    source, form = build.operand(name)
    result = result or form
    whole = function in ("floor", "ceil", "trunc")
    fraction = 0 if whole or function in ("sign", "not") else form.fraction
    rule = build.rule(changes.pop("made", fraction), result)
    bits = form.width + 1
    settings = {"fraction": max(form.fraction, 0) if whole else 0, "low": form.low, "high": form.high} | changes
    op = Unary(
        function,
        math.prod(build.shape(output)),
        **settings,
        accumulator=build.accumulator(bits, rule),
        to=rule,
    )
    build.layer(op, [source], output, result)


def lower_unary(build: Builder, node: Node) -> None:
    """Abs, Neg, Sign, Not, Floor, Ceil."""
    name = {"Abs": "abs", "Neg": "neg", "Sign": "sign", "Not": "not", "Floor": "floor", "Ceil": "ceil"}[node.op]
    _, form = build.operand(node.inputs[0])
    results = {"sign": FLAG, "not": FLAG, "floor": form, "ceil": form}
    unary(build, name, node.inputs[0], node.outputs[0], results.get(name))


def lower_cast(build: Builder, node: Node) -> None:
    """Numbers to whole numbers, towards zero, or to whether they are not zero."""
    if build.graph.kind(node.outputs[0]) == "b":
        zero = build.graph.constants.setdefault("zero", np.zeros((1, 1), np.float32))
        a, form = build.operand(node.inputs[0])
        b, _ = build.constant("zero", zero)
        rule = Requantise(0, FLAG.width)
        sizes, first = loops(build, node.outputs[0], node.inputs[0])
        away = Binary("xor", sizes, first, (0,) * len(sizes), 0, 0, build.accumulator(form.width, rule), rule)
        build.layer(away, [a, b], node.outputs[0], FLAG)
    else:
        unary(build, "trunc", node.inputs[0], node.outputs[0], INDEX)


def lower_clamp(build: Builder, node: Node) -> None:
    """Relu, Clip: bounds that lie between two codes move inwards."""
    _, form = build.operand(node.inputs[0])
    low, high = form.low, form.high
    if node.op == "Relu":
        low = 0
    else:
        bounds = [node.get("min"), node.get("max")]
        for place, name in enumerate(node.inputs[1:3]):
            bounds[place] = build.static(name).item() if name else None
        if bounds[0] is not None:
            low = min(max(low, math.ceil(_codes(bounds[0], form))), high)
        if bounds[1] is not None:
            high = max(min(high, math.floor(_codes(bounds[1], form))), low)
    unary(build, "copy", node.inputs[0], node.outputs[0], low=low, high=high)


def _codes(bound: float, form: Fixed) -> float:
    """A bound in codes, not beyond the format's ends."""
    return min(max(math.ldexp(bound, form.fraction), form.low), form.high)


def root(build: Builder, node: Node) -> None:
    """Square root, by an integer root of the operand with as many more bits as fit."""
    _, form = build.operand(node.inputs[0])
    result = build.result(node.outputs[0])
    more = min(ROOT_BITS - form.width, 2 * result.fraction + 2 - form.fraction)
    more = max(more - (more + form.fraction) % 2, 0 if form.fraction % 2 == 0 else 1)
    made = (form.fraction + more) // 2
    result = build.result(node.outputs[0], made)
    unary(build, "sqrt", node.inputs[0], node.outputs[0], result, fraction=more, made=made)


RULES = {
    **dict.fromkeys(NAMES, lower_binary),
    "Div": lower_div,
    "Reciprocal": lower_reciprocal,
    "Pow": lower_pow,
    "Where": lower_select,
    **dict.fromkeys(("Abs", "Neg", "Sign", "Not", "Floor", "Ceil"), lower_unary),
    **dict.fromkeys(("Cast", "CastLike"), lower_cast),
    **dict.fromkeys(("Relu", "Clip"), lower_clamp),
    "Sqrt": root,
}
