"""The rule for a mixture of experts."""

from __future__ import annotations

import math

import numpy as np

from export.fpga.calibrate import inside
from export.fpga.formats import INDEX, Fixed, Requantise, bits_of
from export.fpga.graph import Node
from export.fpga.lower.builder import Builder, product_bits
from export.fpga.lower.functions import CURVES, Tabulated, tabulate
from export.fpga.ops.experts import TABLES, Experts

QUEUE, LENGTHS = "queue", "lengths"
"""Outputs of the layer beside the sum: tokens in order of their expert, and how many each expert has."""


def lower_experts(build: Builder, node: Node) -> None:
    """All that one opaque node holds: queues, experts, weighted sums."""
    names = [*node.inputs, *[""] * (9 - len(node.inputs))]
    x, expert, weight, up, down, gate = names[:6]
    output, activation = node.outputs[0], node.get("activation")
    if not all(build.graph.is_constant(name) for name in (up, down, gate) if name):
        raise build.refuse("with weights computed from inputs")
    made = _Stages(build, output, names)
    hidden = made.hidden(activation)
    down_rule, down_bits, down_shift, y = made.product("down", "down", hidden)
    weights, weight_form = build.operand(weight)
    fraction = y.fraction + weight_form.fraction
    result = build.result(output, fraction)
    rule = build.rule(fraction, result)
    tokens, top_k = build.shape(expert)
    experts, width, inner = build.shape(up)
    outputs = build.shape(down)[1]
    total = product_bits(1 << (y.width - 1 + weight_form.width - 1), top_k)
    op = Experts(
        tokens,
        top_k,
        experts,
        inner,
        width,
        outputs,
        bool(gate),
        activation,
        (made.shifts["up"], made.shifts["gate"], down_shift),
        *made.table_fields(),
        min(build.settings.tile_in, inner, width),
        min(build.settings.tile_out, width, outputs),
        (made.bits["up"], down_bits, build.accumulator(total, rule)),
        made.bits["act"],
        *(made.rules[stage] for stage in ("up", "gate", "act", "product")),
        down_rule,
        rule,
    )
    operands = [build.operand(x)[0], build.operand(expert)[0], weights, *made.operands()]
    build.layers(
        op,
        operands,
        [
            (output, build.shape(output), result),
            (inside(output, QUEUE), (tokens * top_k,), INDEX),
            (inside(output, LENGTHS), (experts,), INDEX),
        ],
    )


class _Stages:
    """Formats from stage to stage inside an expert."""

    def __init__(self, build: Builder, output: str, names: list[str]) -> None:
        self.build, self.output = build, output
        self.names = dict(zip(("up", "down", "gate", "up_bias", "down_bias", "gate_bias"), names[3:], strict=True))
        self.x = build.operand(names[0])[1]
        self.codes: dict[str, str] = {}
        self.rules: dict[str, Requantise] = {}
        self.bits: dict[str, int] = {}
        self.shifts: dict[str, int] = {}
        self.table: Tabulated | None = None

    def product(self, kind: str, stage: str, form: Fixed) -> tuple[Requantise, int, int, Fixed]:
        """A matrix: rule, bits of its accumulator, shift of the bias, format of the result."""
        build, name = self.build, self.names[kind]
        array = build.graph.constant(name)  # [variants, E, out, in]
        self.codes[kind], weights = build.constant(build.graph.base(name), array, store="weights")
        fraction = form.fraction + weights.fraction
        bias = self.names[f"{kind}_bias"]
        if bias:
            self.codes[f"{kind}_bias"], biases = build.operand(bias, fraction)
            shift = fraction - biases.fraction
        else:
            self.codes[f"{kind}_bias"], shift = build.zeros(math.prod(array.shape[1:3])), 0
        table = build.program.constants[self.codes[kind]].codes.reshape(-1, array.shape[-1])
        total = int(np.abs(table).sum(-1).max()) << (form.width - 1)
        total += build.largest(self.codes[f"{kind}_bias"]) << shift
        result = build.result(inside(self.output, stage), fraction)
        rule = build.rule(fraction, result)
        return rule, build.accumulator(bits_of(total), rule), shift, result

    def hidden(self, activation: str) -> Fixed:
        """Up to the hidden units; returns their format."""
        self.rules["up"], bits, self.shifts["up"], units = self.product("up", "up", self.x)
        self.bits["up"], self.shifts["gate"], gated = bits, 0, bool(self.names["gate"])
        before = units
        if gated:
            self.rules["gate"], more, self.shifts["gate"], before = self.product("gate", "gate", self.x)
            self.bits["up"] = max(bits, more)
        else:
            self.codes |= {"gate": self.codes["up"], "gate_bias": self.codes["up_bias"]}
            self.rules["gate"] = self.rules["up"]
        acted = self._activate(activation, before)
        self.rules["product"] = self.rules["act"]
        if not gated:
            return acted
        fraction = acted.fraction + units.fraction
        result = self.build.result(inside(self.output, "product"), fraction)
        self.rules["product"] = self.build.rule(fraction, result)
        self.build.accumulator(acted.width + units.width, self.rules["product"])
        return result

    def _activate(self, activation: str, form: Fixed) -> Fixed:
        build, name = self.build, inside(self.output, "act")
        if activation in TABLES:
            fraction, bits = form.fraction, form.width
            if activation == "relu2":
                fraction, bits = 2 * fraction, 2 * bits
            result = build.result(name, fraction)
            self.rules["act"] = build.rule(fraction, result)
            self.bits["act"] = build.accumulator(bits, self.rules["act"])
            return result
        if activation not in CURVES:
            raise build.refuse(f"with activation {activation}", f"use one of {', '.join(sorted({*CURVES, *TABLES}))}")
        curve = CURVES[activation]
        result = build.result(name, bounds=curve.bounds)
        self.table = tabulate(curve, form, result, build.settings.table_bits, build.settings.wrap)
        self.rules["act"] = self.table.rule
        self.bits["act"] = build.accumulator(self.table.bits, self.table.rule)
        self.codes["table"] = build.codes(f"table.{activation}", self.table.codes[None], self.table.format, "tables")
        return result

    def table_fields(self) -> tuple[int, int, int, int]:
        """Low, shift, count, shift of the relu."""
        table = self.table
        return (0, 0, 1, -1) if table is None else (table.low, table.shift, table.count, table.relu_shift)

    def operands(self) -> list[str]:
        """Weights, biases and table, in the layer's order."""
        if "table" not in self.codes:
            none = Fixed(2, 2)
            self.codes["table"] = self.build.codes("table.none", np.zeros((1, 2), np.int64), none, "tables")
        return [self.codes[kind] for kind in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias", "table")]


RULES = {"Experts": lower_experts}
