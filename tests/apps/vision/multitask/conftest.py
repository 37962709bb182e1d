"""A tiny trained run of several tasks that every verb is tried on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.apps.conftest import flags_of

RECIPE = Path(__file__).parents[4] / "configs" / "vision" / "tiny_m3vit.yaml"
TINY = {
    "model.name": "m3vit",
    "model.stem": "patch",
    "model.patch_size": "8",
    "model.embed_dim": "16",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.moe_layers": "every-2",
    "model.moe.num_experts": "4",
    "model.moe.top_k": "2",
    "model.moe.score": "per_task",
    "model.m3vit.decoder_width": "8",
    "data.dataset": "scenes",
    "data.image_size": "16",
    "data.image_width": "24",
    "data.batch_size": "4",
    "data.scenes.num_train": "20",
    "data.scenes.num_val": "6",
    "data.scenes.num_test": "6",
    "optim.lr": "0.002",
    "optim.ema_decay": "null",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": "1",
    "trainer.log_every_n_steps": "1",
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
}
"""A second of training; what the tests rely on is written out, so that other defaults change nothing."""


@pytest.fixture(scope="session")
def tiny_tasks() -> Callable[..., list[str]]:
    """Flags of a run of several tasks that takes a second; keyword arguments change them, `__` for dots."""
    return flags_of(TINY)


@pytest.fixture(scope="session")
def scenes_run(cli, tmp_path_factory) -> Path:
    """The folder of `train -c configs/vision/tiny_m3vit.yaml`, with its report; tests only read it."""
    root = tmp_path_factory.mktemp("runs")
    done = cli("train", "-c", RECIPE, "--run.root", root, "--trainer.accelerator", "cpu", "--json", root / "t.json")
    assert (done.code, done.err) == (0, "")
    folder = root / "vision" / "tiny_m3vit"
    assert json.loads((root / "t.json").read_text()) == json.loads((folder / "test.json").read_text())
    return folder
