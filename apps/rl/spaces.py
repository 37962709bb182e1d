"""What agents, replay and environments know of each other. Imports no torch.

B transitions, A numbers of an action, K frames of a stack, C channels, H and W of an image, N of a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped


@dataclass(frozen=True)
class EnvSpec:
    """An environment as agent and replay see it."""

    id: str
    """Gymnasium id."""
    frame: tuple[int, ...]
    """Shape of one observation, not stacked: `[C, H, W]`, uint8, or `[N]`, float32."""
    frame_stack: int
    """K."""
    action_dim: int
    """A; every action is a float32 vector in [-1, 1]."""
    tasks: tuple[str, ...] = ()
    """Names of the skills or tasks that one environment holds; `info["task"]` of reset and step is the number of the
    present one. Empty: one task."""

    @property
    def pixels(self) -> bool:
        """Whether observations are images."""
        return len(self.frame) == 3

    @property
    def dtype(self) -> np.dtype:
        """Of frames."""
        return np.dtype(np.uint8 if self.pixels else np.float32)

    @property
    def stacked(self) -> tuple[int, ...]:
        """Shape of what an agent sees: `[K C, H, W]`, oldest frame first, or `[K N]`."""
        return (self.frame_stack * self.frame[0], *self.frame[1:])

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> EnvSpec:
        """Out of what a file kept of it, lists for tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True)
class Transitions:
    """A batch to learn from, n steps each, fewer where the episode ends earlier."""

    obs: Shaped[np.ndarray, "B ..."]
    action: Float[np.ndarray, "B A"]
    """The first of the n actions."""
    reward: Float[np.ndarray, " B"]
    """Discounted sum over the n steps."""
    discount: Float[np.ndarray, " B"]
    """Of the value of `next_obs`: gamma to the steps taken, 0 after a terminal state; truncation bootstraps."""
    next_obs: Shaped[np.ndarray, "B ..."]
    task: Int[np.ndarray, " B"]
    """Number of the task."""
