"""A model in some other form beside PyTorch, on real inputs: numbers, decisions, experts, the task's score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

import moecore
from export.decisions import Agreement
from export.exportable import Exportable, Outputs, Runner, in_torch
from export.measure import session_of

if TYPE_CHECKING:
    import onnx

ROUTING = "moecore.routing"
"""Key of the metadata that says, layer by layer, which tensors of a graph hold expert numbers and weights."""

TIED = 1e-5
"""Difference of two experts' scores, relative to the largest, that rounding explains."""


@dataclass(frozen=True)
class Comparison:
    """How another form of a model compares with PyTorch."""

    rows: int
    max_error: float
    """Largest absolute difference; NaN where only one of the two is a number."""
    mean_error: float
    max_relative_error: float
    """Largest difference of an output over its largest value, the worst output."""
    rms_relative_error: float
    """Root mean square of the differences over that of the outputs, the worst output."""
    decisions: Agreement
    score: tuple[str, float, float, float] | None
    """Name of the task's figure; in PyTorch; of the other form; how far it moved."""

    def scalars(self) -> dict[str, float]:
        """Figures by flat name."""
        found = {
            "rows": float(self.rows),
            "max_error": self.max_error,
            "mean_error": self.mean_error,
            "max_relative_error": self.max_relative_error,
            "rms_relative_error": self.rms_relative_error,
        }
        if self.decisions.count:
            found |= {"decision_agreement": self.decisions.share, "decisions": float(self.decisions.count)}
            found["decision_ties"] = float(self.decisions.ties)
        if self.score:
            name, before, after, _ = self.score
            found |= {f"{name}_torch": before, f"{name}_export": after}
        return found


def compare(
    exportable: Exportable,
    runner: Runner,
    expected: Sequence[Outputs] | None = None,
    tied: Sequence[np.ndarray] | None = None,
) -> Comparison:
    """Run another form of a model on all samples.

    Args:
        exportable: the model.
        runner: the other form.
        expected: what PyTorch gives for the samples, if that is known already.
        tied: of each sample the rows to leave out of numbers and decisions; see `RoutingAgreement`.
    """
    if expected is None:
        expected = [in_torch(exportable.module)(sample) for sample in exportable.samples]
    found = [runner(sample) for sample in exportable.samples]
    score = None
    if exportable.score is not None:
        before, after = (exportable.score.of(joined(each)) for each in (expected, found))
        score = (exportable.score.name, before, after, exportable.score.change(before, after))
    if tied is not None:
        expected, found = (
            [[np.delete(out, rows, 0) for out in one] for one, rows in zip(calls, tied, strict=True)]
            for calls in (expected, found)
        )
    decisions = Agreement()
    for before, after in zip(expected, found, strict=True):
        for a, b in zip(before, after, strict=True):
            decisions += exportable.decide(a, b)
    ours, theirs = joined(found), joined(expected)
    differences = [np.abs(_numbers(a, b)) for a, b in zip(ours, theirs, strict=True)]
    scales = [max(float(np.nanmax(np.abs(b), initial=0.0)), 1e-12) for b in theirs]
    sizes = [max(np.sqrt(np.nanmean(b.astype(np.float64) ** 2)), 1e-12) for b in theirs]
    return Comparison(
        rows=len(ours[0]),
        max_error=float(max(d.max(initial=0.0) for d in differences)),
        mean_error=float(np.mean([d.mean() for d in differences])),
        max_relative_error=float(np.max([d.max(initial=0.0) / s for d, s in zip(differences, scales, strict=True)])),
        rms_relative_error=float(np.max([np.sqrt(np.mean(d**2)) / s for d, s in zip(differences, sizes, strict=True)])),
        decisions=decisions,
        score=score,
    )


def joined(calls: Sequence[Outputs]) -> Outputs:
    """Outputs of several calls, along the batch."""
    return [np.concatenate(parts) for parts in zip(*calls, strict=True)]


def _numbers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Differences in double precision; zero where both are no numbers, or the same infinity."""
    same = (np.isnan(a) & np.isnan(b)) | (a == b)
    return np.where(same, 0.0, a.astype(np.float64) - np.where(same, a, b))


@dataclass(frozen=True)
class RoutingAgreement:
    """Whether a graph sends tokens to the experts that PyTorch sends them to."""

    by_layer: Mapping[str, float]
    """Share of tokens with the very same experts, over all calls of the layer."""
    tied: Sequence[np.ndarray]
    """Of each sample the rows in which a token went to another expert that scores the same up to rounding: their
    outputs may differ without anything being wrong."""


def routing_agreement(exportable: Exportable, proto: onnx.ModelProto) -> RoutingAgreement:
    """Compare a graph's routing with PyTorch's on all samples.

    Args:
        exportable: the model.
        proto: a graph whose metadata names the routing tensors; see `ROUTING`.
    """
    layers = routing_layers(proto)
    if not layers:
        return RoutingAgreement({}, [np.zeros(0, int) for _ in exportable.samples])
    run = _probe(proto, [layer["expert"] for layer in layers])
    counts: dict[str, np.ndarray] = {}
    tied: list[np.ndarray] = []
    for sample in exportable.samples:
        with moecore.record(exportable.module) as recording, torch.no_grad():
            exportable.module(*sample.tensors)
        calls: dict[str, list[moecore.Routing]] = {}
        for routing in recording:
            calls.setdefault(routing.name, []).append(routing)
        rows: set[int] = set()
        for layer, chosen in zip(layers, run(sample.feed), strict=True):
            routing = calls[layer["layer"]].pop(0) if calls.get(layer["layer"]) else None
            tokens = 0 if routing is None else len(routing.scores)
            if not tokens or len(chosen) % tokens:
                continue
            chosen = chosen[:: len(chosen) // tokens]  # a unit's tokens all go the same way
            expected, found = routing.assignment.chosen().numpy(), _table(chosen, routing.assignment.num_experts)
            same = (expected == found).all(1)
            counts[layer["layer"]] = counts.get(layer["layer"], 0) + np.array([same.sum(), tokens])
            swapped = np.flatnonzero(~same)
            close = swapped[_alike(routing.scores.numpy()[swapped], expected[swapped], found[swapped])]
            rows |= set((close * len(sample.tensors[0]) // tokens).tolist())
        tied.append(np.array(sorted(rows), int))
    return RoutingAgreement({layer: float(same / total) for layer, (same, total) in counts.items()}, tied)


def _alike(scores: np.ndarray, expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Whether experts that were left out `[T, E]` score what those taken instead score, up to rounding: `[T]`."""
    scores = scores[:, : expected.shape[1]]
    gone = np.where(expected & ~found, scores, -np.inf).max(1, initial=-np.inf)
    come = np.where(found & ~expected, scores, np.inf).min(1, initial=np.inf)
    return np.abs(gone - come) <= TIED * np.abs(scores).max(1, initial=1e-12)


def routing_layers(proto: onnx.ModelProto) -> list[Mapping[str, str]]:
    """What the metadata says of the mixtures in a graph."""
    return next((json.loads(one.value) for one in proto.metadata_props if one.key == ROUTING), [])


def _probe(proto: onnx.ModelProto, names: Sequence[str]):
    """The graph with inner tensors as its outputs."""
    import onnx

    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    del probed.graph.output[:]
    unique = list(dict.fromkeys(names))
    probed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in unique)
    session = session_of(probed)

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        given = {one.name for one in session.get_inputs()}
        found = dict(zip(unique, session.run(None, {k: v for k, v in feed.items() if k in given}), strict=True))
        return [found[name] for name in names]

    return run


def _table(expert: np.ndarray, num_experts: int) -> np.ndarray:
    """Expert numbers `[T, K]`, E where a slot is empty -> who was chosen `[T, E]`."""
    table = np.zeros((len(expert), num_experts + 1), bool)
    np.put_along_axis(table, np.minimum(expert, num_experts), True, axis=1)
    return table[:, :num_experts]
