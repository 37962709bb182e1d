"""Multi-gate experts of which every gate chooses a few: hundreds of experts, the multiply-adds of those chosen.

Gates, and in training the gradients of all weights, still grow with the number of experts.

B rows, D width of the input, E experts that a gate sees, K of them chosen, G gates, O width of an expert's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecore.build import build_router
from moecore.config import MoEConfig
from moecore.errors import require
from moecore.executors import execute
from moecore.experts import ExpertBank
from moecore.factorized import FactorizedInput, dense
from moecore.multigate import Inputs, check_level
from moecore.routing import Assignment, Routing


class SparseMultiGate(nn.Module):
    """One level of experts in groups, of which each gate chooses K among those it sees.

    Every gate is a router of its own (`moecore.Router`), the experts of a group are a bank that `moecore.execute` runs
    on the rows that any gate sends there. `moecore.record` shows a `Routing` per gate, for `moecore.balance_loss`.

    Args:
        experts: group -> bank; all give the same width.
        gates: gate -> the groups it sees.
        gate_width: D of what gates read, one number or one by gate.
        top_k: K.
        executor: a name of `moecore.EXECUTORS`, or "auto".
        aux_loss: balance losses of every gate, name -> coefficient.

    Example:
        >>> import torch
        >>> from moecore.multigate_bank import StackBank
        >>> from moecore.multigate_sparse import SparseMultiGate
        >>> level = SparseMultiGate({"shared": StackBank(256, 32, [16])}, {"click": ["shared"]}, 32, top_k=2)
        >>> level(torch.randn(8, 32))["click"].shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        experts: Mapping[str, ExpertBank],
        gates: Mapping[str, Sequence[str]],
        gate_width: int | Mapping[str, int],
        top_k: int,
        executor: str = "auto",
        aux_loss: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        check_level(experts, gates)
        self.experts = nn.ModuleDict(experts)
        self.sees = {name: tuple(groups) for name, groups in gates.items()}
        self.executor, self.aux_loss = executor, dict(aux_loss or {})
        routers = {}
        for name, groups in self.sees.items():
            seen = sum(experts[group].num_experts for group in groups)
            require(1 <= top_k <= seen, "top_k", top_k, f"must lie between 1 and {seen}, the experts that a gate sees")
            config = MoEConfig(num_experts=seen, top_k=top_k, aux_loss=self.aux_loss)
            routers[name] = build_router(config, gate_width if isinstance(gate_width, int) else gate_width[name])
        self.gates = nn.ModuleDict(routers)
        self._recorder: Callable[[Routing], None] | None = None
        """Set by `moecore.record` while it is active."""

    @property
    def out_width(self) -> int:
        """O."""
        return next(iter(self.experts.values())).out_width

    def forward(self, x: Inputs, gate_x: Inputs | None = None) -> dict[str, Float[Tensor, "B O"]]:
        """Mixtures by gate; arguments as for `moecore.MultiGate`."""
        return dict(zip(self.gates, self.mixtures(x, gate_x).unbind(1), strict=True))

    def mixtures(self, x: Inputs, gate_x: Inputs | None = None) -> Float[Tensor, "B G O"]:
        """As `forward`, side by side in the order of the gates."""
        x = dense(x) if isinstance(x, FactorizedInput) else x
        gate_x = x if gate_x is None else gate_x
        routings = {
            name: router(gate_x if isinstance(gate_x, Tensor) else gate_x[name]) for name, router in self.gates.items()
        }
        if self._recorder is not None:
            for name, routing in routings.items():
                rows = (routing.assignment.num_tokens,)
                self._recorder(replace(routing, name=name, lead=rows, aux_loss=self.aux_loss))
        mixed: dict[str, Tensor] = {}
        for group in self.experts:
            readers = [name for name, groups in self.sees.items() if group in groups]
            if not readers:
                continue
            own = x if isinstance(x, Tensor) else x[group]
            parts = self._run_group(group, own, {name: routings[name] for name in readers})
            for name, part in zip(readers, parts.unbind(), strict=True):
                mixed[name] = mixed[name] + part if name in mixed else part
        return torch.stack([mixed[name] for name in self.gates], 1)

    def _run_group(
        self, group: str, x: Float[Tensor, "B D"], routings: Mapping[str, Routing]
    ) -> Float[Tensor, "G B O"]:
        """What each gate gets from the experts of a group: all gates' rows in one pass over the bank."""
        bank, rows, count = self.experts[group], x.shape[0], len(routings)
        expert = torch.cat([r.assignment.expert - self._first(name, group) for name, r in routings.items()])  # [G B, K]
        weights = torch.cat([r.weights for r in routings.values()])
        inside = (expert >= 0) & (expert < bank.num_experts)
        valid = None if len(self.experts) == 1 else inside
        assignment = Assignment(expert.clamp(0, bank.num_experts - 1), count * rows, bank.num_experts, valid=valid)
        many = x.expand(count, *x.shape).reshape(-1, x.shape[1])
        return execute(many, bank, assignment, weights, self.executor).view(count, rows, -1)

    def _first(self, gate: str, group: str) -> int:
        """Number that the first expert of a group has for a gate."""
        before = self.sees[gate][: self.sees[gate].index(group)]
        return sum(self.experts[name].num_experts for name in before)

    def __getstate__(self) -> dict[str, object]:
        """Everything but who listens: a copy made inside `moecore.record` is not part of that recording."""
        return {**self.__dict__, "_recorder": None}
