"""From operations on elements to layers on vectors, and their values in floating point.

Layers are made on demand, from the outputs on. What is read in parts is made in these parts from the start (the experts
of one product become layers of their own), so that nothing has to be sliced, which hls4ml cannot.

B samples, N units of a layer, K of its input.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from export.hls4ml.elements import PAIRS, Elements
from export.hls4ml.reader import Reader

if TYPE_CHECKING:
    import onnx

PARAMETERS = {"affine": ("scale", "bias"), "layernorm": ("scale", "bias"), "dense": ("weight", "bias")}
"""Weights of each kind of layer that has some."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of the project; kinds as of `Operation`, and "concatenate" of two."""

    kind: str
    name: str
    origin: str
    """Of the module or node it comes from."""
    size: int
    """N."""
    inputs: tuple[str, ...] = ()
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def multiply_adds(self) -> int:
        """Of one sample."""
        if self.kind == "dense":
            return self.weights["weight"].size
        return self.size * int(self.weights["count"]) if self.kind == "mix" else 0


@dataclass(frozen=True)
class Plan:
    """Layers, in an order in which they can be computed.

    Attributes:
        layers: of the project.
        inputs: graph input -> its layer.
        outputs: graph output -> the layer that gives it.
    """

    layers: tuple[Layer, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values `[B, N]` of every layer in float64.

        Args:
            inputs: of the graph, `[B, ...]` each.
        """
        found: dict[str, np.ndarray] = {}
        given = {layer: np.asarray(inputs[name], np.float64) for name, layer in self.inputs.items()}
        for layer in self.layers:
            if layer.kind == "input":
                found[layer.name] = given[layer.name].reshape(len(given[layer.name]), -1)
            else:
                found[layer.name] = _value(layer, [found[name] for name in layer.inputs])
        return found


def make_plan(proto: onnx.ModelProto) -> Plan:
    """Layers for a static ONNX graph.

    Args:
        proto: of one sample, without opaque nodes.

    Raises:
        ExportError: hls4ml has no layers for it.
    """
    reader, cuts = Reader(proto), {}
    while True:
        planner = _Planner(reader.elements, cuts)
        inputs = {name: planner.vector(ids) for name, ids in reader.inputs.items()}
        outputs = {name: planner.vector(ids) for name, ids in reader.outputs.items()}
        if planner.cuts == cuts:
            return Plan(tuple(planner.layers), inputs, outputs)
        cuts = planner.cuts


class _Planner:
    """Makes layers for vectors of elements.

    Args:
        elements: the operations.
        cuts: operation -> rows at which it is read in parts, as found so far.
    """

    def __init__(self, elements: Elements, cuts: Mapping[int, frozenset[int]]) -> None:
        self.elements, self.known_cuts = elements, cuts
        self.cuts = dict(cuts)
        self.layers: list[Layer] = []
        self.sizes: dict[str, int] = {}
        self.count: Counter[str] = Counter()
        self.made: dict[bytes, str] = {}
        """Ids of a vector -> its layer."""

    def vector(self, ids: np.ndarray) -> str:
        """The layer whose units are the elements `[N]`."""
        ids = np.ascontiguousarray(ids, np.int64)
        if (key := ids.tobytes()) not in self.made:
            self.made[key] = self._vector(ids)
        return self.made[key]

    def _vector(self, ids: np.ndarray) -> str:
        runs = [part for run in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1) for part in self._parts(run)]
        ordered = bool((np.diff(ids) > 0).all())
        repeated = len(np.unique(ids)) < len(ids)
        scattered = len(runs) > 2 * len(np.unique(self.elements.owners(ids)))
        partial = any(len(run) < len(self._unit(run)) for run in runs)
        if partial or repeated or (scattered and not ordered):
            return self._select(ids)
        for run in runs:
            number = int(self.elements.owners(run[:1])[0])
            rows = {int(run[0]), int(run[-1]) + 1}
            self.cuts[number] = self.cuts.get(number, frozenset()) | {
                row - self.elements.starts[number] for row in rows
            }
        return self._concatenated([self.vector(run) if len(runs) > 1 else self._layer(run) for run in runs])

    def _parts(self, run: np.ndarray) -> list[np.ndarray]:
        """Consecutive elements, cut where operations end or are read in parts."""
        first, last = self.elements.owners(run[[0, -1]])
        parts = []
        for number in range(first, last + 1):
            start = self.elements.starts[number]
            low, high = max(run[0] - start, 0), min(run[-1] + 1 - start, self.elements.operations[number].size)
            inner = [cut for cut in sorted(self.known_cuts.get(number, ())) if low < cut < high]
            edges = [low, *([] if self.elements.operations[number].whole else inner), high]
            parts += [np.arange(start + a, start + b) for a, b in itertools.pairwise(edges)]
        return parts

    def _unit(self, run: np.ndarray) -> np.ndarray:
        """The least that can be computed of one operation when a run of its elements is read."""
        number = int(self.elements.owners(run[:1])[0])
        return self._all(number) if self.elements.operations[number].whole else run

    def _all(self, number: int) -> np.ndarray:
        """Elements of an operation."""
        return np.arange(*self.elements.starts[number : number + 2])

    def _cover(self, ids: np.ndarray) -> np.ndarray:
        """Ids of a vector that holds all the elements, in rising order, and needs no selection."""
        operations = self.elements.operations
        return np.concatenate(
            [
                self._all(number) if operations[number].whole else np.intersect1d(self._all(number), ids)
                for number in np.unique(self.elements.owners(ids))
            ]
        )

    def _select(self, ids: np.ndarray) -> str:
        """Elements in any order and number, by a linear layer of zeros and ones."""
        source = self._cover(ids)
        weight = np.zeros((len(ids), len(source)))
        weight[np.arange(len(ids)), np.searchsorted(source, ids)] = 1
        return self._add("dense", "select", len(ids), (source,), {"weight": weight, "bias": np.zeros(len(ids))})

    def _concatenated(self, names: Sequence[str]) -> str:
        """Vectors side by side; hls4ml joins two at a time."""
        names = list(names)
        while len(names) > 1:
            pairs = [names[i : i + 2] for i in range(0, len(names), 2)]
            names = [pair[0] if len(pair) == 1 else self._append("concatenate", "concatenate", pair) for pair in pairs]
        return names[0]

    def _layer(self, run: np.ndarray) -> str:
        """Consecutive elements of one operation."""
        number = int(self.elements.owners(run[:1])[0])
        operation, rows = self.elements.operations[number], run - self.elements.starts[number]
        weights = {name: one if one.ndim == 0 else one[rows] for name, one in operation.weights.items()}
        if operation.kind == "dense":
            source = self._cover(operation.inputs[0])
            spread = np.zeros((len(rows), len(source)))
            np.add.at(spread.T, np.searchsorted(source, operation.inputs[0]), weights["weight"].T)
            return self._add("dense", operation.name, len(rows), (source,), {**weights, "weight": spread})
        if operation.kind == "mix":
            read = (operation.inputs[0], operation.inputs[1][:, rows].ravel())
            return self._add("mix", operation.name, len(rows), read, {"count": np.array(len(operation.inputs[0]))})
        read = tuple(ids if operation.whole else ids[rows] for ids in operation.inputs)
        return self._add(operation.kind, operation.name, len(rows), read, weights)

    def _add(self, kind: str, origin: str, size: int, read: Sequence[np.ndarray], weights: Mapping) -> str:
        return self._append(kind, origin, [self.vector(ids) for ids in read], size, weights)

    def _append(
        self, kind: str, origin: str, inputs: Sequence[str], size: int = 0, weights: Mapping | None = None
    ) -> str:
        name = f"{kind}_{self.count[kind]}"
        self.count[kind] += 1
        self.sizes[name] = size or sum(self.sizes[one] for one in inputs)
        self.layers.append(Layer(kind, name, origin, self.sizes[name], tuple(inputs), weights or {}))
        return name


def _value(layer: Layer, given: Sequence[np.ndarray]) -> np.ndarray:
    x, own = given[0], layer.weights
    if layer.kind == "dense":
        return x @ own["weight"].T + own["bias"]
    if layer.kind == "affine":
        return x * own["scale"] + own["bias"]
    if layer.kind == "concatenate":
        return np.concatenate(given, 1)
    if layer.kind == "mix":
        return np.einsum("bk,bkn->bn", x, given[1].reshape(len(x), x.shape[1], -1))
    if layer.kind == "layernorm":
        centred = x - x.mean(1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(1, keepdims=True) + own["epsilon"]) * own["scale"] + own["bias"]
    if layer.kind in PAIRS.values():
        return getattr(np, layer.kind)(*given)
    return _activated(layer, x)


def _activated(layer: Layer, x: np.ndarray) -> np.ndarray:
    if layer.kind == "softmax":
        risen = np.exp(x - x.max(1, keepdims=True))
        return risen / risen.sum(1, keepdims=True)
    if layer.kind == "sigmoid":
        return 1 / (1 + np.exp(-x))
    if layer.kind == "tanh":
        return np.tanh(x)
    if layer.kind == "relu":
        return np.maximum(x, 0)
    below = np.expm1(np.minimum(x, 0)) if layer.kind == "elu" else np.minimum(x, 0)
    return np.maximum(x, 0) + layer.weights["alpha"] * below
