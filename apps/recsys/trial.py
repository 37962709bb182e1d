"""One trial of a search over ranking models."""

from __future__ import annotations

from pathlib import Path

import torch

from apps.recsys.data import RecsysData
from apps.recsys.settings import RecsysConfig
from apps.recsys.task import RankTask
from apps.trial import Report, train_trial


def objective(config: RecsysConfig, folder: Path, report: Report) -> float:
    """Largest mean AUC on the validation rows of a training run in `folder`."""
    torch.manual_seed(config.run.seed)
    data = RecsysData(config.data, config.run.seed)
    return train_trial(config, RankTask(config, data.transform), data, folder, report, "val/auc", "max")
