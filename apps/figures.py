"""Charts that every app's report uses. Figures are made without pyplot: no window, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.figure import Figure

rcParams["text.parse_math"] = False  # names of classes may have dollar signs, and are no formulas
PALETTE = colormaps["tab20"].colors
GREY = "#5b6577"


def expert_color(expert: int) -> tuple[float, float, float]:
    """One colour per expert, the same in every figure: saturated ones first."""
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return PALETTE[order[expert % 20]]


def curves(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """One panel per title; in it one line per name: (steps, values)."""
    figure = Figure(figsize=(10, 3.0), layout="constrained")
    for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for i, (name, (steps, values)) in enumerate(lines.items()):
            axes.plot(steps, values, label=name, color=expert_color(i), linewidth=1.6, marker="o" * (len(steps) < 3))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        clean(axes)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    return figure


def load_over_time(layers: Mapping[str, tuple[Sequence[float], np.ndarray]]) -> Figure:
    """Per layer the share of pairs each expert got: (steps, [steps, E]) as stacked areas."""
    columns = _columns(len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(10, 2.3 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flat
    for (name, (steps, shares)), axes in zip(layers.items(), grid, strict=False):
        colors = [expert_color(e) for e in range(shares.shape[1])]
        axes.stackplot(steps, shares.T, colors=colors, linewidth=0.4, edgecolor="white")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set(xlabel="step", ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
        clean(axes)
    for axes in list(grid):
        axes.set_axis_off()
    return figure


def heatmaps(
    maps: Mapping[str, np.ndarray],
    rows: Sequence[str],
    row_label: str,
    column_label: str,
    vmax: float | None = None,
    signed: bool = False,
) -> Figure:
    """One matrix per title, rows named, columns numbered, each cell's value by its shade.

    Args:
        maps: matrices with equal rows.
        rows: names.
        row_label: what the rows are.
        column_label: what the columns are.
        vmax: value of the darkest shade, for all of them; None: the largest of each matrix.
        signed: values on both sides of zero, in two colours, up to `vmax` or the largest deviation of each matrix.
    """
    columns = _columns(len(maps))
    lines = -(-len(maps) // columns)
    height = max(2.2, 0.22 * len(rows) + 0.9)
    figure = Figure(figsize=(10, min(height, 30) * lines), layout="constrained")
    grid = list(np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).flat)
    for i, (axes, (title, values)) in enumerate(zip(grid, maps.items(), strict=False)):
        top = vmax or float(np.abs(values).max())
        shades = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if signed else {"cmap": "Blues", "vmin": 0, "vmax": top}
        picture = axes.imshow(values, aspect="auto", **shades)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(column_label)
        axes.set_xticks(range(values.shape[1]) if values.shape[1] <= 16 else [0, values.shape[1] - 1])
        if i % columns == 0:
            axes.set_ylabel(row_label)
            _name_rows(axes, rows)
        else:
            axes.set_yticks([])
        if vmax is None:
            figure.colorbar(picture, ax=axes, shrink=0.8)
    for axes in grid[len(maps) :]:
        axes.set_axis_off()
    if vmax is not None:
        figure.colorbar(picture, ax=grid, shrink=0.8, aspect=5 * figure.get_figheight())
    return figure


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """True class by predicted class, counts written in while there is room."""
    side = min(9.0, 2.5 + 0.42 * len(classes))
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    _name_rows(axes, classes)
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j,
                    i,
                    int(count),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if share[i, j] > 0.5 else "black",
                )
    return figure


def bars(values: Mapping[str, float], marks: Mapping[str, float], label: str, mark_label: str) -> Figure:
    """Horizontal bars with a mark on each, for a value and what chance would give."""
    figure = Figure(figsize=(8, 0.6 + 0.38 * len(values)), layout="constrained")
    axes = figure.subplots()
    names = list(values)[::-1]
    axes.barh(names, [values[n] for n in names], color=expert_color(0), height=0.6)
    axes.plot(
        [marks[n] for n in names], names, "|", color="#c0392b", markersize=16, markeredgewidth=2, label=mark_label
    )
    axes.set_xlabel(label)
    axes.set_xlim(0, max(0.05, 1.15 * max(*values.values(), *marks.values())))
    figure.legend(frameon=False, fontsize=8, loc="outside upper right")
    clean(axes)
    return figure


def _columns(panels: int) -> int:
    """Panels side by side: rather four in a row than one alone below three."""
    return 4 if panels in (4, 7, 8) or panels > 9 else min(3, panels)


def _name_rows(axes, rows: Sequence[str]) -> None:
    if len(rows) <= 120:
        axes.set_yticks(range(len(rows)), rows, fontsize=8 if len(rows) <= 40 else 5)
    else:
        axes.set_yticks([0, len(rows) - 1], [rows[0], rows[-1]])


def clean(axes) -> None:
    """Take away what frames and ticks have too much."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c8ced8")
    axes.tick_params(colors=GREY, labelsize=8)
