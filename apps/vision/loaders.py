"""Loaders over data sets that hand out whole batches, for classifiers and for several tasks alike."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from apps.loading import ResumableBatches, ResumableLoader, as_is, limited
from apps.training import count_steps
from apps.vision.settings import DataConfig


class BatchLoaders(LightningDataModule, ABC):
    """Training batches that continue where training stands; validation and test images in order.

    Data sets are called with lists of (epoch, index) pairs and return the whole batch.

    Args:
        config: batch size and loader processes.
        seed: of shuffling.
    """

    least_evaluated = 1
    """Images per batch of validation and testing, where training takes fewer at a time."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    @abstractmethod
    def images(self, split: str) -> Dataset:
        """The data set of a split: train, val or test."""

    @abstractmethod
    def in_memory(self, split: str) -> bool:
        """Whether its images are held decoded, so that loader processes would only cost."""

    def sampler(self, **options: Any) -> ResumableBatches:
        """The order of training images, from the options of `ResumableBatches` but its first."""
        return ResumableBatches(len(self.images("train")), **options)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches that continue where training stands."""
        return ResumableLoader(
            self.images("train"), batch_sampler=self._batches(), collate_fn=as_is, **self._workers("train")
        )

    def _batches(self) -> ResumableBatches:
        trainer = self.trainer
        batches = self.sampler(
            batch_size=self.config.batch_size,
            seed=self.seed,
            position=lambda: trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        batches.limit = limited(trainer.limit_train_batches, len(batches))
        return batches

    def training_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return count_steps(self.trainer, len(self._batches()))

    def val_dataloader(self) -> DataLoader:
        """Validation images in order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader:
        """Test images in order."""
        return self._in_order("test")

    def _in_order(self, split: str) -> DataLoader:
        images, trainer = self.images(split), self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        own = list(range(rank, len(images), world))
        size = max(self.config.batch_size, self.least_evaluated)
        batches = [[(0, i) for i in own[start : start + size]] for start in range(0, len(own), size)]
        return DataLoader(images, batch_sampler=batches, collate_fn=as_is, **self._workers(split))

    def _workers(self, split: str) -> dict[str, Any]:
        workers = self.config.num_workers
        if workers is None:
            workers = 0 if self.in_memory(split) else min(8, max(1, len(os.sched_getaffinity(0)) - 1))
        pin = torch.cuda.is_available()
        return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin}
