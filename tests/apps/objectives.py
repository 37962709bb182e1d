"""Objectives of a search that train nothing. Tests import this module by name, as worker processes do."""

from __future__ import annotations

import os
from pathlib import Path

from apps.errors import ConfigError
from apps.search import Report
from apps.vision.settings import VisionConfig


def sphere(config: VisionConfig, folder: Path, report: Report) -> float:
    """Best at a rate of 0.003; above 0.008 not a number, above 0.009 refused."""
    folder.mkdir()
    (folder / "process").write_text(str(os.getpid()))
    value = -abs(config.optim.lr - 0.003)
    for step in range(3):
        report(step, value)
    if config.optim.lr > 0.009:
        raise ConfigError("optim.lr", config.optim.lr, "too much for this test")
    return float("nan") if config.optim.lr > 0.008 else value


def broken(config: VisionConfig, folder: Path, report: Report) -> float:
    """Refuses everything."""
    raise ConfigError("optim.lr", config.optim.lr, "too much for this test")
