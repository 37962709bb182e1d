"""From an id to an environment: the package that registers it is imported, and what is missing is said in one line."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, NamedTuple

import gymnasium

from apps.errors import UserError
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.headless import choose_gl, load_mujoco


class Package(NamedTuple):
    """Where ids come from."""

    prefixes: tuple[str, ...]
    """How its ids begin."""
    modules: tuple[str, ...]
    """What must be imported, in this order; the last registers the ids."""
    install: str
    """Command of the versions that were tested together."""


_MUJOCO = '"mujoco==3.3.0"'
_ROBOTS = ("Adroit", "Fetch", "FrankaKitchen", "HandManipulate", "HandReach", "PointMaze", "AntMaze")
PACKAGES = (
    Package(("dm_control/",), ("dm_control", "shimmy"), f'pip install {_MUJOCO} "dm_control==1.0.28" "shimmy==2.0.1"'),
    Package(("Meta-World/",), ("metaworld",), f'pip install {_MUJOCO} "metaworld==3.1.1"'),
    Package(_ROBOTS, ("gymnasium_robotics",), f'pip install {_MUJOCO} "gymnasium-robotics==1.4.2"'),
    Package(("ALE/",), ("ale_py",), "pip install ale-py"),
)
_SIMULATED = ("dm_control/", "Meta-World/", *_ROBOTS)
"""Ids of MuJoCo."""


def open_env(config: EnvConfig, render: bool) -> gymnasium.Env:
    """The environment as its package makes it, with its time limit or `config.max_steps`.

    Raises:
        UserError: The id is unknown, its package is not installed or cannot be loaded, or it does not take
            `config.kwargs`.
    """
    if not config.id.startswith("moecore/"):
        choose_gl()
        _load_package(config.id)
    kwargs: dict[str, Any] = dict(config.kwargs)
    if config.id.startswith("Meta-World/"):
        kwargs.setdefault("seed", 0)  # of its 50 goals; without one they differ from process to process
    if render:
        kwargs.setdefault("render_mode", "rgb_array")
    if config.max_steps is not None:
        kwargs["max_episode_steps"] = config.max_steps
    try:
        return gymnasium.make(config.id, disable_env_checker=True, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise UserError(f"env.id={config.id}: no such environment{_similar(config.id)}") from error
    except (gymnasium.error.Error, ImportError, AttributeError) as error:  # the latter of unmatched versions
        raise UserError(f"env.id={config.id}: {_line(error)}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"env.kwargs={config.kwargs}: {config.id} does not take them: {_line(error)}") from error
    except AssertionError as error:  # of classes that check their arguments in this way
        raise UserError(f"env.kwargs={config.kwargs}: {config.id} refuses them: {_line(error)}") from error


def _load_package(env_id: str) -> None:
    """Import what registers an id, MuJoCo first: dm_control makes a GL context with each environment, drawn or not."""
    spec = gymnasium.registry.get(env_id)
    if env_id.startswith(_SIMULATED) or "mujoco" in str(spec and spec.entry_point):
        load_mujoco()
    for package in PACKAGES:
        if not env_id.startswith(package.prefixes):
            continue
        for module in package.modules:
            try:
                loaded = importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise UserError(f"env.id={env_id}: {error.name} is not installed: {package.install}") from error
            except Exception as error:  # of unmatched versions, or of MUJOCO_GL where its library is missing
                raise UserError(f"env.id={env_id}: {module} fails ({_line(error)}): {package.install}") from error
        gymnasium.register_envs(loaded)


def _similar(env_id: str) -> str:
    close = difflib.get_close_matches(env_id, gymnasium.registry, n=3, cutoff=0.6)
    return f": did you mean {', '.join(close)}?" if close else ""


def _line(error: BaseException) -> str:
    """An error's first line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
