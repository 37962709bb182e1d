"""Conflict of trained models: measured on training images, kept in the run folder for reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps import output
from apps.errors import UserError
from apps.vision.multitask.conflict import Conflict, measure_conflict
from apps.vision.multitask.data import Batch, MultiTaskData
from apps.vision.multitask.loading import Trained
from apps.vision.multitask.task import task_losses

FILE = "conflict.json"
"""Its name in a run folder."""


def conflict_of(trained: Trained, data: MultiTaskData, batches: int, progress: bool = True) -> Conflict:
    """Conflict of a trained model on its first training images, as they are evaluated.

    Args:
        trained: the model.
        data: its images.
        batches: of `data.batch_size` images.
        progress: show a bar.
    """
    model, size = trained.model, data.config.batch_size
    images = data.first_images("train", batches * size)
    starts = range(0, min(len(images), batches * size), size)
    chosen = [list(range(start, min(start + size, len(images)))) for start in starts]

    def losses(batch: Batch) -> dict[str, Tensor]:
        pixels, labels = batch
        device = model.mean.device
        predictions = model(pixels.to(device))
        return task_losses(model.spec, predictions, {name: label.to(device) for name, label in labels.items()})

    return measure_conflict(model, losses, [images.plain(indices) for indices in chosen], model.spec.names, progress)


def save_conflict(conflict: Conflict, folder: Path) -> Path:
    """Write it to a run folder; returns the file."""
    output.write_json(folder / FILE, {name: _plain(value) for name, value in vars(conflict).items()})
    return folder / FILE


def load_conflict(folder: Path) -> Conflict | None:
    """What `save_conflict` wrote to a run folder; None if it has not.

    Raises:
        UserError: for a damaged file.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        layers = {part: _tensors(values[part]) for part in ("layers", "norms", "experts", "expert_norms")}
        return Conflict(tasks=tuple(values["tasks"]), **layers)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); run `evaluate --conflict true` anew") from None


def _plain(value: Any) -> Any:
    return {name: each.tolist() for name, each in value.items()} if isinstance(value, dict) else list(value)


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """Nested lists as tensors; null, which stands for NaN in JSON, as NaN."""
    return {name: torch.tensor(_numbers(value), dtype=torch.float64) for name, value in values.items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float("nan") if value is None else float(value)
