"""Arguments of the verbs that vision needs beyond those of every app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apps import verbs
from apps.verbs import ExportFormat
from moecore.errors import require


@dataclass
class Evaluate(verbs.Evaluate):
    """Measure a trained model on the test data."""

    conflict: bool = False
    """m3vit: also measure how far the tasks' gradients point in different directions, per block and expert; kept in
    the run folder for the report."""
    conflict_batches: int = 8
    """Training batches for `conflict`."""

    def __post_init__(self) -> None:
        require(self.conflict_batches >= 1, "conflict_batches", self.conflict_batches, "must be at least 1")


@dataclass
class Predict:
    """Apply a trained model to new images."""

    ckpt_path: str
    """What to load: a checkpoint, a run folder, or `last`."""
    input: str
    """An image, or a folder of images."""
    output: str | None = None
    """vimoe: file of classes, .csv or .json; default predictions.csv. m3vit: folder of maps; default predictions/."""


@dataclass
class Export(verbs.Export):
    """Write a trained model in a deployable form, compared with PyTorch."""

    format: ExportFormat | Literal["task", "edge-moe"] = "onnx"
    """As for every app: onnx: one file that computes the chosen experts only; onnx-int8, onnx-int8-dynamic, onnx-int4,
    onnx-fp16: of lower precision; qonnx, hls4ml: for FINN and hls4ml; fpga: a folder of fixed-point weights and
    synthesizable C++. Of m3vit also task: the model for one task, a checkpoint with only the experts that its gates
    choose, for evaluate, predict, report and export; edge-moe: the files that the published accelerator reads."""
    output: str | None = None
    """File or folder to write; default: named after format and task, in the run folder."""
    task: str | None = None
    """m3vit: the task of format=task; with onnx the only output, of the model for that task."""
    margin: float = 0.0
    """Also keep experts whose probability came so close to that of a chosen one on some calibration token."""
    min_share: float = 0.0
    """Leave out experts with a smaller share of the weights that the task's gates give than this."""
    rescale: bool = False
    """edge-moe: where a weight exceeds the accelerator's range, move powers of two into neighbouring layers, which
    changes no output."""
    calibration: int = 512
    """Training images on which is seen which experts the gates choose, and how large activations get."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.format != "task" or self.task is not None, "task", self.task, "say which task format=task is for")
        require(self.margin >= 0, "margin", self.margin, "is a difference of probabilities: 0 or more")
        require(0 <= self.min_share < 1, "min_share", self.min_share, "is a share of the weights, in [0, 1)")


@dataclass
class Report(verbs.Report):
    """Write one HTML page: curves, errors, routing, experts."""

    beside: str | None = None
    """m3vit: folder of a run to compare gradient conflict with, a dense one as a rule; `evaluate --conflict` first."""


ARGUMENTS = {"evaluate": Evaluate, "predict": Predict, "export": Export, "report": Report}
"""Verb -> its arguments, where they differ from those of every app."""
