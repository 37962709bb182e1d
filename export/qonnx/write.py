"""A quantised graph as a file, compared with the float graph on samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.lowering import lower
from export.lowering.node import read_experts
from export.qonnx.emit import Settings, quantise
from export.qonnx.prepare import prepare
from export.qonnx.routers import find_routers
from export.qonnx.run import Samples, observe, run
from moecore.errors import require
from moecore.files import atomic_path

if TYPE_CHECKING:
    import onnx

FLOAT_TOLERANCE = 1e-4
"""Largest error of the prepared graph in float, relative to the largest output: it must be the same model."""


def write_qonnx(
    proto: onnx.ModelProto,
    calibration: Samples,
    path: Path,
    settings: Settings | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write a quantised graph and compare it with the float one.

    Args:
        proto: traced with a batch of one sample (`export.onnx.trace`); mixtures become their dense form.
        calibration: samples by input, `[B, ...]` each: ranges are of half of them, figures of the others.
        path: of the file; written whole or not at all.
        settings: dialect and widths.
        metadata: plain data kept in the file, values other than strings as JSON.

    Returns:
        Figures by flat name: `relative_rms_error` (root of the mean squared error over the standard deviation between
        samples; the largest of all outputs), `decision_agreement` (equal argmaxes over the last axis, of outputs longer
        than 1 there), `routing_agreement` (equal experts; of graphs that choose some), `products`, `router_products`,
        `samples`, `file_bytes`.

    Raises:
        ExportError: shapes vary, or nothing in the graph is a product.
    """
    import onnx

    settings = settings or Settings()
    count = min(map(len, calibration.values()))
    require(count >= 4, "calibration", count, "give at least four samples")
    _check_static(proto)
    chosen = [one.expert for one in read_experts(proto) if one.slots != "every"]
    proto = lower(proto, "dense")
    prepared = prepare(proto)
    seen, unseen = ({name: one[k::2] for name, one in calibration.items()} for k in (0, 1))
    ranges = observe(prepared, seen)
    if not ranges:
        raise ExportError("nothing to quantise: the graph has no product (MatMul, Gemm, Conv)")
    routers = find_routers(prepared)
    made = quantise(prepared, ranges, routers, settings)
    facts = {"quantisation": vars(settings), "routers": sorted(routers), **(metadata or {})}
    for key, value in facts.items():
        made.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    products = sum(node.op_type in ("MatMul", "Conv") for node in prepared.graph.node)
    figures = {**_compare(proto, prepared, made, unseen, chosen), "products": float(products)}
    with atomic_path(path) as temporary:
        onnx.save_model(made, temporary)
        size = temporary.stat().st_size
    return {**figures, "router_products": float(len(routers)), "samples": float(count // 2), "file_bytes": float(size)}


def _check_static(proto: onnx.ModelProto) -> None:
    for one in proto.graph.input:
        shape = [axis.dim_value for axis in one.type.tensor_type.shape.dim]
        if not shape or min(shape) < 1 or shape[0] != 1:
            raise ExportError(f"input {one.name}: shape {shape} is not that of one sample; trace with a batch of 1")


def _compare(
    proto: onnx.ModelProto, prepared: onnx.ModelProto, made: onnx.ModelProto, samples: Samples, chosen: list[str]
) -> dict[str, float]:
    """The quantised graph against the float one; the prepared one must be equal to that.

    Args:
        proto: the float graph.
        prepared: the same, in the form that is quantised.
        made: the quantised graph.
        samples: inputs.
        chosen: tensors of expert numbers.
    """
    names = [one.name for one in proto.graph.output]
    expected = [np.stack(one) for one in zip(*run(proto, samples, names + chosen), strict=True)]
    same = [np.stack(one) for one in zip(*run(prepared, samples, names), strict=True)]
    for name, a, b in zip(names, same, expected, strict=False):
        if not np.abs(a - b).max() <= FLOAT_TOLERANCE * max(np.abs(b).max(), 1e-12):
            raise ExportError(f"output {name}: the prepared graph differs from the model's; report a bug")
    got = [np.stack(one) for one in zip(*run(made, samples, names + chosen), strict=True)]
    pairs = list(zip(got, expected, strict=True))
    errors = [_root(a - b) / max(_root(b - b.mean(0)), 1e-12) for a, b in pairs[: len(names)]]
    figures = {"relative_rms_error": max(errors)}
    decided = [(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in pairs[: len(names)] if b.shape[-1:] > (1,)]
    if decided:
        figures["decision_agreement"] = float(np.concatenate(decided).mean())
    if chosen:
        equal = [(np.sort(a, -1) == np.sort(b, -1)).ravel() for a, b in pairs[len(names) :]]
        figures["routing_agreement"] = float(np.concatenate(equal).mean())
    return figures


def _root(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
