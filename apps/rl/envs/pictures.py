"""Pictures of any environment at any size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import gymnasium
import numpy as np
from jaxtyping import Float, UInt8

from apps.errors import UserError
from apps.rl.envs.mujoco import Camera, is_mujoco
from apps.rl.envs.raster import Image

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Shares of red, green and blue in brightness (ITU-R BT.601)."""


def painter(env: gymnasium.Env, camera: str | None, cheap: bool) -> Callable[[int], Image]:
    """What draws an environment as it stands, given a size; `[size, size, 3]`.

    In this order: its own `draw(size)`, MuJoCo, its `render()` resized.

    Raises:
        UserError: When called, where the environment has no pictures.
    """
    if hasattr(env.unwrapped, "draw"):
        return env.unwrapped.draw
    if is_mujoco(env):
        return Camera(env, camera, cheap).draw
    return lambda size: resize(_rendered(env), size)


def _rendered(env: gymnasium.Env) -> UInt8[np.ndarray, "H W 3"]:
    try:
        image = env.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"env.id={env.spec.id}: {error}") from error
    if not isinstance(image, np.ndarray) or image.ndim != 3:
        raise UserError(f"env.id={env.spec.id}: it renders no images, set env.obs=state")
    return image[..., :3]


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
