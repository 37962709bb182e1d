"""Ranges of activations over calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.errors import ExportError
from export.measure import session_of

if TYPE_CHECKING:
    import onnx

    from export.quantize.products import Product

ENOUGH = 64
"""Tokens from which on an expert has ranges of its own."""
_PROBES = {"least": "ReduceMin", "largest": "ReduceMax", "shape": "Shape"}


@dataclass(frozen=True)
class Range:
    """What a tensor was seen to hold; infinite ends the wrong way round where it had no rows."""

    least: float = math.inf
    largest: float = -math.inf
    rows: int = 0

    def __or__(self, other: Range) -> Range:
        least, largest = min(self.least, other.least), max(self.largest, other.largest)
        return Range(least, largest, self.rows + other.rows)


def observe(
    proto: onnx.ModelProto, products: Sequence[Product], feeds: Sequence[dict[str, np.ndarray]]
) -> dict[str, Range]:
    """Range of what each product multiplies, and of what comes out where that counts, over all feeds.

    An expert that was sent fewer tokens than `ENOUGH`, or none, takes the range over all experts of its layer.

    Args:
        proto: whose products they are.
        products: of which.
        feeds: inputs by name, a dictionary per run.

    Returns:
        Ranges by name of the tensor.

    Raises:
        ExportError: if one is not finite.
    """
    names = sorted({name for one in products for name in (one.x, one.y) if name})
    session = session_of(_probed(proto, names))
    wanted = [f"{name}:{kind}" for name in names for kind in _PROBES]
    seen = dict.fromkeys(names, Range())
    for feed in feeds:
        values = iter(session.run(wanted, feed))
        for name, least, largest, shape in zip(names, values, values, values, strict=True):
            if not np.isfinite([least, largest]).all() and shape.all():
                raise ExportError(f"{name}: values that are not finite on calibration data; check inputs and weights")
            seen[name] |= Range(float(least), float(largest), int(np.prod(shape[:-1])))
    layers: dict[str, Range] = {}
    for part, x in sorted({(one.part, one.x) for one in products}):
        layers[part] = layers.get(part, Range()) | seen[x]
    for one in products:
        if seen[one.x].rows < ENOUGH:
            seen[one.x] = layers[one.part]
    return {name: one if one.least <= one.largest else Range(0.0, 0.0) for name, one in seen.items()}


def _probed(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The graph with the ends and the shapes of tensors as further outputs."""
    import onnx

    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    for name in names:
        for kind, operator in _PROBES.items():
            reduce = {} if operator == "Shape" else {"keepdims": 0}
            probed.graph.node.append(onnx.helper.make_node(operator, [name], [f"{name}:{kind}"], **reduce))
            probed.graph.output.append(onnx.ValueInfoProto(name=f"{name}:{kind}"))
    return probed
