"""A user's environment, watched: what it raises or gives amiss is one line that names it, not a traceback of ours."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float

from apps.errors import UserError
from moecore.errors import ConfigError


def guarded(env_id: str, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call into an environment gives.

    Args:
        env_id: for errors.
        what: the method's name, for errors.
        call: the method.
        *args: of it.
        **kwargs: of it.

    Raises:
        UserError: it raised; the line says what, and where in its code.
    """
    try:
        return call(*args, **kwargs)
    except (UserError, ConfigError):
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"env.id={env_id}: {error}") from error
    except Exception as error:  # anything at all, from somebody else's code
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        raise UserError(f"env.id={env_id}: {what} raised {type(error).__name__} ({where}): {error}") from error


def checked_result(env_id: str, what: str, result: Any, length: int) -> tuple[Any, ...]:
    """A result of `reset` (length 2) or `step` (length 5), whose last part must be a dictionary."""
    form = "(obs, info)" if length == 2 else "(obs, reward, terminated, truncated, info)"
    if not isinstance(result, tuple) or len(result) != length or not isinstance(result[-1], dict):
        raise UserError(f"env.id={env_id}: {what} must give {form}, as Gymnasium has it since version 0.26")
    return result


def as_number(env_id: str, what: str, value: Any) -> float:
    """A number, also where the environment gives an array of one; it must be finite."""
    try:
        (number,) = (float(one) for one in np.asarray(value).reshape(-1))
    except (TypeError, ValueError):
        raise UserError(f"env.id={env_id}: {what} is {value!r}; it must be one number") from None
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise UserError(f"env.id={env_id}: {what} is {number}; it must be finite")
    return number


def as_state(env_id: str, value: Float[np.ndarray, " N"], width: int) -> Float[np.ndarray, " N"]:
    """A flattened state of the width that the observation space promises, all finite."""
    if value.shape != (width,):
        raise UserError(f"env.id={env_id}: an observation has {value.size} numbers, its space has {width}")
    if not np.isfinite(value).all():
        raise UserError(f"env.id={env_id}: an observation has NaN or infinite values; wrap it so that it has not")
    return value


def as_task(env_id: str, info: dict[str, Any], names: tuple[str, ...]) -> int:
    """The number of the present task, of an environment that names several."""
    task = info.get("task")
    if isinstance(task, (int, np.integer)) and 0 <= task < len(names):
        return int(task)
    raise UserError(f"env.id={env_id}: info['task'] is {task!r}; with task_names it must be 0 to {len(names) - 1}")
