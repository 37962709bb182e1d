"""The tasks of an environment that holds several, one at a time, and which of them are learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium

from apps.errors import UserError
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import AgentEnv, make_env
from apps.rl.incontext.settings import T2MIRConfig
from apps.rl.spaces import EnvSpec
from moecore.errors import require


class OneTask(gymnasium.Wrapper):
    """Every episode is of one task."""

    def __init__(self, env: AgentEnv, task: int) -> None:
        super().__init__(env)
        self.task, self.config = task, env.config

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode of it."""
        obs, info = self.env.reset(seed=seed, options={**(options or {}), "task": self.task})
        if info["task"] != self.task:
            raise UserError(
                f"env.id={self.config.id}: a reset with options={{'task': {self.task}}} began task {info['task']}; it "
                "must begin the one asked for"
            )
        return obs, info


def make_task_env(config: EnvConfig, task: int, render: bool = False) -> OneTask:
    """An environment as `envs.make.make_env` makes it, of one task."""
    return OneTask(make_env(config, render), task)


@dataclass(frozen=True)
class Split:
    """Numbers of tasks."""

    train: list[int]
    val: list[int]
    held_out: list[int]


def split_tasks(spec: EnvSpec, config: T2MIRConfig) -> Split:
    """The last tasks are held out, those before them validate.

    Raises:
        UserError: if the environment has no tasks, or gives images.
        ConfigError: if too few tasks are left.
    """
    if not spec.tasks:
        raise UserError(f"env.id={spec.id}: has one task; in-context learning needs many (an env with task_names)")
    if spec.pixels:
        raise UserError("env.obs=pixels: T2MIR reads states; set env.obs=state")
    require(spec.frame_stack == 1, "env.frame_stack", spec.frame_stack, "must be 1: T2MIR remembers by itself")
    count = len(spec.tasks)
    left = count - config.val_tasks - config.held_out
    require(left >= 2, "t2mir.held_out", config.held_out, f"leaves {max(left, 0)} of {count} tasks to learn from")
    every = list(range(count))
    return Split(every[:left], every[left : left + config.val_tasks], every[left + config.val_tasks :])
