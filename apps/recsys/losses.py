"""From logits to probabilities and losses, task by task. B rows, T tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from apps.recsys.batch import TaskSpec
from apps.recsys.train_settings import LossConfig


def log_probabilities(logits: Float[Tensor, "B T"], tasks: Sequence[TaskSpec]) -> Float[Tensor, "B T"]:
    """Log of the probability of a positive, all conditions included: log p(buy) = log p(click) + log p(buy | click).

    Args:
        logits: of conditional tasks given that their condition holds.
        tasks: in the order of the columns; conditions may follow on each other.
    """
    return torch.stack([log_p for log_p, _ in _chain(logits, tasks)], 1)


def _chain(logits: Float[Tensor, "B T"], tasks: Sequence[TaskSpec]) -> list[tuple[Tensor, Tensor]]:
    """Logs of the probability of a positive and of a negative, per task.

    A conversion fails without the click, or with it: 1 - p q = (1 - p) + p (1 - q). As a sum of logs this is exact, and
    has a gradient, where p q rounds to 1.
    """
    yes, no = F.logsigmoid(logits).unbind(1), F.logsigmoid(-logits).unbind(1)
    place = {task.name: i for i, task in enumerate(tasks)}
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def both(i: int) -> tuple[Tensor, Tensor]:
        if i not in found:
            given = tasks[i].given
            found[i] = (yes[i], no[i])
            if given is not None:
                holds, fails = both(place[given])
                found[i] = (holds + yes[i], torch.logaddexp(fails, holds + no[i]))
        return found[i]

    return [both(i) for i in range(len(tasks))]


def task_losses(
    logits: Float[Tensor, "B T"], labels: Float[Tensor, "B T"], tasks: Sequence[TaskSpec], config: LossConfig
) -> Float[Tensor, " T"]:
    """Mean loss of each task over the rows inside it (labels not NaN); 0 for a task without any.

    Args:
        logits: as the model gives them.
        labels: 0 or 1, NaN outside of a task.
        tasks: in the order of the columns.
        config: kind of loss.
    """
    logits, inside = logits.float(), ~labels.isnan()
    if config.chain:
        log_p, log_not = (torch.stack(parts, 1) for parts in zip(*_chain(logits, tasks), strict=True))
    else:
        log_p, log_not = F.logsigmoid(logits), F.logsigmoid(-logits)
        inside = inside & _holds(labels, tasks)
    y = labels.nan_to_num()
    positive, negative = y * log_p, (1 - y) * log_not
    if config.focal_gamma:
        positive = positive * (config.focal_gamma * log_not).exp()
        negative = negative * (config.focal_gamma * log_p).exp()
    if config.positive_weight == "balanced":
        rates = torch.tensor(_rates(tasks, config.chain), device=logits.device)
        positive, negative = positive * 0.5 / rates, negative * 0.5 / (1 - rates)
    losses = torch.where(inside, -(positive + negative), 0.0)
    return losses.sum(0) / inside.sum(0).clamp(min=1)


def _rates(tasks: Sequence[TaskSpec], chain: bool) -> list[float]:
    """Share of positives among the rows that a task is trained on; priors of conditional tasks are conditional."""
    rates, named = [], {task.name: task for task in tasks}
    for task in tasks:
        rate, given = task.prior, task.given
        while chain and given is not None:
            rate, given = rate * named[given].prior, named[given].given
        rates.append(min(max(rate, 1e-4), 1 - 1e-4))
    return rates


def _holds(labels: Float[Tensor, "B T"], tasks: Sequence[TaskSpec]) -> Tensor:
    """[B, T]: where the condition of a task holds; everywhere for tasks without one."""
    place = {task.name: i for i, task in enumerate(tasks)}
    true = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    return torch.stack([true if t.given is None else labels[:, place[t.given]] == 1 for t in tasks], 1)
