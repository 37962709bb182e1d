"""Training of M³ViT: the losses of all tasks, their weights, balance."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

import moecore
from apps.training import make_optimizer
from apps.tree import plain
from apps.vision.models.m3vit import M3ViT
from apps.vision.multitask.data import Batch
from apps.vision.multitask.metrics import make_measure
from apps.vision.multitask.tasks import SceneSpec
from apps.vision.multitask.weighting import make_weighting
from apps.vision.settings import VisionConfig
from moecore.errors import require


class M3ViTTask(LightningModule):
    """Weighted losses of the tasks, plus balance losses of every layer and task, plus what makes tasks specialise.

    Args:
        config: all settings of the run; kept in every checkpoint, with the spec.
        spec: size of the images, and tasks.
    """

    def __init__(self, config: VisionConfig, spec: SceneSpec) -> None:
        super().__init__()
        self.config = config
        self.model = M3ViT(config.model, spec)
        self.weighting = make_weighting(config.tasks, spec.names)
        remedy = "needs gates that know the task: model.moe.score per_task or task_conditioned"
        require(
            not config.tasks.specialise or self.model.task_aware, "tasks.specialise", config.tasks.specialise, remedy
        )
        self.recording = moecore.Recording()
        """What the last training batch routed; read and cleared by `RoutingMonitor`."""
        # Edges are matched one by one in the evaluation; here, after every epoch, that would take too long.
        self.measures = nn.ModuleDict({task.name: make_measure(task) for task in spec.tasks if task.name != "edges"})

    def forward(self, images: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
        """Predictions of all tasks."""
        return self.model(images)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        with moecore.record(self.model) as self.recording:
            predictions = self.model(images)
        losses = task_losses(self.model.spec, predictions, labels)
        loss = self.weighting(losses, shared=self._last_shared())
        balance = moecore.balance_loss(self.recording).to(loss.device)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/balance_loss", balance)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        for task, value in losses.items():
            self.log(f"train/{task}/loss", value)
        if self.config.tasks.weighting != "fixed":
            for task, weight in self.weighting.weights().items():
                self.log(f"train/{task}/weight", weight)
        total = loss + balance
        if self.config.tasks.specialise:
            total = total + self._information()
        return total

    def _information(self) -> Tensor:
        loss = moecore.task_information_loss(self.recording).to(self.device)
        self.log("train/task_information", -loss)
        return self.config.tasks.specialise * loss

    def _last_shared(self) -> list[nn.Parameter]:
        """The last matrix that the gradients of all tasks reach: the projection of the last block's attention."""
        return [self.model.backbone.blocks[-1].attn.proj.weight]

    def on_train_epoch_end(self) -> None:
        """Weights that move once per epoch."""
        self.weighting.epoch_end()

    def validation_step(self, batch: Batch, index: int) -> None:
        """Losses and measures of one validation batch."""
        images, labels = batch
        predictions = self.model(images)
        losses = task_losses(self.model.spec, predictions, labels)
        total = sum(loss * weight for loss, weight in zip(losses.values(), self.weighting.base, strict=True))
        self.log("val/loss", total, batch_size=len(images), sync_dist=True, prog_bar=True)
        for task, loss in losses.items():
            self.log(f"val/{task}/loss", loss, batch_size=len(images), sync_dist=True)
        for name, measure in self.measures.items():
            measure.update(self.model.spec.task(name).kind.decode(predictions[name]), labels[name])

    def on_validation_epoch_end(self) -> None:
        """The figure that judges each task."""
        for name, measure in self.measures.items():
            self.log(f"val/{name}/{_judge(self.model.spec, name)}", _figure(measure, self.model.spec, name))
            measure.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the whole training."""
        lr = 1e-3 if self.config.model.pretrained is None else 1e-4
        return make_optimizer(self, self.config.optim, self.trainer.datamodule.training_steps(), lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings and spec as plain data."""
        checkpoint |= {"app": "vision", "config": plain(self.config), "scenes": plain(self.model.spec)}


def task_losses(
    spec: SceneSpec, predictions: dict[str, Tensor], labels: dict[str, Tensor]
) -> dict[str, Float[Tensor, ""]]:
    """Loss of every task, without weights."""
    return {task.name: task.kind.loss(predictions[task.name], labels[task.name]) for task in spec.tasks}


def _judge(spec: SceneSpec, name: str) -> str:
    return spec.task(name).kind.metric


def _figure(measure: Metric, spec: SceneSpec, name: str) -> float:
    return float(measure.compute()[_judge(spec, name)])
