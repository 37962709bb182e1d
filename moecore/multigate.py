"""Banks of experts in groups, and gates that each see some of the groups: MMoE, CGC and PLE, HoME, MoAE.

B rows, D width of the input, E experts of all groups, G gates, O width of an expert's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moecore.errors import ConfigError, choice, require
from moecore.factorized import FactorizedInput, Features, linear
from moecore.multigate_experts import BatchNorm, ExpertStack

Inputs = Tensor | FactorizedInput | Mapping[str, Tensor]
"""One input for all, or one by name of group or gate."""
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}
"""How gates weight, by the name that configurations use. An expert that a gate does not see has logit -inf."""


@dataclass(frozen=True, eq=False)
class GateRecord:
    """What the gates of one level decided in one call."""

    weights: Float[Tensor, "B G E"]
    """0 where a gate does not see an expert."""
    outputs: Float[Tensor, "B E O"]
    """What the experts gave."""
    gates: tuple[str, ...]
    experts: tuple[str, ...]
    """Their names, `group` or `group.number`."""
    groups: tuple[str, ...]
    """Group of each expert."""
    visible: Bool[Tensor, "G E"]
    name: str = ""
    """The level's name inside the recorded model."""


class MultiGate(nn.Module):
    """One level: experts in groups, gates that mix what they see.

    `y_g = sum over the e that g sees of w_ge(x_g) f_e(x_group)`. The first layers of all experts and gates that read
    the same input are one matrix product, all mixtures another. MMoE (Ma et al. 2018) is one group that every gate
    sees; CGC (Tang et al. 2020) one shared group and one per task, of which the gate of task k sees its own and the
    shared one; levels on top of each other are PLE.

    Args:
        experts: group -> its experts; all give the same width.
        gates: gate -> the groups it sees.
        gate_width: D of what gates read, one number or one by gate.
        weight: "softmax" or "sigmoid".
        bias: of the gates.
        norm: BatchNorm on the gates' logits, before the softmax.

    Example:
        >>> import torch
        >>> from moecore.multigate import MultiGate
        >>> from moecore.multigate_experts import ExpertStack
        >>> mmoe = MultiGate({"shared": ExpertStack(4, 32, [16])}, {"click": ["shared"], "like": ["shared"]}, 32)
        >>> mmoe(torch.randn(8, 32))["like"].shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        experts: Mapping[str, ExpertStack],
        gates: Mapping[str, Sequence[str]],
        gate_width: int | Mapping[str, int],
        weight: str = "softmax",
        bias: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        choice("weight", weight, WEIGHTS)
        check_level(experts, gates)
        self.experts = nn.ModuleDict(experts)
        self.sees = {name: tuple(groups) for name, groups in gates.items()}
        self.weight = weight
        counts = {name: sum(experts[group].num_experts for group in groups) for name, groups in self.sees.items()}
        widths = {name: gate_width if isinstance(gate_width, int) else gate_width[name] for name in gates}
        self.gates = nn.ModuleDict({name: nn.Linear(widths[name], counts[name], bias) for name in gates})
        self.norm = BatchNorm(sum(counts.values())) if norm else None
        columns, visible = _columns(self.sees, {name: stack.num_experts for name, stack in experts.items()})
        self.register_buffer("columns", columns, persistent=False)  # [G, E]
        self.register_buffer("visible", visible, persistent=False)  # [G, E]
        self._all_visible = bool(visible.all())
        self._recorder: Callable[[GateRecord], None] | None = None
        """Set by `moecore.record` while it is active."""

    @property
    def out_width(self) -> int:
        """O."""
        return next(iter(self.experts.values())).out_width

    @property
    def expert_names(self) -> tuple[str, ...]:
        """In the order of the columns of `GateRecord.weights`."""
        counts = {name: stack.num_experts for name, stack in self.experts.items()}
        return tuple(n if count == 1 else f"{n}.{i}" for n, count in counts.items() for i in range(count))

    def forward(self, x: Inputs, gate_x: Inputs | None = None) -> dict[str, Float[Tensor, "B O"]]:
        """Mixtures by gate.

        Args:
            x: what experts read, `[B, D]` (or `[B, E, D]`, one for each), or one by group.
            gate_x: what gates read, `[B, D]`, or one by gate; None: the same as the experts.
        """
        return dict(zip(self.gates, self.mixtures(x, gate_x).unbind(1), strict=True))

    def mixtures(self, x: Inputs, gate_x: Inputs | None = None) -> Float[Tensor, "B G O"]:
        """As `forward`, side by side in the order of the gates."""
        if gate_x is None and not isinstance(x, Mapping) and all(stack.reads_input for stack in self.experts.values()):
            return self.mix(*self._run_both(x))
        return self.mix(self.run_experts(x), self.run_gates(x if gate_x is None else gate_x))

    def mix(self, outputs: Float[Tensor, "B E O"], weights: Float[Tensor, "B G E"]) -> Float[Tensor, "B G O"]:
        """Mixtures of outputs that `run_experts` gave with weights that `run_gates` gave; this is what is recorded."""
        if self._recorder is not None:
            groups = tuple(name for name, stack in self.experts.items() for _ in range(stack.num_experts))
            record = GateRecord(weights, outputs, tuple(self.gates), self.expert_names, groups, self.visible)
            self._recorder(record)
        return torch.bmm(weights, outputs)

    def run_experts(self, x: Inputs) -> Float[Tensor, "B E O"]:
        """Outputs of all experts, group by group."""
        parts = [stack(x[name] if isinstance(x, Mapping) else x) for name, stack in self.experts.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def columns_of(self, group: str) -> slice:
        """Where the experts of a group are among all."""
        counts = {name: stack.num_experts for name, stack in self.experts.items()}
        start = sum(count for _, count in itertools.takewhile(lambda pair: pair[0] != group, counts.items()))
        return slice(start, start + counts[group])

    def run_gates(self, x: Inputs) -> Float[Tensor, "B G E"]:
        """Weights of all gates, 0 for experts that a gate does not see."""
        if isinstance(x, Mapping):
            return self._weights(torch.cat([gate(x[name]) for name, gate in self.gates.items()], 1))
        return self._weights(linear(x, *self._gate_map()))

    def _weights(self, logits: Float[Tensor, "B C"]) -> Float[Tensor, "B G E"]:
        """From the logits of all gates, side by side."""
        if self.norm is not None:
            logits = self.norm(logits)
        if self._all_visible:
            return WEIGHTS[self.weight](logits.view(logits.shape[0], *self.columns.shape))
        unseen = logits.new_full((logits.shape[0], 1), float("-inf"))
        logits = torch.cat([logits, unseen], 1).index_select(1, self.columns.flatten())
        return WEIGHTS[self.weight](logits.view(logits.shape[0], *self.columns.shape))

    def _gate_map(self) -> tuple[Float[Tensor, "C D"], Float[Tensor, " C"] | None]:
        """All gates as one linear map: weight and bias."""
        gates = list(self.gates.values())
        if len(gates) == 1:
            return gates[0].weight, gates[0].bias
        bias = None if gates[0].bias is None else torch.cat([gate.bias for gate in gates])
        return torch.cat([gate.weight for gate in gates]), bias

    def _run_both(self, x: Features) -> tuple[Float[Tensor, "B E O"], Float[Tensor, "B G E"]]:
        """As `run_experts` and `run_gates`; first layers in one product."""
        weights, biases = zip(*(stack.first for stack in self.experts.values()), self._gate_map(), strict=True)
        bias = None
        if any(one is not None for one in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([weight.new_zeros(len(weight)) if one is None else one for weight, one in pairs])
        *parts, logits = linear(x, torch.cat(weights), bias).split([len(weight) for weight in weights], 1)
        outputs = [stack.go_on(part) for stack, part in zip(self.experts.values(), parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), self._weights(logits)

    def __getstate__(self) -> dict[str, object]:
        """Everything but who listens: a copy made inside `moecore.record` is not part of that recording."""
        return {**self.__dict__, "_recorder": None}


def check_level(experts: Mapping[str, nn.Module], gates: Mapping[str, Sequence[str]]) -> None:
    """Raise `ConfigError` unless gates see groups that exist and all experts give the same width."""
    require(len(experts) > 0, "experts", list(experts), "give at least one group")
    require(len(gates) > 0, "gates", list(gates), "give at least one gate")
    widths = {name: stack.out_width for name, stack in experts.items()}
    require(len(set(widths.values())) == 1, "experts", widths, "must all give the same width")
    for name, groups in gates.items():
        unknown = [group for group in groups if group not in experts]
        if unknown or not groups or len(set(groups)) < len(groups):
            raise ConfigError(f"gates.{name}", list(groups), f"give different groups of {', '.join(experts)}")


def _columns(sees: Mapping[str, Sequence[str]], counts: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """[G, E]: column of each gate's logits (the one after the last where it does not see the expert); who sees whom."""
    owner = [name for name, count in counts.items() for _ in range(count)]
    total = sum(counts[group] for groups in sees.values() for group in groups)
    columns, start = torch.full((len(sees), len(owner)), total), 0
    for row, groups in enumerate(sees.values()):
        for group in groups:
            places = [i for i, name in enumerate(owner) if name == group]
            columns[row, places] = torch.arange(start, start + len(places))
            start += len(places)
    return columns, columns < total
