"""What training minimises and what validation says, against sums by hand."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

import moecore
from apps.timeseries.loading import load_trained
from apps.timeseries.models.base import Windows
from apps.timeseries.task import ForecastTask
from apps.timeseries.verbs import make_data


@pytest.fixture
def task(segmoe_run) -> ForecastTask:
    """Of a trained run, outside of a trainer: what it logs is kept in `task.logged`."""
    trained = load_trained(segmoe_run / "checkpoints" / "best.ckpt")
    task = ForecastTask(trained.config, trained.spec)
    task.model.load_state_dict(trained.model.state_dict())
    task.logged = {}
    task.log = lambda name, value, **kwargs: task.logged.update(
        {name: (torch.as_tensor(value).item(), kwargs["batch_size"])}
    )
    optimizer = torch.optim.SGD(task.parameters(), lr=0.125)
    task.optimizers = lambda: optimizer
    return task.eval()


def test_the_loss_is_the_models_and_the_layers_balance(task):
    windows = Windows(torch.randn(4, 24), torch.randn(4, 6))
    found = task.training_step(windows, 0)
    own = task.model.loss(windows)
    with moecore.record(task.model) as recording:
        task.model.loss(windows)
    expected = 0.0
    for routing in recording:  # 0.02 E sum_e f_e p_e of each layer (Switch, equation 4)
        share = routing.assignment.chosen().float().mean(0)
        expected += 0.02 * 3 * (share @ routing.probs.mean(0)).item()
    torch.testing.assert_close(found, own + expected)
    assert task.logged["train/loss"] == (pytest.approx(own.item()), 4)
    assert task.logged["train/balance_loss"] == (pytest.approx(expected), 4)
    assert task.logged["train/lr"] == (0.125, 4)
    assert {routing.name for routing in task.recording} == {"blocks.0.ffn", "blocks.1.ffn"}


def test_validation_counts_points_that_were_observed(task):
    """Gaps at the end of a context included; a batch weighs as much as it has points to compare."""
    past, future = torch.randn(3, 24), torch.randn(3, 6)
    past[0, -2:] = torch.nan
    future[1, 3:] = torch.nan
    future[2] = torch.nan
    task.validation_step(Windows(past, future), 0)
    with torch.no_grad():
        shifted = torch.cat([torch.full((1, 2), torch.nan), past[:1, :-2]], 1)
        first = task.model.forecast(Windows(shifted), 8).mean[0, 2:] - future[0]
        second = (task.model.forecast(Windows(past[1:2]), 6).mean[0] - future[1])[:3]
    errors = torch.cat([first, second])
    assert task.logged["val/mse"] == (pytest.approx(errors.square().mean().item(), rel=1e-5), 9)
    assert task.logged["val/mae"] == (pytest.approx(errors.abs().mean().item(), rel=1e-5), 9)


def test_the_logged_validation_is_that_of_the_saved_weights(ts, small, tmp_path):
    """All validation windows, in batches of unequal size."""
    options = {"trainer__limit_val_batches": "null", "data__eval_batch_size": 8}
    assert ts("train", *small(tmp_path, run__name="v", **options)).code == 0
    run = tmp_path / "timeseries" / "v"
    trained = load_trained(run / "checkpoints" / "best.ckpt")
    windows = make_data(trained.config).windows("val")
    batch = windows.batch(np.arange(len(windows)))
    with torch.no_grad():
        error = trained.model.forecast(batch, 6).mean - batch.future
    with open(run / "metrics.csv", newline="") as text:
        (row,) = [row for row in csv.DictReader(text) if row["val/mae"]]
    assert float(row["val/mse"]) == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert float(row["val/mae"]) == pytest.approx(error.abs().mean().item(), rel=1e-4)
