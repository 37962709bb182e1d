"""One trial of a search over multi-task models."""

from __future__ import annotations

from pathlib import Path

import torch

from apps.trial import Report, train_trial
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.task import M3ViTTask
from apps.vision.settings import VisionConfig


def objective(config: VisionConfig, folder: Path, report: Report) -> float:
    """Smallest validation loss of a training run in `folder`, by the weights that the settings give the tasks."""
    torch.manual_seed(config.run.seed)
    data = MultiTaskData(config.data, config.tasks.names, config.run.seed)
    return train_trial(config, M3ViTTask(config, data.spec), data, folder, report, "val/loss", "min")
