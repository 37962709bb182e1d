"""Small ranking models ready for export, the encoding of their numbers traced once for all."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch

from apps.recsys import deploy
from apps.recsys.data import RecsysData
from apps.recsys.loading import Trained
from apps.recsys.model_settings import ModelConfig
from apps.recsys.models.build import build_model
from apps.recsys.settings import RecsysConfig
from apps.recsys.sources import from_frame
from export.exportable import Exportable
from tests.apps.recsys.conftest import small_log, small_schema


def ready(config: ModelConfig, monkeypatch) -> tuple[Trained, Exportable]:
    """A model of these settings with fresh weights; tables so large that any wrong row of theirs shows."""
    features = _features()
    monkeypatch.setattr(deploy, "raw_features", lambda _: features)
    trained, data = _fresh(config)
    return trained, deploy.exportable(trained, data)


def _fresh(config: ModelConfig) -> tuple[Trained, RecsysData]:
    settings = dataclasses.replace(RecsysConfig(), model=config)
    data = RecsysData(settings.data, 0, source=from_frame(small_log(), settings.data, small_schema()))
    torch.manual_seed(0)
    model = build_model(config, data.spec).eval()  # encoders come first, so that they are all the same
    for weight in model.encoder.tables.weights.values():
        torch.nn.init.normal_(weight, std=3)
    return Trained(model, settings, data.transform, Path()), data


@functools.cache
def _features():
    return deploy.raw_features(_fresh(ModelConfig())[0])
