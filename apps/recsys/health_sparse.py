"""What sparse gates do: which experts each of them sends rows to, and which get none. B rows, G gates, E experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moecore.inspect import Recording
from moecore.multigate_sparse import SparseMultiGate
from moecore.routing import Routing

OWNED, ALWAYS = 0.8, 0.98
"""Beyond these a sentence is worth it: part of an expert's rows that one gate sends, share of a gate's rows that one
expert gets."""


@dataclass(frozen=True)
class SparseHealth:
    """Figures of one level over all batches seen."""

    gates: tuple[str, ...]
    experts: tuple[str, ...]
    top_k: int
    visible: Bool[Tensor, "G E"]
    sent: Float[Tensor, "G E"]
    """Share of the rows that a gate sends to an expert; the shares of a gate add up to `top_k`."""
    mass: Float[Tensor, "G E"]
    """Mean weight of each gate on each expert, 0 in rows that it does not send there."""

    def chosen_weight(self) -> Float[Tensor, " E"]:
        """Mean weight of each expert in the rows that it gets; 0 for those without any."""
        return self.mass.sum(0) / self.sent.sum(0).clamp(min=1e-12)

    def dead(self) -> list[str]:
        """Experts that no gate sends a row to."""
        return [name for name, total in zip(self.experts, self.sent.sum(0).tolist(), strict=True) if total == 0]

    def owner(self, expert: int) -> tuple[str, float]:
        """The gate that sends most of an expert's rows, and its part of them; no gate for a dead expert."""
        total = float(self.sent[:, expert].sum())
        if not total:
            return "none", 0.0
        gate = int(self.sent[:, expert].argmax())
        return self.gates[gate], float(self.sent[gate, expert]) / total


class SparseStats:
    """Running totals of what sparse gates routed.

    Args:
        model: whose levels of sparse gates are looked at; recordings must be of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.levels = {name: one for name, one in model.named_modules() if isinstance(one, SparseMultiGate)}
        self._sums: dict[tuple[str, str], Float[Tensor, "2 E"]] = {}
        self._rows: dict[tuple[str, str], int] = {}

    @torch.no_grad()
    def update(self, recording: Recording, rows: Bool[Tensor, " B"] | None = None) -> None:
        """Add the routings of a batch, or of some of its rows."""
        for level, gate, routing in self._routings(recording):
            expert, weights = routing.assignment.expert, routing.weights.double()
            if rows is not None:
                expert, weights = expert[rows], weights[rows]
            count = routing.assignment.num_experts
            pairs = expert.flatten()
            sums = torch.stack(
                [torch.bincount(pairs, one.flatten(), count) for one in (torch.ones_like(weights), weights)]
            ).cpu()
            key = (level, gate)
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums
            self._rows[key] = self._rows.get(key, 0) + len(expert)

    def _routings(self, recording: Recording) -> Iterator[tuple[str, str, Routing]]:
        for routing in recording:
            level, _, gate = routing.name.rpartition(".")
            if level in self.levels:
                yield level, gate, routing

    def health(self) -> dict[str, SparseHealth]:
        """Figures of the levels that were recorded, by name."""
        seen = {level for level, _ in self._sums}
        return {name: self._health(name, level) for name, level in self.levels.items() if name in seen}

    def _health(self, name: str, level: SparseMultiGate) -> SparseHealth:
        counts = {group: bank.num_experts for group, bank in level.experts.items()}
        experts = [n if count == 1 else f"{n}.{i}" for n, count in counts.items() for i in range(count)]
        gates = tuple(level.gates)
        visible = torch.zeros(len(gates), len(experts), dtype=torch.bool)
        figures = torch.zeros(2, len(gates), len(experts), dtype=torch.float64)
        for g, gate in enumerate(gates):
            columns = _columns(counts, level.sees[gate])
            visible[g, columns] = True
            figures[:, g, columns] = self._sums[name, gate] / max(self._rows[name, gate], 1)
        sent, mass = figures.float()
        return SparseHealth(gates, tuple(experts), round(float(sent[0].sum())), visible, sent, mass)


def _columns(counts: dict[str, int], groups: tuple[str, ...]) -> Int[Tensor, " seen"]:
    """Places among all experts of those that a gate sees, in the order of its numbers for them."""
    starts, total = {}, 0
    for group, count in counts.items():
        starts[group], total = total, total + count
    return torch.cat([torch.arange(starts[group], starts[group] + counts[group]) for group in groups])


def sparse_findings(health: SparseHealth) -> list[str]:
    """What stands out, a sentence each."""
    found = [
        f"Dead: no gate sends a row to {name}; raise the balance loss (balance), or take fewer experts."
        for name in health.dead()
    ]
    for i, name in enumerate(health.experts):
        owner, part = health.owner(i)
        if int(health.visible[:, i].sum()) > 1 and part > OWNED:
            found.append(f"Degradation: {name} belongs to {owner}, which sends {part:.0%} of its rows.")
    for g, gate in enumerate(health.gates):
        if int(health.visible[g].sum()) > health.top_k:
            always = [n for n, share in zip(health.experts, health.sent[g].tolist(), strict=True) if share > ALWAYS]
            if len(always) == health.top_k:
                found.append(f"Collapse: {gate} sends nearly all rows to {' and '.join(always)}; it chooses nothing.")
    return found
