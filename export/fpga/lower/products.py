"""Rules for matrix products, convolutions and batch norm."""

from __future__ import annotations

import math
import string

import numpy as np

from export.fpga.calibrate import Observed
from export.fpga.formats import bits_of
from export.fpga.graph import Node
from export.fpga.lower.builder import Builder, product_bits
from export.fpga.lower.pointwise import binary
from export.fpga.ops.base import broadcast_strides, strides_of
from export.fpga.ops.products import Affine, Conv2d, Linear, Matmul


def linear(build: Builder, x: str, weight: np.ndarray, bias: np.ndarray | None, name: str, output: str) -> None:
    """Rows of x times a weight `[variants, inner, outputs]`, plus a bias `[variants, ..., outputs]`."""
    source, form = build.operand(x)
    _, inner, outputs = weight.shape
    codes, weights = build.constant(name, weight.swapaxes(1, 2), store="weights")
    fraction = form.fraction + weights.fraction
    shift, bias_codes = _bias(build, bias, f"{output}.bias", fraction, outputs)
    table = build.program.constants[codes].codes.reshape(-1, outputs, inner)
    total = int(np.abs(table).sum(-1).max()) * build.largest(source) + (build.largest(bias_codes) << shift)
    result = build.result(output, fraction)
    rule = build.rule(fraction, result)
    op = Linear(
        int(np.prod(build.shape(x)[:-1], dtype=np.int64)),
        inner,
        outputs,
        min(build.settings.tile_in, inner),
        min(build.settings.tile_out, outputs),
        build.accumulator(bits_of(total), rule),
        shift,
        rule,
    )
    build.layer(op, [source, codes, bias_codes], output, result)


def _bias(build: Builder, bias: np.ndarray | None, name: str, fraction: int, size: int) -> tuple[int, str]:
    """Shift to the left, and codes."""
    if bias is None:
        return 0, build.zeros(size)
    bias = np.broadcast_to(bias.reshape(len(bias), -1), (len(bias), size))
    codes, form = build.constant(name, bias, fraction)
    return fraction - form.fraction, codes


def lower_linear(build: Builder, node: Node) -> None:
    """MatMul and Add, fused before."""
    x, weight, bias = node.inputs
    linear(build, x, build.graph.constant(weight), build.graph.constant(bias), weight, node.outputs[0])


def lower_gemm(build: Builder, node: Node) -> None:
    """`alpha A B + beta C`."""
    x, weight, *rest = [name for name in node.inputs if name]
    summand = bool(rest) and not build.graph.is_constant(rest[0])
    if node.get("transA", 0) or not build.graph.is_constant(weight) or (summand and node.get("beta", 1.0) != 1):
        raise build.refuse("of activations")
    matrix = build.graph.constant(weight) * node.get("alpha", 1.0)
    matrix = matrix.swapaxes(1, 2) if node.get("transB", 0) else matrix
    output = node.outputs[0]
    if not summand:
        bias = build.graph.constant(rest[0]) * node.get("beta", 1.0) if rest else None
        linear(build, x, matrix, bias, weight, output)
        return
    # The product alone was not observed: it lies between the extremes of the difference.
    whole, added = build.observed(output).reach, build.observed(build.graph.base(rest[0])).reach
    product = f"{output}.product"
    build.graph.observed[product] = Observed(build.shape(output), "f", whole[0] - added[1], whole[1] - added[0])
    linear(build, x, matrix, None, weight, product)
    binary(build, "add", product, rest[0], output)


def lower_matmul(build: Builder, node: Node) -> None:
    """A product with a constant matrix, or a batched one."""
    left, right = node.inputs
    if build.graph.is_constant(right) and len(build.shape(right)) == 2:
        linear(build, left, build.graph.constant(right), None, right, node.outputs[0])
        return
    a, b = build.shape(left), build.shape(right)
    a, b = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    parts = [_batched(build, name, shape, batch) for name, shape in ((left, a), (right, b))]
    matmul(build, parts, (math.prod(batch), a[-2], a[-1], b[-1]), node.outputs[0])


def _batched(build: Builder, name: str, shape: tuple[int, ...], batch: tuple[int, ...]) -> tuple[str, bool]:
    """An operand that has the whole batch or one entry of it."""
    source, _ = build.operand(name, store="weights")
    own, wanted = math.prod(shape[:-2]), math.prod(batch)
    if own in (1, wanted):
        return source, own == 1 and wanted > 1
    whole = (*batch, *shape[-2:])
    return build.move(source, f"{build.node.outputs[0]}.{name}", whole, broadcast_strides(shape, whole)), False


def matmul(
    build: Builder, parts: list[tuple[str, bool]], sizes: tuple[int, int, int, int], output: str, to: str | None = None
) -> None:
    """A batched product of two operands, each with whether it repeats; sizes are batch, rows, inner, columns.

    `to` names the tensor whose range the result has, if it is not the output itself.
    """
    (a, repeat_a), (b, repeat_b) = parts
    batch, rows, inner, columns = sizes
    fraction = build.program.format(a).fraction + build.program.format(b).fraction
    result = build.result(to or output, fraction)
    rule = build.rule(fraction, result)
    bits = product_bits(build.largest(a) * build.largest(b), inner)
    op = Matmul(
        batch,
        rows,
        inner,
        columns,
        repeat_a,
        repeat_b,
        min(build.settings.tile_in, inner),
        min(build.settings.tile_out, columns),
        build.accumulator(bits, rule),
        rule,
    )
    build.layer(op, [a, b], output, result, None if to is None else (batch, rows, columns))


def lower_einsum(build: Builder, node: Node) -> None:
    """Two operands, each letter in one of four roles: batch, rows, summed, columns."""
    terms, _, output = node.get("equation").replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(letters) != 2 or any(
        set(part) - set(string.ascii_letters) or len(set(part)) < len(part) for part in letters
    ):
        raise build.refuse(f"of {node.get('equation')}")
    a, b = letters
    batch = [x for x in output if x in a and x in b]
    summed = [x for x in a if x in b and x not in output]
    rows, columns = [x for x in output if x not in b], [x for x in output if x not in a]
    if set(a) - {*batch, *summed, *rows} or set(b) - {*batch, *summed, *columns}:
        raise build.refuse(f"of {node.get('equation')}")
    sizes = {
        **dict(zip(a, build.shape(node.inputs[0]), strict=True)),
        **dict(zip(b, build.shape(node.inputs[1]), strict=True)),
    }
    orders = [[a.index(x) for x in (*batch, *rows, *summed)], [b.index(x) for x in (*batch, *summed, *columns)]]
    name = node.outputs[0]
    parts = [
        (build.transposed(operand, order, f"{name}.{side}"), False)
        for operand, order, side in zip(node.inputs, orders, "ab", strict=True)
    ]
    made = [*batch, *rows, *columns]
    shape = [sizes[x] for x in made]
    number = [math.prod(sizes[x] for x in part) for part in (batch, rows, summed, columns)]
    matmul(build, parts, (number[0], number[1], number[2], number[3]), f"{name}.product", name)
    strides = dict(zip(made, strides_of(shape), strict=True))
    build.move(f"{name}.product", name, build.shape(name), [strides[x] for x in output])


def lower_conv(build: Builder, node: Node) -> None:
    """In one or two dimensions, of one image."""
    x, weight, bias = (*node.inputs, "")[:3]
    shape, kernel, after = (build.shape(name) for name in (x, weight, node.outputs[0]))
    if not build.graph.is_constant(weight) or shape[0] != 1 or len(shape) not in (3, 4):
        raise build.refuse(f"of {shape} with {kernel}")
    planes = len(shape) - 2
    pads = _pads(build, node, shape, kernel, after)
    source, form = build.operand(x)
    codes, weights = build.constant(weight, build.graph.constant(weight), store="weights")
    fraction = form.fraction + weights.fraction
    given = build.graph.constant(bias) if bias else None
    shift, bias_codes = _bias(build, given, f"{node.outputs[0]}.bias", fraction, kernel[0])
    table = build.program.constants[codes].codes.reshape(-1, kernel[0], math.prod(kernel[1:]))
    total = int(np.abs(table).sum(-1).max()) * build.largest(source) + (build.largest(bias_codes) << shift)
    result = build.result(node.outputs[0], fraction)
    rule = build.rule(fraction, result)
    op = Conv2d(
        shape[1],
        *_pair(shape[2:], 1),
        kernel[0],
        node.get("group", 1),
        _pair(kernel[2:], 1),
        _pair(node.get("strides", [1] * planes), 1),
        _pair(node.get("dilations", [1] * planes), 1),
        _pair(pads, 0),
        *_pair(after[2:], 1),
        min(build.settings.tile_out, kernel[0] // node.get("group", 1)),
        build.accumulator(bits_of(total), rule),
        shift,
        rule,
    )
    build.layer(op, [source, codes, bias_codes], node.outputs[0], result)


def _pair(sizes: list[int] | tuple[int, ...], missing: int) -> tuple[int, int]:
    """Height and width; of one dimension it is the width."""
    high, wide = (missing, *sizes) if len(sizes) == 1 else sizes
    return int(high), int(wide)


def _pads(build: Builder, node: Node, shape: tuple, kernel: tuple, after: tuple) -> list[int]:
    """Zeros before, along each dimension."""
    planes, auto = len(shape) - 2, node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        steps, spread = node.get("strides", [1] * planes), node.get("dilations", [1] * planes)
        total = [
            max(0, (after[2 + i] - 1) * steps[i] + spread[i] * (kernel[2 + i] - 1) + 1 - shape[2 + i])
            for i in range(planes)
        ]
        return [(size + (auto == "SAME_LOWER")) // 2 for size in total]
    return [0] * planes if auto == "VALID" else list(node.get("pads", [0] * 2 * planes))[:planes]


def lower_batch_norm(build: Builder, node: Node) -> None:
    """As trained: a factor and a summand per channel."""
    x = node.inputs[0]
    scale, summand, mean, variance = (build.graph.constant(name).astype(np.float64) for name in node.inputs[1:5])
    factor = scale / np.sqrt(variance + node.get("epsilon", 1e-5))
    shape, name = build.shape(x), node.outputs[0]
    source, form = build.operand(x)
    codes, factors = build.constant(f"{name}.scale", factor)
    fraction = form.fraction + factors.fraction
    shift, bias = _bias(build, summand - mean * factor, f"{name}.bias", fraction, shape[1])
    result = build.result(name, fraction)
    rule = build.rule(fraction, result)
    total = build.largest(source) * build.largest(codes) + (build.largest(bias) << shift)
    inner = math.prod(shape[2:])
    op = Affine(shape[0], shape[1], inner, shift, build.accumulator(bits_of(total), rule), rule)
    build.layer(op, [source, codes, bias], name, result)


RULES = {
    "Linear": lower_linear,
    "Gemm": lower_gemm,
    "MatMul": lower_matmul,
    "Einsum": lower_einsum,
    "Conv": lower_conv,
    "BatchNormalization": lower_batch_norm,
}
