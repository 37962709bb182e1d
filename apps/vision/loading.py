"""Trained classifiers from checkpoints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.errors import UserError
from apps.runs import load_checkpoint
from apps.training import load_weights
from apps.tree import restore
from apps.vision.models.vimoe import ImageSpec, ViMoE
from apps.vision.settings import VisionConfig


@dataclass(frozen=True)
class Trained:
    """A model with its weights, and where they came from."""

    model: ViMoE
    config: VisionConfig
    path: Path
    checkpoint: dict[str, Any]


def load_trained(path: Path, config: VisionConfig | None = None) -> Trained:
    """The model of a checkpoint, on the GPU if there is one.

    Args:
        path: of the checkpoint.
        config: settings to build it by; None: those it was trained with.

    Raises:
        UserError: if the weights are of another architecture.
    """
    checkpoint = load_checkpoint(path, "vision")
    if "images" not in checkpoint:
        raise UserError(f"{path}: is a model of several tasks, model.name=m3vit; give a run of model.name=vimoe")
    config = config or restore(VisionConfig, checkpoint["config"])
    without_pretrained = dataclasses.replace(config.model, pretrained=None)
    model = ViMoE(without_pretrained, ImageSpec.from_dict(checkpoint["images"]))
    return Trained(load_weights(model, checkpoint, path, config.trainer), config, path, checkpoint)
