"""Settings of what is minimised, and how. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apps.settings import OptimConfig
from moecore.errors import require


@dataclass
class RankOptimConfig(OptimConfig):
    """AdamW with warm-up and a cosine; large embedding tables row by row."""

    weight_decay: float = 0.0
    """On matrices only: not on biases, norms and embeddings."""
    warmup: float = 0.05
    """Share of all steps spent warming up (below 1), or a number of steps."""
    ema_decay: float | None = None
    """Average the weights with this decay; the average is what is evaluated and saved. null: off."""
    tables: Literal["auto", "dense", "adagrad", "adam"] = "auto"
    """How embedding tables learn. dense: by AdamW as all else, every row at every step; adagrad: row-wise Adagrad: it
    keeps one number per row; worth trying where ids are many, for rare ones learn in larger steps; adam: touched rows
    only, with twice the table as state; auto: dense up to dense_rows, then adagrad."""
    dense_rows: int = 200_000
    """tables=auto, adagrad: beyond so many rows of all tables together, gradients are of the touched rows only; up to
    there, passing over all rows is quicker."""
    table_lr: float | None = None
    """Peak learning rate of tables; null: lr, or 0.05 with adagrad."""
    table_decay: float = 0.0
    """Weight decay of tables that AdamW trains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dense_rows >= 0, "dense_rows", self.dense_rows, "must not be negative")
        require(self.table_lr is None or self.table_lr > 0, "table_lr", self.table_lr, "must be positive, or null")
        require(self.table_decay >= 0, "table_decay", self.table_decay, "must not be negative")


@dataclass
class LossConfig:
    """Binary cross-entropy per task, and how tasks are weighed."""

    chain: bool = True
    """Tasks with `given` are trained over all rows through their condition, p(buy) = p(click) p(buy | click), as ESMM
    does (arXiv 1804.07931); false: over the rows where the condition holds."""
    positive_weight: Literal["none", "balanced"] = "none"
    """balanced: positives weigh as much as negatives, for tasks with few of them; scores are then no probabilities any
    more. AUC rarely gains."""
    focal_gamma: float = 0.0
    """Focal loss (arXiv 1708.02002): well-classified rows count less; 0: plain cross-entropy."""
    balancing: Literal["static", "uncertainty", "dwa", "gradnorm", "pcgrad"] = "static"
    """static: the labels' weights; uncertainty: learned (arXiv 1705.07115); dwa: by how fast losses fall from epoch to
    epoch (arXiv 1803.10704); gradnorm: by gradient norms (arXiv 1711.02257); pcgrad: gradients that disagree are
    projected off each other (arXiv 2001.06782), a backward pass per task."""
    temperature: float = 2.0
    """dwa: large, and weights are all alike."""
    alpha: float = 1.5
    """gradnorm: how strongly tasks that learn slowly are pulled along."""

    def __post_init__(self) -> None:
        require(self.focal_gamma >= 0, "focal_gamma", self.focal_gamma, "must not be negative")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(self.alpha >= 0, "alpha", self.alpha, "must not be negative")
