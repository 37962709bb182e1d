"""One way from a trained model to a file of any ONNX format: trace, lower or quantise, write, verify, note."""

from __future__ import annotations

import math
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from export.compare import joined
from export.exportable import Exportable, in_torch
from export.lowering import lower
from export.notes import note
from export.onnx import place, routing, save, varying
from export.settings import OnnxSettings
from export.trace import trace
from export.verify import Verified, refuse_changed, refuse_inexact, verify
from moecore import __version__

if TYPE_CHECKING:
    import onnx

_INEXACT = ("qmoe", "qmoe4")


def deliver(exportable: Exportable, form: str, path: Path, settings: OnnxSettings | None = None) -> Verified:
    """Write an ONNX file and measure it.

    Args:
        exportable: the model.
        form: "onnx", or "onnx-" and a kind of `export.quantize`.
        path: of the file; one that was there stays as it is unless all goes well.
        settings: of the file.

    Raises:
        ExportError: if the model has no such form, or the file is out of tolerance.
    """
    settings = settings or OnnxSettings()
    opaque = traced(exportable)
    graph, experts = _graph(exportable, opaque, form, settings)
    graph = exportable.finish(graph) if exportable.finish else graph
    expected = [in_torch(exportable.module)(sample) for sample in exportable.samples]
    notes = {**exportable.metadata, **routing(opaque), "format": form, "experts": experts, **_origin()}
    if exportable.score is not None:
        notes["metrics"] = {exportable.score.name: exportable.score.of(joined(expected))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = save(graph, Path(folder) / path.name, notes)
        exact = form == "onnx" and experts not in _INEXACT
        found = verify(exportable, made, opaque, form, expected)
        refuse_inexact(found.comparison) if exact else refuse_changed(found, settings)
        if exportable.further is not None:
            found.measured.update(exportable.further(made, exact))
        place(made, path)
    if form != "onnx":
        found.measured["quantised_share"] = 1 - float_weights(graph) / max(float_weights(opaque), 1)
    note(path, found.plain() | {"experts": experts})
    return found


def float_weights(proto: onnx.ModelProto) -> int:
    """Number of weights in matrices and tables that are held in float32."""
    kept = [one for one in proto.graph.initializer if one.data_type == one.FLOAT and len(one.dims) > 1]
    return sum(math.prod(one.dims) for one in kept)


def _origin() -> dict[str, str]:
    """The version that wrote a file, and its commit where that is known."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"moecore_version": __version__}
    return {"moecore_version": __version__, "moecore_commit": done.stdout.strip()}


def traced(exportable: Exportable, static: bool = False) -> onnx.ModelProto:
    """The graph of the model, its mixtures opaque.

    Args:
        exportable: the model.
        static: whether all shapes are those of one call of one row.
    """
    if static:
        single = exportable.single().tensors
        return trace(exportable.module, single, exportable.inputs, exportable.outputs)
    shapes = exportable.dynamic_shapes or varying(exportable.example)
    return trace(exportable.module, exportable.example, exportable.inputs, exportable.outputs, shapes)


def _graph(
    exportable: Exportable, opaque: onnx.ModelProto, form: str, settings: OnnxSettings
) -> tuple[onnx.ModelProto, str]:
    """The graph in the form asked for, and the form of its mixtures."""
    if form == "onnx":
        experts = settings.experts
        if experts == "auto":
            from export.auto import fastest

            experts = fastest(opaque, [each.numpy() for each in exportable.single().tensors])
        return lower(opaque, experts), experts
    from export.quantize import quantize

    feeds = [
        {name: each.numpy() for name, each in zip(exportable.inputs, sample.tensors, strict=True)}
        for sample in exportable.calibration
    ]
    return quantize(opaque, form.removeprefix("onnx-"), feeds), "sparse"
