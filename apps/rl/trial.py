"""One trial of a search over agents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from apps.rl.data import RLData
from apps.rl.envs.make import spec_of
from apps.rl.incontext.data import InContextData
from apps.rl.incontext.task import InContextTask
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec
from apps.rl.task import RLTask
from apps.trial import Report, train_trial


def objective(config: RLConfig, folder: Path, report: Report) -> float:
    """Largest mean return of the evaluations of a training run in `folder`."""
    torch.manual_seed(config.run.seed)
    spec = spec_of(config.env)
    if config.method == "t2mir":
        return _in_context(config, spec, folder, report)
    task = RLTask(config, spec)
    folder.mkdir(parents=True, exist_ok=True)
    data = RLData(config, spec, task.model, folder / "replay")
    config = dataclasses.replace(config, trainer=config.loop)
    return train_trial(config, task, data, folder, report, "val/return", "max")


def _in_context(config: RLConfig, spec: EnvSpec, folder: Path, report: Report) -> float:
    data, task = InContextData(config, spec), InContextTask(config, spec)
    task.prepare(data)
    config = dataclasses.replace(config, trainer=config.loop)
    return train_trial(config, task, data, folder, report, "val/return", "max")
