"""The report of an agent that learns in context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

import moecore
from apps import figures
from apps.curves import read_curves
from apps.exported import exported_files
from apps.report import Page
from apps.rl.agents.t2mir import T2MIR
from apps.rl.incontext import pictures
from apps.rl.incontext.episodes import Life
from apps.rl.incontext.evaluation import InContextEvaluation, TrainedInContext
from apps.rl.pictures import table
from apps.rl.video import gif
from apps.runs import run_folder
from moecore.routing import Routing

KINDS = ("state", "action", "reward")


def write_report(trained: TrainedInContext, evaluation: InContextEvaluation, path: Path) -> Path:
    """Write the page.

    Args:
        trained: the agent; curves come from the folder it was trained in.
        evaluation: of it, with pictures of some tasks.
        path: of the file.
    """
    folder, split = run_folder(trained.path), trained.split
    page = Page(
        title=f"{folder.name}: {trained.title}",
        subtitle=f"{trained.path}, environment {trained.spec.id}, {len(split.train)} tasks learned from, "
        f"{len(split.held_out)} held out",
        key_figures=_key_figures(trained, evaluation),
    )
    _episodes(page, evaluation)
    _film(page, trained, evaluation)
    _learning(page, folder)
    _experts(page, trained, evaluation)
    exported_files(page, run_folder(trained.path))
    return page.write(path)


def _key_figures(trained: TrainedInContext, evaluation: InContextEvaluation) -> dict[str, str]:
    found = evaluation.scalars()
    shown = {
        "held-out tasks, last episode": f"{found['return_mean']:.4g}",
        "held-out tasks, first episode": f"{found['return_first']:.4g}",
        "random actions": f"{found['return_random']:.4g}",
        "agents trained in them": f"{found['return_trained']:.4g}",
    }
    if "success" in found:
        shown["success in the last episode"] = f"{found['success']:.0%}"
    return shown | {"parameters": f"{sum(p.numel() for p in trained.agent.parameters() if p.requires_grad):,}"}


def _episodes(page: Page, evaluation: InContextEvaluation) -> None:
    section = page.section("Learning in context")
    way = evaluation.scalars()["way"]
    section.text(
        "The weights stay as they are; all that changes from episode to episode is what the agent remembers of the "
        f"task. In its last episode in tasks it was not trained on, it is {way:.0%} of the way from random actions to "
        "agents that were trained in those very tasks."
    )
    section.figure(pictures.by_episode(evaluation), "Mean return of every episode; bands are one standard error.")
    rows = evaluation.rows()
    section.table([{name.replace("_", " "): value for name, value in row.items()} for row in rows])


def _film(page: Page, trained: TrainedInContext, evaluation: InContextEvaluation) -> None:
    frames = pictures.film(evaluation, trained.spec.tasks)
    if frames:
        words = "Held-out tasks: first episodes above, last episodes of the same tasks below, with their returns."
        page.section("What it does").animation(gif(frames), words)


def _learning(page: Page, folder: Path) -> None:
    rows = read_curves(folder / "metrics.csv")
    groups = {
        "loss": {"train/imitation": "imitation"},
        "gates": {"train/balance": "balance, token-wise", "train/contrast": "contrast, task-wise"},
        "return": {"val/return": "last episode, validation tasks", "val/first_return": "first episode"},
    }
    panels = {}
    for title, names in groups.items():
        curves = {words: _curve(rows, name) for name, words in names.items()}
        panels[title] = {words: curve for words, curve in curves.items() if curve[0]}
    panels = {title: curves for title, curves in panels.items() if curves}
    if panels:
        page.section("Training").figure(figures.curves(panels), "Over steps of the optimiser.")


def _curve(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _experts(page: Page, trained: TrainedInContext, evaluation: InContextEvaluation) -> None:
    if trained.config.t2mir.experts == "none":
        return
    lives = [*evaluation.held_out, *evaluation.seen]
    found = [_weights(trained.agent, life) for life in lives]
    section = page.section("Experts")
    if "token" in found[0]:
        section.figure(
            table(np.mean([one["token"] for one in found], 0), KINDS),
            "Token-wise mixture: mean weight of the experts by kind of token. Different rows mean that experts have "
            "divided states, actions and rewards among them.",
        )
    if "task" in found[0]:
        by_task = np.stack([one["task"].mean(0) for one in found])
        apart = by_task.std(0)
        held = len(evaluation.held_out)
        names = [f"{trained.spec.tasks[life.task]}{' (held out)' if i < held else ''}" for i, life in enumerate(lives)]
        section.figure(
            table(by_task, names),
            f"Task-wise mixture: mean weight of the experts by task, over what was in memory at the end. Between tasks "
            f"the weight of expert {int(apart.argmax())} varies most, by a deviation of {apart.max():.2f}.",
        )


@torch.no_grad()
def _weights(agent: T2MIR, life: Life) -> dict[str, Float[np.ndarray, "3 E"]]:
    """Mean weights of every mixture's experts by kind of token, over what is in memory at the end of a life."""
    device = next(agent.parameters()).device
    parts = (np.array(part[life.begin(agent.context) :], np.float32) for part in (life.obs, life.actions, life.rewards))
    with moecore.record(agent) as routings:
        agent(*(torch.from_numpy(part).to(device)[None] for part in parts))
    return {routing.name.rsplit(".", 1)[-1]: _by_kind(routing) for routing in routings}


def _by_kind(routing: Routing) -> Float[np.ndarray, "3 E"]:
    dense = routing.assignment.dense(routing.weights)  # [T, E]; T is 1 where whole sequences are routed
    return (dense.unflatten(0, (-1, 3)).mean(0) if len(dense) % 3 == 0 else dense.expand(3, -1)).cpu().numpy()
