"""Graphs run sample by sample in onnxruntime, those with `Quant` nodes in standard operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from export.qonnx.emit import DOMAIN, Range
from export.qonnx.prepare import PRODUCTS

if TYPE_CHECKING:
    import onnx

Samples = Mapping[str, np.ndarray]
"""By input, `[B, ...]` each."""
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8}
"""onnxruntime's names of inputs that are not float."""


def run(proto: onnx.ModelProto, samples: Samples, names: list[str] | None = None) -> Iterator[list[np.ndarray]]:
    """What a static graph of one sample gives for each of several.

    Args:
        proto: standard operators, and QONNX's `Quant`.
        samples: inputs.
        names: tensors of the graph; None: its outputs.

    Yields:
        A list of their values per sample.
    """
    import onnx
    import onnxruntime

    standard = expand(proto)
    known = {one.name for one in standard.graph.output}
    for name in names or ():
        if name not in known:
            standard.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(standard.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {one.name: (one.shape, _TYPES.get(one.type, np.float32)) for one in session.get_inputs()}
    for row in range(min(map(len, samples.values()))):
        feeds = {name: samples[name][row].reshape(shape).astype(kind) for name, (shape, kind) in given.items()}
        yield session.run(names, feeds)


def observe(proto: onnx.ModelProto, samples: Samples) -> dict[str, Range]:
    """Ranges of every tensor that a product reads and that is no constant.

    Args:
        proto: as `prepare` gives it.
        samples: calibration inputs.
    """
    constants = {one.name for one in proto.graph.initializer}
    read = {name for node in proto.graph.node if node.op_type in PRODUCTS for name in node.input[:2]}
    inputs = {one.name for one in proto.graph.input}
    found = {name: Range(float(samples[name].min()), float(samples[name].max())) for name in read & inputs}
    names = sorted(read - constants - inputs)
    if not names:
        return found
    least, largest = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for values in run(proto, samples, names):
        least = np.minimum(least, [one.min() for one in values])
        largest = np.maximum(largest, [one.max() for one in values])
    return found | {name: Range(float(a), float(b)) for name, a, b in zip(names, least, largest, strict=True)}


def expand(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with `Quant` nodes in standard operators: `scale * clip(round(x / scale + zero), low, high) - zero`."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    del made.graph.node[:], made.opset_import[:]
    made.opset_import.extend(one for one in proto.opset_import if one.domain != DOMAIN)
    for node in proto.graph.node:
        if node.domain != DOMAIN:
            made.graph.node.append(node)
            continue
        options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        x, scale, zero, bits = node.input
        low, high = limits(float(constants[bits]), bool(options["signed"]), bool(options["narrow"]))
        y = node.output[0]
        steps = {f"{y}/low": low, f"{y}/high": high}
        made.graph.initializer.extend(numpy_helper.from_array(np.float32(v), k) for k, v in steps.items())
        made.graph.node.extend(
            helper.make_node(kind, given, [out])
            for kind, given, out in (
                ("Div", [x, scale], f"{y}/1"),
                ("Add", [f"{y}/1", zero], f"{y}/2"),
                ("Round", [f"{y}/2"], f"{y}/3"),
                ("Clip", [f"{y}/3", *steps], f"{y}/4"),
                ("Sub", [f"{y}/4", zero], f"{y}/5"),
                ("Mul", [f"{y}/5", scale], y),
            )
        )
    used = {name for node in made.graph.node for name in node.input}
    kept = [one for one in made.graph.initializer if one.name in used]  # all but the bit widths
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made


def limits(bits: float, signed: bool, narrow: bool) -> tuple[float, float]:
    """Least and largest code of a width; a narrow range leaves out the one that has no opposite."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0.0, 2**bits - 1 - narrow
