"""One trial of a search over classifiers."""

from __future__ import annotations

from pathlib import Path

import torch

from apps.trial import Report, train_trial
from apps.vision.data import VisionData
from apps.vision.settings import VisionConfig
from apps.vision.task import ViMoETask


def objective(config: VisionConfig, folder: Path, report: Report) -> float:
    """Best validation accuracy of a training run in `folder`."""
    torch.manual_seed(config.run.seed)
    data = VisionData(config.data, config.run.seed)
    return train_trial(config, ViMoETask(config, data.spec), data, folder, report, "val/accuracy", "max")
