"""See what was routed where: record a forward pass, then measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecore.balance import entropy
from moecore.layer import MoE
from moecore.multigate import GateRecord, MultiGate
from moecore.multigate_sparse import SparseMultiGate
from moecore.routing import Routing

RECORDED = (MoE, MultiGate, SparseMultiGate)
"""Layers that `record` listens to."""


class Recording(list[Routing]):
    """The routings of one or more forward passes, in the order of the calls."""

    def __init__(self, routings: Iterable[Routing] = ()) -> None:
        super().__init__(routings)
        self.gates: list[GateRecord] = []
        """What multi-gate levels decided (`moecore.MultiGate`), likewise."""

    def by_layer(self) -> dict[str, list[Routing]]:
        """Layer name -> its calls."""
        layers: dict[str, list[Routing]] = {}
        for routing in self:
            layers.setdefault(routing.name, []).append(routing)
        return layers


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Collect the routing of every MoE layer of `model`, and the gates of every `MultiGate`, while it runs inside.

    Outside, layers store nothing. A recording is of the model: threads that share it share what is recorded. Leave the
    block before calling `backward()` under activation checkpointing, which runs layers a second time. Copies of the
    model made inside are not recorded.

    Args:
        model: any module with `moecore.MoE` or `moecore.MultiGate` layers in it; a layer that occurs twice goes by its
            first name.

    Yields:
        A list that fills as the model runs, with its graph: detach or drop it when the step is done.

    Example:
        >>> import torch, moecore
        >>> model = torch.nn.Sequential(moecore.MoE.build(8, num_experts=4, top_k=2))
        >>> with moecore.record(model) as recording:
        ...     y = model(torch.randn(6, 8))
        >>> loss = y.square().mean() + moecore.balance_loss(recording)
    """
    recording = Recording()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, RECORDED)]
    before = [module._recorder for _, module in layers]
    for (name, module), outer in zip(layers, before, strict=True):
        kept = recording.gates if isinstance(module, MultiGate) else recording
        module._recorder = _recorder(kept, name, outer)
    try:
        yield recording
    finally:
        for (_, module), outer in zip(layers, before, strict=True):
            module._recorder = outer


def _recorder(kept: list, name: str, outer: Callable[[Any], None] | None) -> Callable[[Any], None]:
    def keep(decision: Routing | GateRecord) -> None:
        own = f"{name}.{decision.name}" if decision.name else name  # a layer of several gates names each
        kept.append(replace(decision, name=own))
        if outer is not None:  # an enclosing `record` sees the layer too
            outer(decision)

    return keep


@dataclass(frozen=True)
class LayerMetrics:
    """Balance and sharpness of one layer's routing."""

    load: list[float]
    """Share of all filled slots per expert."""
    max_violation: float
    """Largest load over mean load, minus 1: 0 when even (arXiv 2408.15664)."""
    load_entropy: float
    """Entropy of the load over log E: 1 when even, 0 when one expert does it all."""
    router_entropy: float
    """Mean entropy of a token's router distribution over log of its size: low means sure decisions."""
    dead_experts: int
    """Experts that received nothing."""
    experts_per_token: float
    """Mean number of filled slots per token."""
    drop_rate: float
    """Share of chosen pairs that a capacity took away."""

    def scalars(self) -> dict[str, float]:
        """Everything but the load, for loggers."""
        names = (
            "max_violation",
            "load_entropy",
            "router_entropy",
            "dead_experts",
            "experts_per_token",
            "drop_rate",
        )
        return {name: float(getattr(self, name)) for name in names}


def routing_metrics(recording: Recording) -> dict[str, LayerMetrics]:
    """Metrics of every recorded layer, its calls taken together."""
    stats = RoutingStats()
    stats.update(recording)
    return stats.metrics()


class RoutingStats:
    """Running totals of what layers routed, for data sets that do not fit one recording.

    Args:
        num_labels: C, to also count how often tokens of samples with each label went to each expert.
    """

    def __init__(self, num_labels: int | None = None) -> None:
        self.num_labels = num_labels
        self._totals: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, recording: Recording, labels: Int[Tensor, " B"] | None = None) -> None:
        """Add a recording; with `labels`, of one batch."""
        for routing in recording:
            assignment = routing.assignment
            sums = {
                "load": assignment.load().double(),
                "entropy": entropy(routing.probs.double()).sum(),
                "tokens": _count(assignment.num_tokens),
                "dropped": _count(0 if assignment.dropped is None else int(assignment.dropped.sum())),
                "columns": _count(routing.scores.shape[1]),
            }
            if self.num_labels is not None and labels is not None:
                sums["labels"] = expert_label_counts(routing, labels, self.num_labels)
            totals = self._totals.setdefault(routing.name, {})
            for name, value in sums.items():
                totals[name] = totals[name] + value.cpu() if name in totals and name != "columns" else value.cpu()

    def metrics(self) -> dict[str, LayerMetrics]:
        """Metrics per layer."""
        return {layer: _layer_metrics(totals) for layer, totals in self._totals.items()}

    def label_counts(self) -> dict[str, Int[Tensor, "C E"]]:
        """Tokens per label and expert, per layer."""
        return {layer: totals["labels"] for layer, totals in self._totals.items() if "labels" in totals}


def _count(number: int) -> Float[Tensor, ""]:
    return torch.tensor(number, dtype=torch.float64)  # float32 stops counting at 2**24


def _layer_metrics(totals: dict[str, Tensor]) -> LayerMetrics:
    load, tokens, dropped = totals["load"], float(totals["tokens"]), float(totals["dropped"])
    filled = float(load.sum())
    share = load / max(filled, 1.0)
    return LayerMetrics(
        load=share.tolist(),
        max_violation=float(share.max() * load.numel() - 1) if filled else 0.0,
        load_entropy=_relative(entropy(share), load.numel()),
        router_entropy=_relative(totals["entropy"] / max(tokens, 1.0), int(totals["columns"])),
        dead_experts=int((load == 0).sum()),
        experts_per_token=filled / max(tokens, 1.0),
        drop_rate=dropped / max(filled + dropped, 1.0),
    )


def _relative(value: Tensor, size: int) -> float:
    """An entropy over its largest value; 1 where there is nothing to choose."""
    return 1.0 if size == 1 else float(value / torch.tensor(float(size)).log())


def expert_counts(routing: Routing) -> Int[Tensor, "B E"]:
    """Tokens of each sample that went to each expert; the routing's leading dimension is the batch."""
    chosen = routing.assignment.chosen().long()  # [T, E]
    batch = routing.lead[0] if routing.lead else chosen.shape[0]
    return chosen.view(batch, -1, chosen.shape[1]).sum(1)


def expert_label_counts(routing: Routing, labels: Int[Tensor, " B"], num_labels: int) -> Int[Tensor, "C E"]:
    """How often tokens of samples with each label went to each expert.

    Args:
        routing: of one call, whose leading dimension is the batch.
        labels: one per sample.
        num_labels: C.
    """
    return sum_by_label(expert_counts(routing), labels, num_labels)


def sum_by_label(counts: Int[Tensor, "B E"], labels: Int[Tensor, " B"], num_labels: int) -> Int[Tensor, "C E"]:
    """Rows of `expert_counts` added up per label."""
    return counts.new_zeros(num_labels, counts.shape[1]).index_add(0, labels, counts)


def mutual_information(counts: Float[Tensor, "C E"] | Int[Tensor, "C E"]) -> float:
    """Mutual information, in nats, of label and expert from their joint counts."""
    joint = counts.double()
    joint = joint / joint.sum().clamp(min=1)
    return float(entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.flatten()))


def specialisation(counts: Float[Tensor, "C E"] | Int[Tensor, "C E"]) -> float:
    """Mutual information over the entropy of the label: the share of the label that the expert gives away, 0 to 1."""
    label = counts.double().sum(1)
    whole = float(entropy(label / label.sum().clamp(min=1)))
    return mutual_information(counts) / whole if whole > 0 else 0.0


def routing_degree(recording: Recording) -> list[int]:
    """Distinct expert combinations among all tokens, over the first layer, the first two, and so on.

    The routing degree of ViMoE (arXiv 2410.15732): where the number stops growing, further layers choose nothing that
    the ones before had not.

    Raises:
        ValueError: if layers route different numbers of tokens.
    """
    combined: Tensor | None = None
    degrees = []
    for calls in recording.by_layer().values():
        chosen = torch.cat([r.assignment.chosen() for r in calls])
        _, code = chosen.unique(dim=0, return_inverse=True)  # one number per expert set
        if combined is not None:
            if combined.shape != code.shape:
                raise ValueError("routing_degree: layers route different numbers of tokens")
            _, code = torch.stack([combined, code], 1).unique(dim=0, return_inverse=True)
        combined = code
        degrees.append(int(code.max()) + 1 if code.numel() else 0)
    return degrees


def token_map(routing: Routing) -> Int[Tensor, "*lead"]:
    """The expert with the largest combine weight for every token, -1 for none, in the layout of the input."""
    table = routing.assignment.dense(routing.weights)
    chosen = routing.assignment.chosen()
    best = table.masked_fill(~chosen, float("-inf")).argmax(-1)
    return best.masked_fill(~chosen.any(-1), -1).view(routing.lead)
