"""One trial of a search: train with given settings, report every validation."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from apps import training
from apps.search import Report
from apps.vision.data import VisionData
from apps.vision.settings import VisionConfig
from apps.vision.task import ViMoETask


class Reporter(Callback):
    """Passes the validation accuracy on after every validation."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.best = 0.0
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Report, which may raise to end the trial."""
        if trainer.sanity_checking:
            return
        value = float(trainer.callback_metrics["val/accuracy"])
        self.best = max(self.best, value)
        self.report(self._validations, value)
        self._validations += 1


def objective(config: VisionConfig, folder: Path, report: Report) -> float:
    """Best validation accuracy of a training run in `folder`."""
    import torch

    torch.manual_seed(config.run.seed)
    data = VisionData(config.data, config.run.seed)
    task = ViMoETask(config, data.spec)
    reporter = Reporter(report)
    config.trainer.enable_progress_bar = False
    folder.mkdir(parents=True, exist_ok=True)
    trainer = training.make_trainer(
        config.trainer, config.run, config.optim, folder, "val/accuracy", "max", extra=[reporter]
    )
    training.fit(trainer, task, data, folder, config, resume=None)
    return reporter.best
