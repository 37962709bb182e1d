"""How good an agent is: returns over episodes, beside random actions; and over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.rl.loading import Trained
from apps.rl.rollout import Rollout, evaluation_seeds, random_policy, run_episodes


def iqm(values: Sequence[float]) -> float:
    """Interquartile mean: of the middle half, quarter values weighted (Agarwal et al. 2021, arXiv 2108.13264)."""
    ordered, cut = np.sort(np.asarray(values, float)), len(values) / 4
    place = np.arange(len(ordered))
    weights = np.clip(place + 1 - cut, 0, 1) * np.clip(len(ordered) - cut - place, 0, 1)
    return float((ordered * weights).sum() / weights.sum())


@dataclass(frozen=True)
class Evaluation:
    """Episodes of an agent and of random actions from the same starts."""

    agent: str
    rollouts: Mapping[str, Rollout]
    """Name in tables -> episodes; the agent's first."""
    tasks: tuple[str, ...]
    """Names of tasks, where the environment has several."""

    def rows(self) -> list[dict[str, Any]]:
        """A table of returns, by task too where there are several."""
        rows = [_row(name, rollout) for name, rollout in self.rollouts.items()]
        own = self.rollouts[self.agent]
        for number, task in enumerate(self.tasks):
            part = Rollout([trace for trace in own.traces if trace.task == number])
            if part.traces:
                rows.append(_row(f"  {task}", part))
        return rows

    def scalars(self) -> dict[str, Any]:
        """Flat figures."""
        found: dict[str, Any] = {}
        for row in self.rows():
            name = "random" if row["agent"] == "random actions" else row["agent"].strip()
            prefix = "" if name == self.agent else f"{name}/"
            found |= {f"{prefix}{key}": value for key, value in row.items() if key != "agent"}
        return found


def _row(name: str, rollout: Rollout) -> dict[str, Any]:
    returns = rollout.returns
    row = {
        "agent": name,
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "return_iqm": iqm(returns),
        "steps_mean": float(np.mean(rollout.lengths)),
        "episodes": len(returns),
    }
    return row | ({"success": float(np.mean(rollout.successes))} if rollout.has_success else {})


def evaluate(trained: Trained, episodes: int, pictures: int = 0) -> Evaluation:
    """Run episodes of the agent, and of random actions.

    Args:
        trained: the agent.
        episodes: of each.
        pictures: keep pictures of so many of the agent's episodes.
    """
    seed = trained.config.run.seed
    guess = random_policy(trained.spec, seed)
    by_chance = run_episodes(trained.config.env, trained.spec, guess, evaluation_seeds(episodes))
    own = trained.episodes(episodes, pictures=pictures)
    return Evaluation(trained.title, {trained.title: own, "random actions": by_chance}, trained.spec.tasks)
