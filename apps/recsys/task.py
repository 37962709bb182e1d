"""Training of a ranking model: losses, metrics, optimiser."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import moecore
from apps.recsys.balancing import make_balance
from apps.recsys.batch import Batch, InputSpec
from apps.recsys.losses import log_probabilities, task_losses
from apps.recsys.metrics import auc, log_loss
from apps.recsys.models.build import Ranker, build_model
from apps.recsys.optimizers import make_optimizer, row_updates
from apps.recsys.settings import RecsysConfig
from apps.recsys.transform import Transform
from apps.tree import plain

NEED_DENSE = ("gradnorm", "pcgrad")
"""Ways to balance tasks that look at gradients, which must not be sparse then."""


def trainable_model(config: RecsysConfig, spec: InputSpec) -> Ranker:
    """A model with fresh weights, its tables with sparse gradients where the settings and their size ask for it."""
    rows = sum(table.rows for table in spec.tables)
    return build_model(config.model, spec, row_updates(config.optim, rows) and config.loss.balancing not in NEED_DENSE)


class RankTask(LightningModule):
    """Losses of the tasks, balanced, plus what the model adds.

    Args:
        config: all settings of the run; kept in every checkpoint, with the transform.
        transform: of the data.
    """

    def __init__(self, config: RecsysConfig, transform: Transform) -> None:
        super().__init__()
        self.config, self.transform, self.spec = config, transform, transform.spec
        self.model = trainable_model(config, self.spec)
        own = self.model.task_weights or (1.0,) * len(self.spec.tasks)
        weights = [task.weight * weight for task, weight in zip(self.spec.tasks, own, strict=True)]
        self.balance = make_balance(config.loss, weights)
        self.recording = moecore.Recording()
        """What the last training batch routed; read and cleared by `RoutingMonitor`."""
        self._pending: tuple[Tensor, Tensor] | None = None
        self._validated: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Loss of one batch; `backward` goes through the tasks' own losses."""
        output = self.model(batch)
        losses = task_losses(output.logits, batch.labels, self.spec.tasks, self.config.loss)
        rest = sum(output.losses.values(), torch.zeros((), device=losses.device))
        self._pending = (losses, rest)
        total = losses.sum() + rest
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch))
        for task, loss in zip(self.spec.tasks, losses.detach(), strict=True):
            self.log(f"train/{task.name}", loss, batch_size=len(batch))
        for name, loss in output.losses.items():
            self.log(f"train/{name}_loss", loss.detach(), batch_size=len(batch))
        self.log("train/lr", self.optimizers().param_groups[0]["lr"], batch_size=len(batch))
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients as the balance of tasks makes them."""
        losses, rest = self._pending
        self._pending = None
        every = self.trainer.accumulate_grad_batches
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.balance.backward(losses / every, rest / every, parameters)

    def on_train_epoch_end(self) -> None:
        """For balances that look at whole epochs."""
        self.balance.end_epoch()

    def validation_step(self, batch: Batch, index: int) -> None:
        """Keep scores for the metrics of the epoch."""
        log_p = log_probabilities(self.model(batch).logits.float(), self.spec.tasks)
        self._validated.append((log_p.exp().cpu(), batch.labels.cpu()))

    def on_validation_epoch_end(self) -> None:
        """AUC of every task, and their mean."""
        scores, labels = (torch.cat(parts).numpy() for parts in zip(*self._validated, strict=True))
        self._validated.clear()
        found, losses = [], []
        for i, task in enumerate(self.spec.tasks):
            inside = ~np.isnan(labels[:, i])
            value = auc(scores[inside, i], labels[inside, i])
            if inside.any():
                losses.append(log_loss(scores[inside, i], labels[inside, i]))
            if not math.isnan(value):
                self.log(f"val/auc_{task.name}", value, sync_dist=True)
                found.append(value)
        mean = sum(found) / len(found) if found else 0.5
        self.log("val/auc", mean, prog_bar=True, sync_dist=True)
        self.log("val/log_loss", sum(losses) / max(len(losses), 1), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, and row by row for large tables, over the whole training."""
        return make_optimizer(self, self.config.optim, self.trainer.datamodule.training_steps())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings and transform as plain data."""
        checkpoint["app"] = "recsys"
        checkpoint["config"] = plain(self.config)
        checkpoint["transform"] = self.transform.plain()
