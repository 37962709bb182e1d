"""Charts of the recsys report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from apps.figures import GREY, clean, expert_color
from apps.recsys.metrics import Calibration


def calibration(curves: Mapping[str, Calibration]) -> Figure:
    """Observed over predicted rates, a line per task."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    least = 1.0
    for i, (name, curve) in enumerate(curves.items()):
        seen = (curve.predicted > 0) & (curve.observed > 0)
        if seen.any():
            least = min(least, float(curve.predicted[seen].min()), float(curve.observed[seen].min()))
        label = f" {name}" if name.startswith("_") else name  # legends leave out what begins so
        axes.plot(curve.predicted[seen], curve.observed[seen], "o-", markersize=3, color=expert_color(i), label=label)
    axes.plot([least, 1], [least, 1], color=GREY, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="predicted rate", ylabel="observed rate")
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers: formulas are off in all figures
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    clean(axes)
    return figure


def matrix(
    values: Float[np.ndarray, "R C"], rows: Sequence[str], columns: Sequence[str], signed: bool = False
) -> Figure:
    """A heat map with its values written in."""
    figure = Figure(figsize=(min(12, 2.5 + 0.65 * len(columns)), 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    top = 1.0 if signed else max(float(values.max()), 1e-9)
    shades = {"cmap": "RdBu", "vmin": -1, "vmax": 1} if signed else {"cmap": "Blues", "vmin": 0, "vmax": top}
    axes.imshow(values, aspect="auto", **shades)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    turned = max(map(len, columns)) > 6
    axes.set_xticks(
        range(len(columns)), columns, fontsize=8, rotation=40 if turned else 0, ha="right" if turned else "center"
    )
    for (i, j), value in np.ndenumerate(values):
        dark = abs(value) > 0.6 * top
        text = "undefined" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return figure
