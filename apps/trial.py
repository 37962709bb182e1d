"""One trial of a search, for apps that train with Lightning: train with given settings, report every validation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from apps import training

Report = Callable[[int, float], None]
"""`report(number of the validation, value)`; may end the trial by raising."""


class Reporter(Callback):
    """Passes a validation metric on after every validation, and remembers its best value.

    Args:
        report: where to.
        monitor: name of the metric.
        mode: "max" or "min".
    """

    def __init__(self, report: Report, monitor: str, mode: str) -> None:
        self.report, self.monitor = report, monitor
        self.best, self._better = (-math.inf, max) if mode == "max" else (math.inf, min)
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Report."""
        if trainer.sanity_checking:
            return
        value = float(trainer.callback_metrics[self.monitor])
        self.best = self._better(self.best, value)
        self.report(self._validations, value)
        self._validations += 1


def train_trial(
    config: Any, task: LightningModule, data: LightningDataModule, folder: Path, report: Report, monitor: str, mode: str
) -> float:
    """Train in `folder`, which is created; the best value of the monitored metric.

    Args:
        config: the app's settings, with sections `trainer`, `run` and, for averaged weights, `optim`.
        task: what to train.
        data: what to train it on.
        folder: of the trial.
        report: as an `apps.search.Objective` gets it.
        monitor: validation metric.
        mode: "max" or "min".
    """
    reporter = Reporter(report, monitor, mode)
    ema_decay = config.optim.ema_decay if hasattr(config, "optim") else None
    quiet = dataclasses.replace(config.trainer, enable_progress_bar=False)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = training.make_trainer(quiet, config.run, ema_decay, folder, monitor, mode, extra=[reporter])
    training.fit(trainer, task, data, folder, config, resume=None)
    return reporter.best
