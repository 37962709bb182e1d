"""One trial of a search over forecasters."""

from __future__ import annotations

from pathlib import Path

import torch

from apps.timeseries.settings import TimeseriesConfig
from apps.timeseries.task import ForecastTask
from apps.timeseries.verbs import make_data
from apps.trial import Report, train_trial


def objective(config: TimeseriesConfig, folder: Path, report: Report) -> float:
    """Least validation error of a training run in `folder`."""
    torch.manual_seed(config.run.seed)
    data = make_data(config)
    task = ForecastTask(config, data.spec)
    task.prepare(data)
    return train_trial(config, task, data, folder, report, "val/mae", "min")
