"""Which images carry labels of which task, and drawing images so that all tasks are seen equally often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apps.loading import ResumableBatches, derive_seed


def keep_labels(count: int, tasks: int, how: Literal["all", "one", "half"], seed: int) -> Bool[Tensor, "N T"]:
    """Which labels a data set's images keep, to learn from images that have labels for some tasks only.

    The regimes of Li et al., Learning Multiple Dense Prediction Tasks from Partially Annotated Data (arXiv 2111.14893).

    Args:
        count: images.
        tasks: tasks.
        how: all; one, the tasks in turn; or each with probability 1/2, but at least one per image.
        seed: of "half".
    """
    if how == "all":
        return torch.ones(count, tasks, dtype=torch.bool)
    if how == "one":
        return torch.arange(count)[:, None] % tasks == torch.arange(tasks)
    generator = torch.Generator().manual_seed(derive_seed(seed))
    kept = torch.rand(count, tasks, generator=generator) < 0.5
    spare = torch.randint(tasks, (count, 1), generator=generator) == torch.arange(tasks)
    return kept | (spare & ~kept.any(1, keepdim=True))


def balanced_draws(known: Bool[Tensor, "N T"], generator: torch.Generator) -> Int[Tensor, " N"]:
    """As many images as there are, some repeatedly and some not at all, with like many labels of every task.

    Always the next image, in random order, of those with labels of the task that so far has been seen least. Where
    labels come together counts can differ: if one task's come with every image, it stays ahead.

    Args:
        known: which image has labels of which task.
        generator: to draw from.
    """
    columns = [torch.nonzero(column).flatten() for column in known.T if column.any()]
    tasks_of = [torch.nonzero(row).flatten().tolist() for row in known[:, known.any(0)]]
    queues: list[list[int]] = [[] for _ in columns]
    seen = [0] * len(columns)
    draws = []
    for _ in range(len(known)):
        task = seen.index(min(seen))
        if not queues[task]:
            order = torch.randperm(len(columns[task]), generator=generator)
            queues[task] = columns[task][order].tolist()
        draws.append(queues[task].pop())
        for other in tasks_of[draws[-1]]:
            seen[other] += 1
    return torch.tensor(draws)


class BalancedBatches(ResumableBatches):
    """Batches of (epoch, index), resumable, in which labels of every task come equally often over an epoch.

    Args:
        known: which image has labels of which task.
        batch_size: images per batch and process.
        seed: of the draws.
        options: position, limit, rank and world, as of `ResumableBatches`.
    """

    def __init__(self, known: Bool[Tensor, "N T"], batch_size: int, seed: int, **options: Any) -> None:
        super().__init__(len(known), batch_size, seed, **options)
        self.known = known

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draws: list[int] = []
        for batch in super().__iter__():
            if not draws:  # all batches are of one epoch
                generator = torch.Generator().manual_seed(derive_seed(self.seed, batch[0][0], 1))
                draws = balanced_draws(self.known, generator).tolist()
            yield [(epoch, draws[index]) for epoch, index in batch]
