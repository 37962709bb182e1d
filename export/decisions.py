"""What outputs decide, and whether two models decide the same; near ties are counted apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NEAR = 1e-4
"""Difference, relative to the largest output, below which two candidates are a tie."""


@dataclass(frozen=True)
class Agreement:
    """Decisions counted."""

    count: int = 0
    same: int = 0
    ties: int = 0
    """Of those that are not the same, how many were between candidates that are equal up to rounding."""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.count + other.count, self.same + other.same, self.ties + other.ties)

    @property
    def share(self) -> float:
        """Share of decisions that agree, ties left out; 1 where nothing is decided."""
        return self.same / (self.count - self.ties) if self.count > self.ties else 1.0


Decide = Callable[[np.ndarray, np.ndarray], Agreement]
"""Outputs of the original and of the exported model, `[B, ...]` each -> how far their decisions agree."""


def nothing(expected: np.ndarray, found: np.ndarray) -> Agreement:
    """Outputs that decide nothing."""
    return Agreement()


def largest(axis: int = -1) -> Decide:
    """The largest value along an axis wins: classes, labels of pixels. Axes of length 1 decide nothing."""

    def decide(expected: np.ndarray, found: np.ndarray) -> Agreement:
        if expected.ndim < 2 or expected.shape[axis] < 2:
            return Agreement()
        same = expected.argmax(axis) == found.argmax(axis)
        best = np.sort(expected, axis)
        lead = np.take(best, -1, axis) - np.take(best, -2, axis)
        ties = ~same & (lead <= NEAR * np.abs(expected).max())
        return Agreement(same.size, int(same.sum()), int(ties.sum()))

    return decide


def ranking(expected: np.ndarray, found: np.ndarray) -> Agreement:
    """Rows `[B, ...]` ordered by each output: neighbours in the original's order must stand in the same order."""
    total = Agreement()
    for before, after in zip(expected.reshape(len(expected), -1).T, found.reshape(len(found), -1).T, strict=True):
        order = before.argsort()
        lead, now = np.diff(before[order]), np.diff(after[order])
        same = (now >= 0) | (lead == 0)
        ties = ~same & (lead <= NEAR * np.abs(before).max())
        total += Agreement(same.size, int(same.sum()), int(ties.sum()))
    return total


def nearness(share: float = 1e-3) -> Decide:
    """Continuous decisions (actions, quantiles): the same if they differ by less than a share of the largest."""

    def decide(expected: np.ndarray, found: np.ndarray) -> Agreement:
        reach = float(np.nanmax(np.abs(expected), initial=1e-12))
        same = (np.abs(expected - found) <= share * reach) | (np.isnan(expected) & np.isnan(found))
        return Agreement(same.size, int(same.sum()))

    return decide
