"""Arguments of the verbs that a forecaster needs beyond those of every app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from apps import verbs
from moecore.errors import require


@dataclass
class Predict:
    """Forecast what comes after the end of every series of a file."""

    input: str
    """Series: CSV (comma, semicolon or tab; also .gz, .bz2, .xz, .zip) or Parquet, long (unique_id, ds, y) or wide, or
    a folder of such files."""
    ckpt_path: str | None = None
    """What to load: a checkpoint, a run folder, or `last`. Not needed with model.timemoe.pretrained or
    model.moirai_moe.pretrained, nor for seasonal_naive, which learns nothing."""
    output: str = "forecasts.csv"
    """Where to write: .csv, .parquet or .json, with columns unique_id, ds, the model's name, and its intervals."""
    horizon: int | None = None
    """Points to forecast; null: as many as the model was trained for. Required without a checkpoint."""
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Quantile levels: 0.1 and 0.9 are the columns -lo-80 and -hi-80, 0.5 is -median."""
    future: str | None = None
    """File of the covariates after the end of the series (unique_id, ds and data.futr_columns), for models that look
    at them."""
    plots: str | None = None
    """Folder for a picture of every series with its forecast."""

    def __post_init__(self) -> None:
        good = self.output.endswith((".csv", ".parquet", ".json"))
        require(good, "output", self.output, "must end in .csv, .parquet or .json")
        require(self.horizon is None or self.horizon >= 1, "horizon", self.horizon, "must be at least 1")
        levels = self.quantiles
        require(all(0 < q < 1 for q in levels), "quantiles", levels, "must lie strictly between 0 and 1")
        require(len(set(levels)) == len(levels), "quantiles", levels, "must be different from each other")


@dataclass
class Evaluate:
    """Measure a trained model on the test windows, beside seasonal naive and DLinear."""

    ckpt_path: str | None = None
    """What to load: a checkpoint, a run folder, or `last`. Not needed with model.timemoe.pretrained or
    model.moirai_moe.pretrained, nor for seasonal_naive, which learns nothing."""
    json: str | None = None
    """Write the figures to this file as JSON."""


@dataclass
class Export(verbs.Export):
    """Write a trained model in a deployable form, compared with PyTorch.

    Of Time-MoE the ONNX forms are two files, the whole pass and the cached decoding step; for devices it is the step.
    Of Moirai-MoE it is the parameters of the distribution of each point.
    """


@dataclass
class Benchmark(verbs.Benchmark):
    """Measure latency and memory beside the dense twin of equal active multiply-adds."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    """Windows per call."""


ARGUMENTS: dict[str, type] = {"predict": Predict, "evaluate": Evaluate, "export": Export, "benchmark": Benchmark}
"""Verb -> its arguments."""
