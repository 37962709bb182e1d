"""Experience for training: environments are stepped as updates ask for it, and batches drawn from the replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import Env
from jaxtyping import Float, Shaped
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from apps.loading import ResumableLoader, as_is, derive_seed
from apps.rl.agents.mentor import Mentor
from apps.rl.collect import Collector, Episode
from apps.rl.envs.make import make_env
from apps.rl.replay import Replay
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec, Transitions

EXPLORE, DRAW = 2, 3
"""Streams of random numbers beside those of the agent."""


class RLData(LightningDataModule):
    """Steps the environments, keeps what happened, and draws from it.

    One update asks for `update_every` more steps, so that collection and learning take turns in an order that depends
    on nothing but counters: a resumed run goes on exactly.

    Args:
        config: all settings.
        spec: of the environment.
        agent: acts.
        folder: of the replay.
        make: an environment; None: the configured one.

    Attributes:
        ended: episodes that ended since they were last taken away.
    """

    def __init__(
        self, config: RLConfig, spec: EnvSpec, agent: Mentor, folder: Path, make: Callable[[], Env] | None = None
    ) -> None:
        super().__init__()
        self.config, self.agent, self.seed = config, agent, config.run.seed
        self.ended: list[Episode] = []
        one = config.collect
        slack = max(10_000, 4 * config.run.checkpoint_every * one.update_every)
        self.replay = Replay(folder, spec, one.capacity, slack, one.num_envs)
        make = make or partial(make_env, config.env)
        self.collector = Collector([make] * one.num_envs, self.replay, self.seed, one.asynchronous)

    def experience(self, update: int) -> Transitions:
        """Collect up to where an update is due, and draw its batch."""
        one = self.config.collect
        while self.collector.steps < one.random_steps + update * one.update_every:
            self.ended += self.collector.step(self.explore)
        rng = np.random.default_rng(derive_seed(self.seed, DRAW, update))
        return self.replay.sample(one.batch_size, self.config.agent.n_step, self.config.agent.gamma, rng)

    def explore(self, obs: Shaped[np.ndarray, "B ..."], step: int) -> Float[np.ndarray, "B A"]:
        """Noisy actions at an agent step."""
        rng = np.random.default_rng(derive_seed(self.seed, EXPLORE, step))
        shape = (len(obs), self.agent.spec.action_dim)
        if step < self.config.collect.random_steps:
            return rng.uniform(-1, 1, shape).astype(np.float32)
        mean = self.agent.policy(obs)
        noise = rng.standard_normal(shape, np.float32) * self.agent.noise(step)
        return (mean + noise).clip(-1, 1)

    def take_ended(self) -> list[Episode]:
        """Episodes of training that ended since the last call."""
        ended, self.ended = self.ended, []
        return ended

    def state_dict(self) -> dict[str, Any]:
        """Positions; what they point to is on disk."""
        self.replay.flush()
        return {"replay": self.replay.state(), "collector": self.collector.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to those positions, environments in the middle of their episodes."""
        self.replay.restore(state["replay"])
        self.collector.restore(state["collector"])

    def train_dataloader(self) -> DataLoader:
        """A batch per update."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        updates = Updates(self.config.collect.updates, lambda: progress.total.ready)
        return ResumableLoader(_Experience(self), batch_size=None, sampler=updates, collate_fn=as_is)

    def val_dataloader(self) -> DataLoader:
        """One item: all evaluation episodes."""
        return DataLoader([0], batch_size=None, collate_fn=as_is)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        """As it is; the task makes tensors of it."""
        return batch

    def teardown(self, stage: str) -> None:
        """Close the environments."""
        self.collector.close()


class Updates(Sampler[int]):
    """Numbers of the updates that are left."""

    def __init__(self, total: int, position: Callable[[], int]) -> None:
        self.total, self.position = total, position

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.position(), self.total))


class _Experience(Dataset):
    def __init__(self, data: RLData) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.config.collect.updates

    def __getitem__(self, update: int) -> Transitions:
        return self.data.experience(update)
