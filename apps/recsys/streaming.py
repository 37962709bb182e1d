"""Batches by number: of rows encoded once and held, or of rows read while training, in an order that can be resumed.

A batch is named (epoch, index). Which rows it holds depends on these, the seed and the data alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch.utils.data import Dataset, Sampler

from apps.loading import derive_seed
from apps.recsys.batch import Batch, concat
from apps.recsys.splits import Rows
from apps.recsys.tables import CHUNK
from apps.recsys.transform import Transform

Key = tuple[int, int]


class Keys(Sampler[Key]):
    """Names of the batches of an epoch, from wherever training stands.

    Args:
        batches: per epoch, of all processes.
        position: batches this process has trained on so far, over all epochs.
        limit: batches per epoch and process at most.
        rank: number of this data-parallel process, of `world`.
        world: number of processes; all get equally many batches.
    """

    def __init__(
        self,
        batches: int,
        position: Callable[[], int] = lambda: 0,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.batches, self.position, self.limit, self.rank, self.world = batches, position, limit, rank, world

    def __len__(self) -> int:
        own = self.batches // self.world
        return own if self.limit is None else min(own, self.limit)

    def __iter__(self) -> Iterator[Key]:
        epoch, done = divmod(self.position(), max(len(self), 1))
        for i in range(done, len(self)):
            yield epoch, self.rank + i * self.world


class Batches(Dataset, ABC):
    """Whole batches of encoded rows, by (epoch, index).

    Args:
        rows: how many there are.
        batch_size: rows per batch.
        shuffle: draw an order for each epoch; rows left over at its end then wait for the next one, which draws anew,
            so that every batch is full (unless there is only one).
        seed: of the order.
    """

    def __init__(self, rows: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed

    def __len__(self) -> int:
        if self.shuffle:
            return max(self.rows // self.batch_size, min(self.rows, 1))
        return -(-self.rows // self.batch_size)

    @abstractmethod
    def __getitem__(self, key: Key) -> Batch:
        """The batch of an epoch and number."""


class Held(Batches):
    """Rows encoded once and held in memory; batches are slices."""

    def __init__(self, data: Batch, batch_size: int, shuffle: bool = False, seed: int = 0) -> None:
        super().__init__(len(data), batch_size, shuffle, seed)
        self.data = data
        self._order: tuple[int, Int[torch.Tensor, " N"]] | None = None

    def __getitem__(self, key: Key) -> Batch:
        epoch, index = key
        chosen = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.data[self._shuffled(epoch)[chosen]] if self.shuffle else self.data[chosen]

    def _shuffled(self, epoch: int) -> Int[torch.Tensor, " N"]:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            self._order = (epoch, torch.randperm(self.rows, generator=generator))
        return self._order[1]


class Streamed(Batches):
    """Rows read and encoded when they are wanted; a buffer of them is held.

    Units of the table come in an order drawn for each epoch; their rows are cut into blocks of the buffer's size, each
    shuffled. To resume in the midst of an epoch, the units before are skipped, not read.

    Args:
        rows: to read.
        transform: encodes them.
        batch_size: rows per batch.
        buffer_rows: rows held, rounded to whole batches.
        shuffle: draw orders; False: as they come.
        seed: of the orders.
    """

    def __init__(
        self,
        rows: Rows,
        transform: Transform,
        batch_size: int,
        buffer_rows: int,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(len(rows), batch_size, shuffle, seed)
        self.part, self.transform = rows, transform
        self.per_block = max(1, buffer_rows // batch_size)
        self.columns = transform.schema.columns()
        self._at: Key | None = None
        """Epoch and number of the block that is held."""
        self._block: Batch | None = None
        self._reader: Iterator[pd.DataFrame] = iter(())
        self._rest: pd.DataFrame | None = None
        """Rows that were read for the next block."""

    def __getitem__(self, key: Key) -> Batch:
        epoch, index = key
        block, within = divmod(index, self.per_block)
        if self._at != (epoch, block):
            self._load(epoch, block)
        return self._block[within * self.batch_size : (within + 1) * self.batch_size]

    def _load(self, epoch: int, block: int) -> None:
        if self._at != (epoch, block - 1):
            self._reader = self._read(epoch, block * self.per_block * self.batch_size)
            self._rest = None
        self._block = None  # frees its memory before more is read
        parts, lacking = [], self.per_block * self.batch_size
        while lacking:
            frame = next(self._reader, None) if self._rest is None else self._rest
            if frame is None:
                break
            parts.append(self.transform.encode(frame.iloc[:lacking]))
            self._rest = frame.iloc[lacking:] if len(frame) > lacking else None
            lacking -= len(parts[-1])
        self._block, self._at = concat(parts), (epoch, block)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, block))
            self._block = self._block[torch.randperm(len(self._block), generator=generator)]

    def _read(self, epoch: int, skip: int) -> Iterator[pd.DataFrame]:
        """Frames of an epoch, without its first `skip` rows."""
        units = np.arange(len(self.part.counts))
        if self.shuffle:
            units = np.random.default_rng(derive_seed(self.seed, epoch)).permutation(units)
        size = min(CHUNK, self.per_block * self.batch_size)
        for unit in units:
            if skip >= self.part.counts[unit]:
                skip -= int(self.part.counts[unit])
                continue
            for frame in self.part.chunks(int(unit), self.columns, size):
                if skip < len(frame):
                    yield frame.iloc[skip:]
                skip = max(0, skip - len(frame))


def hold(rows: Rows, transform: Transform) -> Batch:
    """All rows, encoded."""
    return concat([transform.encode(frame) for frame in rows.frames(transform.schema.columns()) if len(frame)])
