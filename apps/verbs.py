"""The verbs that every app answers, and the arguments each takes beside the app's settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from export.settings import FpgaSettings, OnnxSettings
from moecore.errors import require

ExportFormat = Literal["onnx", "onnx-int8", "onnx-int8-dynamic", "onnx-int4", "onnx-fp16", "qonnx", "hls4ml", "fpga"]
"""Forms that every app's models can be asked for."""


@dataclass
class Train:
    """Train a model; ends with test figures and a report."""

    ckpt_path: str | None = None
    """Resume: a checkpoint, a run folder, or `last` for the newest run of this configuration."""
    json: str | None = None
    """Write the figures to this file as JSON."""


@dataclass
class Evaluate:
    """Measure a trained model on the test data."""

    ckpt_path: str
    """What to load: a checkpoint, a run folder, or `last`."""
    json: str | None = None
    """Write the figures to this file as JSON."""


@dataclass
class Predict:
    """Apply a trained model to new inputs."""

    ckpt_path: str
    """What to load: a checkpoint, a run folder, or `last`."""
    input: str
    """A file, or a folder of files."""
    output: str = "predictions.csv"
    """Where to write: .csv or .json."""

    def __post_init__(self) -> None:
        require(self.output.endswith((".csv", ".json")), "output", self.output, "must end in .csv or .json")


@dataclass
class Search:
    """Search hyperparameters with Optuna; can be stopped, resumed and shared by several workers."""

    space: str = ""
    """YAML file of the search space; default: configs/<app>/space.yaml."""
    num_trials: int = 20
    """Trials of the whole study, those of earlier or parallel workers counted in."""
    workers: int = 1
    """Processes on this machine that share the study."""
    storage: str | None = None
    """Database URL (sqlite:///study.db, postgresql://...) or a journal file (study.log) on a shared disk; default: a
    journal file in the search's folder."""
    study: str = "search"
    """Name of the study: the same name and storage continue it."""
    json: str | None = None
    """Write the best trial to this file as JSON."""

    def __post_init__(self) -> None:
        require(self.num_trials >= 1, "num_trials", self.num_trials, "must be at least 1")
        require(self.workers >= 1, "workers", self.workers, "must be at least 1")


@dataclass
class Export:
    """Write a trained model in a deployable form, compared with PyTorch on real inputs."""

    ckpt_path: str
    """What to load: a checkpoint, a run folder, or `last`."""
    format: ExportFormat = "onnx"
    """onnx: one file that computes the chosen experts only. onnx-int8: weights and activations in 8 bits, routers in
    float (-dynamic: ranges of activations found at each call); onnx-int4: weights in 4 bits; onnx-fp16: half precision.
    qonnx: quantised, static shapes, for FINN and hls4ml; hls4ml: its project. fpga: a folder of fixed-point weights and
    synthesizable C++ that g++ builds and runs."""
    output: str | None = None
    """File or folder to write; default: named after the format, in the run folder."""
    onnx: OnnxSettings = field(default_factory=OnnxSettings)
    fpga: FpgaSettings = field(default_factory=FpgaSettings)
    calibration: int = 256
    """Training inputs from which ranges of activations are taken, for all formats but onnx."""
    json: str | None = None
    """Write the comparison to this file as JSON."""

    def __post_init__(self) -> None:
        require(self.calibration >= 1, "calibration", self.calibration, "must be at least 1")


@dataclass
class Report:
    """Write one HTML page: curves, errors, routing, experts."""

    ckpt_path: str
    """What to load: a checkpoint, a run folder, or `last`."""
    output: str | None = None
    """File to write; default: report.html in the run folder."""


@dataclass
class Benchmark:
    """Measure latency, throughput and memory beside a dense model of equal active multiply-adds."""

    ckpt_path: str | None = None
    """A trained model; default: the configuration's model with fresh weights."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    """Batch sizes to measure."""
    rounds: int = 15
    """Interleaved rounds; medians are reported."""
    json: str | None = None
    """Write the figures to this file as JSON."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")
        bad = not self.batch_sizes or min(self.batch_sizes) < 1
        require(not bad, "batch_sizes", self.batch_sizes, "must be positive numbers")


VERBS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "search": Search,
    "export": Export,
    "report": Report,
    "benchmark": Benchmark,
}
"""The verbs, in the order of a model's life."""
