"""Rules for functions of one variable, all by the same table mechanism."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from export.fpga.formats import Fixed, Requantise, bits_of
from export.fpga.graph import Node
from export.fpga.lower.builder import Builder
from export.fpga.ops.pointwise import Table
from moecore.activations import ACTIVATIONS

Function = Callable[[np.ndarray], np.ndarray]
FINER = 2
"""Bits behind the binary point that entries have beyond the result."""


@dataclass(frozen=True)
class Curve:
    """A function, and where it is not yet what it becomes further out."""

    of: Function
    reach: tuple[float, float] = (-math.inf, math.inf)
    """Outside it is constant, or with `relu` like ReLU, to within 2e-6."""
    relu: bool = False
    """The table holds the difference from ReLU."""
    bounds: tuple[float, float] | None = None
    """Of its values."""


def torch_function(name: str) -> Function:
    """An activation of `moecore.ACTIVATIONS` on NumPy arrays."""
    return lambda x: ACTIVATIONS[name](torch.from_numpy(np.asarray(x, np.float64))).numpy()


def _erf(x: np.ndarray) -> np.ndarray:
    return torch.erf(torch.from_numpy(x)).numpy()


CURVES: dict[str, Curve] = {
    "gelu": Curve(torch_function("gelu"), (-6.5, 6.5), relu=True),
    "gelu_tanh": Curve(torch_function("gelu_tanh"), (-6.5, 6.5), relu=True),
    "silu": Curve(torch_function("silu"), (-16, 16), relu=True),
    "softplus": Curve(lambda x: np.logaddexp(0, x), (-16, 16), relu=True),
    "mish": Curve(lambda x: x * np.tanh(np.logaddexp(0, x)), (-16, 16), relu=True),
    "sigmoid": Curve(torch_function("sigmoid"), (-16, 16), bounds=(0, 1)),
    "tanh": Curve(np.tanh, (-8, 8), bounds=(-1, 1)),
    "erf": Curve(_erf, (-4, 4), bounds=(-1, 1)),
    "sin": Curve(np.sin, bounds=(-1, 1)),
    "cos": Curve(np.cos, bounds=(-1, 1)),
}
"""Functions by name. Activations have the names of `moecore.ACTIVATIONS`."""
OPERATORS = {
    "Silu": "silu",
    "Softplus": "softplus",
    "Mish": "mish",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Erf": "erf",
    "Sin": "sin",
    "Cos": "cos",
}
"""Operators of ONNX that are one of them."""


@dataclass(frozen=True)
class Tabulated:
    """A table in codes, and how to read it; see `export.fpga.ops.pointwise.Table`."""

    codes: np.ndarray
    format: Fixed
    low: int
    shift: int
    relu_shift: int
    rule: Requantise
    bits: int
    """Of the interpolated value, its relu included."""

    @property
    def count(self) -> int:
        """Segments."""
        return len(self.codes) - 1


def segments(low: float, high: float, form: Fixed, table_bits: int) -> tuple[int, int, int]:
    """First code, shift and number of equal segments that cover a range; zero is between two of them or outside.

    Args:
        low: of the range, in values.
        high: likewise.
        form: of the inputs; what it cannot hold is left out.
        table_bits: at most `2^table_bits` segments.
    """
    first = math.floor(max(math.ldexp(low, form.fraction) if math.isfinite(low) else form.low, form.low))
    last = math.ceil(min(math.ldexp(high, form.fraction) if math.isfinite(high) else form.high, form.high))
    last = max(last, first + 1)
    shift = 0
    while (-(-last >> shift)) - (first >> shift) > 1 << table_bits:
        shift += 1
    return (first >> shift) << shift, shift, (-(-last >> shift)) - (first >> shift)


def tabulate(curve: Curve, form: Fixed, result: Fixed, table_bits: int, wrap: bool) -> Tabulated:
    """Entries of a table from one format to another."""
    low, shift, count = segments(*curve.reach, form, table_bits)
    places = low + (np.arange(count + 1, dtype=np.int64) << shift)
    points = form.decode(places)
    values = np.asarray(curve.of(points), np.float64) - (np.maximum(points, 0) if curve.relu else 0)
    fraction = max(result.fraction + FINER, form.fraction - shift if curve.relu else -shift)
    scaled = np.floor(np.ldexp(values, fraction) + 0.5)
    largest = int(np.abs(scaled).max())
    width = max(bits_of(largest), 2)
    relu_shift = fraction + shift - form.fraction if curve.relu else -1
    bits = bits_of((largest << shift) + (1 << (form.width - 1 + relu_shift) if curve.relu else 0)) + 1
    rule = Requantise(fraction + shift - result.fraction, result.width, wrap)
    return Tabulated(scaled.astype(np.int64), Fixed(width, width - fraction), low, shift, relu_shift, rule, bits)


def lower_curve(build: Builder, name: str, operand: str, output: str, curve: Curve) -> None:
    """A layer that looks a function up."""
    source, form = build.operand(operand)
    result = build.result(output, bounds=curve.bounds)
    made = tabulate(curve, form, result, build.settings.table_bits, build.settings.wrap)
    table = build.codes(f"table.{name}", made.codes[None], made.format, "tables")
    size = math.prod(build.shape(output))
    accumulator = build.accumulator(made.bits, made.rule)
    op = Table(size, made.low, made.shift, made.count, made.relu_shift, accumulator, made.rule)
    build.layer(op, [source, table], output, result)


def lower_function(build: Builder, node: Node) -> None:
    """A function that has a name here."""
    name = OPERATORS[node.op]
    lower_curve(build, name, node.inputs[0], node.outputs[0], CURVES[name])


def lower_gelu(build: Builder, node: Node) -> None:
    """Exact, or by tanh."""
    name = "gelu_tanh" if node.get("approximate", "none") == "tanh" else "gelu"
    lower_curve(build, name, node.inputs[0], node.outputs[0], CURVES[name])


def function(build: Builder, node: Node, of: Function, name: str) -> None:
    """A function without a natural end, over twice the range that calibration saw; clamped outside."""
    seen = build.observed(build.graph.base(node.inputs[0]))
    low = seen.low / 2 if seen.low > 0 else 2 * seen.low
    _, form = build.operand(node.inputs[0])
    reach = (max(low, form.step), 2 * seen.high) if seen.low > 0 else (low, 2 * max(seen.high, 0))
    with np.errstate(all="ignore"):
        defined = bool(np.isfinite(of(np.array(reach))).all())
    if not defined:
        raise build.refuse(f"over [{seen.low:g}, {seen.high:g}], which calibration saw,")
    lower_curve(build, name, node.inputs[0], node.outputs[0], Curve(of, reach))


def lower_exp(build: Builder, node: Node) -> None:
    """Up to twice the largest value that calibration saw; nearly nothing below -17."""
    highest = build.observed(build.graph.base(node.inputs[0])).high + math.log(2)
    lower_curve(build, "exp", node.inputs[0], node.outputs[0], Curve(np.exp, (min(-17, highest - 17), highest)))


def lower_log(build: Builder, node: Node) -> None:
    """Natural logarithm."""
    function(build, node, np.log, "log")


def lower_elu(build: Builder, node: Node) -> None:
    """`alpha (exp(x) - 1)` below zero."""
    alpha = float(node.get("alpha", 1.0))
    curve = Curve(lambda x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))), (-17, 0), relu=True)
    lower_curve(build, f"elu.{alpha:g}", node.inputs[0], node.outputs[0], curve)


def lower_leaky(build: Builder, node: Node) -> None:
    """`alpha x` below zero."""
    alpha = float(node.get("alpha", 0.01))
    curve = Curve(lambda x: np.where(x > 0, x, alpha * x), (-math.inf, 0), relu=True)
    lower_curve(build, f"leaky.{alpha:g}", node.inputs[0], node.outputs[0], curve)


RULES = {
    **dict.fromkeys(OPERATORS, lower_function),
    "Gelu": lower_gelu,
    "Exp": lower_exp,
    "Log": lower_log,
    "Elu": lower_elu,
    "LeakyRelu": lower_leaky,
}
