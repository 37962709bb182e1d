"""Kinds of layers: integer semantics in NumPy beside the C++ function of the same bits."""

from __future__ import annotations

from export.fpga.ops.base import Codes, Op
from export.fpga.ops.experts import Experts
from export.fpga.ops.moves import Concat, Copy, Gather, GatherElements, Resize, ScatterElements
from export.fpga.ops.pointwise import Binary, Divide, Select, Table, Unary
from export.fpga.ops.products import Affine, Conv2d, Linear, Matmul
from export.fpga.ops.rows import Cumulate, Norm, Reduce, Softmax, TopK

OPS: dict[str, type[Op]] = {
    "linear": Linear,
    "matmul": Matmul,
    "conv2d": Conv2d,
    "affine": Affine,
    "experts": Experts,
    "binary": Binary,
    "divide": Divide,
    "select": Select,
    "unary": Unary,
    "table": Table,
    "norm": Norm,
    "softmax": Softmax,
    "reduce": Reduce,
    "topk": TopK,
    "cumulate": Cumulate,
    "copy": Copy,
    "concat": Concat,
    "gather": Gather,
    "gather_elements": GatherElements,
    "scatter_elements": ScatterElements,
    "resize": Resize,
}
"""Layers by the name that manifests use."""

__all__ = ["OPS", "Codes", "Op"]
