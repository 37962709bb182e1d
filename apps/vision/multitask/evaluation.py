"""Measuring a multi-task model on a data set: the figures of every task, and which experts each task uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

import moecore
from apps.errors import UserError
from apps.progress import track
from apps.timing import clock
from apps.vision.models.m3vit import M3ViT
from apps.vision.multitask.metrics import delta_m, delta_per_task, make_measure


@dataclass
class Evaluation:
    """Figures of a whole data set, statistics of the routing, and some images with all there is to show of them."""

    figures: dict[str, float]
    """`<task>/<figure>`, of all tasks."""
    images: int
    images_per_second: float
    """All tasks of an image, over the forward passes; CPU time if on a CPU."""
    routing: dict[str, moecore.LayerMetrics]
    use: dict[str, Float[Tensor, "tasks E"]]
    """Per MoE layer the share of each task's (token, slot) pairs that each expert takes."""
    shown: Float[Tensor, "S C H W"]
    """The first images."""
    labels: dict[str, Tensor]
    """Of those."""
    predictions: dict[str, Tensor]
    """Of those, decoded as labels are."""
    maps: dict[str, dict[str, Int[Tensor, "S N"]]] = field(default_factory=dict)
    """Task -> MoE layer -> the main expert of every token of those (`moecore.token_map`)."""

    def scalars(self) -> dict[str, float]:
        """Figures by flat name."""
        figures = {"images": float(self.images), **self.figures, "images_per_second": self.images_per_second}
        for layer, metrics in self.routing.items():
            figures |= {f"routing/{layer}/{name}": value for name, value in metrics.scalars().items()}
        for layer, use in self.use.items():
            figures[f"routing/{layer}/task_specialisation"] = moecore.specialisation(use)
        return figures


@torch.no_grad()
def evaluate(model: M3ViT, batches: object, progress: bool = True, show: int = 6) -> Evaluation:
    """Run a model over batches of (images, labels).

    Args:
        model: put into eval mode.
        batches: an iterable of batches with a length.
        progress: show a bar.
        show: how many images to keep with their labels, predictions and routing.
    """
    model.eval()
    spec, device = model.spec, model.mean.device
    measures = {task.name: make_measure(task) for task in spec.tasks}
    stats, pairs = moecore.RoutingStats(), {}
    shown: dict[str, list] = {"images": [], "labels": [], "predictions": [], "maps": []}
    count, seconds = 0, 0.0
    for images, labels in track(batches, "evaluating", progress):
        started = clock(device)
        with moecore.record(model) as recording:
            predictions = model(images.to(device))
        seconds += clock(device) - started
        decoded = {task.name: task.kind.decode(predictions[task.name]).cpu() for task in spec.tasks}
        for name, measure in measures.items():
            measure.update(decoded[name], labels[name])
        stats.update(recording)
        _add_pairs(pairs, recording, len(spec.tasks))
        if count < show:
            left = show - count
            shown["images"].append(images[:left])
            shown["labels"].append({name: value[:left] for name, value in labels.items()})
            shown["predictions"].append({name: value[:left] for name, value in decoded.items()})
            shown["maps"].append(_maps(recording, spec.names, left))
        count += len(images)
    figures = {f"{name}/{key}": v for name, measure in measures.items() for key, v in measure.compute().items()}
    return Evaluation(
        figures,
        count,
        count / max(seconds, 1e-9),
        stats.metrics(),
        {layer: (use / use.sum(1, keepdim=True).clamp(min=1)).float() for layer, use in pairs.items()},
        torch.cat(shown["images"]),
        _joined(shown["labels"]),
        _joined(shown["predictions"]),
        {task: _joined([maps[task] for maps in shown["maps"]]) for task in spec.names},
    )


def _tasks(routing: moecore.Routing, count: int) -> Sequence[int]:
    """The tasks that a routing decides for: one, or where no gate knows the task all of them."""
    return [routing.task] if isinstance(routing.task, int) else range(count)


def _add_pairs(pairs: dict[str, Tensor], recording: moecore.Recording, tasks: int) -> None:
    for routing in recording:
        load = routing.assignment.load().double().cpu()
        table = pairs.setdefault(routing.name, torch.zeros(tasks, len(load), dtype=torch.float64))
        for task in _tasks(routing, tasks):
            table[task] += load


def _maps(recording: moecore.Recording, names: Sequence[str], left: int) -> dict[str, dict[str, Tensor]]:
    maps: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for routing in recording:
        experts = moecore.token_map(routing)[:left].short().cpu()
        for task in _tasks(routing, len(names)):
            maps[names[task]][routing.name] = experts
    return maps


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def read_baselines(path: str | Path) -> dict[str, float]:
    """Figures of single-task runs, `<task>/<figure>`: from a JSON file, or from the test.json of all runs in a folder.

    A folder's runs of one task are averaged; runs of several tasks are no baselines and are left out.

    Raises:
        UserError: for a file that is no JSON of figures, or a folder without single-task runs.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tasks.baselines={path}: no such file or folder")
    files = sorted(path.glob("*/test.json")) if path.is_dir() else [path]
    found: dict[str, list[float]] = {}
    for file in files:
        try:
            figures = json.loads(file.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"tasks.baselines={file}: no JSON file of figures ({error})") from None
        if not isinstance(figures, dict):
            raise UserError(f"tasks.baselines={file}: holds no figures by name, such as depth/rmse")
        named = {k: v for k, v in figures.items() if k.count("/") == 1 and isinstance(v, (int, float))}
        if not path.is_dir() or len({name.split("/")[0] for name in named}) == 1:
            for name, value in named.items():
                found.setdefault(name, []).append(float(value))
    if not found:
        raise UserError(f"tasks.baselines={path}: no figures of single-task runs in it, such as depth/rmse: 0.6")
    return {name: sum(values) / len(values) for name, values in found.items()}


def against_baselines(figures: Mapping[str, float], baselines: str | None, tasks: Sequence[str]) -> dict[str, float]:
    """`delta_m` in percent, and `delta/<task>`; nothing without baselines.

    Args:
        figures: of an evaluation.
        baselines: as `tasks.baselines` says.
        tasks: over which to average; figures over other tasks do not compare.
    """
    if baselines is None:
        return {}
    single = read_baselines(baselines)
    each = {f"delta/{task}": value for task, value in delta_per_task(figures, single, tasks).items()}
    return {"delta_m": delta_m(figures, single, tasks), **each}
