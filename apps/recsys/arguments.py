"""Arguments of the verbs that a ranking model needs beyond those of every app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from apps import verbs
from moecore.errors import require


@dataclass
class Predict:
    """Score the rows of a log, or rank candidates for users."""

    ckpt_path: str
    """What to load: a checkpoint, a run folder, or `last`."""
    input: str
    """Rows to score: CSV (comma, semicolon or tab; also .gz, .bz2, .xz, .zip) or Parquet, a file or a folder. With
    `top`, every row is a candidate for its user."""
    output: str = "scores.csv"
    """Where to write: .csv, .parquet or .json."""
    top: int | None = None
    """Keep so many candidates per user, the best first, with their rank; null: a score for every row."""
    by: str | None = None
    """top: the task to rank by; null: the first one."""

    def __post_init__(self) -> None:
        good = self.output.endswith((".csv", ".parquet", ".json"))
        require(good, "output", self.output, "must end in .csv, .parquet or .json")
        require(self.top is None or self.top >= 1, "top", self.top, "must be at least 1, or null")


@dataclass
class Evaluate(verbs.Evaluate):
    """Measure a trained model on the test rows, beside popularity, logistic regression and gradient boosting."""

    boosting: bool = True
    """Fit scikit-learn's histogram gradient boosting on the training rows and show it beside the model."""


@dataclass
class Export(verbs.Export):
    """Write a trained model in a deployable form, compared with PyTorch on test rows.

    ONNX files take raw ids and numbers, unknown ids are unknown, not errors; for devices, rows of tables and encoded
    numbers, and a file beside says how to come by them."""

    calibration: int = 256
    """Training rows from which ranges of activations are taken, for all formats but onnx."""


@dataclass
class Benchmark(verbs.Benchmark):
    """Measure training throughput and the latency of ranking, beside the dense twin of equal active multiply-adds."""

    batch_sizes: list[int] = field(default_factory=lambda: [500, 1024])
    """Rows per call: 500 candidates of one user, a training batch."""
    peers: bool = False
    """Also measure torch-rechub's MMoE at the same sizes (pip install torch-rechub)."""


ARGUMENTS: dict[str, type] = {"predict": Predict, "evaluate": Evaluate, "export": Export, "benchmark": Benchmark}
"""Verb -> its arguments."""
