"""Windows out of histories: what a transformer learns from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from apps.errors import UserError
from apps.rl.agents.t2mir import Windows
from apps.rl.incontext.histories import TaskHistory
from moecore.errors import require


def check_length(histories: Mapping[int, TaskHistory], context: int) -> None:
    """Raise unless every history has a window that begins with an episode."""
    for task, history in histories.items():
        longest = len(history.reward)
        require(longest >= context, "t2mir.context", context, f"the history of task {task} has only {longest} steps")
        if not history.first[: longest - context + 1].any():
            raise UserError(f"t2mir.context={context}: no episode of task {task} begins so long before its end")


def draw_windows(
    histories: Mapping[int, TaskHistory], tasks: int, context: int, final: bool, rng: np.random.Generator
) -> Windows:
    """Two windows of each of some tasks, from the beginning of an episode on, wherever in the agent's learning.

    Args:
        histories: by task.
        tasks: how many to draw, all different; fewer if there are no more.
        context: steps of a window.
        final: imitate what the agent does once it has learned, not what it did then.
        rng: source of randomness.
    """
    chosen = rng.choice(sorted(histories), min(tasks, len(histories)), replace=False)
    parts = [_window(histories[int(task)], context, final, rng) for task in chosen for _ in range(2)]
    obs, action, reward, target = (torch.from_numpy(np.stack(some)) for some in zip(*parts, strict=True))
    return Windows(obs, action, reward, target)


def _window(history: TaskHistory, context: int, final: bool, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    starts = np.flatnonzero(history.first[: len(history.reward) - context + 1])
    begin = int(rng.choice(starts))
    part = slice(begin, begin + context)
    target = history.final if final else history.action
    return history.obs[part], history.action[part], history.reward[part], target[part]
