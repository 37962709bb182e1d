"""A static ONNX graph of one sample, element by element: which number is computed from which others, and how.

Reshapes, transposes, slices and concatenations only move elements, so that here they cost nothing and leave no trace:
what stays are the operations that hls4ml has layers for, on vectors. N elements of an operation, K of its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

CONSTANT = -1
"""Id of elements that are numbers known beforehand."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation and the elements it reads.

    Kinds: "input"; "dense" (reads `[K]`, weights `weight` [N, K] and `bias` [N]); "affine" (`scale` and `bias` [N]);
    the activations; "softmax"; "layernorm" (`scale` and `bias` [N], `epsilon`); the elementwise pairs of `PAIRS`; "mix"
    (factors `[K]` times values `[K, N]`).
    """

    kind: str
    name: str
    """Of the module or node it comes from."""
    size: int
    """N."""
    inputs: tuple[np.ndarray, ...] = ()
    """Ids of elements."""
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether elements of it cannot be computed apart from each other."""
        return self.kind in ("input", "softmax", "layernorm")


PAIRS = {"Add": "add", "Sub": "subtract", "Mul": "multiply", "Max": "maximum", "Min": "minimum"}
"""ONNX operators on two tensors, and hls4ml's names of them."""
ACTIVATIONS = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Elu": "elu", "LeakyRelu": "leaky_relu"}
"""ONNX operators on each element, and hls4ml's names of them."""


class Elements:
    """Operations, their elements numbered through."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.starts: list[int] = [0]
        """Id of the first element of each operation, and of the next."""

    def add(self, operation: Operation) -> np.ndarray:
        """Ids `[N]` of a new operation's elements."""
        self.operations.append(operation)
        self.starts.append(self.starts[-1] + operation.size)
        return np.arange(self.starts[-2], self.starts[-1])

    def owners(self, ids: np.ndarray) -> np.ndarray:
        """Number of the operation of each element."""
        return np.searchsorted(self.starts, ids, side="right") - 1


@dataclass(frozen=True, eq=False)
class Symbolic:
    """A tensor of elements."""

    ids: np.ndarray
    """`CONSTANT` where the element is a number."""
    values: np.ndarray
    """The numbers, 0 elsewhere."""

    @classmethod
    def of(cls, ids: np.ndarray) -> Symbolic:
        """A tensor without constants."""
        return cls(ids, np.zeros(ids.shape))

    @classmethod
    def constant(cls, values: np.ndarray) -> Symbolic:
        """A tensor of constants."""
        return cls(np.full(values.shape, CONSTANT), values.astype(np.float64))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.ids.shape

    @property
    def known(self) -> np.ndarray:
        """True where the element is a number."""
        return self.ids == CONSTANT

    def reshape(self, *shape: int) -> Symbolic:
        """As NumPy's."""
        return Symbolic(self.ids.reshape(*shape), self.values.reshape(*shape))

    def moved(self, axis: int) -> Symbolic:
        """With an axis last."""
        return Symbolic(np.moveaxis(self.ids, axis, -1), np.moveaxis(self.values, axis, -1))

    def broadcast(self, shape: tuple[int, ...]) -> Symbolic:
        """As NumPy's `broadcast_to`."""
        return Symbolic(np.broadcast_to(self.ids, shape), np.broadcast_to(self.values, shape))
