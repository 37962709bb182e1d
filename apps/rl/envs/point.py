"""A family of tasks for agents that learn in context: a point is to reach a goal that it is not shown."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Float

from apps.rl.envs.raster import Image, blank, circle
from moecore.errors import choice, require

SPEED, NEAR = 0.1, 0.1
"""Way per step and axis; distance within which the goal is reached."""
_FLOOR, _POINT, _GOAL = (24, 24, 32), (245, 245, 245), (210, 50, 50)
_DRAWN = 0.06
"""Radius of point and goal in pictures."""


class PointReach(gymnasium.Env):
    """Goals drawn once, uniformly in the arena: each is a task, and only rewards tell which one it is.

    Episodes begin anywhere. The observation is the place, `[2]` in [-1, 1], the action the velocity, `[2]`
    in [-1, 1]. Pictures show the goal, so that observations of pixels do too. `info["task"]` is the goal's number,
    `options={"task": number}` of a reset chooses it; otherwise it is drawn.

    Args:
        tasks: Number of goals.
        reward: progress: by how much the distance to the goal shrinks; distance: minus it; sparse: 1 near the goal.
        render_mode: rgb_array or None.
        render_size: Height and width of pictures.

    Raises:
        ConfigError: No task, or an unknown reward.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 (Gymnasium's form)

    def __init__(
        self,
        tasks: int = 60,
        reward: Literal["progress", "distance", "sparse"] = "progress",
        render_mode: str | None = None,
        render_size: int = 64,
    ) -> None:
        require(tasks >= 1, "env.kwargs.tasks", tasks, "must be at least 1")
        choice("env.kwargs.reward", reward, ("progress", "distance", "sparse"))
        self.goals = np.random.default_rng(0).uniform(-1, 1, (tasks, 2))
        self.task_names = tuple(f"goal {x:+.2f} {y:+.2f}" for x, y in self.goals)
        self.reward, self.render_mode, self.render_size = reward, render_mode, render_size
        self.action_space = Box(-1, 1, (2,), np.float32)
        self.observation_space = Box(-1, 1, (2,), np.float32)
        self.task, self.place = 0, np.zeros(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, " 2"], dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self.goals)))
        self.task = int((options or {}).get("task", drawn))
        require(0 <= self.task < len(self.goals), "task", self.task, f"must be one of 0 to {len(self.goals) - 1}")
        self.place = self.np_random.uniform(-1, 1, 2)
        return self.place.astype(np.float32), {"task": self.task, "success": False}

    def step(
        self, action: Float[np.ndarray, " 2"]
    ) -> tuple[Float[np.ndarray, " 2"], float, bool, bool, dict[str, Any]]:
        """Move; time limits are the registration's."""
        before = self._distance()
        self.place = np.clip(self.place + SPEED * np.clip(action, -1, 1), -1, 1)
        distance = self._distance()
        reward = {"progress": before - distance, "distance": -distance, "sparse": float(distance < NEAR)}[self.reward]
        return self.place.astype(np.float32), reward, False, False, {"task": self.task, "success": distance < NEAR}

    def _distance(self) -> float:
        return float(np.hypot(*(self.place - self.goals[self.task])))

    def draw_at(self, size: int) -> Image:
        """The arena, `[size, size, 3]`, y up."""
        image, scale = blank(size, _FLOOR), size / (2 + 4 * _DRAWN)
        for place, colour in ((self.goals[self.task], _GOAL), (self.place, _POINT)):
            x, y = size / 2 + scale * float(place[0]), size / 2 - scale * float(place[1])
            circle(image, (x, y), _DRAWN * scale, colour)
        return image

    def render(self) -> Image:
        """The arena at `render_size`."""
        return self.draw_at(self.render_size)
