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
    own = F.logsigmoid(logits)
    place = {task.name: i for i, task in enumerate(tasks)}
    columns = []
    for i, task in enumerate(tasks):
        column, given = own[:, i], task.given
        while given is not None:
            column = column + own[:, place[given]]
            given = tasks[place[given]].given
        columns.append(column)
    return torch.stack(columns, 1)


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
    logits = logits.float()
    log_p = log_probabilities(logits, tasks) if config.chain else F.logsigmoid(logits)
    chained = torch.tensor([config.chain and task.given is not None for task in tasks], device=logits.device)
    log_not = torch.where(chained, _log1mexp(log_p), F.logsigmoid(-logits))
    inside = ~labels.isnan()
    if not config.chain:
        inside = inside & _holds(labels, tasks)
    y = labels.nan_to_num()
    positive, negative = y * log_p, (1 - y) * log_not
    if config.focal_gamma:
        positive = positive * (1 - log_p.exp()).pow(config.focal_gamma)
        negative = negative * log_p.exp().pow(config.focal_gamma)
    if config.positive_weight == "balanced":
        rates = torch.tensor([min(max(task.prior, 1e-4), 1 - 1e-4) for task in tasks], device=logits.device)
        positive, negative = positive * 0.5 / rates, negative * 0.5 / (1 - rates)
    losses = torch.where(inside, -(positive + negative), 0.0)
    return losses.sum(0) / inside.sum(0).clamp(min=1)


def _holds(labels: Float[Tensor, "B T"], tasks: Sequence[TaskSpec]) -> Tensor:
    """[B, T]: where the condition of a task holds; everywhere for tasks without one."""
    place = {task.name: i for i, task in enumerate(tasks)}
    true = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    return torch.stack([true if t.given is None else labels[:, place[t.given]] == 1 for t in tasks], 1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without loss of digits (Maechler 2012)."""
    x = x.clamp(max=-1e-6)
    small = x > -0.6931
    return torch.where(small, (-torch.expm1(torch.where(small, x, -1.0))).log(), (-x.exp()).log1p())
