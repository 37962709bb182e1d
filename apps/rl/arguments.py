"""Arguments of the verbs that an agent needs beyond those of every app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from apps import verbs
from moecore.errors import require


@dataclass
class Train(verbs.Train):
    """Train an agent; ends with evaluation episodes, a video and a report."""

    seeds: list[int] = field(default_factory=list)
    """Train once with each of these seeds, one after the other, and sum up; empty: once, with `run.seed`."""

    def __post_init__(self) -> None:
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "give different ones")
        good = not self.seeds or self.ckpt_path is None
        require(good, "seeds", self.seeds, "a resumed run has one seed; leave out seeds or ckpt_path")


@dataclass
class Evaluate(verbs.Evaluate):
    """Run evaluation episodes of a trained agent, beside random actions."""

    episodes: int | None = None
    """Episodes; null: 10. With method=t2mir, in a row in each held-out task; null: t2mir.eval_episodes."""
    video: str | None = None
    """Write the first episodes to this file: .gif or .mp4."""
    conflict: bool = False
    """Also measure whether the tasks of an environment ask the actor for the same: cosines of their gradients."""

    def __post_init__(self) -> None:
        require(self.episodes is None or self.episodes >= 1, "episodes", self.episodes, "must be at least 1")
        good = self.video is None or self.video.endswith((".gif", ".mp4"))
        require(good, "video", self.video, "must end in .gif or .mp4")


@dataclass
class Predict:
    """Run episodes and write every step: action, reward, experts that fired."""

    ckpt_path: str
    """What to load: a checkpoint, a run folder, or `last`."""
    output: str = "episodes.csv"
    """Where to write: .csv, .parquet or .json."""
    episodes: int | None = None
    """Episodes; null: 1. With method=t2mir, in a row in each held-out task; null: t2mir.eval_episodes."""
    video: str | None = None
    """Also write a video: .gif or .mp4."""

    def __post_init__(self) -> None:
        require(self.episodes is None or self.episodes >= 1, "episodes", self.episodes, "must be at least 1")
        good = self.output.endswith((".csv", ".parquet", ".json"))
        require(good, "output", self.output, "must end in .csv, .parquet or .json")
        good = self.video is None or self.video.endswith((".gif", ".mp4"))
        require(good, "video", self.video, "must end in .gif or .mp4")


@dataclass
class Report(verbs.Report):
    """Write one HTML page: returns, videos, experts, exploration, conflicts between tasks."""

    curves: str | None = None
    """Also write the evaluations of all runs in the same environment and folder, as .csv."""

    def __post_init__(self) -> None:
        good = self.curves is None or self.curves.endswith(".csv")
        require(good, "curves", self.curves, "must end in .csv")


@dataclass
class Export(verbs.Export):
    """Write the deterministic policy in a deployable form, compared with PyTorch along whole episodes."""

    calibration: int = 256
    """Observations from which ranges of activations are taken, for all formats but onnx; with method=t2mir
    histories."""


@dataclass
class Benchmark(verbs.Benchmark):
    """Measure environment steps and updates per second, where their time goes, and the MoE beside all experts."""

    rounds: int = 10
    """Interleaved rounds; medians are reported."""


ARGUMENTS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "report": Report,
    "export": Export,
    "benchmark": Benchmark,
}
"""Verb -> its arguments."""
