"""Routing is logged, and balance controllers step with the optimiser."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

import moecore
from apps.callbacks import RoutingMonitor
from apps.settings import RunConfig
from apps.training import prepare_process

RATE = 0.01


class Routed(LightningModule):
    """One layer with a loss-free bias, on tokens that all prefer the same expert."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = moecore.MoE.build(
            4, num_experts=2, top_k=1, hidden=4, controller="loss_free", controller_options={"rate": RATE}
        )
        self.moe.router.score.weight.data = torch.tensor([[5.0] * 4, [-5.0] * 4])
        self.recording = moecore.Recording()

    def training_step(self, batch, index):
        with moecore.record(self) as self.recording:
            y = self.moe(batch)
        return y.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 3), (3, 2)])
def test_controllers_step_once_per_optimiser_step(tmp_path, accumulate, steps):
    prepare_process(RunConfig())
    module = Routed()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[RoutingMonitor()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, DataLoader(torch.rand(6, 4), batch_size=1))
    bias = module.moe.router.balance.bias
    torch.testing.assert_close(bias, torch.tensor([-RATE * steps, RATE * steps]))
    logged = {name for name in trainer.logged_metrics if name.startswith(("routing/moe/", "load/moe/"))}
    assert {"routing/moe/max_violation", "load/moe/0", "load/moe/1"} <= logged
    assert not module.recording
