"""Training of an image classifier: loss, metrics, optimiser."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_accuracy

import moecore
from apps.training import make_optimizer
from apps.tree import plain
from apps.vision.augment import mixing
from apps.vision.data import Batch
from apps.vision.models.vimoe import ImageSpec, ViMoE
from apps.vision.settings import VisionConfig


class ViMoETask(LightningModule):
    """Cross-entropy plus the layers' balance losses.

    Args:
        config: all settings of the run; kept in every checkpoint, with the image spec.
        images: channels, size and classes of the data.
    """

    def __init__(self, config: VisionConfig, images: ImageSpec) -> None:
        super().__init__()
        self.config = config
        self.model = ViMoE(config.model, images)
        self.recording = moecore.Recording()
        """What the last training batch routed; read and cleared by `RoutingMonitor`."""
        self.accuracy = MulticlassAccuracy(len(images.classes), average="micro")
        self._mix = mixing(config.data, len(images.classes))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Class scores."""
        return self.model(images)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch if self._mix is None else self._mix(*batch)
        with moecore.record(self.model) as self.recording:
            scores = self.model(images)
        loss = F.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
        balance = moecore.balance_loss(self.recording).to(loss.device)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/balance_loss", balance)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        if labels.dim() == 1:
            self.log("train/accuracy", multiclass_accuracy(scores, labels, scores.shape[1], average="micro"))
        return loss + balance

    def validation_step(self, batch: Batch, index: int) -> None:
        """Loss and accuracy of one validation batch."""
        images, labels = batch
        scores = self.model(images)
        self.accuracy(scores, labels)
        self.log("val/loss", F.cross_entropy(scores, labels), batch_size=len(labels), sync_dist=True)
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the whole training."""
        lr = 2e-3 if self.config.model.pretrained is None else 2e-4
        return make_optimizer(self, self.config.optim, self.trainer.datamodule.training_steps(), lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings and image spec as plain data."""
        checkpoint["app"] = "vision"
        checkpoint["config"] = plain(self.config)
        checkpoint["images"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self._spec().items()}

    def _spec(self) -> dict[str, Any]:
        return dataclasses.asdict(self.model.images)
