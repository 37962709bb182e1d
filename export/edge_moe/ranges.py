"""Ranges of weights and activations against the accelerator's types: a report, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from export.edge_moe.fixed import ACTIVATION, Fixed
from export.edge_moe.layout import Tensors
from export.errors import ExportError

Ranges = Mapping[str, tuple[float, float]]
"""Name -> smallest and largest value."""


def weight_ranges(tensors: Tensors) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each tensor."""
    return {name: (float(value.min()), float(value.max())) for name, value in tensors.items()}


def clip_upper_ends(tensors: Tensors, formats: Mapping[str, Fixed]) -> tuple[Tensors, dict[str, int]]:
    """Weights that lie exactly on the upper end of their type, which it just does not hold, become its largest value.

    They would wrap to the lower end. Fresh models have such weights: `trunc_normal_` cuts off at 2.

    Returns:
        The tensors, and how many values of which were changed, by one step each.
    """
    changed, clipped = {}, {}
    for name, value in tensors.items():
        fixed, at_end = formats[name], value == formats[name].limit
        if at_end.any():
            changed[name] = np.where(at_end, np.float32(fixed.limit - fixed.step), value)
            clipped[name] = int(np.count_nonzero(at_end))
    return tensors | changed, clipped


def require_finite(ranges: Ranges) -> None:
    """Refuse values that are not finite.

    Raises:
        ExportError: names the first tensor that has such.
    """
    for name, (low, high) in ranges.items():
        if not np.isfinite([low, high]).all():
            raise ExportError(f"{name}: has values that are not finite; train the model anew")


def require_ranges(ranges: Ranges, formats: Mapping[str, Fixed], remedy: str) -> None:
    """Refuse values that their type would wrap.

    Args:
        ranges: of tensors or activations.
        formats: type of each; activations need none.
        remedy: what to do about it.

    Raises:
        ExportError: names the tensor that is furthest outside, its type, and the power of two that would make it fit.
    """
    require_finite(ranges)
    outside = {}
    for name, (low, high) in ranges.items():
        fixed = formats.get(name, ACTIVATION)
        if not fixed.holds(low, high):
            outside[name] = max(1, int(fixed.excess(max(abs(low), abs(high)))))
    if not outside:
        return
    name = max(outside, key=outside.get)
    (low, high), fixed = ranges[name], formats.get(name, ACTIVATION)
    more = f" ({len(outside) - 1} more outside)" if len(outside) > 1 else ""
    raise ExportError(
        f"{name}: ranges over [{low:.4g}, {high:.4g}], where {fixed.name} holds {fixed.interval}{more}; "
        f"2^-{outside[name]} times it would fit; {remedy}"
    )


def described(name: str, ranges: Ranges, fixed: Fixed) -> dict[str, Any]:
    """Type, range and headroom of a tensor, as plain data."""
    low, high = ranges[name]
    return {"type": fixed.name, "min": low, "max": high, "headroom_bits": fixed.headroom_bits(low, high)}
