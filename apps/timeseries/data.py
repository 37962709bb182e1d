"""Batches of windows for training, validation and testing."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from apps.errors import UserError
from apps.loading import ResumableBatches, ResumableLoader, as_is, limited
from apps.timeseries.models.base import Windows
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.pretraining import Mixture, corpus_windows
from apps.timeseries.settings import DataConfig
from apps.timeseries.sources import default_split, load_series
from apps.timeseries.windows import (
    SeriesStore,
    WindowSet,
    evaluation_index,
    most_common,
    split_series,
    training_index,
)
from apps.training import count_steps


class SeriesData(LightningDataModule):
    """Windows of the configured series, by the splits of `apps.timeseries.windows`.

    Args:
        config: source, splits, sizes.
        seed: of the shuffling.
        train_horizon: points of a training window's future, where the model wants others than `config.horizon`.
        pack: put short series of pretraining corpora into one sequence, for a model that keeps them apart.
    """

    def __init__(self, config: DataConfig, seed: int, train_horizon: int | None = None, pack: bool = False) -> None:
        super().__init__()
        self.config, self.seed, self.pack = config, seed, pack
        self.train_horizon = train_horizon or config.horizon
        series = load_series(config)
        longest = max(config.horizon, *config.horizons)
        how = default_split(config)
        borders = [split_series(one, how, longest, config.test_windows) for one in series]
        self.store = SeriesStore(series, borders, config.scale)

    @cached_property
    def spec(self) -> SeriesSpec:
        """What a model must know of the data."""
        config = self.config
        lengths = np.array([len(s) for s in self.store.series])
        season = most_common(np.repeat(self.store.season(config.season), lengths))  # of most points
        return SeriesSpec(
            config.context, config.horizon, season, config.futr_columns, config.hist_columns, config.stat_columns
        )

    @cached_property
    def train_set(self) -> Dataset:
        """Windows to learn from; nothing after the training part is in them."""
        config = self.config
        if config.corpora:
            return self._corpora()
        index = training_index(
            self.store, config.context, self.train_horizon, config.min_context, config.stride, config.min_future
        )
        if not len(index):
            raise UserError(f"data.source={config.source}: no series is long enough to train on")
        limits = np.array([border.train for border in self.store.borders])
        return WindowSet(self.store, index, config.context, self.train_horizon, limits, config.season)

    def _corpora(self) -> Mixture:
        """Sequences of the pretraining corpora; "train" is what comes before the borders of the source's series."""
        config = self.config
        parts = [one.until(border.train) for one, border in zip(self.store.series, self.store.borders, strict=True)]
        return corpus_windows(
            config.corpora,
            config.corpus_length,
            self.train_horizon,
            pack=self.pack,
            synthetic=config.synthetic_series,
            size=config.corpus_size,
            seed=self.seed,
            train=parts,
        )

    def check(self) -> None:
        """Raise, before anything is written, what training would stop with: corpora not there, series too short."""
        _ = self.train_set
        self.val_dataloader()

    def windows(self, part: str, horizon: int | None = None, stride: int = 1) -> WindowSet:
        """All windows of "val" or "test" at a horizon."""
        horizon = horizon or self.config.horizon
        index = evaluation_index(self.store, part, self.config.context, horizon, stride)
        limits = self.store.lengths if part == "test" else np.array([border.val for border in self.store.borders])
        return WindowSet(self.store, index, self.config.context, horizon, limits, self.config.season)

    def _batches(self) -> ResumableBatches:
        trainer = self.trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress
        rank, world, size = trainer.global_rank, trainer.world_size, self.config.batch_size
        count = len(self.train_set)
        full = ResumableBatches(count, size, self.seed, rank=rank, world=world)
        batches = limited(trainer.limit_train_batches, len(full))
        return ResumableBatches(count, size, self.seed, lambda: progress.total.ready, batches, rank, world)

    def training_steps(self) -> int:
        """Optimiser steps of the whole training, for the learning rate schedule."""
        return count_steps(self.trainer, len(self._batches()))

    def transfer_batch_to_device(self, batch: Windows, device: torch.device, index: int) -> Windows:
        """To the device."""
        return batch.to(device)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches that continue where training stands."""
        return ResumableLoader(self.train_set, batch_sampler=self._batches(), collate_fn=as_is)

    def val_dataloader(self) -> DataLoader:
        """Validation windows."""
        windows = self.windows("val", stride=self.config.val_stride)
        if not len(windows):
            raise UserError(
                f"data.horizon={self.config.horizon}: no series is long enough to validate on; lower it, or give "
                "longer series"
            )
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        rows = windows.rows(self.config.eval_batch_size)[rank::world]
        return DataLoader(windows, batch_sampler=[[(0, int(i)) for i in part] for part in rows], collate_fn=as_is)
