"""Weights in fewer bits, arithmetic in floats: blocks of four-bit weights, and half precision."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from export.quantize.products import by_expert, prepare, routes

if TYPE_CHECKING:
    import onnx

BLOCK = 32
"""Weights of one column that share a scale at four bits."""
_FLOAT32 = ("Pow", "ReduceMean", "ReduceSumSquare", "ReduceL2")
"""Operators besides the library's own list that stay float32 in half precision: squares leave its range at 256."""


def int4(proto: onnx.ModelProto, calibration: Sequence[dict[str, np.ndarray]] = ()) -> onnx.ModelProto:
    """Weights of products in four bits, symmetric, a scale per block of 32 (onnxruntime's `MatMulNBits`).

    Products unfold them and run in float32. Other weights take eight bits.
    """
    with _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    prepared, products = prepare(proto)
    if not products:
        return prepared
    chosen = {one.node for one in products}
    others = [node.name for node in prepared.graph.node if node.op_type == "MatMul" and node.name not in chosen]
    quantizer = MatMulNBitsQuantizer(prepared, block_size=BLOCK, is_symmetric=True, nodes_to_exclude=others)
    quantizer.process()
    return quantizer.model.model


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """The root logger as it was: importing that module sets it up to print everything."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def fp16(proto: onnx.ModelProto, calibration: Sequence[dict[str, np.ndarray]] = ()) -> onnx.ModelProto:
    """Weights and activations in half precision, inputs and outputs in single, routers and gates in single.

    For hardware that computes in half precision. onnxruntime on the CPU converts back and forth, and is no faster.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    lowered = onnx.shape_inference.infer_shapes(by_expert(proto))
    factors = {name for node in lowered.graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input}
    single = {
        node.name
        for node in lowered.graph.node
        if routes(node)
        or node.op_type in _FLOAT32
        # onnxruntime 1.24 and later crash while loading a product of a transposed half (onnxruntime #28392)
        or (node.op_type == "Transpose" and node.output[0] in factors)
    }
    _forget_between(lowered.graph, single)
    return convert_float_to_float16(
        lowered,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_FLOAT32],
        node_block_list=sorted(single),
    )


def _forget_between(graph: onnx.GraphProto, single: set[str]) -> None:
    """Drop the noted types of tensors that pass from one node in single precision to others such.

    The converter rounds every tensor whose type is noted, so it would round the logits between a router's nodes.
    """
    made = {name for node in graph.node if node.name in single for name in node.output}
    read = {name for node in graph.node if node.name not in single for name in node.input}
    kept = [one for one in graph.value_info if one.name not in made or one.name in read]
    del graph.value_info[:]
    graph.value_info.extend(kept)
