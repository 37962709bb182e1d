"""Nothing is called exported before it was compared with PyTorch on real inputs, and is within tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.compare import Comparison, compare, routing_agreement
from export.errors import ExportError
from export.exportable import Exportable, Outputs, Runner, Sample
from export.latency import latency
from export.measure import session_of
from export.onnx import file_bytes
from export.settings import OnnxSettings

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-4
"""Largest error of a float32 file, relative to the largest output."""


@dataclass(frozen=True)
class Verified:
    """An exported file, and what was measured of it."""

    path: Path
    format: str
    comparison: Comparison
    routing: dict[str, float] = field(default_factory=dict)
    """Share of tokens with the very experts of PyTorch, by layer."""
    measured: dict[str, float] = field(default_factory=dict)
    """Latency, size, memory."""

    def scalars(self) -> dict[str, float]:
        """Figures by flat name."""
        found = self.comparison.scalars()
        if self.routing:
            found["routing_agreement"] = float(np.mean(list(self.routing.values())))
        return found | self.measured

    def plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"format": self.format, **self.scalars(), "routing_agreement_by_layer": self.routing}


def in_onnxruntime(source: Path | onnx.ModelProto) -> Runner:
    """A file, or a graph, in onnxruntime on one thread."""
    session = session_of(source)
    names = [one.name for one in session.get_inputs()]

    def run(sample: Sample) -> Outputs:
        return session.run(None, {name: sample.feed[name] for name in names})

    return run


def verify(
    exportable: Exportable, path: Path, opaque: onnx.ModelProto, form: str, expected: Sequence[Outputs]
) -> Verified:
    """Measure a file.

    Args:
        exportable: the model.
        path: of the file.
        opaque: the traced graph that it was made from.
        form: of the file.
        expected: what PyTorch gives for the samples.
    """
    import onnx

    routing = routing_agreement(exportable, onnx.load(path))
    by_row = all(
        len(out) == len(one.tensors[0]) for one, said in zip(exportable.samples, expected, strict=True) for out in said
    )
    tied = routing.tied if by_row else None
    comparison = compare(exportable, in_onnxruntime(path), expected, tied)
    measured = {**latency(exportable, path, opaque), "file_bytes": float(file_bytes(path))}
    if tied is not None and routing.by_layer:
        measured["routing_tied_rows"] = float(sum(map(len, tied)))
    return Verified(path, form, comparison, dict(routing.by_layer), measured)


def refuse_inexact(comparison: Comparison) -> None:
    """Raise `ExportError` unless numbers and decisions are PyTorch's, up to rounding."""
    error, decisions = comparison.max_relative_error, comparison.decisions
    if not comparison.rows:
        raise ExportError("in every row a token stands between two experts that score the same; nothing to compare on")
    if not error <= TOLERANCE:
        raise ExportError(
            f"outputs differ from PyTorch by {error:.2g} of their range, more than {TOLERANCE}; no file was kept"
        )
    if decisions.share < 1:
        lost = decisions.count - decisions.ties - decisions.same
        raise ExportError(f"{lost} of {decisions.count} decisions differ from PyTorch's; no file was kept")


def refuse_changed(found: Verified, settings: OnnxSettings) -> None:
    """Raise `ExportError` if the task's figure or the routing moved further than the settings allow."""
    if found.comparison.score:
        name, before, after, change = found.comparison.score
        if not change <= settings.max_score_change:
            raise ExportError(
                f"{name} goes from {before:.4g} to {after:.4g}, further than onnx.max_score_change="
                f"{settings.max_score_change:g}; no file was kept"
            )
    worst = min(found.routing, key=found.routing.__getitem__, default=None)
    if worst is not None and found.routing[worst] < settings.min_routing_agreement:
        raise ExportError(
            f"{worst}: {found.routing[worst]:.1%} of tokens keep their experts, fewer than "
            f"onnx.min_routing_agreement={settings.min_routing_agreement:g}; no file was kept"
        )
