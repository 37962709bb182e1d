"""Pictures of MuJoCo environments without a display: DeepMind Control, Meta-World, Gymnasium's own, Adroit."""

from __future__ import annotations

import atexit
import sys
import weakref
from typing import Any

import gymnasium
import numpy as np

from apps.errors import UserError
from apps.rl.envs.headless import load_triton_first, no_picture, require_display
from apps.rl.envs.raster import Image

_META_WORLD_VIEW = (0.75, 0.075, 0.7)
"""Place of Meta-World's camera corner2 in published work: closer to the table than the package's."""

_CAMERAS: weakref.WeakSet[Camera] = weakref.WeakSet()
"""Those that may hold GL contexts."""


def is_mujoco(env: gymnasium.Env) -> bool:
    """Whether a MuJoCo model can be found in an environment."""
    return sys.modules.get("mujoco") is not None and _model(env) is not None


class Camera:
    """Draws a MuJoCo environment at any size.

    Args:
        env: The environment.
        camera: Name or number; None: camera 0 of DeepMind Control (2 of its quadruped), corner2 of Meta-World, else
            the environment's own.
        cheap: Draw without shadows, reflections and multisampling.

    Raises:
        UserError: There is no such camera, or no display and nothing that draws without.
    """

    def __init__(self, env: gymnasium.Env, camera: str | None = None, cheap: bool = True) -> None:
        self.env, self.name, self.cheap = env.unwrapped, camera, cheap
        self.model: Any = None
        self.renderers: dict[int, Any] = {}

    def draw_at(self, size: int) -> Image:
        """The scene as it stands, `[size, size, 3]`."""
        model, data = _model(self.env)
        if model is not self.model:  # some environments compile a new model in reset
            self.close()
            self._prepare(model)
        if size not in self.renderers:
            self.renderers[size] = self._renderer(model, size)
        renderer = self.renderers[size]
        renderer.update_scene(data, self._view(model, data))
        image = renderer.render()
        return np.ascontiguousarray(image[::-1, ::-1]) if self._upside_down(data) else image

    def close(self) -> None:
        """Free what draws."""
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers.clear()

    def _prepare(self, model: Any) -> None:
        """Settings of a model, before its first renderer copies them."""
        import mujoco

        require_display()
        load_triton_first()
        _CAMERAS.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)  # last, so that it runs before MuJoCo ends its GL library
        self.model = model
        self.camera = self._camera(model)
        corner = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "corner2")
        if is_meta_world(self.env) and self.camera == corner:
            model.cam_pos[corner] = _META_WORLD_VIEW
        if self.cheap:
            model.light_castshadow[:] = 0
            model.mat_reflectance[:] = 0
            model.vis.quality.offsamples = 0

    def _renderer(self, model: Any, size: int) -> Any:
        import mujoco

        # Its buffer has the size that the model names, and is cleared for each picture: no larger than needed.
        buffer = model.vis.global_
        buffer.offwidth = buffer.offheight = size
        try:
            return mujoco.Renderer(model, size, size)
        except Exception as error:  # whatever the GL layer raises: ImportError, RuntimeError, AttributeError, its own
            raise UserError(no_picture(error)) from error

    def _camera(self, model: Any) -> int:
        """Number of the camera, -1 for the free one."""
        import mujoco

        def number(name: str) -> int:
            return mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)

        if self.name is not None:
            found = int(self.name) if self.name.lstrip("-").isdigit() else number(self.name)
            if not (0 <= found < model.ncam or self.name == "-1"):
                names = [model.camera(index).name or str(index) for index in range(model.ncam)]
                raise UserError(f"env.camera={self.name}: choose one of {', '.join([*names, '-1 (free)'])}")
            return found
        if is_meta_world(self.env):
            return number("corner2")
        if hasattr(self.env, "physics"):
            return 2 if type(self.env.physics).__module__.endswith(".quadruped") else 0
        return number("track")

    def _upside_down(self, data: Any) -> bool:
        """Whether the camera stands on its head, as corner cameras of Meta-World do: its y axis points down."""
        return is_meta_world(self.env) and self.camera >= 0 and data.cam_xmat[self.camera][7] < -0.1

    def _view(self, model: Any, data: Any) -> Any:
        """What a renderer takes for a camera; the free one as the environment's own settings place it."""
        import mujoco

        own = getattr(getattr(self.env, "mujoco_renderer", None), "default_cam_config", None)
        if self.camera >= 0 or own is None:
            return self.camera
        view = mujoco.MjvCamera()
        view.lookat[:] = np.median(data.geom_xpos, axis=0)
        view.distance = model.stat.extent
        for key, value in own.items():
            if np.ndim(value):
                getattr(view, key)[:] = value
            else:
                setattr(view, key, value)
        return view


def _close_all() -> None:
    for camera in list(_CAMERAS):
        camera.close()


def _model(env: gymnasium.Env) -> tuple[Any, Any] | None:
    """Model and data, of whichever package the environment comes from."""
    import mujoco

    holder = getattr(env.unwrapped, "physics", env.unwrapped)
    model, data = getattr(holder, "model", None), getattr(holder, "data", None)
    model, data = getattr(model, "ptr", model), getattr(data, "ptr", data)
    return (model, data) if isinstance(model, mujoco.MjModel) else None


def is_meta_world(env: gymnasium.Env) -> bool:
    """Whether an environment is one of Meta-World."""
    return type(env).__module__.startswith("metaworld")
