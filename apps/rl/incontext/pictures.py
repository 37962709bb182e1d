"""Charts and moving pictures of agents that learn in context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apps.figures import clean, expert_color
from apps.rl import pictures
from apps.rl.incontext.evaluation import InContextEvaluation
from apps.rl.video import Picture

SHOWN = 4
"""Tasks in a film."""


def by_episode(evaluation: InContextEvaluation) -> Figure:
    """Mean return of every episode, with a band of one standard error over tasks."""
    figure = Figure(figsize=(10, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, (name, returns) in enumerate(evaluation.curves().items()):
        place, mean = np.arange(1, returns.shape[1] + 1), returns.mean(0)
        error = returns.std(0) / np.sqrt(len(returns))
        color = expert_color(number)
        axes.fill_between(place, mean - error, mean + error, color=color, alpha=0.18, linewidth=0)
        axes.plot(place, mean, "o-", color=color, markersize=4, linewidth=2, label=name)
    label = "agents trained in the held-out tasks"
    axes.axhline(evaluation.learned, color="#8a6d3b", linewidth=1, linestyle="--", label=label)
    axes.set(xlabel="episode in a task", ylabel="return")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    clean(axes)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def film(evaluation: InContextEvaluation, tasks: Sequence[str]) -> list[Picture]:
    """First and last episodes in some held-out tasks, the same tasks below each other."""
    lives = [life for life in evaluation.held_out if life.episodes[0].frames][:SHOWN]
    if not lives:
        return []
    ends = [("first episode", 0), ("last episode", -1)]
    traces = [life.episodes[end] for _, end in ends for life in lives]
    return pictures.film(traces, [f"{words}: {life.returns[end]:.3g}" for words, end in ends for life in lives])
