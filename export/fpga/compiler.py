"""From ONNX graphs and calibration inputs to a program in fixed point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from export.fpga.calibrate import FloatGraph, observe
from export.fpga.fuse import fuse
from export.fpga.graph import Graph, merge, read
from export.fpga.lower import compile_graph
from export.fpga.program import FixedSettings, Program

if TYPE_CHECKING:
    import onnx

Feeds = Sequence[Mapping[str, np.ndarray]]
"""Inputs of single runs, by name."""


def read_graphs(protos: Mapping[str, onnx.ModelProto], calibration: Feeds) -> Graph:
    """The graph of a model, or of several tasks of one structure, with ranges observed on the same inputs.

    Args:
        protos: by task; one under any name for most models.
        calibration: inputs of single runs.

    Raises:
        ExportError: for inputs that do not fit, or tasks that differ in more than constants.
    """
    graphs = []
    for proto in protos.values():
        whole = FloatGraph(proto)
        graphs.append(fuse(read(whole, *observe(whole, calibration))))
    return merge(graphs, list(protos))


def compile_protos(
    protos: onnx.ModelProto | Mapping[str, onnx.ModelProto], calibration: Feeds, settings: FixedSettings
) -> Program:
    """A program from ONNX.

    Args:
        protos: a static graph (batch 1) with opaque `moecore::Experts` nodes; or one for each task.
        calibration: inputs of single runs.
        settings: widths and tiles.

    Raises:
        ExportError: for what has no fixed-point form, in one line.
    """
    tasks = protos if isinstance(protos, Mapping) else {"": protos}
    return compile_graph(read_graphs(tasks, calibration), settings, list(tasks))
