"""The report of a ranking model: tasks beside baselines, calibration, and what its gates and experts do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from apps import figures
from apps.curves import read_curves
from apps.exported import exported_files
from apps.recsys import pictures
from apps.recsys.data import RecsysData
from apps.recsys.evaluation import Evaluation
from apps.recsys.health import Health, conflicts, findings, gate_health
from apps.recsys.health_sparse import sparse_findings
from apps.recsys.loading import Trained
from apps.recsys.metrics import calibration
from apps.report import Page
from apps.runs import run_folder


def write_report(trained: Trained, evaluation: Evaluation, data: RecsysData, path: Path) -> Path:
    """Write the page.

    Args:
        trained: the model; curves come from the folder it was trained in.
        evaluation: of its test rows.
        data: whose test rows its gates are looked at on.
        path: of the file.
    """
    page = Page(
        title=f"{run_folder(trained.path).name}: {trained.title}",
        subtitle=f"{trained.path}, {len(evaluation.labels):,} test rows, {len(evaluation.tasks)} tasks",
        key_figures=_key_figures(trained, evaluation),
    )
    _accuracy(page, evaluation)
    _groups(page, evaluation)
    _calibration(page, evaluation)
    _learning(page, trained)
    _conflicts(page, trained, data)
    health = gate_health(trained, data, evaluation)
    _gates(page, health)
    _sparse_gates(page, health)
    exported_files(page, run_folder(trained.path))
    return page.write(path)


def _key_figures(trained: Trained, evaluation: Evaluation) -> dict[str, str]:
    means = {name: evaluation.mean(name) for name in evaluation.figures}
    found = {"mean AUC over tasks": _figure(means[evaluation.model])}
    known = {name: value for name, value in means.items() if not math.isnan(value)}
    rivals = {n: v for n, v in known.items() if n not in (evaluation.model, "best possible")}
    if rivals:
        best = max(rivals, key=lambda name: rivals[name])
        found[f"best baseline ({best})"] = _figure(rivals[best])
    if {evaluation.model, "best possible"} <= set(known):
        reached = (means[evaluation.model] - 0.5) / (means["best possible"] - 0.5)
        found["of the way from chance to the best possible"] = f"{reached:.0%}"
    tables = sum(p.numel() for name, p in trained.model.named_parameters() if ".tables." in name)
    rest = sum(p.numel() for p in trained.model.parameters()) - tables
    return found | {
        "parameters in tables": f"{tables:,}",
        "other parameters": f"{rest:,}",
        "rows per second": f"{evaluation.rows_per_second:,.0f}",
    }


def _figure(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"


def _accuracy(page: Page, evaluation: Evaluation) -> None:
    section = page.section("Accuracy")
    section.text(
        "AUC is the chance that a positive row is scored above a negative one; GAUC is the same within each user, "
        "which is what ranking for a user needs. ECE is how far predicted rates are from observed ones."
    )
    section.table(evaluation.rows())
    undefined = evaluation.undefined()
    if undefined:
        section.text(f"One class only among the test rows, so that AUC is undefined: {', '.join(undefined)}.")


def _groups(page: Page, evaluation: Evaluation) -> None:
    if evaluation.short_history is None:
        return
    section = page.section("Users with short and long histories")
    section.text(
        "Users with less history than that of the median row, and the others. A model that reads histories should gain "
        "most on the second."
    )
    rows = []
    for task in evaluation.tasks:
        for name, tasks in evaluation.figures.items():
            own = {k: v for k, v in tasks[task].items() if k.endswith("_history") and not math.isnan(v)}
            rows.append({"task": task, "model": name} | {k.replace("_", " "): v for k, v in own.items()})
    full = {column for row in rows for column in row}
    section.table([{c: row.get(c, "") for c in rows[0] if c in full} for row in rows])


def _calibration(page: Page, evaluation: Evaluation) -> None:
    section = page.section("Calibration")
    curves = {}
    for i, task in enumerate(evaluation.tasks):
        inside = ~np.isnan(evaluation.labels[:, i])
        if inside.any():
            curves[task] = calibration(evaluation.scores[evaluation.model][inside, i], evaluation.labels[inside, i])
    if not curves:
        section.text("No task has a label among the test rows.")
        return
    section.figure(
        pictures.calibration(curves),
        "Predicted against observed rates, in bins of equally many rows, both on logarithmic scales. Points above the "
        "line are rows that happen more often than the model says.",
    )


def _learning(page: Page, trained: Trained) -> None:
    rows = read_curves(run_folder(trained.path) / "metrics.csv")
    panels = {}
    for title, prefix in (("training loss", "train/loss"), ("validation AUC", "val/auc")):
        lines = {}
        for name in sorted({key for row in rows for key in row if key.startswith(prefix)}):
            points = [(row["step"], row[name]) for row in rows if name in row and not math.isnan(row[name])]
            if points:
                lines[name.removeprefix("val/").removeprefix("train/")] = tuple(zip(*points, strict=True))
        if lines:
            panels[title] = lines
    if panels:
        page.section("Learning curves").figure(figures.curves(panels), "Over training steps.")


def _conflicts(page: Page, trained: Trained, data: RecsysData) -> None:
    cosines = conflicts(trained, data)
    if cosines is None:
        return
    section = page.section("Do tasks agree?")
    names = [task.name for task in trained.spec.tasks]
    section.figure(
        pictures.matrix(cosines, names, names, signed=True),
        "Cosine of the gradients of every two tasks on the parameters that they share, without the embedding tables. "
        "Below 0 a step for one undoes the other: give them experts of their own (ple, home), or balance by pcgrad.",
    )


def _gates(page: Page, health: Health) -> None:
    for level, found in health.levels.items():
        section = page.section(_title(level))
        for sentence in findings(found) or ["Nothing stands out: no expert is dead, owned by one task, or starved."]:
            section.text(sentence)
        section.figure(
            pictures.matrix(found.mass.numpy(), found.gates, found.experts),
            "Mean weight of every gate on every expert. A column with one dark cell is an expert that one task owns.",
        )
        groups = {name: levels[level] for name, levels in health.groups.items() if level in levels}
        for name, part in groups.items():
            section.figure(
                pictures.matrix(part.mass.numpy(), found.gates, found.experts), f"The same, rows with {name}."
            )
        dominance = found.dominance()
        section.table(
            [
                {
                    "expert": name,
                    "near-zero activations": float(found.zeros[i]),
                    "deviation of outputs": float(found.std[i]),
                    "largest user": dominance[name][0] if name in dominance else "own",
                    "its part of the mass": dominance[name][1] if name in dominance else 1.0,
                }
                for i, name in enumerate(found.experts)
            ]
        )
        own = found.own_mass()
        if own:
            section.table([{"gate": g, "weight on own experts": m, "even spread": e} for g, (m, e) in own.items()])


def _title(level: str) -> str:
    words = [part for part in level.split(".") if part not in ("network", "trunk", "level")]
    return f"Experts and gates: {' '.join(words) or 'all'}"


def _sparse_gates(page: Page, health: Health) -> None:
    for level, found in health.sparse.items():
        section = page.section(_title(level))
        for sentence in sparse_findings(found) or ["Nothing stands out: no expert is dead, or owned by one task."]:
            section.text(sentence)
        section.figure(
            pictures.matrix(found.sent.numpy(), found.gates, found.experts),
            f"Share of rows that every gate sends to every expert; each row goes to {found.top_k}. An empty column is "
            "a dead expert, one dark cell in it an expert that one task owns.",
        )
        groups = {name: levels[level] for name, levels in health.sparse_groups.items() if level in levels}
        for name, part in groups.items():
            section.figure(
                pictures.matrix(part.sent.numpy(), found.gates, found.experts), f"The same, rows with {name}."
            )
        section.figure(
            pictures.matrix(found.mass.numpy(), found.gates, found.experts),
            "Mean weight of every gate on every expert, 0 in rows that it sends elsewhere.",
        )
        weight, owners = found.chosen_weight().tolist(), [found.owner(i) for i in range(len(found.experts))]
        section.table(
            [
                {
                    "expert": name,
                    "rows, of all gates' together": float(found.sent[:, i].sum() / found.sent.sum()),
                    "mean weight where chosen": weight[i],
                    "largest user": owners[i][0],
                    "its part of the rows": owners[i][1],
                }
                for i, name in enumerate(found.experts)
            ]
        )
