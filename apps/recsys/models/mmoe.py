"""MMoE and PLE: experts that tasks share, a gate per task.

B rows, D width of the features, T tasks, W width of an expert's output.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import MMoEConfig, PLEConfig
from apps.recsys.models.levels import make_level
from apps.recsys.models.names import safe_names
from moecore.factorized import FactorizedInput


class MMoE(nn.Module):
    """Experts of all tasks, mixed by a gate per task (Ma et al., KDD 2018); OMoE with one gate for all."""

    def __init__(self, config: MMoEConfig, tasks: Sequence[TaskSpec], width: int) -> None:
        super().__init__()
        own = safe_names("task", [task.name for task in tasks]).values()
        gates = ["all"] if config.one_gate else own
        self.level = make_level(
            {"shared": config.num_experts},
            {gate: ["shared"] for gate in gates},
            width,
            width,
            config.experts,
            config.gates,
            config.top_k,
            config.balance,
        )
        self.one_gate, self.out_width = config.one_gate, self.level.out_width

    def forward(self, x: Float[Tensor, "B D"] | FactorizedInput) -> Float[Tensor, "B T W"] | Float[Tensor, "B W"]:
        """Mixtures by task, or the one of all."""
        mixed = self.level.mixtures(x)
        return mixed[:, 0] if self.one_gate else mixed


class PLE(nn.Module):
    """Levels of shared experts and experts of each task (Tang et al., RecSys 2020); one level is CGC.

    The gate of a task sees its own experts and the shared ones, that of the shared experts sees all; the last level has
    none. From the second level on, experts and gates of a task read what its gate gave, shared ones what theirs did.
    """

    def __init__(self, config: PLEConfig, tasks: Sequence[TaskSpec], width: int) -> None:
        super().__init__()
        own = safe_names("task", [task.name for task in tasks]).values()
        counts = {"shared": config.shared_experts} | dict.fromkeys(own, config.task_experts)
        sees = {key: ["shared", key] for key in own}
        self.levels = nn.ModuleList()
        for number in range(config.levels):
            last = number == config.levels - 1
            level = make_level(
                counts,
                sees if last else sees | {"shared": list(counts)},
                width,
                width,
                config.experts,
                config.gates,
                config.top_k,
                config.balance,
            )
            self.levels.append(level)
            width = level.out_width
        self.out_width = width

    def forward(self, x: Float[Tensor, "B D"] | FactorizedInput) -> Float[Tensor, "B T W"]:
        """Mixtures by task."""
        *before, last = self.levels
        for level in before:
            x = level(x)  # by name, of experts and gates alike
        return last.mixtures(x)
