"""Batches of a log for training, validation and testing."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from apps.errors import UserError
from apps.loading import ResumableLoader, as_is, limited
from apps.recsys.batch import Batch, InputSpec
from apps.recsys.columns import read_label
from apps.recsys.data_settings import DataConfig
from apps.recsys.generated import BAYES
from apps.recsys.sources import Source, load_source
from apps.recsys.streaming import Batches, Held, Keys, Streamed, hold
from apps.recsys.tables import FrameTable
from apps.recsys.transform import Transform
from apps.training import count_steps


class RecsysData(LightningDataModule):
    """The configured log, split and encoded.

    Args:
        config: source, split, sizes.
        seed: of the shuffling.
        transform: of a checkpoint; None: fitted on the training part when first needed.
        source: a log that is read already (`apps.recsys.sources.from_frame`); None: by the settings.
    """

    def __init__(
        self, config: DataConfig, seed: int, transform: Transform | None = None, source: Source | None = None
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        source = source or load_source(config, None if transform is None else transform.schema)
        self.schema, self.parts = source.schema, source.parts
        """`parts`: raw rows of train, val and test."""
        if transform is not None:
            self.transform = transform

    @cached_property
    def transform(self) -> Transform:
        """Learned from the training part."""
        fitted = Transform.fit(self.schema, self.parts["train"], self.config.embed_dim)
        self._check_labels()
        if rank_zero_only.rank == 0:
            for note in fitted.notes:
                print(f"note: {note}", flush=True)
        return fitted

    def _check_labels(self) -> None:
        """Every task needs a row to learn from, if of one class."""
        empty = {name: self.schema.column(name) for name in self.schema.labels}
        for frame in self.parts["train"].frames(list(empty.values())):
            empty = {name: column for name, column in empty.items() if np.isnan(read_label(frame[column], name)).all()}
            if not empty:
                return
        name, column = next(iter(empty.items()))
        raise UserError(
            f"labels.{name}: column {column!r} has no value in the training rows; fill it with 0 and 1, split "
            "otherwise (data.split), or take it out of the schema"
        )

    @property
    def spec(self) -> InputSpec:
        """What a model must know of the data."""
        return self.transform.spec

    @cached_property
    def train_set(self) -> Batches:
        """Shuffled batches to learn from."""
        return self.shuffled(self.config.batch_size)

    def shuffled(self, size: int) -> Batches:
        """Training rows in batches of any size, in another order every epoch."""
        return self._batches("train", size, shuffle=True)

    def batches(self, part: str) -> Batches:
        """Batches of train, val or test, in the order of the rows, for evaluation."""
        return self._batches(part, self.config.eval_batch_size, shuffle=False)

    def _batches(self, part: str, size: int, shuffle: bool) -> Batches:
        rows = self.parts[part]
        if not isinstance(rows.table, FrameTable):
            return Streamed(rows, self.transform, size, self.config.buffer_rows, shuffle, self.seed)
        return Held(self.encoded(part), size, shuffle, self.seed)

    def encoded(self, part: str) -> Batch:
        """All rows of a part at once; kept, as long as the log is held in memory."""
        kept = self.__dict__.setdefault("_encoded", {})
        if part not in kept:
            batch = hold(self.parts[part], self.transform)
            if not isinstance(self.parts[part].table, FrameTable):
                return batch
            kept[part] = batch
        return kept[part]

    def frame(self, part: str) -> pd.DataFrame:
        """Raw rows of a part, all columns, in the order of `batches`."""
        return self.parts[part].frame()

    def bayes(self, part: str) -> Float[np.ndarray, "N T"] | None:
        """True probabilities of the tasks, in the order of `batches`; None where nobody knows them."""
        names = [BAYES.format(task) for task in self.schema.labels]
        there = self.parts[part].table.columns
        return self.parts[part].frame(names).to_numpy() if set(names) <= set(there) else None

    def check(self) -> None:
        """Raise, before anything is written, what training would stop with; fits the transform."""
        _ = self.train_set

    def _keys(self) -> Keys:
        trainer = self.trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress
        count, rank, world = len(self.train_set), trainer.global_rank, trainer.world_size
        limit = limited(trainer.limit_train_batches, len(Keys(count, world=world)))
        return Keys(count, lambda: progress.total.ready, limit, rank, world)

    def training_steps(self) -> int:
        """Optimiser steps of the whole training, for the learning rate schedule."""
        return count_steps(self.trainer, len(self._keys()))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        """To the device."""
        return batch.to(device)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches that continue where training stands."""
        return ResumableLoader(self.train_set, batch_size=None, sampler=self._keys(), collate_fn=as_is)

    def val_dataloader(self) -> DataLoader:
        """Validation rows in order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader:
        """Test rows in order."""
        return self._in_order("test")

    def _in_order(self, part: str) -> DataLoader:
        batches = self.batches(part)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        keys = [(0, i) for i in range(rank, len(batches), world)]
        return DataLoader(batches, batch_size=None, sampler=keys, collate_fn=as_is)
