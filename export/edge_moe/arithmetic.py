"""The two kinds of numbers that the schedule is computed in: floats, and the accelerator's fixed point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from export.edge_moe.fixed import ACTIVATION, Fixed

GELU_STEP, GELU_END = 1 / 32, 8.0
"""Step of the table of ReLU minus GELU, and where it ends; beyond it the difference is below the activations' step."""


class Arithmetic(Protocol):
    """Numbers of one kind."""

    def weight(self, name: str) -> np.ndarray:
        """A tensor of the accelerator."""

    def activation(self, name: str, x: np.ndarray) -> np.ndarray:
        """What is left of an intermediate result where it is kept."""

    def gelu(self, x: np.ndarray) -> np.ndarray:
        """GELU of activations."""


@dataclass
class Floats:
    """Plain floats, of the precision of the tensors; sees which ranges the activations have."""

    tensors: Mapping[str, np.ndarray]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Activation -> smallest and largest value so far."""

    def weight(self, name: str) -> np.ndarray:
        """The tensor as it is."""
        return self.tensors[name]

    def activation(self, name: str, x: np.ndarray) -> np.ndarray:
        """The same; its range is noted."""
        low, high = self.ranges.get(name, (math.inf, -math.inf))
        self.ranges[name] = float(np.minimum(low, x.min())), float(np.maximum(high, x.max()))  # of numpy: nan wins
        return x

    def gelu(self, x: np.ndarray) -> np.ndarray:
        """With the error function."""
        return functional.gelu(torch.from_numpy(x)).numpy()


class FixedPoint:
    """The accelerator's types, in float64, which holds their values exactly; counts what wraps around.

    Sums of products are exact before they are kept (up to 2^53 steps), as in an accumulator that is wide enough.

    Args:
        tensors: float.
        formats: type of each tensor.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], formats: Mapping[str, Fixed]) -> None:
        self.wrapped: dict[str, int] = {}
        self._tensors = {name: self._kept(name, value, formats[name]) for name, value in tensors.items()}
        steps = np.arange(int(GELU_END / GELU_STEP) + 1) * GELU_STEP
        self._table = ACTIVATION.assign([relu_minus_gelu(step) for step in steps])[0]
        self._table[-1] = 0.0  # for all that lies beyond

    def weight(self, name: str) -> np.ndarray:
        """The tensor in its type."""
        return self._tensors[name]

    def activation(self, name: str, x: np.ndarray) -> np.ndarray:
        """Truncated and wrapped."""
        return self._kept(name, x, ACTIVATION)

    def gelu(self, x: np.ndarray) -> np.ndarray:
        """ReLU minus a table of the difference, which is even; an entry stands for the step that it begins."""
        index = np.minimum(np.abs(x) / GELU_STEP, len(self._table) - 1).astype(int)
        return np.maximum(x, 0) - self._table[index]

    def _kept(self, name: str, x: np.ndarray, fixed: Fixed) -> np.ndarray:
        kept, outside = fixed.assign(x)
        if outside:
            self.wrapped[name] = self.wrapped.get(name, 0) + outside
        return kept


def relu_minus_gelu(x: float) -> float:
    """x Phi(-x) for x >= 0; equal to relu(x) - gelu(x), and to relu(-x) - gelu(-x)."""
    return x * math.erfc(x / math.sqrt(2)) / 2
