"""Batches of windows, each out of its own stream of random numbers: a resumed run goes on exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.loading import ResumableLoader, as_is, derive_seed
from apps.rl.agents.t2mir import Windows
from apps.rl.data import DRAW, Updates
from apps.rl.incontext.histories import TaskHistory, load_histories
from apps.rl.incontext.tasks import split_tasks
from apps.rl.incontext.windows import check_length, draw_windows
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec

LAST_EPISODES = 5
"""Episodes at the end of a history whose mean return says what its agent has learned."""


class InContextData(LightningDataModule):
    """Histories of all tasks, collected first where they are missing.

    Args:
        config: all settings.
        spec: of the environment.

    Attributes:
        histories: by task, what of them is learned from.
        learned: return of each task's own agent at the end of its history, by task.
    """

    def __init__(self, config: RLConfig, spec: EnvSpec) -> None:
        super().__init__()
        self.config, self.spec, self.split = config, spec, split_tasks(spec, config.t2mir)
        every = load_histories(config, spec, range(len(spec.tasks)))
        self.histories: dict[int, TaskHistory] = {
            task: every[task].early(config.t2mir.share) for task in self.split.train
        }
        check_length(self.histories, config.t2mir.context)
        self.learned = {task: float(one.returns()[-LAST_EPISODES:].mean()) for task, one in every.items()}

    def steps(self) -> tuple[Tensor, Tensor]:
        """States `[S, N]` and rewards `[S]` of all training tasks."""
        parts = list(self.histories.values())
        obs, reward = (np.concatenate([getattr(one, name) for one in parts]) for name in ("obs", "reward"))
        return torch.from_numpy(obs), torch.from_numpy(reward)

    def windows(self, step: int) -> Windows:
        """The batch of a step."""
        one = self.config.t2mir
        rng = np.random.default_rng(derive_seed(self.config.run.seed, DRAW, step))
        return draw_windows(self.histories, one.batch_tasks, one.context, one.target == "final", rng)

    def train_dataloader(self) -> DataLoader:
        """A batch per step."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        updates = Updates(self.config.t2mir.steps, lambda: progress.total.ready)
        return ResumableLoader(_Batches(self), batch_size=None, sampler=updates, collate_fn=as_is)

    def val_dataloader(self) -> DataLoader:
        """One item: all evaluation episodes."""
        return DataLoader([0], batch_size=None, collate_fn=as_is)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        """Windows as whole batches; the number of an evaluation as it is."""
        return batch.to(device) if isinstance(batch, Windows) else batch


class _Batches(Dataset):
    def __init__(self, data: InContextData) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.config.t2mir.steps

    def __getitem__(self, step: int) -> Windows:
        return self.data.windows(step)
