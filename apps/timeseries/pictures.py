"""Pictures of series: forecasts beside what came, components, and which expert worked on which part of a context."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib import dates
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from apps.figures import GREY, clean, expert_color
from apps.timeseries.metrics import central_intervals
from apps.timeseries.prediction import SeriesForecast
from apps.timeseries.routing import ExpertUse
from apps.timeseries.series import Series
from moecore.files import atomic_path

INK, BLUE, ORANGE = "#1d2330", "#2f6fb5", "#d9822b"
MOST_PANELS = 6
"""Layers that a context is drawn for one by one; of more there are only strips."""
MOST_BORDERS = 64
"""Units per context up to which borders are drawn."""


@dataclass(frozen=True)
class Example:
    """A window of a series with its forecast, in the units of the series."""

    series: Series
    row: int
    """Of the window set."""
    origin: int
    """First point of the horizon."""
    context: int
    """Points before it that the model saw."""
    label: str
    mean: Float[np.ndarray, " H"]
    naive: Float[np.ndarray, " H"]
    quantiles: Float[np.ndarray, "Q H"] | None = None
    levels: Sequence[float] = ()
    components: Mapping[str, Float[np.ndarray, " H"]] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """First point of the context that the series has."""
        return max(0, self.origin - self.context)

    def times(self, start: int, stop: int) -> np.ndarray:
        """Times of points, as matplotlib takes them."""
        return plain_times(self.series.times(start, stop))

    @property
    def horizon(self) -> np.ndarray:
        """Times of the forecast."""
        return self.times(self.origin, self.origin + len(self.mean))


def plain_times(times: pd.Index) -> np.ndarray:
    """Dates without a time zone, or whole numbers."""
    if isinstance(times, pd.DatetimeIndex):
        return times.tz_localize(None).to_numpy()
    return times.to_numpy()


def plot_forecasts(
    title: str, forecasts: Sequence[SeriesForecast], levels: Sequence[float], folder: str | Path
) -> Path:
    """One PNG per series: the end of its history, the forecast, and its intervals.

    Args:
        title: name of the model.
        forecasts: to draw.
        levels: of their quantiles.
        folder: is created.

    Returns:
        The folder. Files are called by the series' ids, as far as file systems let them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for one, name in zip(forecasts, _file_names([f.series.id for f in forecasts]), strict=True):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots()
        count = len(one.mean)
        tail = max(3 * count, 2 * one.series.season, 30)
        first = max(0, one.origin - tail)
        line(axes, plain_times(one.series.times(first, one.origin)), one.series.y[first : one.origin], INK, "history")
        _intervals(axes, plain_times(one.times), one.quantiles, levels)
        line(axes, plain_times(one.times), one.mean, BLUE, title)
        axes.set_title(short_name(one.series.id, 90), loc="left", fontsize=10)
        _time_axis(axes, 8)
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside lower center")
        with atomic_path(folder / name) as temporary, open(temporary, "wb") as file:
            figure.savefig(file, format="png", dpi=120)
    return folder


def short_name(id: str, most: int) -> str:
    """An id as one line of at most so many characters."""
    name = " ".join(id.split())
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def _file_names(ids: Sequence[str]) -> list[str]:
    """A file name for each id, all different even where letters' case does not count."""
    taken: set[str] = set()
    names = []
    for id in ids:
        base = re.sub(r"[^\w.\- ]+", "_", id).strip(" .")[:80] or "series"
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def line(axes, x: np.ndarray, y: np.ndarray, color: str, label: str | None = None, **style) -> None:
    """A line with gaps where values are missing; a value between two gaps is a dot."""
    axes.plot(x, y, color=color, label=label, **({"linewidth": 1.3} | style))
    seen = np.concatenate([[False], np.isfinite(y), [False]])
    alone = seen[1:-1] & ~seen[:-2] & ~seen[2:]
    if alone.any():
        axes.plot(x[alone], y[alone], ".", color=color, markersize=3)


def _intervals(axes, x: np.ndarray, quantiles: np.ndarray | None, levels: Sequence[float]) -> None:
    """Central intervals, the widest ones palest."""
    if quantiles is None:
        return
    found = central_intervals(levels)
    for number, (percent, (low, high)) in enumerate(reversed(found.items())):
        shade = 0.84 - 0.3 * number / len(found)
        color = [shade + (1 - shade) * part for part in to_rgb(BLUE)]
        bounds = quantiles[low], quantiles[high]
        if len(x) == 1:
            height = bounds[1] - bounds[0]
            axes.errorbar(x, bounds[0], [0 * height, height], color=color, linewidth=6, label=f"{percent}%", zorder=1)
        else:
            axes.fill_between(x, *bounds, color=color, linewidth=0, label=f"{percent}%")


def _time_axis(axes, ticks: int) -> None:
    clean(axes)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if isinstance(axes.xaxis.get_converter(), dates._SwitchableDateConverter):
        locator = dates.AutoDateLocator(minticks=2, maxticks=ticks)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        axes.xaxis.get_offset_text().set(color=GREY, fontsize=8)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(ticks - 1, integer=True))


def forecasts(examples: Sequence[Example], title: str, columns: int = 3) -> Figure:
    """Windows with their forecasts, what came, and seasonal naive."""
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(10, 2.35 * rows + 0.4), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, one in zip(grid, examples, strict=False):
        _forecast(axes, one, title)
    for axes in grid[len(examples) :]:
        axes.set_axis_off()
    _legend(figure, grid[0])
    return figure


def _forecast(axes, one: Example, title: str) -> None:
    count = len(one.mean)
    first = max(one.first, one.origin - max(2 * count, 2 * one.series.season, 24))
    shown = {k: v for k, v in central_intervals(one.levels).items() if k in (40, 80)}
    _intervals(axes, one.horizon, *_rows(one, shown))
    line(axes, one.horizon, one.naive, ORANGE, "seasonal naive", linewidth=1, linestyle=":")
    line(axes, one.times(first, one.origin + count), one.series.y[first : one.origin + count], INK, "observed")
    line(axes, one.horizon, one.mean, BLUE, title)
    axes.axvline(one.times(one.origin, one.origin + 1)[0], color=GREY, linewidth=0.6)
    axes.set_title(one.label, loc="left", fontsize=8)
    _time_axis(axes, 4)


def _rows(one: Example, shown: Mapping[int, tuple[int, int]]) -> tuple[np.ndarray | None, list[float]]:
    """Only the quantiles of the intervals that are to be shown."""
    if one.quantiles is None or not shown:
        return None, []
    rows = sorted(row for pair in shown.values() for row in pair)
    return one.quantiles[rows], [one.levels[row] for row in rows]


def _legend(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="outside lower center")


def components(examples: Sequence[Example], title: str) -> Figure:
    """A column per window: the forecast above, below it the parts that it is the sum of."""
    names = list(examples[0].components)
    figure = Figure(figsize=(10, 2.0 + 1.25 * len(names)), layout="constrained")
    ratios = [1.7] + [1.0] * len(names)
    grid = figure.subplots(1 + len(names), len(examples), squeeze=False, height_ratios=ratios, sharex="col")
    for column, one in enumerate(examples):
        top = grid[0, column]
        line(top, one.horizon, one.series.y[one.origin : one.origin + len(one.mean)], INK, "observed")
        line(top, one.horizon, one.mean, BLUE, title)
        top.set_title(one.label, loc="left", fontsize=8)
        for number, name in enumerate(names):
            axes = grid[1 + number, column]
            line(axes, one.horizon, one.components[name], _hex(number))
            if column == 0:
                axes.set_ylabel(name, fontsize=8)
        for axes in grid[:, column]:
            _time_axis(axes, 4)
    figure.align_ylabels()
    _legend(figure, grid[0, 0])
    return figure


def _hex(expert: int) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in expert_color(expert))


def by_step(measures: Mapping[str, Mapping[str, Float[np.ndarray, " H"]]]) -> Figure:
    """One panel per measure; in it one line per model over the steps of the horizon."""
    columns = min(2, len(measures))
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(10, 2.3 * rows + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (measure, lines) in zip(grid, measures.items(), strict=False):
        for (name, values), (color, style) in zip(lines.items(), _styles(), strict=False):
            steps = np.arange(1, len(values) + 1)
            line(axes, steps, values, color, name, linestyle=style)
        axes.set_xlim(left=1)
        axes.set_title(measure, loc="left", fontsize=10)
        axes.set_xlabel("step of the horizon", fontsize=8, color=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if measure.startswith("coverage"):
            axes.axhline(int(re.sub(r"\D", "", measure)) / 100, color=GREY, linewidth=0.8, linestyle="--")
            axes.set_ylim(0, 1)
        else:
            axes.set_ylim(bottom=0)
        clean(axes)
    for axes in grid[len(measures) :]:
        axes.set_axis_off()
    _legend(figure, grid[0])
    return figure


def _styles() -> list[tuple[str, str]]:
    """Colour and stroke of the model, of seasonal naive and of DLinear."""
    return [(BLUE, "-"), (ORANGE, ":"), ("#3a923a", "--")]


def calibration(shares: Mapping[str, Float[np.ndarray, " Q"]], levels: Sequence[float]) -> Figure:
    """Share of the truth below each quantile; right ones lie on the diagonal."""
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, label="right")
    for (name, values), (color, style) in zip(shares.items(), _styles(), strict=False):
        axes.plot(levels, values, style, color=color, label=name, linewidth=1.4, marker="o", markersize=3.5)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("level of the quantile", fontsize=9)
    axes.set_ylabel("share of the truth below it", fontsize=9)
    clean(axes)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    return figure


def specialisation(panels: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """One panel per kind of label: a bar per layer, with a mark at what chance gives."""
    layers = list(next(iter(panels.values())))[::-1]
    figure = Figure(figsize=(10, 1.1 + 0.3 * len(layers)), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    largest = max(max(pair) for values in panels.values() for pair in values.values())
    for axes, (title, values) in zip(grid, panels.items(), strict=True):
        axes.barh(layers, [values[name][0] for name in layers], color=expert_color(0), height=0.6)
        style = {"color": "#c0392b", "markersize": 13, "markeredgewidth": 2}
        axes.plot([values[name][1] for name in layers], layers, "|", label="shuffled labels", **style)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlim(0, max(0.02, 1.15 * largest))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        clean(axes)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower right")
    return figure


def context_routing(one: Example, use: Mapping[str, ExpertUse], names: Mapping[str, str]) -> Figure:
    """A context, and which expert worked on which part of it, layer by layer, as colours.

    Few layers with few units: one panel per layer with the series on a background of its experts. Else the series once,
    and a strip of colours per layer.
    """
    units = max(len(use[layer].starts) for layer in names)
    panels = len(names) <= MOST_PANELS and units <= MOST_BORDERS
    heights = [1.0] * len(names) if panels else [3.2] + [0.45] * len(names)
    figure = Figure(figsize=(10, 0.9 + (0.95 if panels else 0.42) * sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    times = one.times(one.first, one.origin + 1)  # one more: where the last unit ends
    for axes, layer in zip(grid if panels else grid[1:], names, strict=True):
        _paint(axes, one, use[layer], times, alpha=0.45 if panels else 0.9)
        axes.set_ylabel(names[layer], fontsize=8, rotation=0, ha="right", va="center")
    for axes in grid if panels else grid[:1]:
        line(axes, times[:-1], one.series.y[one.first : one.origin], INK, linewidth=1.1)
    for axes in grid:
        _time_axis(axes, 10)
        axes.set_yticks([])
        axes.set_xlim(times[0], times[-1])
    grid[0].set_title(one.label, loc="left", fontsize=9)
    shown = sorted({int(e) for layer in names for e in use[layer].maps[one.row]} - {-1})
    handles = [Patch(color=expert_color(e), label=f"expert {e}") for e in shown]
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=min(8, len(handles)), loc="outside lower center")
    return figure


def _paint(axes, one: Example, use: ExpertUse, times: np.ndarray, alpha: float) -> None:
    """Colour each unit of the target by its expert; runs of one expert at once where there are many units."""
    skipped = one.context - (one.origin - one.first)  # points of the context before the series begins
    count = _first_variate(use.starts)
    borders = count <= MOST_BORDERS
    experts = use.maps[one.row][:count]
    for first, last in [(u, u) for u in range(count)] if borders else _runs(experts):
        start, end = (max(0, int(p) - skipped) for p in (use.starts[first], use.ends[last]))
        if end <= start or experts[first] < 0:
            continue
        axes.axvspan(times[start], times[end], color=expert_color(int(experts[first])), alpha=alpha, linewidth=0)
        if borders and start > 0:
            axes.axvline(times[start], color="white", linewidth=1.4)


def _first_variate(starts: Int[np.ndarray, " U"]) -> int:
    """Units of the target: those of covariates follow, from the start of the context again."""
    back = np.flatnonzero(np.diff(starts) <= 0)
    return int(back[0]) + 1 if len(back) else len(starts)


def _runs(experts: Int[np.ndarray, " U"]) -> list[tuple[int, int]]:
    """First and last unit of each run of one expert."""
    borders = np.flatnonzero(np.diff(experts)) + 1
    starts = np.concatenate([[0], borders])
    return list(zip(starts.tolist(), np.append(borders - 1, len(experts) - 1).tolist(), strict=True))
