"""Gymnasium's pendulum, drawn without pygame."""

from __future__ import annotations

import math

from gymnasium.envs.classic_control.pendulum import PendulumEnv

from apps.rl.envs.raster import Image, blank, capsule, circle

_WHITE, _ROD, _AXLE = (255, 255, 255), (204, 77, 77), (0, 0, 0)
_VIEW = 1.25
"""Half the width that the picture shows; the rod is 1 long."""


class PixelPendulum(PendulumEnv):
    """Pendulum-v1 in physics, reward, start and state vector; pictures are drawn at any size."""

    def __init__(self, render_mode: str | None = None, render_size: int = 64, g: float = 10.0) -> None:
        super().__init__(render_mode="rgb_array" if render_mode else None, g=g)
        self.render_size = render_size

    def draw_at(self, size: int) -> Image:
        """The pendulum as it stands, `[size, size, 3]`: angle 0 is up, positive angles lean left."""
        angle, scale, middle = float(self.state[0]), size / (2 * _VIEW), size / 2
        tip = (middle - scale * math.sin(angle), middle - scale * math.cos(angle))
        image = blank(size, _WHITE)
        capsule(image, (middle, middle), tip, 0.1 * scale, _ROD)
        circle(image, (middle, middle), 0.05 * scale, _AXLE)
        return image

    def render(self) -> Image:
        """The picture at `render_size`."""
        return self.draw_at(self.render_size)
