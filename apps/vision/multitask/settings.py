"""Settings of M³ViT beside those of ViMoE: decoder, tasks, scenes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moecore.errors import require

TaskName = Literal["semseg", "parts", "saliency", "depth", "normals", "edges", "classification"]


@dataclass
class M3ViTConfig:
    """What M³ViT has beside its backbone; which blocks are MoE and how they are gated is in `model.moe`."""

    decoder: Literal["light", "upsample", "task_expert"] = "light"
    """What turns tokens into maps: light (linear maps and one convolution), upsample (published: four convolutions with
    upsampling between, 60% of the cost), task_expert (TaskExpert: experts decompose the features of several blocks,
    gates of the tasks assemble them, a memory passes from block to block)."""
    decoder_width: int | None = None
    """Channels within the decoder; null: 64 for light and task_expert, 256 for upsample."""
    decoder_experts: int = 5
    """Experts of task_expert."""
    decoder_layers: int = 3
    """Blocks that task_expert reads, spread evenly up to the last."""
    share_prefix: bool = True
    """Compute once for all tasks what does not depend on the task: all up to the first MoE layer. false: the backbone
    anew for each task, as published. Results are the same."""

    def __post_init__(self) -> None:
        width = self.decoder_width
        require(width is None or width >= 8, "decoder_width", width, "must be at least 8, or null")
        require(self.decoder_experts >= 1, "decoder_experts", self.decoder_experts, "must be at least 1")
        require(self.decoder_layers >= 1, "decoder_layers", self.decoder_layers, "must be at least 1")


@dataclass
class TasksConfig:
    """Which tasks are trained, and how their losses make one."""

    names: tuple[TaskName, ...] = ()
    """Tasks, in the order of their gates; none given: all that the data set has labels for."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each task's loss, {task: weight}; {}: as published (semseg 1, parts 2, saliency 5, depth 1, normals 10,
    edges 50, classification 1)."""
    weighting: Literal["fixed", "uncertainty", "dwa", "gradnorm"] = "fixed"
    """How weights move in training: not at all, by learned uncertainty (arXiv 1705.07115), by how fast losses fall
    (DWA, arXiv 1803.10704), or so that all tasks train at like pace (GradNorm, arXiv 1711.02257)."""
    dwa_temperature: float = 2.0
    """Of dwa: higher is closer to equal weights."""
    gradnorm_alpha: float = 1.5
    """Of gradnorm: how strongly slower tasks are favoured."""
    specialise: float = 0.0
    """Coefficient of Mod-Squad's loss (arXiv 2212.08066): minus the mutual information of task and expert, which gives
    each task few experts of its own, so that models of one task are small. Works against balance losses per task: set
    model.moe.aux_loss to {}."""
    baselines: str | None = None
    """JSON file of figures of single-task runs (test.json of several runs merged: `semseg/miou`, ...), or a folder of
    such runs, against which delta_m is taken."""

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        require(not twice, "names", ",".join(self.names), f"has {', '.join(twice)} twice")
        for name, weight in self.weights.items():
            require(weight > 0, f"weights.{name}", weight, "must be positive; to leave a task out, see names")
        require(self.specialise >= 0, "specialise", self.specialise, "must not be negative")
        require(self.dwa_temperature > 0, "dwa_temperature", self.dwa_temperature, "must be positive")
        require(self.gradnorm_alpha >= 0, "gradnorm_alpha", self.gradnorm_alpha, "must not be negative")


@dataclass
class ScenesConfig:
    """The generated scenes of `data.dataset=scenes`."""

    num_train: int = 2000
    """Training images."""
    num_val: int = 200
    """Validation images."""
    num_test: int = 400
    """Test images."""
    seed: int = 0
    """Of the scenes; independent of the run's seed, so that all runs see the same images."""
    labels_per_image: Literal["all", "one", "half"] = "all"
    """Tasks that each training image carries labels for: all, one in turn, or about half of them."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "num_test"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
