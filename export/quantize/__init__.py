"""Traced graphs in fewer bits: experts and other products quantised, routers and what is sensitive left in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from export.errors import ExportError
from export.quantize.graph import replace_nodes
from export.quantize.integers import dynamic_int8, static_int8
from export.quantize.weights import fp16, int4
from export.simplify import simplify

if TYPE_CHECKING:
    import onnx

Quantizer = Callable[["onnx.ModelProto", Sequence[dict[str, np.ndarray]]], "onnx.ModelProto"]
"""Traced graph and calibration data -> graph in fewer bits; its nodes may stand in any order."""
KINDS: dict[str, Quantizer] = {"int8": static_int8, "int8-dynamic": dynamic_int8, "int4": int4, "fp16": fp16}
"""Kinds of quantisation by name."""


def quantize(proto: onnx.ModelProto, kind: str, calibration: Sequence[dict[str, np.ndarray]] = ()) -> onnx.ModelProto:
    """A traced graph in fewer bits, for onnxruntime.

    Every expert has its own scales. Routers and gates stay float32 and read inputs that were not quantised; attention
    between activations, norms and activation functions stay float32. Tensors that `export.onnx.routing` names, inputs
    and outputs keep their names, and inputs and outputs their types.

    Args:
        proto: as `export.trace.trace` gives it, with opaque nodes.
        kind: a name of `KINDS`.
        calibration: real inputs by name, a dictionary per run; "int8" takes ranges of activations from them.

    Returns:
        A graph in the operator set of the traced one.

    Raises:
        ExportError: if there is no such kind, or it needs calibration data.
    """
    import onnx

    if kind not in KINDS:
        raise ExportError(f"kind={kind!r}: choose one of {', '.join(sorted(KINDS))}")
    made = KINDS[kind](proto, calibration)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.graph.CopyFrom(made.graph)
    result.graph.name = proto.graph.name
    result.graph.ClearField("value_info")
    result.ClearField("opset_import")
    result.opset_import.extend(made.opset_import)
    replace_nodes(result.graph, list(result.graph.node))
    return simplify(result)
