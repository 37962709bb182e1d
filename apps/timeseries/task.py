"""Training of a forecaster: loss, metrics, optimiser."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

import moecore
from apps.timeseries.data import SeriesData
from apps.timeseries.dense_start import start_from_run
from apps.timeseries.forecasting import forecast_windows
from apps.timeseries.models.base import Windows, filled, masked_mean, observed
from apps.timeseries.models.build import FAMILIES, build_model, resolved_sizes
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.settings import TimeseriesConfig
from apps.training import make_optimizer
from apps.tree import plain


class ForecastTask(LightningModule):
    """The model's own loss plus the layers' balance losses.

    Args:
        config: all settings of the run; kept in every checkpoint, with the spec.
        spec: what the model must know of the series.
    """

    def __init__(self, config: TimeseriesConfig, spec: SeriesSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.model = build_model(config.model, spec)
        self.recording = moecore.Recording()
        """What the last training batch routed; read and cleared by `RoutingMonitor`."""

    def prepare(self, data: SeriesData) -> None:
        """What fresh weights take from the data before training: Moirai-MoE's centroids from a dense run."""
        config = self.config.model.moirai_moe
        if self.config.model.name == "moirai_moe" and config.centroids_from and not self.config.model.dense:
            start_from_run(self.model, config.centroids_from, self.config.run, data)

    def training_step(self, batch: Windows, index: int) -> Tensor:
        """Loss of one batch."""
        with moecore.record(self.model) as self.recording:
            loss = self.model.loss(batch)
        balance = moecore.balance_loss(self.recording).to(loss.device)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/balance_loss", balance, batch_size=len(batch))
        self.log("train/lr", self.optimizers().param_groups[0]["lr"], batch_size=len(batch))
        return loss + balance

    def validation_step(self, batch: Windows, index: int) -> None:
        """Errors of one validation batch at the horizon, in the units of the windows."""
        horizon = batch.future.shape[1]
        error = forecast_windows(self.model, batch, horizon).mean - filled(batch.future)
        seen = observed(batch.future)
        weight = max(int(seen.sum()), 1)
        self.log("val/mse", masked_mean(error.square(), seen), prog_bar=True, batch_size=weight, sync_dist=True)
        self.log("val/mae", masked_mean(error.abs(), seen), batch_size=weight, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the whole training."""
        lr = FAMILIES[self.config.model.name].lr
        return make_optimizer(self, self.config.optim, self.trainer.datamodule.training_steps(), lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings and spec as plain data."""
        checkpoint["app"] = "timeseries"
        checkpoint["config"] = plain(self.config)
        checkpoint["spec"] = self.spec.plain()
        checkpoint["sizes"] = resolved_sizes(self.model)
