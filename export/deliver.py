"""One way from a trained model to a file of any ONNX format: trace, lower or quantise, write, verify, note."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.exportable import Exportable
from export.lowering import lower
from export.notes import note
from export.onnx import routing, save, varying
from export.settings import OnnxSettings
from export.trace import trace
from export.verify import Verified, verify_exact, verify_quantized
from moecore.files import atomic_path

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
    notes = {**exportable.metadata, **routing(opaque), "format": form, "experts": experts}
    with atomic_path(path) as temporary:
        save(graph, temporary, notes)
        if form == "onnx" and experts not in _INEXACT:
            found = verify_exact(exportable, temporary, opaque, form)
        else:
            found = verify_quantized(exportable, temporary, opaque, form, settings)
    note(path, found.plain() | {"experts": experts})
    return found


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
