"""Settings of the recsys app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from apps.recsys.data_settings import DataConfig
from apps.recsys.model_settings import ModelConfig
from apps.recsys.train_settings import LossConfig, RankOptimConfig
from apps.settings import RunConfig, TrainerConfig
from moecore.errors import require


@dataclass
class RecsysConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    optim: RankOptimConfig = field(default_factory=RankOptimConfig)
    """Optimiser."""
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=3, gradient_clip_val=None))
    """Training loop."""
    run: RunConfig = field(default_factory=RunConfig)
    """Run folder and repeatability."""

    def __post_init__(self) -> None:
        precision = self.trainer.precision
        good = precision in ("auto", "32", "32-true", "bf16-mixed")
        require(good, "trainer.precision", precision, "gradients are not scaled here; use 32-true or bf16-mixed")
