"""Charts and moving pictures of the rl report.

S points of a curve, N steps of an episode, E experts, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from apps.figures import GREY, clean, expert_color
from apps.rl.history import Curve, Group
from apps.rl.rollout import Trace
from apps.rl.video import Picture

EVENT, CHANCE = "#c0392b", "#8a6d3b"
"""Colours of perturbations and of random actions."""
LONGEST = 300
"""Pictures of a GIF at most; of longer episodes every second one, or fewer."""


def returns(training: Curve, evaluations: Curve, deviation: Float[np.ndarray, " S"], chance: float) -> Figure:
    """Training episodes with their running mean, evaluations with a band of one deviation, and random actions."""
    figure = Figure(figsize=(10, 4.0), layout="constrained")
    axes = figure.subplots()
    steps, values = training
    if len(steps):
        axes.plot(steps, values, ".", color="#b9c3d3", markersize=4, label="training episode")
        window = max(1, min(10, len(values) // 4))
        means = np.convolve(values, np.ones(window) / window, "valid")
        label = f"mean of {window} training episodes"
        axes.plot(steps[window - 1 :], means, color=GREY, linewidth=1.2, label=label)
    steps, values = evaluations
    if len(steps):
        low, high = values - deviation, values + deviation
        axes.fill_between(steps, low, high, color=expert_color(0), alpha=0.18, linewidth=0)
        axes.plot(
            steps, values, "o-", color=expert_color(0), markersize=4, linewidth=2, label="evaluation, ± deviation"
        )
    _chance(axes, chance)
    _finish(figure, axes, "return")
    return figure


def success(curve: Curve) -> Figure:
    """Share of successful episodes."""
    figure = Figure(figsize=(10, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*curve, "o-", color=expert_color(2), markersize=4, linewidth=2, clip_on=False)
    axes.set(xlabel="agent step", ylabel="success", ylim=(0, 1), xlim=(0, 1.02 * curve[0][-1]))
    clean(axes)
    return figure


def beside(groups: Sequence[Group], chance: float) -> Figure:
    """A curve per group of runs: mean, and from the lowest to the highest run."""
    figure = Figure(figsize=(10, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        steps, values = group.spread()
        runs = f"{len(values)} runs" if len(values) > 1 else "1 run"
        axes.fill_between(steps, values.min(0), values.max(0), color=expert_color(i), alpha=0.18, linewidth=0)
        style = {"color": expert_color(i), "markersize": 3.5, "linewidth": 1.8}
        axes.plot(steps, values.mean(0), "o-", label=f"{group.title}, {runs}", **style)
    _chance(axes, chance)
    _finish(figure, axes, "mean return of evaluations", columns=2 if len(groups) > 2 else 3)
    return figure


def _chance(axes, chance: float) -> None:
    axes.axhline(chance, color=CHANCE, linewidth=1.2, linestyle="--", label="random actions")


def _finish(figure: Figure, axes, label: str, columns: int = 4) -> None:
    axes.set(xlabel="agent step", ylabel=label)
    clean(axes)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=columns)


def panels(curves: Mapping[str, Curve], events: Float[np.ndarray, " U"], kept: Curve | None = None) -> Figure:
    """A panel per metric over agent steps, perturbations as vertical lines; shares that weights kept as a last one.

    Args:
        curves: title -> steps and values.
        events: agent steps of perturbations.
        kept: the same and the shares; None: no panel.
    """
    count = len(curves) + (kept is not None)
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)[0]
    ends = [steps[-1] for steps, _ in curves.values()] + [1.0, *events]
    for axes, (title, (steps, values)) in zip(grid, curves.items(), strict=False):
        axes.plot(steps, values, color=expert_color(0), linewidth=1.6)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(0, max(0.05, 1.1 * float(values.max())))
    if kept is not None:
        grid[-1].vlines(kept[0], 0, kept[1], color=EVENT, linewidth=1.2)
        grid[-1].plot(*kept, "o", color=EVENT, markersize=5)
        grid[-1].set_title("share of the weights kept", loc="left", fontsize=10)
        grid[-1].set_ylim(0, 1.05)
    for axes in grid:
        axes.set(xlabel="agent step", xlim=(0, 1.02 * max(ends)))
        clean(axes)
    for axes in grid[: len(curves)]:
        for step in events:
            axes.axvline(step, color=EVENT, linewidth=0.9, alpha=0.7, linestyle=":")
    return figure


def table(values: Float[np.ndarray, "R E"], rows: Sequence[str]) -> Figure:
    """Weights of experts, a row for each case, values written in while there is room."""
    experts = values.shape[1]
    figure = Figure(figsize=(min(10, 2.5 + 0.7 * experts), 1.1 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    _matrix(axes, values, rows, {"cmap": "Blues", "vmin": 0, "vmax": max(float(values.max()), 1e-9)}, experts <= 16)
    axes.set_xticks(range(experts), range(experts), fontsize=8)
    axes.set_xlabel("expert")
    return figure


def cosines(maps: Mapping[str, Float[np.ndarray, "T T"]], tasks: Sequence[str]) -> Figure:
    """Cosines between tasks side by side: blue agrees, red conflicts."""
    side = 1.6 + 0.55 * len(tasks)
    figure = Figure(figsize=(min(11.0, 1.2 + side * len(maps)), min(side, 6.0)), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        _matrix(axes, values, tasks, {"cmap": "RdBu", "vmin": -1, "vmax": 1}, len(tasks) <= 10)
        turned = max(map(len, tasks)) > 4
        style = {"rotation": 35, "ha": "right"} if turned else {}
        axes.set_xticks(range(len(tasks)), tasks, fontsize=8, **style)
        axes.set_title(title, loc="left", fontsize=10)
    return figure


def _matrix(axes, values: np.ndarray, rows: Sequence[str], shades: Mapping[str, object], written: bool) -> None:
    axes.imshow(values, aspect="auto", **shades)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if written:
        for (i, j), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 * shades["vmax"] else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)


def along_episode(trace: Trace, weights: Float[np.ndarray, "N E"], shown: int = 10) -> Figure:
    """Pictures of an episode, each underlined in its strongest expert's colour, above all experts' weights by step."""
    length, experts = weights.shape
    shown = min(shown, length)
    figure = Figure(figsize=(10, 3.2))
    grid = figure.add_gridspec(2, shown, height_ratios=(1, 1.7), hspace=0.22, wspace=0.08)
    for i in range(shown):
        step = int((i + 0.5) * length / shown)  # in the middle of its part of the axis below
        axes = figure.add_subplot(grid[0, i])
        axes.imshow(trace.frames[step])
        axes.set(xticks=[], yticks=[])
        strongest = int(weights[step].argmax())
        axes.spines[:].set(color="#c8ced8", linewidth=0.6)
        axes.spines["bottom"].set(color=expert_color(strongest), linewidth=6, position=("outward", 4), capstyle="butt")
        axes.set_title(f"expert {strongest}", fontsize=8, color=expert_color(strongest), pad=4)
    below = figure.add_subplot(grid[1, :])
    steps = np.arange(length + 1)
    padded = np.concatenate([weights, weights[-1:]])  # so that the last step has its width
    colors = [expert_color(e) for e in range(experts)]
    below.stackplot(steps, padded.T, colors=colors, step="post", labels=[f"expert {e}" for e in range(experts)])
    below.set(xlim=(0, length), ylim=(0, 1), xlabel="agent step of the episode", ylabel="weight")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    clean(below)
    if experts <= 20:
        below.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=min(experts, 10))
    return figure


def film(traces: Sequence[Trace], captions: Sequence[str]) -> list[Picture]:
    """Episodes side by side, four in a row, each under its caption; those that are over stay pale."""
    every = -(-max(len(trace.frames) for trace in traces) // LONGEST)
    reels = [trace.frames[::every] for trace in traces]
    columns = min(len(reels), 4)
    pictures = []
    for i in range(max(map(len, reels))):
        tiles = [_tile(reel, i, words) for reel, words in zip(reels, captions, strict=True)]
        tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
        rows = [np.concatenate(tiles[start : start + columns], 1) for start in range(0, len(tiles), columns)]
        pictures.append(np.concatenate(rows))
    return pictures


def _tile(reel: Sequence[Picture], number: int, words: str) -> Picture:
    picture = reel[min(number, len(reel) - 1)]
    if number >= len(reel):
        picture = (255 - (255 - picture.astype(np.uint16)) // 3).astype(np.uint8)
    height, width = picture.shape[:2]
    tile = Image.new("RGB", (width + 12, height + 30), "white")
    draw = ImageDraw.Draw(tile)
    draw.rectangle((5, 23, width + 6, height + 24), outline="#c8ced8")
    draw.text((6, 4), words, fill=GREY, font=ImageFont.load_default(13))
    tile.paste(Image.fromarray(picture), (6, 24))
    return np.asarray(tile)
