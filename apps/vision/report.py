"""The report of a classifier: curves, errors, and what its experts learned."""

from __future__ import annotations

from pathlib import Path

import torch

import moecore
from apps import figures
from apps.curves import read_curves
from apps.exported import exported_files
from apps.output import short
from apps.report import Page
from apps.runs import run_folder
from apps.vision import pictures
from apps.vision.data import Images, VisionData
from apps.vision.evaluation import Evaluation
from apps.vision.loading import Trained
from apps.vision.report_parts import expert_load, learning_curves, name_of

LEAST, SHARE_OF_BEST = 0.01, 0.5
"""A layer is worth keeping as MoE when its experts give away so much more of the class than chance, and at least this
share of what those of the best layer do."""
PANELS = {
    "loss": {"train": "train/loss", "validation": "val/loss", "balance loss": "train/balance_loss"},
    "accuracy": {"train (augmented)": "train/accuracy", "validation": "val/accuracy"},
    "learning rate": {"learning rate": "train/lr"},
}
"""Learning curves."""


def write_report(trained: Trained, evaluation: Evaluation, data: VisionData, path: Path) -> Path:
    """Write the page.

    Args:
        trained: the model; curves come from the folder it was trained in.
        evaluation: of its test images.
        data: whose test images are shown.
        path: of the file.
    """
    curves = read_curves(run_folder(trained.path) / "metrics.csv")
    scalars = evaluation.scalars()
    cost = moecore.count_cost(trained.model, trained.model.example_input())
    model = trained.config.model
    page = Page(
        title=f"{run_folder(trained.path).name}: {model.backbone} with Mixture-of-Experts layers",
        subtitle=f"{trained.path}, {len(evaluation.labels):,} test images, {len(data.spec.classes)} classes",
        key_figures={
            "test accuracy": f"{scalars['accuracy']:.2%}",
            "parameters held": short(cost.total_params),
            "parameters a token uses": short(cost.active_params),
            "multiply-adds per image": short(cost.macs),
            "if every expert ran": short(cost.all_experts_macs),
            "images per second": short(scalars["images_per_second"]),
        },
    )
    learning_curves(page, curves, PANELS)
    if evaluation.routing:
        _specialisation(page, evaluation)
        _classes(page, evaluation, data)
        _samples(page, trained, evaluation, data.images("test").readable())
        expert_load(page, evaluation.routing, curves)
    _errors(page, evaluation, data)
    _figures(page, {k: v for k, v in scalars.items() if "/" not in k} | cost.scalars())
    exported_files(page, run_folder(trained.path))
    return page.write(path)


def _specialisation(page: Page, evaluation: Evaluation) -> None:
    layers = list(evaluation.routing)
    value = {name_of(layer): evaluation.specialisation(layer) for layer in layers}
    chance = {name_of(layer): evaluation.chance(layer) for layer in layers}
    section = page.section("Which layers specialise")
    section.text(
        "Specialisation is the mutual information between an image's class and the experts its tokens go to, as a "
        "share of the class's entropy: 0 when experts ignore the class, 1 when the expert alone gives it away. ViMoE's "
        "analysis: keep MoE where experts specialise, make the other layers dense again. A low figure is no flaw where "
        "routing follows something other than the class, such as texture or position; try the hint, do not trust it."
    )
    section.figure(
        figures.bars(value, chance, "share of the class given away", "shuffled labels"),
        "Specialisation per layer; the mark is what shuffled labels give.",
    )
    rows = []
    best = max(value[name] - chance[name] for name in value)
    for layer in layers:
        name, metrics = name_of(layer), evaluation.routing[layer]
        keep = value[name] - chance[name] >= max(LEAST, SHARE_OF_BEST * best)
        rows.append(
            {
                "layer": name,
                "specialisation": round(value[name], 4),
                "by chance": round(chance[name], 4),
                "hint": "keep MoE" if keep else "try dense here",
                "load entropy": round(metrics.load_entropy, 3),
                "max violation": round(metrics.max_violation, 3),
                "dead experts": metrics.dead_experts,
                "experts per token": round(metrics.experts_per_token, 2),
                "router entropy": round(metrics.router_entropy, 3),
            }
        )
    section.table(rows)


def _classes(page: Page, evaluation: Evaluation, data: VisionData) -> None:
    maps = {}
    for layer in evaluation.routing:
        counts = evaluation.label_counts(layer).double()
        maps[name_of(layer)] = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    page.section("Classes and experts").figure(
        figures.heatmaps(maps, data.spec.classes, "class", "expert"),
        "Each row shows to which experts the tokens of one class go; equal rows mean that routing ignores the class.",
    )


def _samples(page: Page, trained: Trained, evaluation: Evaluation, images: Images) -> None:
    section = page.section("What each expert sees")
    section.text(
        "Test images with the largest share of tokens at each expert. Where tokens are routed one by one, those that "
        "go elsewhere are dimmed."
    )
    for layer in evaluation.routing:
        grid = pictures.samples_per_expert(trained.model, images, evaluation, layer)
        section.figure(grid, f"{name_of(layer)}: one row per expert, numbered as in the other figures.", photo=True)
    if any(pictures.shows_patches(trained.model, evaluation, layer) for layer in evaluation.routing):
        section.figure(
            pictures.token_maps(trained.model, images, evaluation, {k: name_of(k) for k in evaluation.routing}),
            "Which expert takes which patch, per layer; colours are experts, as in the load figure.",
            photo=True,
        )


def _errors(page: Page, evaluation: Evaluation, data: VisionData) -> None:
    section = page.section("Errors")
    if len(data.spec.classes) <= 120:
        section.figure(
            figures.confusion(evaluation.confusion.numpy(), data.spec.classes), "Test images: true by predicted class."
        )
    probs = evaluation.scores.softmax(-1)
    confidence, predicted = probs.max(-1)
    wrong = torch.nonzero(predicted != evaluation.labels).flatten()
    if len(wrong):
        worst = wrong[confidence[wrong].argsort(descending=True)][:16].tolist()
        names = data.spec.classes
        captions = [f"{names[evaluation.labels[i]]}\n→ {names[predicted[i]]} {confidence[i]:.0%}" for i in worst]
        grid = pictures.image_grid(data.images("test").readable(), worst, captions)
        section.figure(grid, "The most confident mistakes: true class, then the prediction.", photo=True)
    else:
        section.text("No test image was classified wrongly.")


def _figures(page: Page, values: dict[str, float]) -> None:
    page.section("All figures").table([{"figure": name, "value": value} for name, value in values.items()])
