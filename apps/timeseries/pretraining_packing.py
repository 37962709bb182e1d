"""Short series put together into sequences of one length, so that little of a batch is padding."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from apps.loading import derive_seed


class Packing:
    """Pieces distributed over sequences by best fit decreasing; which sequence a piece is in changes by epoch.

    The number of sequences depends on the lengths alone, so that an epoch always has as many batches: each epoch only
    pieces of equal length trade places, and the order within a sequence is drawn anew.

    Args:
        lengths: points of each piece, none above `capacity`.
        capacity: points of a sequence.
        seed: of the draws.
    """

    def __init__(self, lengths: Int[np.ndarray, " P"], capacity: int, seed: int) -> None:
        self.lengths, self.seed = lengths, seed
        self._slots = np.argsort(-lengths, kind="stable")  # pieces in the order in which they were placed
        self._bins = _best_fit(lengths[self._slots], capacity)
        self._order = np.argsort(self._bins, kind="stable")
        count = int(self._bins.max()) + 1 if len(lengths) else 0
        self._starts = np.searchsorted(self._bins[self._order], np.arange(count + 1))
        self._mixed: dict[int, Int[np.ndarray, " P"]] = {}
        """The piece in each slot, by epoch."""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._starts) - 1

    def pieces(self, epoch: int, index: int) -> Int[np.ndarray, " k"]:
        """The pieces of a sequence in their order."""
        if epoch not in self._mixed:
            draw = np.random.default_rng(derive_seed(self.seed, epoch)).random(len(self.lengths))
            kept = list(self._mixed.items())[-1:]  # a batch may lie in two epochs of a mixture
            self._mixed = {**dict(kept), epoch: np.lexsort((draw, -self.lengths))}
        slots = self._order[self._starts[index] : self._starts[index + 1]]
        return np.random.default_rng(derive_seed(self.seed, epoch, index)).permutation(self._mixed[epoch][slots])


def _best_fit(lengths: Int[np.ndarray, " P"], capacity: int) -> Int[np.ndarray, " P"]:
    """Bin of each piece: the fullest that still takes it. Lengths descend."""
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]
    """Bins by what room they have."""
    bins, count = np.empty(len(lengths), np.int64), 0
    for piece, length in enumerate(lengths.tolist()):
        room = next((room for room in range(length, capacity + 1) if open_bins[room]), None)
        if room is None:
            room, chosen = capacity, count
            count += 1
        else:
            chosen = open_bins[room].pop()
        bins[piece] = chosen
        open_bins[room - length].append(chosen)
    return bins
