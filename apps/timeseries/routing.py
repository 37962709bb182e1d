"""Which expert handles which pattern: what layers routed, by series, by frequency and by the phase of the season.

W windows, U units of a layer in a context (points, patches, segments, or the context as a whole), E experts, S series.
Units without any observed point are padding and count nowhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

import moecore
from apps.timeseries.data import SeriesData
from apps.timeseries.models.base import ForecastModel, Windows, instance_scale
from apps.timeseries.phases import Phases
from apps.timeseries.traits import Traits, between
from apps.timeseries.windows import WindowSet, evaluation_index, training_index

DRAWS = 3
"""Shuffles that chance is averaged over."""


@dataclass
class ByLabel:
    """How often units of each label went to each expert."""

    counts: Int[np.ndarray, "C E"]
    shuffled: Int[np.ndarray, "draws C E"]
    """The same with labels shuffled among the windows."""

    @classmethod
    def zeros(cls, labels: int, experts: int) -> ByLabel:
        """Nothing counted yet."""
        return cls(np.zeros((labels, experts), int), np.zeros((DRAWS, labels, experts), int))

    @property
    def specialisation(self) -> float:
        """Share of the label that the expert gives away."""
        return moecore.specialisation(torch.from_numpy(self.counts))

    @property
    def chance(self) -> float:
        """The same with shuffled labels: what so many windows give by chance."""
        return float(np.mean([moecore.specialisation(torch.from_numpy(draw)) for draw in self.shuffled]))

    def grouped(self, groups: Sequence[int], count: int) -> ByLabel:
        """Labels joined to `count` groups, given the group of each label."""
        found = ByLabel.zeros(count, self.counts.shape[1])
        np.add.at(found.counts, np.array(groups), self.counts)
        np.add.at(found.shuffled.swapaxes(0, 1), np.array(groups), self.shuffled.swapaxes(0, 1))
        return found


@dataclass
class ExpertUse:
    """What one layer routed over many windows."""

    metrics: moecore.LayerMetrics
    """Of all units, padding included."""
    series: ByLabel
    """Labels are the series."""
    phase: dict[str, ByLabel]
    """Title of a calendar (hour of the day, month, ...) -> labels are its phases."""
    phase_names: dict[str, tuple[str, ...]]
    """Title of a calendar -> what its phases are called."""
    starts: Int[np.ndarray, " U"]
    """Where in the context each unit begins, in points; negative where a first patch reaches before it."""
    ends: Int[np.ndarray, " U"]
    """Where it ends."""
    traits: Traits
    """What the units of each expert look like."""
    maps: dict[int, Int[np.ndarray, " U"]] = field(default_factory=dict)
    """Row of the window set -> main expert of each unit, -1 for padding: of the windows asked for."""
    weights: dict[int, Float[np.ndarray, " E"]] = field(default_factory=dict)
    """Row of the window set -> mean weight of each expert, the sum being 1."""

    @property
    def load(self) -> Float[np.ndarray, " E"]:
        """Share of the units' slots that each expert has."""
        counts = self.series.counts.sum(0)
        return counts / max(counts.sum(), 1)

    @property
    def dead(self) -> list[int]:
        """Experts that got nothing."""
        return np.flatnonzero(self.load == 0).tolist()

    @property
    def whole(self) -> bool:
        """Whether contexts are routed as a whole."""
        return len(self.starts) == 1


@torch.no_grad()
def expert_use(
    model: ForecastModel, windows: WindowSet, rows: Int[np.ndarray, " R"], keep: Sequence[int] = ()
) -> dict[str, ExpertUse]:
    """Run contexts through a model and count who worked on what.

    Args:
        model: in eval mode; none of its layers need be MoE.
        windows: whose contexts.
        rows: of the window set to look at.
        keep: rows whose maps and weights are kept; they are looked at too.
    """
    rows = np.unique(np.concatenate([rows, np.array(keep, int)]))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    stats, counter = moecore.RoutingStats(), _Counter(windows, rows, set(keep))
    seasons = windows.seasons[windows.index[rows, 0]]
    parts = [rows[seasons == value] for value in np.unique(seasons)]
    for part in (chunk for own in parts for chunk in np.array_split(own, -(-len(own) // 128))):
        batch = windows.batch(part)
        with moecore.record(model) as recording:
            positions = model.trace(batch.to(device)).cpu().numpy()
        stats.update(recording)
        past = instance_scale(batch.past).normalize(batch.past).numpy()
        for routing in recording:
            counter.add(routing, part, unit_spans(model, routing, positions, len(part), windows.context), past)
    metrics = stats.metrics()
    return {name: ExpertUse(metrics[name], **counter.tables(name)) for name in counter.found}


def unit_spans(
    model: nn.Module, routing: moecore.Routing, positions: Int[np.ndarray, " P"], batch: int, context: int
) -> tuple[Int[np.ndarray, " U"], Int[np.ndarray, " U"]]:
    """Where in the context each of a layer's units begins and ends, in points.

    Units are positions, runs of as many consecutive positions as the layer's segments have, or the whole context.
    """
    units = routing.assignment.num_tokens // batch
    if not len(positions) or units == 1:
        return np.zeros(units, int), np.full(units, context)
    size = model.get_submodule(routing.name).unit
    starts = positions[:: size if isinstance(size, int) else 1][:units]
    following = np.append(starts[1:], context)
    return starts, np.where(following > starts, following, context)  # a next variate begins where the first did


class _Counter:
    """Adds up routings."""

    def __init__(self, windows: WindowSet, rows: Int[np.ndarray, " R"], keep: set[int]) -> None:
        self.windows, self.keep = windows, keep
        self.phases = Phases(windows.store.series, windows.seasons)
        self.found: dict[str, dict] = {}
        rng = np.random.default_rng(0)
        series = windows.index[rows, 0]
        self._shuffled = {int(r): s for r, s in zip(rows, _permuted(rng, series).T, strict=True)}
        self._turns = {int(r): t for r, t in zip(rows, rng.integers(0, 1 << 30, (len(rows), DRAWS)), strict=True)}

    def add(self, routing: moecore.Routing, rows: Int[np.ndarray, " B"], spans: tuple, past: Float[np.ndarray, "B L"]):
        """Count one call of a layer on a batch; contexts are normalised."""
        starts, ends = spans
        experts = routing.assignment.num_experts
        own = self.found.setdefault(routing.name, self._empty(experts, starts, ends))
        chosen = routing.assignment.chosen().cpu().numpy().reshape(len(rows), -1, experts)
        real = between(np.isfinite(past).astype(int), starts, ends) > 0  # [B, U]
        chosen = chosen & real[..., None]
        per_window = chosen.sum(1)
        np.add.at(own["series"].counts, self.windows.index[rows, 0], per_window)
        labels = np.stack([self._shuffled[int(r)] for r in rows], 1)  # [draws, B]
        for draw, shuffled in zip(own["series"].shuffled, labels, strict=True):
            np.add.at(draw, shuffled, per_window)
        self._add_phases(own["phase"], rows, chosen, starts)
        own["traits"].add(past, chosen, starts, ends)
        self._keep(own, routing, rows, real)

    def _empty(self, experts: int, starts: np.ndarray, ends: np.ndarray) -> dict:
        series = ByLabel.zeros(len(self.windows.store.series), experts)
        phase = ByLabel.zeros(self.phases.count, experts)
        return {
            "series": series,
            "phase": phase,
            "starts": starts,
            "ends": ends,
            "traits": Traits(experts),
            "maps": {},
            "weights": {},
        }

    def _add_phases(self, table: ByLabel, rows: np.ndarray, chosen: Bool[np.ndarray, "B U E"], starts) -> None:
        """A unit's phase is that of its first point; of a context as a whole, of the first point to forecast."""
        window, unit, expert = np.nonzero(chosen)
        series, origin = self.windows.index[rows[window]].T
        offset = np.maximum(starts[unit] - self.windows.context, -origin) if len(starts) > 1 else 0
        first, size, phase = self.phases.at(series, origin + offset)
        known = size > 0
        first, size, phase, expert, window = (a[known] for a in (first, size, phase, expert, window))
        np.add.at(table.counts, (first + phase, expert), 1)
        turns = np.array([self._turns[int(r)] for r in rows]).reshape(len(rows), DRAWS)[window]
        for draw, turn in zip(table.shuffled, turns.T, strict=True):
            np.add.at(draw, (first + (phase + turn) % size, expert), 1)

    def _keep(self, own: dict, routing: moecore.Routing, rows: np.ndarray, real: Bool[np.ndarray, "B U"]) -> None:
        wanted = [i for i, row in enumerate(rows) if int(row) in self.keep]
        if not wanted:
            return
        main = moecore.token_map(routing).cpu().numpy().reshape(real.shape)
        weights = routing.assignment.dense(routing.weights).float().cpu().numpy().reshape(*real.shape, -1)
        for i in wanted:
            own["maps"][int(rows[i])] = np.where(real[i], main[i], -1)
            mean = weights[i][real[i]].sum(0)
            own["weights"][int(rows[i])] = mean / max(mean.sum(), 1e-9)

    def tables(self, name: str) -> dict:
        """Fields of an `ExpertUse`."""
        own = self.found[name]
        phase = {
            title: ByLabel(own["phase"].counts[part], own["phase"].shuffled[:, part])
            for title, part in self.phases.parts().items()
        }
        names = {title: one.names for title, one in self.phases.calendars.items()}
        return own | {"phase": phase, "phase_names": names}


def contexts(windows: WindowSet) -> WindowSet:
    """Test windows, and after them windows of the same series' earlier points: contexts to look at, not futures."""
    store, found = windows.store, copy.copy(windows)
    earlier = [evaluation_index(store, "val", windows.context, 1), training_index(store, windows.context, 1)]
    found.index, found.horizon = np.concatenate([windows.index, *earlier]), 1
    return found


def _permuted(rng: np.random.Generator, values: Int[np.ndarray, " R"]) -> Int[np.ndarray, "draws R"]:
    return np.stack([rng.permutation(values) for _ in range(DRAWS)])


def sampled(count: int, most: int, first: int = 0) -> Int[np.ndarray, " R"]:
    """At most so many of `count` windows, the first so many before any others.

    At random: evenly spaced windows may all lie at the same phase of the season.
    """
    if count <= most:
        return np.arange(count)
    rng = np.random.default_rng(0)
    if first < most:
        return np.append(np.arange(first), np.sort(first + rng.choice(count - first, most - first, replace=False)))
    return np.sort(rng.choice(first, most, replace=False))


def affordable(macs: int, budget: float, least: int, most: int) -> int:
    """How many windows of so many multiply-adds each a budget allows, within bounds."""
    return int(np.clip(budget / max(macs, 1), least, most))


def shares(counts: Int[np.ndarray, "R E"]) -> Float[np.ndarray, "R E"]:
    """Rows as shares."""
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def example(data: SeriesData, horizon: int | None = None) -> Windows:
    """One test window without its future, for counting and benchmarks."""
    windows = data.windows("test", horizon or data.config.horizon)
    row = len(windows) // 2
    batch = windows.batch(np.array([row]))
    return Windows(batch.past, None, batch.futr, batch.hist, batch.stat, season=batch.season)


class _Tracing(nn.Module):
    """A model whose forward is its trace."""

    def __init__(self, model: ForecastModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Windows) -> object:
        return self.model.trace(windows)


def trace_macs(model: ForecastModel, windows: Windows) -> int:
    """Multiply-adds of one pass over the contexts of windows."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return moecore.count_cost(_Tracing(model), windows.to(device)).macs
