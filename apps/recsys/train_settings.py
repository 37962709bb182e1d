"""Settings of what is minimised, and how. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moecore.errors import require


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
