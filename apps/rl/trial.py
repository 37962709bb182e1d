"""One trial of a search over agents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from apps.rl.data import RLData, spec_of
from apps.rl.settings import RLConfig
from apps.rl.task import RLTask
from apps.trial import Report, train_trial


def objective(config: RLConfig, folder: Path, report: Report) -> float:
    """Largest mean return of the evaluations of a training run in `folder`."""
    torch.manual_seed(config.run.seed)
    spec = spec_of(config)
    task = RLTask(config, spec)
    folder.mkdir(parents=True, exist_ok=True)
    data = RLData(config, spec, task.model, folder / "replay")
    config = dataclasses.replace(config, trainer=config.loop)
    return train_trial(config, task, data, folder, report, "val/return", "max")
