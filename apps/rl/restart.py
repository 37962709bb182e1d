"""Putting an environment back into the middle of an episode, by its seed and the actions taken."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float, Shaped


class Restartable(gym.Wrapper):
    """One of several environments; of what it tells beside frames, it passes on only task and success.

    `reset` takes `options={"actions": {number: actions [steps, A]}}`: after the reset, the environment of that number
    takes these actions, returns what it sees then, and tells the digest of the whole way as `info["digest"]`.
    """

    def __init__(self, env: gym.Env, number: int) -> None:
        super().__init__(env)
        self.number = number

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Shaped[np.ndarray, "*frame"], dict[str, int]]:
        """Begin an episode, and take what actions are given."""
        frame, info = self.env.reset(seed=seed)
        actions = (options or {}).get("actions", {}).get(self.number)
        if actions is None:
            return frame, told(info)
        frames, rewards, over = [np.array(frame)], [], False
        for action in actions:
            if over:  # not the episode these actions were taken in; the digest shows it
                break
            frame, reward, terminated, truncated, info = self.env.step(action)
            over = terminated or truncated
            frames.append(np.array(frame))
            rewards.append(reward)
        return frame, told(info) | {"digest": -1 if over else digest(frames, np.array(rewards, np.float32))}

    def step(self, action: Float[np.ndarray, " A"]) -> tuple[np.ndarray, float, bool, bool, dict[str, int]]:
        """One step."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        return frame, float(reward), bool(terminated), bool(truncated), told(info)


def restartable(make: Callable[[], gym.Env], number: int) -> Restartable:
    """The environment of a number."""
    return Restartable(make(), number)


def told(info: dict[str, Any]) -> dict[str, int]:
    """Number of the task, and whether this step reports success: 1, 0, or -1 where the environment does not say."""
    success = info.get("success", info.get("is_success"))
    return {"task": int(info.get("task", 0)), "success": -1 if success is None else int(bool(success))}


def digest(frames: Iterable[Shaped[np.ndarray, "*frame"]], rewards: Float[np.ndarray, " steps"]) -> int:
    """A number that differs where frames or rewards differ."""
    value = zlib.crc32(rewards.tobytes())
    for frame in frames:
        value = zlib.crc32(np.ascontiguousarray(frame), value)
    return value
