"""Windows out of histories: what a transformer learns from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int

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
    """Two windows of each of some tasks.

    Args:
        histories: by task.
        tasks: how many to draw, all different; fewer if there are no more.
        context: steps of a window.
        final: imitate what the agent does once it has learned: then windows are episodes in any order, of which there
            are many more than stretches. Otherwise they are stretches of a history from the beginning of an episode on,
            and what is imitated is what the agent did then.
        rng: source of randomness.
    """
    chosen = rng.choice(sorted(histories), min(tasks, len(histories)), replace=False)
    draw = _shuffled if final else _stretch
    rows = [(histories[int(task)], draw(histories[int(task)], context, rng)) for task in chosen for _ in range(2)]
    columns = ([getattr(one, name)[at] for one, at in rows] for name in ("obs", "action", "reward"))
    targets = [(one.final if final else one.action)[at] for one, at in rows]
    return Windows(*(torch.from_numpy(np.stack(part)) for part in (*columns, targets)))


def _stretch(history: TaskHistory, context: int, rng: np.random.Generator) -> Int[np.ndarray, " context"]:
    """Steps in the order of time, from the beginning of an episode on."""
    starts = np.flatnonzero(history.first[: len(history.reward) - context + 1])
    return rng.choice(starts) + np.arange(context)


def _shuffled(history: TaskHistory, context: int, rng: np.random.Generator) -> Int[np.ndarray, " context"]:
    """Steps of episodes in any order, the last one cut."""
    starts = np.flatnonzero(history.first)
    ends = np.append(starts[1:], len(history.reward))
    steps = [np.arange(starts[i], ends[i]) for i in rng.permutation(len(starts))]
    return np.concatenate(steps)[:context]
