"""Products in eight bits, with ranges of activations from calibration or of the call at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.errors import ExportError
from export.quantize.products import prepare
from export.quantize.ranges import observe

if TYPE_CHECKING:
    import onnx

_STATIC = ("MatMul", "Gemm", "Conv")
"""Operators with integer kernels for ranges known in advance."""


def static_int8(proto: onnx.ModelProto, calibration: Sequence[dict[str, np.ndarray]]) -> onnx.ModelProto:
    """QuantizeLinear and DequantizeLinear before every product, with ranges from calibration (arXiv 2004.09602).

    Activations are unsigned and asymmetric, a scale per tensor; weights signed and symmetric, a scale per output
    channel and expert. What products by matrices give stays float32: rounding it as well costs accuracy and time.
    What convolutions give is rounded, for there are no kernels that leave it.

    Raises:
        ExportError: without calibration data.
    """
    if not calibration:
        raise ExportError("calibration=(): int8 takes its ranges from real inputs; give some, or use int8-dynamic")
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    prepared, products = prepare(proto, _STATIC)
    if not products:
        return prepared
    ranges = {
        name: TensorData(lowest=np.float32(seen.least), highest=np.float32(seen.largest))
        for name, seen in observe(prepared, products, calibration).items()
    }
    quantizer = QDQQuantizer(
        prepared,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[one.node for one in products],
        nodes_to_exclude=[],
        op_types_to_quantize=list(_STATIC),
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )
    quantizer.quantize_model()
    return quantizer.model.model


def dynamic_int8(proto: onnx.ModelProto, calibration: Sequence[dict[str, np.ndarray]] = ()) -> onnx.ModelProto:
    """Integer products of activations whose range is taken anew at every call; needs no calibration data.

    The range is that of the whole batch, and of an expert that of the tokens it got: results depend, in the last
    bits, on what else is in the batch.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared, products = prepare(proto)
    if not products:
        return prepared
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # or it warns
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(
            prepared,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[one.node for one in products],
        )
        return onnx.load(path)
