"""Quantised graphs with static shapes that dataflow tools read (FINN, hls4ml): QONNX's dialect, or QDQ.

Weights are quantised per output channel, what products read per tensor from calibration, symmetrically; routers and
gates keep more bits.
"""

from __future__ import annotations

from export.qonnx.emit import Settings
from export.qonnx.write import write_qonnx

__all__ = ["Settings", "write_qonnx"]
