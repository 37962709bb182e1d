"""Trained models out of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from apps.errors import UserError
from apps.recsys.batch import Batch, InputSpec
from apps.recsys.losses import log_probabilities
from apps.recsys.models.build import FAMILIES, Ranker, build_model
from apps.recsys.schema import Schema, read_schema
from apps.recsys.settings import RecsysConfig
from apps.recsys.transform import Transform
from apps.runs import load_checkpoint
from apps.training import load_weights
from apps.tree import flatten, restore


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
        config: settings to build it by, with a schema only if it is to be compared; None: those it was trained with.

    Raises:
        UserError: if the weights are of another architecture, or the schema differs from that of the checkpoint.
    """
    checkpoint = load_checkpoint(path, "recsys")
    transform = Transform.from_plain(checkpoint["transform"])
    if config is None:
        config = restore(RecsysConfig, checkpoint["config"])
    elif config.data.schema is not None:
        _check_schema(config.data.schema, transform.schema, path)
    model = load_weights(build_model(config.model, transform.spec), checkpoint, path, config.trainer)
    return Trained(model, config, transform, path)


def _check_schema(file: str, kept: Schema, path: Path) -> None:
    """A model reads columns as it learned to; a file that says otherwise is refused."""
    given, own = flatten(read_schema(file).plain()), flatten(kept.plain())
    names = sorted(given.keys() | own.keys())
    name = next((name for name in names if name not in given or name not in own or given[name] != own[name]), None)
    if name is not None:
        values = [str(one[name]) if name in one else "absent" for one in (given, own)]
        raise UserError(
            f"data.schema={file}: {name} is {values[0]} there and {values[1]} in {path}, whose schema is used; leave "
            "--data.schema out, or train with the other"
        )
