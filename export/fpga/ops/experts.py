"""The mixture of experts, expert by expert: tokens are queued by expert, each expert's weights are loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from export.fpga.formats import Requantise
from export.fpga.ops.base import Codes, Op
from export.fpga.ops.pointwise import interpolate
from export.fpga.ops.products import exact_matmul

TABLES = ("identity", "relu", "relu2")
"""Activations without a table."""


@dataclass(frozen=True)
class Experts(Op):
    """Experts `down(act(up(x)))`, or `down(act(gate(x)) * up(x))`, weighted and summed for each token.

    All tokens were gated before; the expert number E marks an empty slot. Tokens are queued by expert in their order;
    experts with an empty queue are skipped; of the others each has its weights loaded once, beside the work of the one
    before (Edge-MoE, Sarkar et al. 2023, arXiv 2305.18691, section 4). Queues and their lengths are outputs.
    """

    tokens: int
    top_k: int
    experts: int
    inner: int
    hidden: int
    outputs: int
    gated: bool
    activation: str
    """A name of `moecore.ACTIVATIONS`."""
    bias_shifts: tuple[int, int, int]
    """To the left, of the biases of up, gate and down, each to its accumulator's binary point."""
    table_low: int
    table_shift: int
    table_count: int
    table_relu: int
    """See `Table`."""
    tile_in: int
    tile_out: int
    accumulators: tuple[int, int, int]
    """Bits, of the products with up (and gate), with down, and of the sum over a token's experts."""
    activated_accumulator: int
    """Bits, before the activated units are rounded."""
    up: Requantise
    """To the units before the activation, or to the factor beside the gate."""
    gate: Requantise
    act: Requantise
    """To the activated units."""
    product: Requantise
    """To the product with the gate; not used without one."""
    down: Requantise
    """To the output of an expert."""
    to: Requantise
    """To the weighted sum."""

    kind: ClassVar[str] = "experts"

    def run(
        self,
        x: Codes,
        expert: Codes,
        weight: Codes,
        up: Codes,
        gate: Codes,
        down: Codes,
        up_bias: Codes,
        gate_bias: Codes,
        down_bias: Codes,
        table: Codes,
    ) -> tuple[list[Codes], int]:
        """Without a gate, its weights and bias are those of `up`, and not read.

        Returns:
            Outputs `[tokens, outputs]`, queued tokens `[tokens * top_k]` (-1 behind the last), lengths `[experts]`; and
            how many results did not fit.
        """
        x = x.reshape(self.tokens, self.inner)
        slots, lengths = self._queues(expert.reshape(-1))
        queue = slots // self.top_k
        weight = weight.reshape(-1)[slots]
        total, overflow, start = np.zeros((self.tokens, self.outputs), np.int64), 0, 0
        up, gate = (each.reshape(self.experts, -1, self.inner) for each in (up, gate))
        down = down.reshape(self.experts, -1, self.hidden)
        biases = [each.reshape(self.experts, -1) for each in (up_bias, gate_bias, down_bias)]
        for number, length in enumerate(lengths):
            rows = slice(start, start + length)
            if length:
                own = (up[number], gate[number], down[number], *(bias[number] for bias in biases))
                y, lost = self._expert(x[queue[rows]], own, table)
                np.add.at(total, queue[rows], y * weight[rows, None])  # a token may be queued twice
                overflow += lost
            start += length
        codes, lost = self.to(total)
        padded = np.full(self.tokens * self.top_k, -1, np.int64)
        padded[: len(queue)] = queue
        return [codes, padded, lengths], overflow + lost

    def _queues(self, expert: Codes) -> tuple[Codes, Codes]:
        """Slots in order of experts, and how many each has."""
        order = np.argsort(expert, kind="stable")
        filled = (expert[order] >= 0) & (expert[order] < self.experts)
        lengths = np.bincount(expert[order][filled], minlength=self.experts).astype(np.int64)
        return order[filled], lengths

    def _expert(self, rows: Codes, own: Sequence[Codes], table: Codes) -> tuple[Codes, int]:
        """Rows `[n, inner]` through one expert."""
        up, gate, down, up_bias, gate_bias, down_bias = own
        hidden, overflow = self.up(exact_matmul(rows, up.T) + (up_bias << self.bias_shifts[0]))
        if self.gated:
            gates, lost = self.gate(exact_matmul(rows, gate.T) + (gate_bias << self.bias_shifts[1]))
            gates, more = self.act(self._activate(gates, table))
            hidden, last = self.product(gates * hidden)
            overflow += lost + more + last
        else:
            hidden, lost = self.act(self._activate(hidden, table))
            overflow += lost
        y, lost = self.down(exact_matmul(hidden, down.T) + (down_bias << self.bias_shifts[2]))
        return y, overflow + lost

    def _activate(self, x: Codes, table: Codes) -> Codes:
        if self.activation in TABLES:
            positive = np.maximum(x, 0)
            return {"identity": x, "relu": positive, "relu2": positive * positive}[self.activation]
        total = interpolate(x, table.reshape(-1), self.table_low, self.table_shift)
        return total + (np.maximum(x, 0) << self.table_relu) if self.table_relu >= 0 else total

    def arguments(self) -> Sequence[Any]:
        """Of `experts`: a settings type, its members named as here."""
        kind = f"Function::{self.activation}_" if self.activation in TABLES else "Function::table_"
        sizes = (self.tokens, self.top_k, self.experts, self.inner, self.hidden, self.outputs)
        table = (self.table_low, self.table_shift, self.table_count, self.table_relu)
        return (
            f"Sizes<{', '.join(map(str, (*sizes, self.tile_in, self.tile_out)))}>",
            self.gated,
            f"Activation<{', '.join(map(str, (kind, *table, self.activated_accumulator)))}>",
            f"Shifts<{', '.join(map(str, self.bias_shifts))}>",
            f"Widths<{', '.join(map(str, self.accumulators))}>",
            *(f"Rule<{rule.arguments}, {rule.width}>" for rule in self._rules()),
        )

    def _rules(self) -> tuple[Requantise, ...]:
        return (self.up, self.gate, self.act, self.product, self.down, self.to)

    @property
    def dims(self) -> dict[str, int]:
        """Tokens, slots, experts, widths."""
        return {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "experts": self.experts,
            "in": self.inner,
            "hidden": self.hidden,
            "out": self.outputs,
            "gated": int(self.gated),
        }

    @property
    def macs(self) -> int:
        """Multiply-adds if every slot is filled."""
        matrices = (2 if self.gated else 1) * self.inner + self.outputs
        return self.tokens * self.top_k * self.hidden * matrices
