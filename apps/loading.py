"""Training batches in an order that depends on nothing but the seed, so that a resumed run sees what it would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Sampler


class ResumableBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index), continuing at whatever batch training has reached.

    The epoch goes with every index so that a dataset can draw its augmentation from (seed, epoch, index) alone.

    Args:
        num_samples: size of the data set.
        batch_size: samples per batch and process.
        seed: of the shuffling.
        position: number of batches this process has trained on so far, over all epochs.
        limit: batches per epoch at most.
        rank: number of this data-parallel process, of `world`.
        world: number of processes; all get equally many batches.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        position: Callable[[], int] = lambda: 0,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.num_samples, self.batch_size, self.seed, self.position = num_samples, batch_size, seed, position
        self.limit, self.rank, self.world = limit, rank, world

    def __len__(self) -> int:
        full = -(-self.num_samples // self.batch_size) if self.world == 1 else self.num_samples // self.batch_size
        per_rank = full // self.world
        return per_rank if self.limit is None else min(per_rank, self.limit)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, done = divmod(self.position(), max(len(self), 1))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator).split(self.batch_size)
        own = order[self.rank :: self.world][: len(self)]
        for indices in own[done:]:
            yield [(epoch, index) for index in indices.tolist()]


def derive_seed(*parts: int) -> int:
    """One seed from several numbers, well mixed (splitmix64)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF


def limited(limit: int | float | None, batches: int) -> int:
    """Lightning's `limit_train_batches` as a number of batches."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


class ResumableLoader(DataLoader):
    """A loader whose position Lightning's progress counters define: nothing of its own to save."""

    def state_dict(self) -> dict:
        """Empty: the batch sampler reads the trainer's counters."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to do."""


def as_is(batch: object) -> object:
    """Collate function for data sets that return whole batches."""
    return batch
