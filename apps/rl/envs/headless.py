"""How MuJoCo draws on a machine without a display, and what is missing where it cannot."""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.util
import os
import sys

from apps.errors import UserError

PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6 libgl1"}
"""Debian packages that each way to draw without a display needs."""
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


def choose_gl() -> None:
    """Set MUJOCO_GL, which MuJoCo reads when it is imported, to what this machine has; a value that is set is kept."""
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return
    if "mujoco" in sys.modules or not importlib.util.find_spec("mujoco"):
        return
    for way, library in _LIBRARIES.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = way
            return


def load_mujoco() -> None:
    """Import MuJoCo, if it is installed, which loads the GL library that MUJOCO_GL names.

    Raises:
        UserError: The library is missing or has no driver.
    """
    load_triton_first()
    try:
        importlib.import_module("mujoco")
    except ModuleNotFoundError:
        return
    except Exception as error:  # PyOpenGL has an AttributeError for a missing OSMesa, an ImportError for EGL
        raise UserError(no_picture(error)) from error


def require_display() -> None:
    """Refuse to draw with GLFW where there is no display: MuJoCo would abort the process.

    Raises:
        UserError: There is none.
    """
    windows = os.environ.get("MUJOCO_GL", "").lower() in ("", "glfw", "glx", "on", "1", "true", "enable", "enabled")
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if windows and sys.platform.startswith("linux") and not shown:
        raise UserError(no_picture(RuntimeError("no display")))


def load_triton_first() -> None:
    """Import Triton, if it is installed, before anything is drawn.

    Mesa's software renderer and Triton each bring an LLVM; the process dies when torch.optim imports Triton after
    Mesa has made a GL context.
    """
    if "triton" not in sys.modules and importlib.util.find_spec("triton"):
        importlib.import_module("triton")


def no_picture(error: BaseException) -> str:
    """One line for a GL context that could not be made: why, and the packages to install."""
    way = os.environ.get("MUJOCO_GL") or "unset"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if way in PACKAGES:
        return f"MUJOCO_GL={way}: MuJoCo cannot draw ({reason}): apt-get install {PACKAGES[way]}"
    ways = ", or ".join(f"MUJOCO_GL={name} (apt-get install {packages})" for name, packages in PACKAGES.items())
    return f"MUJOCO_GL={way}: MuJoCo cannot draw ({reason}): set {ways}"
