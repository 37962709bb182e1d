"""Trained multi-task models from checkpoints, whole or cut down to one task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.errors import UserError
from apps.runs import load_checkpoint
from apps.training import load_weights
from apps.tree import flatten, plain, restore
from apps.vision.models.m3vit import M3ViT, Slice
from apps.vision.models.task_slice import slice_model
from apps.vision.multitask.tasks import SceneSpec
from apps.vision.settings import VisionConfig


@dataclass(frozen=True)
class Trained:
    """A model with its weights, and where they came from."""

    model: M3ViT
    config: VisionConfig
    path: Path
    checkpoint: dict[str, Any]


def load_trained(path: Path, config: VisionConfig | None = None) -> Trained:
    """The model of a checkpoint, on the GPU if there is one.

    Args:
        path: of the checkpoint, of all tasks or of one (`export --format task`).
        config: settings to build it by; None: those it was trained with.

    Raises:
        UserError: if the checkpoint is a classifier's, or the weights are of another architecture.
    """
    checkpoint = load_run(path)
    stored = restore(VisionConfig, checkpoint["config"])
    _refuse_changes(stored, config or stored, ("tasks.names", "data.image_size", "data.image_width"), "the model is of")
    config = config or stored
    without_pretrained = dataclasses.replace(config.model, pretrained=None)
    model = M3ViT(without_pretrained, SceneSpec.from_dict(checkpoint["scenes"]))
    if "slice" in checkpoint:
        model = slice_model(model, Slice(**checkpoint["slice"]))
    return Trained(load_weights(model, checkpoint, path, config.trainer), config, path, checkpoint)


def load_run(path: Path) -> dict[str, Any]:
    """A checkpoint of several tasks, or of one, as plain data.

    Raises:
        UserError: for that of a classifier.
    """
    checkpoint = load_checkpoint(path, "vision")
    if "scenes" not in checkpoint:
        raise UserError(f"{path}: is a classifier of model.name=vimoe; give a run of model.name=m3vit")
    return checkpoint


def refuse_other_run(checkpoint: dict[str, Any], config: VisionConfig, path: Path) -> None:
    """Raise a one-line error unless training can go on from a checkpoint with these settings.

    Gates and heads go by the number of their task, weights of losses by the way they are made.
    """
    if "slice" in checkpoint:
        raise UserError(
            f"ckpt_path={path}: holds {checkpoint['slice']['task']} alone; training goes on from whole runs"
        )
    stored = restore(VisionConfig, checkpoint["config"])
    _refuse_changes(stored, config, ("tasks.names", "tasks.weighting"), "the run was started with")


def _refuse_changes(stored: VisionConfig, config: VisionConfig, names: Sequence[str], what: str) -> None:
    before, now = flatten(plain(stored)), flatten(plain(config))
    for name in names:
        if before[name] != now[name]:
            raise UserError(f"{name}={now[name]}: {what} {before[name]}; leave it as it was, or train anew")


def slice_checkpoint(whole: Trained, small: M3ViT) -> dict[str, Any]:
    """A checkpoint of a model for one task, as `load_trained` reads it: its weights, settings, and nothing else."""
    state = {f"model.{name}": value.cpu() for name, value in small.state_dict().items()}
    kept = {name: whole.checkpoint[name] for name in ("app", "config", "scenes")}
    return kept | {"state_dict": state, "slice": plain(small.slice)}
