"""Lives written step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apps.rl.arguments import Predict
from apps.rl.incontext.episodes import Life
from apps.rl.incontext.evaluation import TrainedInContext
from apps.rl.prediction import write_steps
from apps.rl.video import write_video


def write_lives(trained: TrainedInContext, args: Predict) -> str:
    """Write every step of episodes in the tasks held out; says where."""
    tasks = trained.split.held_out
    lives = trained.live(tasks, len(tasks) if args.video else 0, args.episodes)
    rows = [row for life in lives for row in _rows(life, trained.spec.tasks[life.task])]
    write_steps(args.output, rows)
    said = f"{len(rows):,} steps in {len(lives)} held-out tasks: {args.output}"
    if args.video:
        frames = [frame for life in lives for trace in life.episodes for frame in trace.frames]
        said += f"; video: {write_video(Path(args.video), frames)}"
    return said


def _rows(life: Life, task: str) -> list[dict[str, Any]]:
    rows = []
    for number, trace in enumerate(life.episodes):
        for step, (action, reward) in enumerate(zip(trace.actions, trace.rewards, strict=True)):
            row: dict[str, Any] = {"task": task, "episode": number, "step": step}
            row |= {f"action_{i}": float(value) for i, value in enumerate(action)} | {"reward": reward}
            rows.append(row)
    return rows
