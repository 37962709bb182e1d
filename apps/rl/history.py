"""Curves of training runs against agent steps: of one run, and of all runs in the same environment.

S points of a curve.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float

from apps.curves import read_curves
from apps.errors import ConfigError, UserError
from apps.rl.loading import agent_title
from apps.rl.settings import RLConfig
from apps.tree import flatten, plain, restore

Curve = tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]
"""Agent steps and values."""


class History:
    """What a run logged.

    Args:
        folder: of the run; without `metrics.csv` every curve is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.rows = read_curves(folder / "metrics.csv")

    def curve(self, name: str) -> Curve:
        """A metric by agent steps."""
        clock = "val/agent_steps" if name.startswith("val/") else "train/agent_steps"
        points = [(row[clock], row[name]) for row in self.rows if name in row and clock in row]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values

    def returns(self) -> Curve:
        """Of training episodes, each one once: rows repeat the latest."""
        steps, values = self.curve("train/return")
        fresh = np.append(True, values[1:] != values[:-1])[: len(values)]
        return steps[fresh], values[fresh]

    def loads(self) -> dict[str, tuple[Float[np.ndarray, " S"], Float[np.ndarray, "S E"]]]:
        """Layer -> agent steps and the share of each of E experts."""
        names = sorted({key for row in self.rows for key in row if key.startswith("load/")}, key=_natural)
        layers: dict[str, list[str]] = {}
        for name in names:
            layers.setdefault(name.removeprefix("load/").rsplit("/", 1)[0], []).append(name)
        found = {layer: [self.curve(name) for name in some] for layer, some in layers.items()}
        return {
            layer: (some[0][0], np.stack([values for _, values in some], 1))
            for layer, some in found.items()
            if len(some[0][0])
        }

    def steps_at(self, updates: Sequence[float]) -> Float[np.ndarray, " U"]:
        """Agent steps at which so many updates had been done; empty without curves."""
        points = [(row["step"] + 1, row["train/agent_steps"]) for row in self.rows if "train/agent_steps" in row]
        known, steps = np.array(points, float).reshape(-1, 2).T
        return np.interp(updates, known, steps) if len(known) else np.empty(0)


def _natural(name: str) -> tuple[str, int]:
    layer, expert = name.rsplit("/", 1)
    return layer, int(expert)


@dataclass
class Group:
    """Runs of equal settings, seed and name apart."""

    title: str
    settings: dict[str, Any]
    """By dotted name."""
    folders: list[Path]
    curves: list[Curve]
    """Mean returns of evaluations."""

    def spread(self) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, "N S"]]:
        """Agent steps, and what each of N runs got there; runs that stopped before 0.9 of the longest are left out."""
        longest = max(steps[-1] for steps, _ in self.curves)
        whole = [(steps, values) for steps, values in self.curves if steps[-1] >= 0.9 * longest]
        start, end = max(steps[0] for steps, _ in whole), min(steps[-1] for steps, _ in whole)
        grid = np.unique(np.concatenate([steps for steps, _ in whole]))
        grid = grid[(grid >= start) & (grid <= end)]
        return grid, np.stack([np.interp(grid, steps, values) for steps, values in whole])


def groups(root: Path, env_id: str) -> list[Group]:
    """Runs in a folder that trained in an environment and were evaluated; those of other versions are passed over."""
    found: dict[str, Group] = {}
    for file in sorted(root.glob("*/config.yaml")):
        config = _config(file)
        if config is None or config.env.id != env_id:
            continue
        curve = History(file.parent).curve("val/return")
        if not len(curve[0]):
            continue
        settings = {k: v for k, v in flatten(plain(config)).items() if not k.startswith(("run.", "trainer."))}
        key = json.dumps(settings, sort_keys=True, default=str)
        group = found.setdefault(key, Group(agent_title(config), settings, [], []))
        group.folders.append(file.parent)
        group.curves.append(curve)
    return _told_apart(list(found.values()))


def evaluations(root: Path, env_id: str) -> list[dict[str, Any]]:
    """Those of all runs in a folder that trained in an environment, a row each, as data to keep."""
    rows = []
    for group in groups(root, env_id):
        for folder in group.folders:
            config, history = _config(folder / "config.yaml"), History(folder)
            names = {"return": "val/return", "return_std": "val/return_std", "success": "val/success"}
            curves = {name: history.curve(metric) for name, metric in names.items()}
            for i, step in enumerate(curves["return"][0]):
                row = {"environment": env_id, "agent": group.title, "run": folder.name, "seed": config.run.seed}
                row["agent_steps"] = int(step)
                rows.append(row | {name: f"{c[1][i]:.6g}" for name, c in curves.items() if len(c[0])})
    return rows


def _config(file: Path) -> RLConfig | None:
    try:
        return restore(RLConfig, yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, UserError, ConfigError, TypeError, AttributeError):
        return None


def _told_apart(found: list[Group]) -> list[Group]:
    """Groups of the same title get the settings in which they differ, the first two, into it."""
    titles = [group.title for group in found]
    for title in {title for title in titles if titles.count(title) > 1}:
        same = [group for group in found if group.title == title]
        names = [name for name in same[0].settings if len({str(one.settings.get(name)) for one in same}) > 1]
        for group in same:
            words = ", ".join(f"{name}={group.settings.get(name)}" for name in names[:2])
            group.title = f"{title} ({words}{', ...' if len(names) > 2 else ''})"
    return found
