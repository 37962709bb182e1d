"""Settings of the recsys app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from apps.recsys.data_settings import DataConfig
from apps.recsys.model_settings import ModelConfig
from apps.settings import OptimConfig, RunConfig, TrainerConfig


@dataclass
class RecsysConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0, ema_decay=None))
    """Optimiser."""
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=3))
    """Training loop."""
    run: RunConfig = field(default_factory=RunConfig)
    """Folder, seed, threads."""
