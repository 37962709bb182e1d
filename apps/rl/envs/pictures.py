"""Pictures of any environment at any size."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import gymnasium
import numpy as np
from jaxtyping import Float, UInt8

from apps.errors import UserError
from apps.rl.envs.guard import guarded
from apps.rl.envs.mujoco import Camera, is_mujoco
from apps.rl.envs.raster import Image

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Shares of red, green and blue in brightness (ITU-R BT.601)."""


class Painter(Protocol):
    """What draws an environment: one of ours itself, or what stands before another's."""

    def draw_at(self, size: int) -> Image:
        """The environment as it stands, `[size, size, 3]`."""


def painter(env: gymnasium.Env, camera: str | None, cheap: bool) -> Painter:
    """The environment itself if it has a `draw_at`, a camera of MuJoCo, or its `render()` resized."""
    if hasattr(env.unwrapped, "draw_at"):
        return env.unwrapped
    return Camera(env, camera, cheap) if is_mujoco(env) else Resized(env)


class Resized:
    """Draws by an environment's `render()`, for what it is worth in time.

    Raises:
        UserError: When it draws, where the environment has no images or needs a package for them.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        self.env = env

    def draw_at(self, size: int) -> Image:
        """The environment as it stands, `[size, size, 3]`."""
        image = guarded(self.env.spec.id, "render", self.env.render)
        if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
            raise UserError(f"env.id={self.env.spec.id}: it renders no images: set env.obs=state")
        if image.ndim == 2 or image.shape[2] == 1:  # shades of grey
            image = np.repeat(image.reshape(*image.shape[:2], 1), 3, 2)
        return resize(image[..., :3], size)


def resize(image: UInt8[np.ndarray, "H W 3"], size: int) -> Image:
    """Average over areas to `[size, size, 3]`; the aspect is not kept."""
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    rows = _areas(height, size) @ image.reshape(height, -1).astype(np.float32)
    pixels = _areas(width, size) @ rows.reshape(size, width, channels)
    return (pixels + 0.5).astype(np.uint8)


@cache
def _areas(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Share of each source pixel in each target pixel along one axis."""
    edges = np.arange(target + 1) * (source / target)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(source)
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def as_frame(image: Image, gray: bool) -> UInt8[np.ndarray, "C H W"]:
    """Channels first, one of brightness if `gray`."""
    if gray:
        return (image @ _LUMA + 0.5).astype(np.uint8)[None]
    return np.ascontiguousarray(image.transpose(2, 0, 1))
