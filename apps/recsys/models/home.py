"""HoME: hierarchy of multi-gate experts (Wang et al. 2024, arXiv 2408.05430).

B rows, D width of the features, T tasks, W width of an expert's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import HoMEConfig
from apps.recsys.models.levels import make_level
from apps.recsys.models.names import safe_names
from moecore.factorized import FactorizedInput, dense
from moecore.multigate_parts import FeatureGate, SelfGate

SHARED = "shared"


class FeatureGates(nn.Module):
    """What each group of experts reads: its source as it is, or weighted by low-rank gates.

    Args:
        config: `feature_gate` says how many readers a source has: one, its groups, or all experts of those.
        counts: group -> experts.
        sources: group -> name of what it reads.
        widths: source -> width.
    """

    def __init__(
        self, config: HoMEConfig, counts: Mapping[str, int], sources: Mapping[str, str], widths: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.kind, self.sources = config.feature_gate, dict(sources)
        self.readers = {name: [group for group, own in sources.items() if own == name] for name in widths}
        self.counts = dict(counts)
        if self.kind == "none":
            return
        rank, maps = config.feature_rank, config.feature_maps
        sizes = {name: self._sizes(name) for name, groups in self.readers.items() if groups}
        self.gates = nn.ModuleDict({name: FeatureGate(widths[name], rank, maps, sum(sizes[name])) for name in sizes})

    def _sizes(self, source: str) -> list[int]:
        """Readers that each group of a source is."""
        if self.kind == "input":
            return [1]
        return [self.counts[group] if self.kind == "expert" else 1 for group in self.readers[source]]

    def forward(self, inputs: Mapping[str, Float[Tensor, "B D"]]) -> dict[str, Tensor]:
        """Sources by name -> inputs by group, `[B, D]`, or `[B, E, D]` of one per expert."""
        if self.kind == "none":
            return {group: inputs[source] for group, source in self.sources.items()}
        found = {}
        for source, gate in self.gates.items():
            gated = gate(inputs[source])  # [B, readers, D]
            groups = self.readers[source]
            if self.kind == "input":
                found |= dict.fromkeys(groups, gated[:, 0])
            elif self.kind == "group":
                found |= dict(zip(groups, gated.unbind(1), strict=True))
            else:
                found |= dict(zip(groups, gated.split(self._sizes(source), 1), strict=True))
        return found


class HoMELevel(nn.Module):
    """A level with gates on features before its experts, and self gates after.

    Args:
        config: settings.
        counts: group -> experts.
        sees: gate -> the groups it sees.
        own: gate -> the group that is its own.
        sources: group -> name of what it reads.
        widths: source -> width.
        gate_width: of what gates read.
    """

    def __init__(
        self,
        config: HoMEConfig,
        counts: Mapping[str, int],
        sees: Mapping[str, Sequence[str]],
        own: Mapping[str, str],
        sources: Mapping[str, str],
        widths: Mapping[str, int],
        gate_width: int,
    ) -> None:
        super().__init__()
        self.features = FeatureGates(config, counts, sources, widths)
        by_group = {group: widths[source] for group, source in sources.items()}
        self.level = make_level(
            counts, sees, by_group, gate_width, config.experts, config.gates, config.top_k, config.balance
        )
        self.own, self.sources, self.reads = dict(own), dict(sources), config.self_gate_input
        self.selves = nn.ModuleDict()
        if config.self_gate:
            for gate, group in own.items():
                width = by_group[group] if self.reads == "experts" else gate_width
                self.selves[gate] = SelfGate(width, counts[group])

    def forward(self, inputs: Mapping[str, Tensor], gate_x: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "B W"]]:
        """Mixtures by gate, from sources by name and what each gate reads."""
        x = self.features(inputs)
        first = next(iter(gate_x.values()))
        same = all(one is first for one in gate_x.values())
        if not self.selves:
            return self.level(x, first if same else gate_x)
        outputs = self.level.run_experts(x)
        mixed = self.level.mix(outputs, self.level.run_gates(first if same else gate_x)).unbind(1)
        found = dict(zip(self.level.gates, mixed, strict=True))
        for gate, one in self.selves.items():
            group = self.own[gate]
            read = inputs[self.sources[group]] if self.reads == "experts" else gate_x[gate]
            found[gate] = found[gate] + one(read, outputs[:, self.level.columns_of(group)])
        return found


class HoME(nn.Module):
    """A meta level that abstracts what groups of tasks need, and a level of tasks on top.

    Meta level, on the features v: `z_shared` mixes all experts, `z_c` those shared and those of group c. Task level:
    the gate of task t reads `z_shared, z_c` side by side and mixes shared experts on `z_shared`, and those of its group
    and its own on `z_c`. Every gate adds a self-gated residual of its own experts. Without the hierarchy each task is
    its own group, has no experts of groups at the task level, and its gate reads `z_c` alone: PLE with two levels.

    Args:
        config: settings.
        tasks: with their groups.
        width: D.
    """

    def __init__(self, config: HoMEConfig, tasks: Sequence[TaskSpec], width: int) -> None:
        super().__init__()
        self.hierarchy, self.both = config.hierarchy, config.expert_input == "both"
        own = safe_names("task", [task.name for task in tasks])
        groups = safe_names("group", list(dict.fromkeys(task.group for task in tasks)))
        self.kind = {own[task.name]: groups[task.group] if config.hierarchy else own[task.name] for task in tasks}
        kinds = list(dict.fromkeys(self.kind.values()))
        counts = {SHARED: config.shared_experts} | dict.fromkeys(kinds, config.group_experts)
        sees = {kind: [SHARED, kind] for kind in kinds} | {SHARED: list(counts)}
        every = dict.fromkeys(counts, "features")
        self.meta = HoMELevel(config, counts, sees, {gate: gate for gate in sees}, every, {"features": width}, width)
        self.task = self._task_level(config, self.meta.level.out_width)
        self.out_width = self.task.level.out_width

    def _task_level(self, config: HoMEConfig, width: int) -> HoMELevel:
        kinds = list(dict.fromkeys(self.kind.values()))
        counts, sources = {SHARED: config.shared_experts}, {SHARED: SHARED}
        if self.hierarchy:
            counts |= dict.fromkeys(kinds, config.group_experts)
            sources |= {kind: kind for kind in kinds}
        counts |= dict.fromkeys(self.kind, config.task_experts)
        sources |= self.kind
        sees = {task: list(dict.fromkeys([SHARED, kind, task])) for task, kind in self.kind.items()}
        widths = {SHARED: width} | dict.fromkeys(kinds, 2 * width if self.both else width)
        gate_width = 2 * width if self.hierarchy else width
        return HoMELevel(config, counts, sees, {task: task for task in self.kind}, sources, widths, gate_width)

    def forward(self, v: Float[Tensor, "B D"] | FactorizedInput) -> Float[Tensor, "B T W"]:
        """Mixtures by task."""
        v = dense(v)
        z = self.meta({"features": v}, dict.fromkeys([*self.meta.own], v))
        pairs = {name: torch.cat([z[SHARED], one], 1) for name, one in z.items() if name != SHARED}
        inputs = {SHARED: z[SHARED]} | (pairs if self.both else {name: z[name] for name in pairs})
        gate_x = {task: pairs[kind] if self.hierarchy else z[kind] for task, kind in self.kind.items()}
        return torch.stack(list(self.task(inputs, gate_x).values()), 1)
