"""Episodes written step by step: what the agent did, what it got, which experts worked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import moecore
from apps.output import write_rows
from apps.rl.agents.mentor import Mentor
from apps.rl.arguments import Predict
from apps.rl.loading import Trained
from apps.rl.rollout import Trace
from apps.rl.video import write_video
from moecore.files import atomic_path
from moecore.routing import Routing


@torch.no_grad()
def expert_weights(agent: Mentor, observations: list[np.ndarray]) -> Float[np.ndarray, "N E"] | None:
    """Weight of every expert at each of N observations, 0 for those not chosen; None for an agent without experts."""
    training = agent.training
    agent.eval()
    with moecore.record(agent.actor) as routings:
        agent(torch.from_numpy(np.stack(observations)).to(next(agent.parameters()).device))
    agent.train(training)
    return _spread(routings[0]).cpu().numpy() if routings else None


def _spread(routing: Routing) -> Float[Tensor, "N E"]:
    chosen: Int[Tensor, "N K"] = routing.assignment.expert
    return torch.zeros_like(routing.scores).scatter(1, chosen, routing.weights.to(routing.scores.dtype))


def write_episodes(trained: Trained, args: Predict) -> str:
    """Write the episodes; says where."""
    episodes = args.episodes or 1
    pictures = episodes if args.video else 0
    rollout = trained.episodes(episodes, observations=True, pictures=pictures)
    rows = [row for number, trace in enumerate(rollout.traces) for row in _rows(trained, number, trace)]
    write_steps(args.output, rows)
    said = f"{len(rows):,} steps of {episodes} episodes: {args.output}"
    if args.video:
        frames = [frame for trace in rollout.traces for frame in trace.frames]
        said += f"; video: {write_video(Path(args.video), frames)}"
    return said


def write_steps(path: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as .csv, .json or .parquet."""
    if not path.endswith(".parquet"):
        write_rows(path, rows)
        return
    import pandas as pd

    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_parquet(temporary, index=False)


def _rows(trained: Trained, number: int, trace: Trace) -> list[dict[str, Any]]:
    weights = expert_weights(trained.agent, trace.observations)
    tasks, rows = trained.spec.tasks, []
    for step, (action, reward) in enumerate(zip(trace.actions, trace.rewards, strict=True)):
        row: dict[str, Any] = {"episode": number, "step": step}
        if tasks:
            row["task"] = tasks[trace.task]
        row |= {f"action_{i}": float(value) for i, value in enumerate(action)} | {"reward": reward}
        if weights is not None:
            row |= {f"expert_{e}": float(value) for e, value in enumerate(weights[step])}
        rows.append(row)
    return rows
