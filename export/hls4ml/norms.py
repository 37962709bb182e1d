"""Layer norms in the range of hls4ml's: its table of 1/sqrt ends at a variance of 1, and says nothing beyond."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from export.hls4ml.plan import Layer, Plan

PEAK = 0.5
"""Largest variance that a layer norm is shown on calibration data."""


def fit_layernorms(plan: Plan, values: Mapping[str, np.ndarray]) -> Plan:
    """Scales what layer norms read by powers of two, which does not change what they give.

    The scale becomes part of the linear layer before the norm, if nobody else reads that, else a layer of its own.

    Args:
        plan: the layers.
        values: of every layer on calibration data, `[B, N]`.
    """
    layers = {layer.name: layer for layer in plan.layers}
    for norm in [layer for layer in plan.layers if layer.kind == "layernorm"]:
        (source,) = norm.inputs
        largest = float(values[source].var(1).max())
        if largest == 0:
            continue
        scale = 2.0 ** math.floor(math.log2(PEAK / largest) / 2)
        before = layers[source]
        alone = sum(source in layer.inputs for layer in plan.layers) == 1 and source not in plan.outputs.values()
        if before.kind == "dense" and alone:
            own = {name: one * scale for name, one in before.weights.items()}
            layers[source] = dataclasses.replace(before, weights=own)
        else:
            source = f"{norm.name}_scale"
            own = {"scale": np.full(before.size, scale), "bias": np.zeros(before.size)}
            layers[source] = Layer("affine", source, norm.origin, before.size, norm.inputs, own)
        own = {**norm.weights, "epsilon": norm.weights["epsilon"] * scale**2}
        layers[norm.name] = dataclasses.replace(norm, inputs=(source,), weights=own)
    return dataclasses.replace(plan, layers=_ordered(layers))


def _ordered(layers: Mapping[str, Layer]) -> tuple[Layer, ...]:
    """Each after what it reads, otherwise in the order given."""
    placed: dict[str, Layer] = {}

    def place(layer: Layer) -> None:
        if layer.name not in placed:
            for name in layer.inputs:
                place(layers[name])
            placed[layer.name] = layer

    for layer in layers.values():
        place(layer)
    return tuple(placed.values())
