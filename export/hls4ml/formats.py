"""Fixed-point formats of every layer, from ranges seen on calibration data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export.hls4ml.plan import PARAMETERS, Layer, Plan
from moecore.errors import require

TABLE_WIDTH = 18
"""Bits of entries of tables (exp, reciprocal, sigmoid, tanh): one block RAM word."""
TABLE_SIZE = 4096
"""Entries of a table."""


@dataclass(frozen=True)
class Settings:
    """How a project is made.

    Args:
        width: bits of what layers give, 8 to 32.
        weight_width: bits of weights and biases, 4 to 32.
        margin: largest value that a format must hold, as a multiple of the largest seen on calibration data.
        reuse_factor: products that each multiplier computes per sample.
        part: the FPGA; `xczu9eg-ffvb1156-2-e` is a ZCU102's.
        clock_period: nanoseconds.
        backend: "Vitis" or "Vivado".
    """

    width: int = 16
    weight_width: int = 16
    margin: float = 1.25
    reuse_factor: int = 1
    part: str = "xczu9eg-ffvb1156-2-e"
    clock_period: float = 5.0
    backend: str = "Vitis"

    def __post_init__(self) -> None:
        require(8 <= self.width <= 32, "width", self.width, "must lie between 8 and 32 bits")
        require(4 <= self.weight_width <= 32, "weight_width", self.weight_width, "must lie between 4 and 32 bits")
        require(self.margin >= 1, "margin", self.margin, "must be at least 1")
        require(self.reuse_factor >= 1, "reuse_factor", self.reuse_factor, "must be at least 1")
        require(self.backend in ("Vitis", "Vivado"), "backend", self.backend, "choose one of Vitis, Vivado")


@dataclass(frozen=True)
class Format:
    """Two's complement of `width` bits, `integer` of them before the point, the sign's included."""

    width: int
    integer: int
    signed: bool = True
    rounds: bool = True
    """Round and saturate where values are stored; else truncate and wrap, as accumulators do."""

    @classmethod
    def holding(cls, width: int, largest: float) -> Format:
        """The finest signed format of a width that holds numbers up to a size, which lies below the power of two."""
        return cls(width, 1 + math.ceil(math.log2(math.nextafter(largest, math.inf))) if largest > 0 else 1)

    @property
    def fraction(self) -> int:
        """Bits after the point."""
        return self.width - self.integer

    def __str__(self) -> str:
        """As HLS tools spell it."""
        modes = ",AP_RND,AP_SAT" if self.rounds else ""
        return f"ap_{'' if self.signed else 'u'}fixed<{self.width},{self.integer}{modes}>"


@dataclass(frozen=True)
class LayerFormats:
    """Of one layer: `result`, and what else its kind has, by hls4ml's names."""

    largest: float
    """Largest absolute value seen on calibration data."""
    precision: Mapping[str, Format]


def choose_formats(plan: Plan, values: Mapping[str, np.ndarray], settings: Settings) -> dict[str, LayerFormats]:
    """Formats of every layer.

    Args:
        plan: the layers.
        values: of every layer on calibration data, `[B, N]`.
        settings: widths and margin.
    """
    found: dict[str, LayerFormats] = {}
    for layer in plan.layers:
        largest = float(np.abs(values[layer.name]).max())
        result = Format.holding(settings.width, largest * settings.margin)
        given = [found[name].precision["result"] for name in layer.inputs]
        own = {
            name: Format.holding(settings.weight_width, float(np.abs(layer.weights[name]).max()))
            for name in PARAMETERS.get(layer.kind, ())
        }
        found[layer.name] = LayerFormats(largest, {"result": result, **own, **_inner(layer, result, given, own)})
    return found


def _inner(layer: Layer, result: Format, given: list[Format], own: Mapping[str, Format]) -> dict[str, Format]:
    """Formats inside a layer: accumulators that lose nothing, and tables."""
    if layer.kind in ("dense", "mix"):
        fraction = sum(one.fraction for one in (*given, *(own[name] for name in ("weight",) if name in own)))
        # Sums that wrap on their way are right in the end if the end fits: two's complement.
        integer = max(result.integer, own["bias"].integer if own else 0) + 2
        return {"accum": Format(integer + max(fraction, 1), integer, rounds=False)}
    if layer.kind == "softmax":
        above = math.ceil(math.log2(layer.size)) + 1
        return {
            "inp_norm": Format(int(math.log2(TABLE_SIZE)), 4, signed=False),  # exp(-16) is nothing
            "exp_table": Format(TABLE_WIDTH, 1, signed=False),
            "accum": Format(TABLE_WIDTH + above, above, signed=False),
            "inv_inp": Format(TABLE_WIDTH, above, signed=False),
            "inv_table": Format(TABLE_WIDTH, 1, signed=False),
        }
    if layer.kind == "layernorm":
        above = math.ceil(math.log2(layer.size)) + 4
        return {"accum": Format(above + 22, above, rounds=False), "table": Format(TABLE_WIDTH + 6, 10, signed=False)}
    return {"table": Format(TABLE_WIDTH, 2)} if layer.kind in ("sigmoid", "tanh", "elu") else {}
