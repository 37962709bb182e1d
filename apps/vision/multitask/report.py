"""The report of a multi-task model: predictions beside truth, which task uses which experts, where tasks conflict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moecore
from apps import figures
from apps.curves import read_curves
from apps.errors import UserError
from apps.exported import exported_files
from apps.output import short
from apps.report import Page
from apps.runs import run_folder
from apps.vision.multitask import pictures
from apps.vision.multitask.conflict import Conflict, compare
from apps.vision.multitask.conflict_figures import conflict_figure, pairs_figure
from apps.vision.multitask.conflict_runs import load_conflict
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.deploy import calibration_images
from apps.vision.multitask.evaluation import Evaluation, against_baselines
from apps.vision.multitask.loading import Trained
from apps.vision.multitask.tasks import TaskSpec
from apps.vision.report_parts import expert_load, learning_curves, name_of

CALIBRATION = 256
"""Training images that show which experts a model for one task would hold."""


def write_report(
    trained: Trained, evaluation: Evaluation, data: MultiTaskData, path: Path, beside: Path | None = None
) -> Path:
    """Write the page.

    Args:
        trained: the model; curves, and conflict if it was measured, come from the folder it was trained in.
        evaluation: of its test images.
        data: whose training images calibrate models for one task.
        path: of the file.
        beside: folder of a run to compare conflict with.

    Raises:
        UserError: if there is no conflict to compare with.
    """
    folder, model = run_folder(trained.path), trained.model
    conflict = load_conflict(folder)
    other = _other_conflict(conflict, beside) if beside is not None else None
    cost = moecore.count_cost(model, model.example_input())
    scalars = evaluation.scalars()
    against = against_baselines(evaluation.figures, trained.config.tasks.baselines, model.spec.names)
    keys = {f"{task.kind.title}: {_words(task.kind.metric)}": _figure(evaluation, task) for task in model.spec.tasks}
    delta = {"delta_m against single tasks": f"{against['delta_m']:+.2f}%"} if against else {}
    page = Page(
        title=f"{folder.name}: {model.config.backbone} for {len(model.spec.tasks)} tasks",
        subtitle=f"{trained.path}, {evaluation.images:,} test images, {', '.join(model.spec.names)}",
        key_figures={
            **delta,
            **keys,
            "parameters held": short(cost.total_params),
            "multiply-adds per image, all tasks": short(cost.macs),
        },
    )
    _predictions(page, trained, evaluation)
    _tasks(page, trained, evaluation, against)
    learning_curves(page, read_curves(folder / "metrics.csv"), _panels(model.spec.names))
    if evaluation.routing:
        _use(page, evaluation, model.spec.names)
        _maps(page, trained, evaluation)
        if model.slice is None:
            _slices(page, trained, data)
    if conflict is not None:
        _conflict(page, conflict, other)
    if evaluation.routing:
        expert_load(page, evaluation.routing, read_curves(folder / "metrics.csv"))
    rows = {name: value for name, value in scalars.items() if not name.startswith("routing/")}
    rows |= cost.scalars() | against
    page.section("All figures").table([{"figure": name, "value": value} for name, value in rows.items()])
    exported_files(page, folder)
    return page.write(path)


def _other_conflict(conflict: Conflict | None, beside: Path) -> Conflict:
    if not beside.exists():
        raise UserError(f"beside={beside}: no such run folder")
    other = load_conflict(run_folder(beside) if beside.is_file() else beside)
    if other is None:
        raise UserError(f"beside={beside}: no conflict was measured there; run `evaluate --conflict true` on it first")
    if conflict is None:
        raise UserError(f"beside={beside}: nothing to compare; run `evaluate --conflict true` on this run first")
    return other


def _words(metric: str) -> str:
    return {"miou": "mIoU", "rmse": "RMSE in m", "mean_angle": "mean angle", "odsf": "odsF"}.get(metric, metric)


def _figure(evaluation: Evaluation, task: TaskSpec) -> str:
    value = evaluation.figures[f"{task.name}/{task.kind.metric}"]
    return f"{value:.1f}°" if task.kind.metric == "mean_angle" else f"{value:.3f}"


def _panels(tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    return {
        "loss": {"train": "train/loss", "validation": "val/loss", "balance loss": "train/balance_loss"},
        "validation loss of each task": {task: f"val/{task}/loss" for task in tasks},
        "weights of the losses": {task: f"train/{task}/weight" for task in tasks},
    }


def _predictions(page: Page, trained: Trained, evaluation: Evaluation) -> None:
    page.section("Predictions beside truth").figure(
        pictures.predictions_beside_truth(trained.model, evaluation),
        "The first test images. Grey is unknown; depth is light near, dark far; normals' x, y, z are red, green, blue.",
        photo=True,
    )


def _tasks(page: Page, trained: Trained, evaluation: Evaluation, against: dict[str, float]) -> None:
    section = page.section("Tasks")
    rows: list[dict[str, Any]] = []
    for task in trained.model.spec.tasks:
        own = {k.split("/", 1)[1]: v for k, v in evaluation.figures.items() if k.startswith(f"{task.name}/")}
        judge = task.kind.metric
        others = ", ".join(f"{name} {value:.3g}" for name, value in own.items() if name != judge and "/" not in name)
        row = {"task": task.name, "judged by": judge, "value": round(own[judge], 4)}
        if against:
            row["against its single-task run, %"] = round(against[f"delta/{task.name}"], 2)
        rows.append(row | {"and": others})
    section.table(rows)
    if against:
        section.text(
            "delta_m is the mean over these tasks of the relative change against models trained for one task alone, "
            "positive where the shared model is better. Over other tasks it is another figure: the released code of "
            "M³ViT leaves edges out of it, its paper does not."
        )


def _use(page: Page, evaluation: Evaluation, tasks: Sequence[str]) -> None:
    section = page.section("Tasks and experts")
    maps = {name_of(layer): use.numpy() for layer, use in evaluation.use.items()}
    section.figure(
        figures.heatmaps(maps, tasks, "task", "expert"),
        "Share of each task's tokens that each expert takes, per layer; equal rows mean that tasks share all experts.",
    )
    rows = [
        {
            "layer": name_of(layer),
            "task given away by the expert": round(moecore.specialisation(evaluation.use[layer]), 4),
            "load entropy": round(metrics.load_entropy, 3),
            "max violation": round(metrics.max_violation, 3),
            "dead experts": metrics.dead_experts,
            "router entropy": round(metrics.router_entropy, 3),
        }
        for layer, metrics in evaluation.routing.items()
    ]
    section.text(
        "How much the choice of expert tells of the task: 0 when all tasks use the same experts alike, 1 when every "
        "task has experts of its own. Models for one task are small where it is high."
    ).table(rows)


def _maps(page: Page, trained: Trained, evaluation: Evaluation) -> None:
    section = page.section("Which expert takes which patch")
    by_patch = [
        layer
        for layer, tokens in evaluation.maps[trained.model.spec.names[0]].items()
        if tokens.dim() == 2 and tokens.shape[1] >= trained.model.backbone.patch_embed.num_patches
    ]
    for layer in by_patch:
        section.figure(
            pictures.token_maps(trained.model, evaluation, layer, trained.model.spec.names),
            f"{name_of(layer)}: images, and for each task the main expert of every patch; colours are experts.",
            photo=True,
        )


def _slices(page: Page, trained: Trained, data: MultiTaskData) -> None:
    model = trained.model
    whole = moecore.count_cost(model, model.example_input())
    images = list(calibration_images(data, CALIBRATION))
    rows = []
    for task in model.spec.names:
        small = model.for_task(task, images)
        cost = moecore.count_cost(small, small.example_input())
        experts = {name_of(layer): len(kept) for layer, kept in small.slice.experts.items()}
        rows.append(
            {"task": task, **experts, "parameters": short(cost.total_params)}
            | {"% of all parameters": round(100 * cost.total_params / whole.total_params, 1)}
            | {"multiply-adds": short(cost.macs), "% of all multiply-adds": round(100 * cost.macs / whole.macs, 1)}
        )
    page.section("Models for one task").text(
        "Experts that a task's gates choose on training images, layer by layer, and what a model with these alone "
        "holds and costs. `export --format task --task NAME` writes it; experts that hardly count can be left out "
        "with `--min_share`."
    ).table(rows)


def _conflict(page: Page, conflict: Conflict, other: Conflict | None) -> None:
    section = page.section("Do tasks pull in different directions?")
    section.text(
        "Cosine between the gradients of two tasks on the weights they share: 1 the same direction, 0 no relation, "
        "below 0 they undo each other. For an MoE layer also within single experts, where both tasks use them."
    )
    section.figure(conflict_figure(conflict, other), "Mean over the pairs of tasks, block by block.")
    section.figure(pairs_figure(conflict, other), "By pair of tasks, mean over blocks.")
    if other is None:
        section.text("Beside a dense model: `report --beside RUN`, after `evaluate --conflict true` on both.")
    else:
        rows = compare(conflict, other)
        section.table(
            [{k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
        )
