"""Skills that conflict: the same scene asks for opposite actions, and only the colour of its frame says which.

A white agent, a red disc, a blue square and a yellow button lie in a square arena. To *reach*, the agent touches the
disc and keeps off the square; to *avoid*, it enters the square and keeps off the disc, which now chases it; to *push*,
it moves the disc into the square; to *reach and push*, it touches the button before it does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Float

from apps.rl.envs.raster import Image, blank, circle, rectangle
from moecore.errors import choice, require

SKILLS = ("reach", "push", "avoid", "reach_push")
"""All skills, in the order of their flags in the state vector."""

AGENT, DISC, SQUARE, BUTTON = 0.1, 0.16, 0.2, 0.1
"""Radii, of the square half its side; the arena reaches from -1 to 1."""
SPEED, CHASE = 0.1, 0.05
"""Way of agent and chasing disc per step."""
_START = 0.65
"""Objects start this close to the middle, so that there is room behind each of them."""
_APART = 0.5
"""Distance that they keep at the start."""

_FLOOR, _AGENT, _DISC, _SQUARE = (24, 24, 32), (245, 245, 245), (210, 50, 50), (70, 150, 255)
_BUTTON, _PRESSED = (240, 200, 40), (40, 110, 60)
_FRAMES = {"reach": (255, 255, 255), "push": (60, 190, 90), "avoid": (200, 30, 120), "reach_push": (40, 50, 170)}


class Skills(gymnasium.Env):
    """Skills drawn or taken in turn, one per episode; the number in `skills` is `info["task"]`.

    The action is the agent's velocity, `[2]` in [-1, 1], the observation `[13]` in [-1, 1]: positions of agent, disc,
    square and button, whether the button is pressed, and a flag per skill. The reward is progress (of the agent, or of
    agent and disc), 1 for success, -1 for touching what is to be kept off; both end the episode.

    Args:
        skills: Names out of `SKILLS`.
        order: random: one is drawn per episode; cyclic: in turn, a seeded reset begins with seed modulo their number.
        render_mode: rgb_array or None.
        render_size: Height and width of pictures.

    Raises:
        ConfigError: A skill or an order is unknown, or none is given.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 (Gymnasium's form)

    def __init__(
        self,
        skills: Sequence[str] = SKILLS,
        order: Literal["random", "cyclic"] = "random",
        render_mode: str | None = None,
        render_size: int = 64,
    ) -> None:
        require(len(skills) > 0, "env.kwargs.skills", skills, f"name at least one of {', '.join(SKILLS)}")
        for skill in skills:
            choice("env.kwargs.skills", skill, SKILLS)
        choice("env.kwargs.order", order, ("random", "cyclic"))
        self.task_names = tuple(skills)
        self.order, self.render_mode, self.render_size = order, render_mode, render_size
        self.action_space = Box(-1, 1, (2,), np.float32)
        self.observation_space = Box(-1, 1, (9 + len(SKILLS),), np.float32)
        self.task = -1
        self.pressed = False

    @property
    def skill(self) -> str:
        """Name of the present skill."""
        return self.task_names[self.task]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, " 13"], dict[str, Any]]:
        """Begin an episode; `options={"task": number}` chooses its skill."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self.task_names)))
        if self.order == "cyclic":
            drawn = (self.task + 1 if seed is None else seed) % len(self.task_names)
        self.task = int((options or {}).get("task", drawn))
        known = 0 <= self.task < len(self.task_names)
        require(known, "task", self.task, f"must be a number of {', '.join(self.task_names)}, counted from 0")
        self.agent, self.disc, self.square, self.button = self._scatter()
        self.pressed = False
        return self._state(), {"task": self.task, "success": False}

    def step(
        self, action: Float[np.ndarray, " 2"]
    ) -> tuple[Float[np.ndarray, " 13"], float, bool, bool, dict[str, Any]]:
        """Move, push and chase; time limits are the registration's."""
        before = self._potential()
        self.agent = np.clip(self.agent + SPEED * np.clip(action, -1, 1), AGENT - 1, 1 - AGENT)
        if self.skill == "avoid":
            away = self.agent - self.disc
            self.disc = self.disc + away * min(1.0, CHASE / max(_norm(away), 1e-6))
        elif self.skill != "reach":
            self._push()
        reward = self._potential() - before
        if self.skill == "reach_push" and not self.pressed and self._near(self.button, BUTTON):
            # The bonus replaces what is left of the way to the button; progress of the second part counts from here.
            self.pressed, reward = True, reward + 0.5
        success, failure = self._outcome()
        info = {"task": self.task, "success": success}
        return self._state(), float(reward + success - failure), success or failure, False, info

    def draw_at(self, size: int) -> Image:
        """The scene, `[size, size, 3]`, y up."""
        image, edge = blank(size, _FRAMES[self.skill]), size / 16
        scale = size / 2 - edge
        rectangle(image, (edge, edge), (size - edge, size - edge), _FLOOR)

        def pixel(point: Float[np.ndarray, " 2"]) -> tuple[float, float]:
            return size / 2 + scale * float(point[0]), size / 2 - scale * float(point[1])

        x, y = pixel(self.square)
        half = SQUARE * scale
        rectangle(image, (x - half, y - half), (x + half, y + half), _SQUARE)
        circle(image, pixel(self.button), BUTTON * scale, _PRESSED if self.pressed else _BUTTON)
        circle(image, pixel(self.disc), DISC * scale, _DISC)
        circle(image, pixel(self.agent), AGENT * scale, _AGENT)
        return image

    def render(self) -> Image:
        """The scene at `render_size`."""
        return self.draw_at(self.render_size)

    def _scatter(self) -> list[Float[np.ndarray, " 2"]]:
        """Four places apart from each other, drawn until they are."""
        places: list[np.ndarray] = []
        while len(places) < 4:
            place = self.np_random.uniform(-_START, _START, 2)
            if all(_norm(place - other) >= _APART for other in places):
                places.append(place)
        return places

    def _push(self) -> None:
        """Move the disc out of the agent along the line between them, and the agent off a disc at the wall."""
        away = self.disc - self.agent
        gap = _norm(away)
        if gap >= AGENT + DISC:
            return
        away = away / gap if gap > 1e-6 else np.array([1.0, 0.0])
        self.disc = np.clip(self.agent + away * (AGENT + DISC), DISC - 1, 1 - DISC)
        gap = _norm(self.disc - self.agent)
        if gap < AGENT + DISC:
            self.agent = np.clip(self.disc - away * (AGENT + DISC), AGENT - 1, 1 - AGENT)

    def _potential(self) -> float:
        """What progress is measured by: minus the way that is left."""
        if self.skill == "reach":
            return -_norm(self.agent - self.disc)
        if self.skill == "avoid":
            return -_norm(self.agent - self.square)
        if self.skill == "reach_push" and not self.pressed:
            return -_norm(self.agent - self.button)
        return -_norm(self.disc - self.square) - 0.5 * _norm(self.agent - self.disc)

    def _near(self, place: Float[np.ndarray, " 2"], radius: float) -> bool:
        return _norm(self.agent - place) < AGENT + radius

    def _inside(self, place: Float[np.ndarray, " 2"]) -> bool:
        """Whether a point lies in the square."""
        return float(np.abs(place - self.square).max()) < SQUARE

    def _outcome(self) -> tuple[bool, bool]:
        """Success and failure."""
        if self.skill == "reach":
            touched = self._near(self.disc, DISC)
            return touched, self._inside(self.agent) and not touched
        if self.skill == "avoid":
            touched = self._near(self.disc, DISC)
            return self._inside(self.agent) and not touched, touched
        return self._inside(self.disc) and (self.skill == "push" or self.pressed), False

    def _state(self) -> Float[np.ndarray, " 13"]:
        flags = [float(self.skill == skill) for skill in SKILLS]
        places = (*self.agent, *self.disc, *self.square, *self.button)
        return np.array([*places, float(self.pressed), *flags], dtype=np.float32)


def _norm(vector: Float[np.ndarray, " 2"]) -> float:
    return float(np.hypot(vector[0], vector[1]))
