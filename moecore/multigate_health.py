"""What goes wrong in multi-gate experts, in figures: collapse, degradation, under-fitting (HoME, arXiv 2408.05430)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moecore.balance import entropy
from moecore.multigate import GateRecord


@dataclass(frozen=True)
class GateHealth:
    """Figures of one level over all batches seen."""

    gates: tuple[str, ...]
    experts: tuple[str, ...]
    groups: tuple[str, ...]
    visible: Bool[Tensor, "G E"]
    mass: Float[Tensor, "G E"]
    """Mean weight of each gate on each expert."""
    entropy: Float[Tensor, " G"]
    """Mean entropy of a gate's weights over its largest value: 1 near-uniform, 0 always one expert."""
    std: Float[Tensor, " E"]
    """Deviation of an expert's outputs, over rows and units."""
    zeros: Float[Tensor, " E"]
    """Share of activations nearer to zero than a twentieth of the expert's deviation: exact zeros of ReLU, dead ends of
    SiLU."""
    contribution: Float[Tensor, "G E"]
    """Share of an expert in what a gate lets through, weight times norm of the output."""

    @property
    def std_ratio(self) -> float:
        """Largest over smallest deviation: far from 1, one expert shouts the others down."""
        return float(self.std.max() / self.std.min().clamp(min=1e-12))

    def dominance(self) -> dict[str, tuple[str, float]]:
        """Of each expert that several gates see: the gate with the largest part of its mass, and that part.

        Near 1, a shared expert belongs to one task (degradation).
        """
        shared = self.visible.sum(0) > 1
        parts = self.mass / self.mass.sum(0).clamp(min=1e-12)
        best, owner = parts.max(0)
        return {
            name: (self.gates[int(owner[i])], float(best[i])) for i, name in enumerate(self.experts) if bool(shared[i])
        }

    def own_mass(self) -> dict[str, tuple[float, float]]:
        """Of each gate with experts of its own: mean weight on them, and what an even spread would give.

        Own experts are those that no other gate sees. Far below the even spread, they are under-fitted.
        """
        alone = self.visible.sum(0) == 1
        found = {}
        for g, name in enumerate(self.gates):
            own = self.visible[g] & alone
            if bool(own.any()) and not bool((self.visible[g] == own).all()):
                found[name] = (float(self.mass[g, own].sum()), float(own.sum() / self.visible[g].sum()))
        return found


class GateStats:
    """Running totals of what the gates of each level did, for data that does not fit one recording."""

    def __init__(self) -> None:
        self._first: dict[str, GateRecord] = {}
        self._sums: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, records: Sequence[GateRecord], rows: Bool[Tensor, " B"] | None = None) -> None:
        """Add the records of a batch, or of some of its rows."""
        for record in records:
            weights, outputs = record.weights.float(), record.outputs.float()
            if rows is not None:
                weights, outputs = weights[rows], outputs[rows]
            norms = outputs.norm(dim=-1)  # [B, E]
            near = 0.05 * outputs.flatten(0, 1).std() if outputs.numel() > 1 else 0.0
            sums = {
                "rows": torch.tensor(float(len(weights)), dtype=torch.float64),
                "mass": weights.double().sum(0),
                "entropy": entropy(weights.double()).sum(0),
                "sum": outputs.double().sum((0, 2)),
                "square": outputs.double().square().sum((0, 2)),
                "zeros": (outputs.abs() <= near).double().mean(2).sum(0),
                "contribution": (weights * norms[:, None]).double().sum(0),
            }
            self._first.setdefault(record.name, record)
            totals = self._sums.setdefault(record.name, {})
            for key, value in sums.items():
                totals[key] = totals[key] + value.cpu() if key in totals else value.cpu()

    def health(self) -> dict[str, GateHealth]:
        """Figures by level."""
        return {name: self._health(self._first[name], sums) for name, sums in self._sums.items()}

    @staticmethod
    def _health(record: GateRecord, sums: dict[str, Tensor]) -> GateHealth:
        rows, visible = sums["rows"].clamp(min=1), record.visible.cpu()
        count = rows * record.outputs.shape[2]
        mean = sums["sum"] / count
        seen = visible.sum(1).double()
        let_through = sums["contribution"].sum(1, keepdim=True).clamp(min=1e-12)
        return GateHealth(
            record.gates,
            record.experts,
            record.groups,
            visible,
            (sums["mass"] / rows).float(),
            torch.where(seen > 1, sums["entropy"] / rows / seen.log().clamp(min=1e-12), 1.0).float(),
            (sums["square"] / count - mean.square()).clamp(min=0).sqrt().float(),
            (sums["zeros"] / rows).float(),
            (sums["contribution"] / let_through).float(),
        )
