"""One way from a trained model to what devices without a runtime take: QONNX graphs, hls4ml projects, FPGA bundles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from export.compare import Comparison, compare
from export.decisions import largest
from export.errors import ExportError
from export.exportable import Exportable, Outputs, Sample
from export.notes import note, require_replaceable
from export.settings import FpgaSettings
from export.trace import trace
from moecore.files import atomic_folder, write_atomic

if TYPE_CHECKING:
    import onnx

    from export.fpga.program import Program


LARGEST = largest().__qualname__


def deliver(exportable: Exportable, form: str, path: Path, settings: FpgaSettings | None = None) -> dict[str, float]:
    """Write a model for a device, and measure it.

    Args:
        exportable: the model.
        form: "qonnx", "hls4ml" or "fpga".
        path: of the file or folder; what was there stays as it is unless all goes well.
        settings: of fixed point.

    Returns:
        Figures by flat name.

    Raises:
        ExportError: if the model has no such form, or is out of tolerance.
    """
    figures = DEVICES[form](exportable, path, settings or FpgaSettings())
    note(path, {"format": form, **figures})
    return figures


def single_runs(exportable: Exportable, samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Samples as calls of the shapes of one, `Exportable.single`: cut into rows where they hold several."""
    shapes = [tuple(t.shape) for t in exportable.single().tensors]
    runs: list[Sample] = []
    for sample in samples:
        if [tuple(t.shape) for t in sample.tensors] == shapes:
            runs.append(sample)
        else:
            rows = min(len(t) for t in sample.tensors)
            parts = [[t[row : row + 1] for t in sample.tensors] for row in range(rows)]
            runs += [Sample(tuple(part), {}) for part in parts]
        if len(runs) >= limit:
            break
    return runs[:limit]


def feeds(exportable: Exportable, runs: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    """What the traced graph takes."""
    return [{name: t.numpy() for name, t in zip(exportable.inputs, run.tensors, strict=True)} for run in runs]


def static_graph(exportable: Exportable, module: torch.nn.Module | None = None) -> onnx.ModelProto:
    """The graph of one call of one row, mixtures opaque, all shapes fixed."""
    single = exportable.single().tensors
    return trace(module or exportable.module, single, exportable.inputs, exportable.outputs)


def _stacked(exportable: Exportable, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Samples by input, `[B, ...]`."""
    return {
        name: np.concatenate([sample.tensors[i].numpy() for sample in samples])
        for i, name in enumerate(exportable.inputs)
    }


def _qonnx(exportable: Exportable, path: Path, settings: FpgaSettings) -> dict[str, float]:
    from export.qonnx import write_qonnx

    graph, samples = static_graph(exportable), _stacked(exportable, exportable.calibration)
    figures = write_qonnx(graph, samples, path, metadata=exportable.metadata)
    if exportable.decide.__qualname__ != LARGEST:  # its decisions are of the largest value along the last axis
        figures.pop("decision_agreement", None)
    return figures


def _hls4ml(exportable: Exportable, path: Path, settings: FpgaSettings) -> dict[str, float]:
    from export.hls4ml import Settings, write_hls4ml

    graph, samples = static_graph(exportable), _stacked(exportable, exportable.calibration)
    return write_hls4ml(graph, samples, path, Settings(), exportable.metadata)


def _fpga(exportable: Exportable, path: Path, settings: FpgaSettings) -> dict[str, float]:
    """Compiled, run by g++, compared with PyTorch in the simulator that gives the same bits, and priced."""
    from export.fpga import export_fpga, load, run_bundle

    modules = exportable.tasks or {"": exportable.module}
    graphs = {name: static_graph(exportable, module) for name, module in modules.items()}
    calibration = feeds(exportable, single_runs(exportable, exportable.calibration, settings.calibrated))
    graph = graphs if exportable.tasks else graphs[""]
    require_replaceable(path)
    with atomic_folder(path) as folder:
        figures = export_fpga(graph, calibration, folder, settings.fixed(), exportable.metadata)
        (folder / "testbench.log").write_text(run_bundle(folder))
        program = load(folder)
        found: dict[str, float] = {}
        for task, (name, module) in enumerate(modules.items()):
            comparison, overflows = _simulated(dataclasses.replace(exportable, module=module), program, task, settings)
            _refuse_changed(comparison, overflows, settings)
            prefix = f"{name}/" if name else ""
            found |= {f"{prefix}{key}": value for key, value in comparison.scalars().items()}
            found[f"{prefix}overflows"] = float(sum(overflows.values()))
            found |= {f"{prefix}overflows/{tensor}": float(count) for tensor, count in overflows.items() if count}
        found |= _priced(folder, path.name, settings)
        _widths(exportable, graphs, calibration, folder, settings)
    return figures | found


def _simulated(
    exportable: Exportable, program: Program, task: int, settings: FpgaSettings
) -> tuple[Comparison, dict[str, int]]:
    """Fixed point beside PyTorch on test inputs, and what did not fit, by tensor."""
    from export.fpga.simulate import simulate

    overflows: dict[str, int] = {}

    def run(sample: Sample) -> Outputs:
        (given,) = feeds(exportable, [sample])
        made = simulate(program, given, task)
        for name, count in made.overflows.items():
            overflows[name] = overflows.get(name, 0) + count
        return [made.outputs[name] for name in exportable.outputs]

    runs = single_runs(exportable, exportable.samples, settings.compared)
    return compare(dataclasses.replace(exportable, samples=runs), run), overflows


def _refuse_changed(comparison: Comparison, overflows: Mapping[str, int], settings: FpgaSettings) -> None:
    if comparison.score is None:
        return
    name, before, after, change = comparison.score
    if change <= settings.max_score_change:
        return
    lost = [tensor for tensor, count in overflows.items() if count]
    remedy = "give more bits (fpga.weight_width, fpga.activation_width)"
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        remedy = f"results of {', '.join(lost[:3])}{more} did not fit: give more fpga.margin or fpga.calibrated inputs"
    raise ExportError(
        f"{name} goes from {before:.4g} to {after:.4g} in fixed point, further than fpga.max_score_change="
        f"{settings.max_score_change:g}; {remedy}; nothing was kept"
    )


def _priced(folder: Path, name: str, settings: FpgaSettings) -> dict[str, float]:
    """Resources and latency on a device, by the model of both: `estimate.json` in the bundle."""
    from export.fpga.explore import explore, for_bundle
    from export.fpga.resources import load_device
    from export.fpga.workload import from_manifest, read_manifest

    manifest, device = read_manifest(folder / "manifest.json"), load_device(settings.device)
    explored = explore(from_manifest(manifest, name), device, for_bundle(manifest, device)).as_dict()
    write_atomic(folder / "estimate.json", json.dumps(explored, indent=1) + "\n")
    return {f"{settings.device}_estimated_ms": float(explored["latency_ms"])}


def _widths(
    exportable: Exportable,
    graphs: dict[str, onnx.ModelProto],
    calibration: list[dict[str, np.ndarray]],
    folder: Path,
    settings: FpgaSettings,
) -> None:
    """Accuracy by width as a table and a picture, where asked for."""
    if not settings.sweep:
        return
    from export.fpga import precision

    inputs = feeds(exportable, single_runs(exportable, exportable.samples, settings.sweep))
    graph = next(iter(graphs.values()))
    varied = ("both", "weights", "activations")
    sweeps = {one: precision.sweep(graph, calibration, inputs, varied=one) for one in varied}
    tables = (f"Varied: {name}\n\n{precision.as_table(rows)}\n" for name, rows in sweeps.items())
    (folder / "precision.md").write_text("\n".join(tables))
    precision.plot(sweeps, folder / "precision.png")


Write = Callable[[Exportable, Path, FpgaSettings], dict[str, Any]]
DEVICES: dict[str, Write] = {"qonnx": _qonnx, "hls4ml": _hls4ml, "fpga": _fpga}
"""Forms by name."""
