"""Trained models out of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from apps.recsys.batch import Batch, InputSpec
from apps.recsys.losses import log_probabilities
from apps.recsys.models.build import FAMILIES, Ranker, build_model
from apps.recsys.settings import RecsysConfig
from apps.recsys.transform import Transform
from apps.runs import load_checkpoint
from apps.training import load_weights
from apps.tree import restore


@dataclass(frozen=True)
class Trained:
    """A model with its weights, and the transform of its inputs."""

    model: Ranker
    config: RecsysConfig
    transform: Transform
    path: Path

    @property
    def spec(self) -> InputSpec:
        """What the model knows of its data."""
        return self.transform.spec

    @property
    def title(self) -> str:
        """The model's name in tables."""
        title = FAMILIES[self.config.model.name].title
        return f"{title} (dense twin)" if self.config.model.dense else title

    @torch.no_grad()
    def score(self, batch: Batch) -> Float[np.ndarray, "B T"]:
        """Probability of a positive in every task, all conditions included."""
        device = next(self.model.parameters()).device
        logits = self.model(batch.to(device)).logits.float()
        return log_probabilities(logits, self.spec.tasks).exp().cpu().numpy()


def load_trained(path: Path, config: RecsysConfig | None = None) -> Trained:
    """The model of a checkpoint, on the GPU if there is one.

    Args:
        path: of the checkpoint.
        config: settings to build it by; None: those it was trained with.

    Raises:
        UserError: if the weights are of another architecture.
    """
    checkpoint = load_checkpoint(path, "recsys")
    config = config or restore(RecsysConfig, checkpoint["config"])
    transform = Transform.from_plain(checkpoint["transform"])
    model = load_weights(build_model(config.model, transform.spec), checkpoint, path, config.trainer)
    return Trained(model, config, transform, path)
