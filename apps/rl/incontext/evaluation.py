"""What an agent earns in tasks it has never seen, episode by episode, while its weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from apps.errors import UserError
from apps.rl.agents.t2mir import T2MIR
from apps.rl.incontext.episodes import Life, by_chance, in_context, live
from apps.rl.incontext.tasks import Split, split_tasks
from apps.rl.loading import known_environment
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec
from apps.runs import load_checkpoint
from apps.training import load_weights
from apps.tree import restore
from moecore.errors import require

MOST_SEEN = 10
"""Tasks of the training that are looked at beside those held out."""


@dataclass(frozen=True)
class TrainedInContext:
    """A transformer with its weights, and the tasks that it knows."""

    agent: T2MIR
    config: RLConfig
    spec: EnvSpec
    path: Path
    learned: Mapping[int, float]
    """Return of each task's own agent at the end of its training."""

    @property
    def split(self) -> Split:
        """Which tasks it learned from."""
        return split_tasks(self.spec, self.config.t2mir)

    @property
    def title(self) -> str:
        """The agent's name in tables."""
        return agent_title(self.config)

    def live(self, tasks: Sequence[int], pictures: int = 0, episodes: int | None = None) -> list[Life]:
        """Episodes in each of some tasks, as many as configured if it is not said; pictures of the first tasks."""
        count = episodes or self.config.t2mir.eval_episodes
        return live(self.config.env, tasks, in_context(self.agent), count, pictures)


def agent_title(config: RLConfig) -> str:
    """What a transformer of these settings is called."""
    names = {"both": "T2MIR", "token": "token-wise experts", "task": "task-wise experts", "none": "dense transformer"}
    one = config.t2mir
    return names[one.experts] + (", no contrast" if one.experts in ("both", "task") and not one.contrast else "")


def load_in_context(path: Path, config: RLConfig | None = None) -> TrainedInContext:
    """The agent of a checkpoint, on the GPU if there is one.

    Raises:
        UserError: if the checkpoint is of another method or architecture.
    """
    checkpoint = load_checkpoint(path, "rl")
    if "learned" not in checkpoint:
        raise UserError(f"{path}: an agent trained with method=mentor; leave out method")
    config, spec = known_environment(checkpoint, config)
    refuse_other_tasks(checkpoint, config)
    agent = load_weights(T2MIR(config.t2mir, spec.stacked[0], spec.action_dim), checkpoint, path, config.trainer)
    return TrainedInContext(agent, config, spec, path, checkpoint["learned"])


def refuse_other_tasks(checkpoint: Mapping[str, Any], config: RLConfig) -> None:
    """Raise if tasks that were learned from would pass for others."""
    stored = restore(RLConfig, checkpoint["config"]).t2mir
    for name in ("val_tasks", "held_out"):
        now, then = getattr(config.t2mir, name), getattr(stored, name)
        require(now == then, f"t2mir.{name}", now, f"the agent was trained with {then}; keep it")


@dataclass(frozen=True)
class InContextEvaluation:
    """Episodes of the agent in tasks held out and in those learned from, and of random actions in the former."""

    title: str
    held_out: list[Life]
    seen: list[Life]
    chance: list[Life]
    learned: float
    """What agents trained in the held-out tasks themselves reach."""

    def curves(self) -> dict[str, Float[np.ndarray, "tasks episodes"]]:
        """Returns by name of a row."""
        parts = {f"{self.title}, held-out tasks": self.held_out, f"{self.title}, tasks learned from": self.seen}
        parts["random actions, held-out tasks"] = self.chance
        return {name: np.array([life.returns for life in lives]) for name, lives in parts.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Mean returns by episode."""
        rows = []
        for name, returns in self.curves().items():
            columns = {f"episode_{i + 1}": float(mean) for i, mean in enumerate(returns.mean(0))}
            rows.append({"agent": name, "tasks": len(returns)} | columns)
        ends = {column: self.learned for column in rows[0] if column.startswith("episode_")}
        rows.append({"agent": "agents trained in these tasks", "tasks": len(self.held_out)} | ends)
        return rows

    def scalars(self) -> dict[str, Any]:
        """Flat figures; `way` is the share of the way from random actions to agents trained in the tasks."""
        held, seen, chance = self.curves().values()
        last, by_chance_alone = float(held[:, -1].mean()), float(chance.mean())
        found = {
            "return_mean": last,
            "return_first": float(held[:, 0].mean()),
            "return_seen_tasks": float(seen[:, -1].mean()),
            "return_random": by_chance_alone,
            "return_trained": self.learned,
            "way": (last - by_chance_alone) / (self.learned - by_chance_alone),
        }
        ends = [life.episodes[-1].success for life in self.held_out]
        return found | ({} if None in ends else {"success": float(np.mean(ends))})


def evaluate_in_context(
    trained: TrainedInContext, pictures: int = 0, episodes: int | None = None
) -> InContextEvaluation:
    """Let it live in the tasks held out and in some of those learned from.

    Args:
        trained: the agent.
        pictures: keep pictures of so many held-out tasks.
        episodes: in a row in each task; None: as configured.
    """
    split, config = trained.split, trained.config
    guess = by_chance(trained.spec.action_dim, config.run.seed)
    return InContextEvaluation(
        title=trained.title,
        held_out=trained.live(split.held_out, pictures, episodes),
        seen=trained.live(split.train[:MOST_SEEN], 0, episodes),
        chance=live(config.env, split.held_out, guess, episodes or config.t2mir.eval_episodes),
        learned=float(np.mean([trained.learned[task] for task in split.held_out])),
    )
