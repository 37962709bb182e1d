"""What comes before and after experts: bottoms of plain layers, and a tower per task.

B rows, D width of the features, T tasks, W width that towers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import MLPConfig, TowerConfig
from apps.recsys.models.base import Fields, Output
from moecore.factorized import FactorizedInput
from moecore.multigate_experts import ExpertStack


def make_stack(config: MLPConfig, count: int, width: int) -> ExpertStack:
    """Networks side by side that read rows of `width`."""
    return ExpertStack(count, width, config.units, config.activation, config.norm, config.dropout)


class SharedBottom(nn.Module):
    """One network for all tasks."""

    def __init__(self, config: MLPConfig, width: int) -> None:
        super().__init__()
        self.bottom = make_stack(config, 1, width)
        self.out_width = self.bottom.out_width

    def forward(self, x: Float[Tensor, "B D"] | FactorizedInput) -> Float[Tensor, "B W"]:
        """[B, D] -> [B, W], the same for all towers."""
        return self.bottom(x)[:, 0]


class SingleTask(nn.Module):
    """A network for each task."""

    def __init__(self, config: MLPConfig, tasks: Sequence[TaskSpec], width: int) -> None:
        super().__init__()
        self.bottoms = make_stack(config, len(tasks), width)
        self.out_width = self.bottoms.out_width

    def forward(self, x: Float[Tensor, "B D"] | FactorizedInput) -> Float[Tensor, "B T W"]:
        """[B, D] -> [B, T, W]."""
        return self.bottoms(x)


class Towers(nn.Module):
    """A network per task that ends in its logit, which starts at the log-odds of the task's prior."""

    def __init__(self, config: TowerConfig, tasks: Sequence[TaskSpec], width: int) -> None:
        super().__init__()
        units = (*config.units, 1)
        self.stack = ExpertStack(len(tasks), width, units, config.activation, config.norm, config.dropout, linear=True)
        odds = [math.log(task.prior / (1 - task.prior)) for task in tasks]
        with torch.no_grad():
            self.stack.biases[-1].copy_(torch.tensor(odds)[:, None])

    def forward(self, x: Float[Tensor, "B W"] | Float[Tensor, "B T W"]) -> Float[Tensor, "B T"]:
        """Logits, from one input for all towers or one each."""
        return self.stack(x).squeeze(2)


class WithTowers(nn.Module):
    """A trunk, which gives what towers read, and the towers."""

    def __init__(self, trunk: nn.Module, config: TowerConfig, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.trunk, self.towers = trunk, Towers(config, tasks, trunk.out_width)

    def forward(self, fields: Fields) -> Output:
        """Logits of all tasks."""
        return Output(self.towers(self.trunk(fields.features)))
