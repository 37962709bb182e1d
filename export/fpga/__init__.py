"""Fixed-point accelerators from ONNX: synthesizable C++ with golden values, and a simulator of the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.fpga.bundle import run_bundle, write_bundle
from export.fpga.compiler import compile_protos
from export.fpga.manifest import load
from export.fpga.program import FixedSettings
from export.fpga.simulate import simulate

if TYPE_CHECKING:
    import onnx

__all__ = ["FixedSettings", "compile_protos", "export_fpga", "load", "run_bundle", "simulate_bundle", "write_bundle"]

GOLDEN = 1
"""Calibration inputs whose every intermediate value is written."""


def export_fpga(
    protos: onnx.ModelProto | Mapping[str, onnx.ModelProto],
    calibration: Sequence[Mapping[str, np.ndarray]],
    folder: Path,
    settings: FixedSettings | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Compile a model to fixed point and write a bundle: C++, weights, golden values, testbench, manifest.

    Args:
        protos: a graph with static shapes (batch 1) and opaque `moecore::Experts` nodes, as `export.trace.trace` gives
            without `dynamic_shapes`; or one for each task, all of the same structure.
        calibration: inputs of single runs, by name; ranges of activations come from these.
        folder: to make; whole or not at all.
        settings: widths and tiles.
        metadata: plain data kept in the manifest.

    Returns:
        Figures, see `write_bundle`.

    Raises:
        ExportError: for what has no fixed-point form, one line with the operation and the nearest form that has.
    """
    program = compile_protos(protos, calibration, settings or FixedSettings())
    return write_bundle(program, calibration[:GOLDEN], Path(folder), metadata)


def simulate_bundle(
    folder: Path, inputs: Sequence[Mapping[str, np.ndarray]], task: int = 0
) -> tuple[list[dict[str, np.ndarray]], dict[str, int]]:
    """Run a bundle's files alone in the simulator, bit for bit as its C++ does.

    Args:
        folder: of the bundle.
        inputs: of single runs, by name.
        task: number of the task whose gates apply.

    Returns:
        Outputs of each run (float64, by name), and how many results did not fit, by tensor.

    Raises:
        ExportError: if a file is missing or changed, or an input does not fit.
    """
    program = load(Path(folder))
    overflows: dict[str, int] = {}
    outputs = []
    for one in inputs:
        found = simulate(program, one, task)
        outputs.append(found.outputs)
        for name, count in found.overflows.items():
            overflows[name] = overflows.get(name, 0) + count
    return outputs, overflows
