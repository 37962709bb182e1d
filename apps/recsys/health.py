"""What the gates and experts of a trained model do on test rows, and whether its tasks pull in different directions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import moecore
from apps.recsys.balancing import gradient_cosines
from apps.recsys.data import RecsysData
from apps.recsys.evaluation import Evaluation
from apps.recsys.health_sparse import SparseHealth, SparseStats
from apps.recsys.loading import Trained
from apps.recsys.losses import task_losses
from moecore.multigate_health import GateHealth, GateStats

OWNED, EVEN, LOUD, STARVED = 0.8, 0.98, 4.0, 0.5
"""Beyond these a sentence is worth it: part of a shared expert's mass that one task has, entropy of a gate, spread of
expert outputs, mass on own experts over what an even spread gives."""


@dataclass(frozen=True)
class Health:
    """Gate figures of every level: over all rows, and of users with short and long histories where there are such."""

    levels: dict[str, GateHealth]
    groups: dict[str, dict[str, GateHealth]]
    sparse: dict[str, SparseHealth] = field(default_factory=dict)
    sparse_groups: dict[str, dict[str, SparseHealth]] = field(default_factory=dict)


@torch.no_grad()
def gate_health(trained: Trained, data: RecsysData, evaluation: Evaluation) -> Health:
    """Run the test rows through the model and look at its gates; nothing for a model without any."""
    everyone, short = _Stats(trained.model), evaluation.short_history
    groups = ("short history", "long history") if short is not None else ()
    parts = {name: _Stats(trained.model) for name in groups}
    batches, start = data.batches("test"), 0
    device = next(trained.model.parameters()).device
    for index in range(len(batches)):
        batch = batches[(0, index)]
        with moecore.record(trained.model) as recording:
            trained.model(batch.to(device))
        everyone.update(recording)
        for name, stats in parts.items():
            own = torch.from_numpy(short[start : start + len(batch)])
            rows = own if name == "short history" else ~own
            if bool(rows.any()):
                stats.update(recording, rows.to(device))
        start += len(batch)
    return Health(
        everyone.gates.health(),
        {name: stats.gates.health() for name, stats in parts.items()},
        everyone.sparse.health(),
        {name: stats.sparse.health() for name, stats in parts.items()},
    )


class _Stats:
    """Running totals of gates that weight all experts, and of those that choose some."""

    def __init__(self, model: nn.Module) -> None:
        self.gates, self.sparse = GateStats(), SparseStats(model)

    def update(self, recording: moecore.Recording, rows: Tensor | None = None) -> None:
        """Add the records of a batch, or of some of its rows."""
        self.gates.update(recording.gates, rows)
        self.sparse.update(recording, rows)


def conflicts(trained: Trained, data: RecsysData, rows: int = 4096) -> Float[np.ndarray, "T T"] | None:
    """Cosine of every two tasks' gradients on what they share, over training rows; None for a single task."""
    if len(trained.spec.tasks) < 2:
        return None
    batches = data.batches("train")
    batch = batches[(0, 0)][:rows].to(next(trained.model.parameters()).device)
    model = trained.model.eval()
    losses = task_losses(model(batch).logits, batch.labels, trained.spec.tasks, trained.config.loss)
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and ".tables." not in name]
    return gradient_cosines(losses, parameters).detach().cpu().numpy()


def findings(health: GateHealth) -> list[str]:
    """What stands out, a sentence each."""
    found = []
    if health.std_ratio > LOUD:
        loud, quiet = health.experts[int(health.std.argmax())], health.experts[int(health.std.argmin())]
        found.append(
            f"Collapse: the outputs of {loud} vary {health.std_ratio:.1f} times as much as those of {quiet}. "
            "Normalise experts (experts.norm true)."
        )
    for name, zeros in zip(health.experts, health.zeros.tolist(), strict=True):
        if zeros > 0.9:
            found.append(
                f"Collapse: {zeros:.0%} of the activations of {name} are near zero; use silu with experts.norm."
            )
    for name, (owner, part) in health.dominance().items():
        if part > OWNED:
            found.append(f"Degradation: {name} belongs to {owner}, which has {part:.0%} of its mass.")
    for name, (mass, even) in health.own_mass().items():
        if mass < STARVED * even:
            found.append(
                f"Under-fitting: {name} puts {mass:.0%} of its weight on experts of its own; an even spread is "
                f"{even:.0%}."
            )
    for name, value, seen in zip(health.gates, health.entropy.tolist(), health.visible.sum(1).tolist(), strict=True):
        if value > EVEN and seen > 1:
            found.append(f"Undifferentiated: {name} weights all its experts alike (entropy {value:.2f} of 1).")
    return found
