"""Settings of the environment. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moecore.errors import require


@dataclass
class EnvConfig:
    """Which environment, and what an agent sees of it."""

    id: str = "moecore/PixelPendulum-v0"
    """Any registered Gymnasium id: one of ours (moecore/...), dm_control/cartpole-balance-v0, Meta-World/MT1 with
    kwargs, AdroitHandDoor-v1, Pendulum-v1, module:id."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to `gymnasium.make`."""
    obs: Literal["pixels", "state"] = "pixels"
    """pixels: rendered images; state: the environment's own vector."""
    size: int = 32
    """pixels: height and width."""
    gray: bool = True
    """pixels: one channel instead of three."""
    camera: str | None = None
    """pixels: camera of MuJoCo environments, by name or number; null: the environment's own."""
    cheap: bool = True
    """pixels: MuJoCo renders without shadows, reflections and multisampling (5 to 11 times faster)."""
    frame_stack: int = 3
    """Latest observations side by side."""
    action_repeat: int = 2
    """Environment steps per action; rewards are added up."""
    max_steps: int | None = None
    """Environment steps after which an episode is truncated; null: as registered."""
    discrete: bool = False
    """Take environments of discrete actions: the agent's action has a number per choice, the largest is taken."""

    def __post_init__(self) -> None:
        for name in ("size", "frame_stack", "action_repeat"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.obs == "state" or self.size >= 8, "size", self.size, "must be at least 8")
        good = self.max_steps is None or self.max_steps >= 1
        require(good, "max_steps", self.max_steps, "must be at least 1, or null")
