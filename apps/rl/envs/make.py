"""Any Gymnasium environment, as agents and replay see it (`apps.rl.spaces`)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, flatdim, flatten
from jaxtyping import Float, Shaped

from apps.errors import UserError
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.catalogue import open_env
from apps.rl.envs.guard import as_number, as_state, as_task, checked_result, guarded
from apps.rl.envs.mujoco import Camera, is_meta_world
from apps.rl.envs.pictures import as_frame, painter
from apps.rl.envs.raster import Image
from apps.rl.spaces import EnvSpec

VIDEO_SIZE = 192
"""Least height and width of pictures for videos."""
_SUCCESS = {"success", "is_success"}
"""Under what names environments report it."""


def make_env(config: EnvConfig, render: bool = False) -> AgentEnv:
    """An environment of single frames and actions in [-1, 1].

    Args:
        config: Which one, and how it is seen.
        render: Whether `render()` will be called; environments of pixels can always.

    Raises:
        UserError: It cannot be made, see `catalogue.open_env`, or its spaces do not fit, see `AgentEnv`.
    """
    return AgentEnv(open_env(config, render or config.obs == "pixels"), config)


def env_spec(env: AgentEnv, config: EnvConfig) -> EnvSpec:
    """What agents and replay need to know."""
    (actions,) = env.action_space.shape
    return EnvSpec(config.id, env.observation_space.shape, config.frame_stack, actions, env.task_names)


def spec_of(config: EnvConfig) -> EnvSpec:
    """What the configured environment looks like; raises what is wrong with it."""
    env = make_env(config)
    try:
        return env_spec(env, config)
    finally:
        env.close()


def has_time_limit(config: EnvConfig) -> bool:
    """Whether episodes are cut off after some steps, as far as Gymnasium knows."""
    if config.id.startswith("dm_control/"):  # they end themselves, which Gymnasium is not told
        return True
    spec = gymnasium.registry.get(config.id.rsplit(":", 1)[-1])
    return config.max_steps is not None or spec is None or spec.max_episode_steps is not None


class AgentEnv(gymnasium.Wrapper):
    """Frames of pixels, uint8 `[C, H, W]`, or states, float32 `[N]`; actions float32 `[A]` in [-1, 1].

    Each action is taken `config.action_repeat` times, until the episode ends; rewards are added up. `info` has the
    number of the task, for environments that hold several and name them in `task_names`, else 0, and `success` if the
    environment reports it: of any of the steps.

    Args:
        env: The environment.
        config: How it is seen.

    Raises:
        UserError: Actions are neither bounded vectors nor, with `config.discrete`, choices.
    """

    def __init__(self, env: gymnasium.Env, config: EnvConfig) -> None:
        super().__init__(env)
        self.config = config
        self.task_names: tuple[str, ...] = tuple(getattr(env.unwrapped, "task_names", ()))
        self.choices = _action_space(env, config)
        self.action_space = Box(-1, 1, (_width(self.choices),), np.float32)
        self.painter = painter(env, config.camera, config.cheap)
        if config.obs == "pixels":
            self.observation_space = Box(0, 255, (1 if config.gray else 3, config.size, config.size), np.uint8)
        else:
            self.observation_space = Box(-np.inf, np.inf, (flatdim(env.observation_space),), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Shaped[np.ndarray, "*frame"], dict[str, Any]]:
        """First frame of an episode."""
        if seed is not None and is_meta_world(self.unwrapped):
            self.unwrapped.seed(seed)  # it takes no heed of the seed of reset
        result = guarded(self.config.id, "reset", self.env.reset, seed=seed, options=options)
        obs, info = checked_result(self.config.id, "reset", result, 2)
        return self._frame(obs), self._noted(info, _succeeded(info))

    def step(
        self, action: Float[np.ndarray, " A"]
    ) -> tuple[Shaped[np.ndarray, "*frame"], float, bool, bool, dict[str, Any]]:
        """The action's steps, and the frame after the last of them."""
        taken, total, success = self._native(action), 0.0, False
        for _ in range(self.config.action_repeat):
            result = guarded(self.config.id, "step", self.env.step, taken)
            obs, reward, terminated, truncated, info = checked_result(self.config.id, "step", result, 5)
            total += as_number(self.config.id, "a reward", reward)
            success = success or _succeeded(info)
            if terminated or truncated:
                break
        return self._frame(obs), total, bool(terminated), bool(truncated), self._noted(info, success)

    def render(self) -> Image:
        """The environment as it stands, for videos: `[H, W, 3]`."""
        return self.painter.draw_at(max(VIDEO_SIZE, self.config.size))

    def close(self) -> None:
        """Free what draws, then the environment."""
        if isinstance(self.painter, Camera):
            self.painter.close()
        super().close()

    def _frame(self, obs: Any) -> Shaped[np.ndarray, "*frame"]:
        if self.config.obs == "pixels":
            return as_frame(self.painter.draw_at(self.config.size), self.config.gray)
        space, (width,) = self.env.observation_space, self.observation_space.shape
        flat = guarded(self.config.id, "reading an observation", flatten, space, obs)
        return as_state(self.config.id, np.asarray(flat, dtype=np.float32), width)

    def _noted(self, info: dict[str, Any], success: bool) -> dict[str, Any]:
        noted = {**info, "task": as_task(self.config.id, info, self.task_names) if self.task_names else 0}
        return {**noted, "success": success} if _SUCCESS & info.keys() else noted

    def _native(self, action: Float[np.ndarray, " A"]) -> Any:
        """The environment's own action: its largest choice, or a vector within its bounds."""
        if isinstance(self.choices, Discrete):
            return int(self.choices.start + np.argmax(action))
        low, high = self.choices.low, self.choices.high
        share = (np.clip(action, -1, 1).reshape(low.shape) + 1) / 2
        return (low + share * (high - low)).astype(self.choices.dtype)


def _action_space(env: gymnasium.Env, config: EnvConfig) -> Box | Discrete:
    space = env.action_space
    if isinstance(space, Discrete):
        if config.discrete:
            return space
        remedy = f"its actions are {space.n} choices and the agent's are vectors: set env.discrete=true"
    elif not isinstance(space, Box):
        remedy = f"its actions are {type(space).__name__}: only Box and Discrete can be taken"
    elif not space.is_bounded():
        remedy = "its actions have no bounds: wrap it so that they have"
    else:
        return space
    raise UserError(f"env.id={config.id}: {remedy}")


def _width(space: Box | Discrete) -> int:
    return int(space.n if isinstance(space, Discrete) else np.prod(space.shape))


def _succeeded(info: dict[str, Any]) -> bool:
    return any(_number(info.get(key, False)) > 0 for key in _SUCCESS)


def _number(value: Any) -> float:
    """A number, also where the environment gives an array of one."""
    return float(np.asarray(value).reshape(-1)[0])
