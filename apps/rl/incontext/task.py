"""Training of a transformer that learns in context, with Lightning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import moecore
from apps.rl.agents.t2mir import T2MIR, Windows
from apps.rl.incontext.data import InContextData
from apps.rl.incontext.episodes import in_context, live
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec
from apps.settings import OptimConfig
from apps.training import make_optimizer
from apps.tree import plain


class InContextTask(LightningModule):
    """Imitates histories, and evaluates in tasks that it does not learn from.

    Args:
        config: all settings; kept in every checkpoint.
        spec: of the environment; kept too.
    """

    def __init__(self, config: RLConfig, spec: EnvSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.model = T2MIR(config.t2mir, spec.stacked[0], spec.action_dim)
        self.recording = moecore.Recording()
        """What the last step routed; read and cleared by `RoutingMonitor`."""
        self.learned: dict[int, float] = {}

    def prepare(self, data: InContextData) -> None:
        """Take from the data what is not learned: scales, and what the tasks' own agents reach."""
        self.model.fit_scale(*data.steps())
        self.learned = data.learned

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with warm-up and cosine."""
        one = self.config.t2mir
        return make_optimizer(self.model, OptimConfig(lr=one.lr, weight_decay=one.weight_decay), one.steps, one.lr)

    def training_step(self, batch: Windows, index: int) -> Tensor:
        """Losses of a batch of windows."""
        found, routings = self.model.losses(batch)
        self.recording.extend(routings)
        for name, value in found.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "imitation", batch_size=1)
        return found["loss"]

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of the optimiser: the slow gate follows."""
        self.model.follow()

    def validation_step(self, batch: int, index: int) -> None:
        """Episodes in a row in each validation task, the memory empty at first."""
        one, tasks = self.config.t2mir, self.trainer.datamodule.split.val
        lives = live(self.config.env, tasks, in_context(self.model), one.eval_episodes)
        returns = np.array([life.returns for life in lives])  # [tasks, episodes]
        self.log("val/return", float(returns[:, -1].mean()), prog_bar=True, batch_size=1)
        self.log("val/first_return", float(returns[:, 0].mean()), batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings and environment as plain data."""
        checkpoint["app"] = "rl"
        checkpoint["config"] = plain(self.config)
        checkpoint["spec"] = plain(self.spec)
        checkpoint["learned"] = self.learned

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Back to them."""
        self.learned = dict(checkpoint["learned"])
