"""Sections that the reports of classifiers and of multi-task models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

import moecore
from apps import figures
from apps.report import Page

Curves = Sequence[Mapping[str, float]]
"""Rows of metrics.csv, as `apps.curves.read_curves` gives them."""


def name_of(layer: str) -> str:
    """`backbone.blocks.3.mlp` as `block 3`."""
    number = [part for part in layer.split(".") if part.isdigit()]
    return f"block {number[-1]}" if number else layer


def learning_curves(page: Page, curves: Curves, wanted: Mapping[str, Mapping[str, str]]) -> None:
    """A section of curves over steps.

    Args:
        page: gets the section.
        curves: what was logged.
        wanted: title of a panel -> name of a line -> metric; those that were not logged are left out.
    """

    def line(metric: str):
        points = [(row["step"], row[metric]) for row in curves if metric in row]
        return tuple(zip(*points, strict=True)) if points else None

    panels = {title: {n: line(m) for n, m in names.items() if line(m)} for title, names in wanted.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    section = page.section("Learning curves")
    if panels:
        section.figure(
            figures.curves(panels), "Training is logged per step with augmented images, validation per epoch."
        )
    else:
        section.text("No curves: metrics.csv is not beside the checkpoint.")


def expert_load(page: Page, routing: Mapping[str, moecore.LayerMetrics], curves: Curves) -> None:
    """A section on how evenly experts are used: over the steps of training, and on the test images.

    Args:
        page: gets the section.
        routing: on the test images, per layer.
        curves: what was logged in training.
    """
    section = page.section("Expert load")
    layers = {}
    for layer, metrics in routing.items():
        names = [f"load/{layer.removeprefix('model.')}/{e}" for e in range(len(metrics.load))]
        rows = [row for row in curves if names[0] in row]
        if rows:
            shares = np.array([[row.get(name, 0.0) for name in names] for row in rows])
            layers[name_of(layer)] = ([row["step"] for row in rows], shares)
    if layers:
        section.figure(
            figures.load_over_time(layers), "Share of training tokens per expert, over the steps of training."
        )
    rows = [
        {"layer": name_of(layer)} | {f"expert {e}": round(share, 3) for e, share in enumerate(metrics.load)}
        for layer, metrics in routing.items()
        if len(metrics.load) <= 16
    ]
    if len({len(row) for row in rows}) == 1:
        section.text("On the test images:").table(rows)
