"""Charts of conflict between tasks: per block, and per pair of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from apps.figures import GREY, clean, expert_color, heatmaps
from apps.vision.multitask.conflict import Conflict, between

DENSE = "#9aa5b5"
"""Colour of the dense model beside."""
WIDTH = 0.8
"""Of the bars of a block together."""


def conflict_figure(conflict: Conflict, beside: Conflict | None = None) -> Figure:
    """Per block the mean cosine between tasks: in the FFN, within its experts where it is a bank, and in attention.

    Args:
        conflict: of the model.
        beside: of its dense twin.
    """
    title = "ffn (MoE: all experts as one)" if conflict.experts else "ffn"
    ffn = {title: (_means(conflict.layers, "ffn"), expert_color(0))}
    attention = {"attention": (_means(conflict.layers, "attention"), expert_color(0))}
    if conflict.experts:
        ffn["within single experts"] = (_means(conflict.within_experts(), "ffn"), expert_color(1))
    if beside is not None:
        ffn = {"dense model's ffn": (_means(beside.layers, "ffn"), DENSE), **ffn}
        attention = {"dense model's attention": (_means(beside.layers, "attention"), DENSE), **attention}
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    for axes, bars, title in zip(panels, (ffn, attention), ("ffn", "attention"), strict=True):
        _bars(axes, bars)
        axes.set_title(title, loc="left", fontsize=10)
    panels[0].set_ylabel("mean cosine between tasks")
    return figure


def _means(layers: Mapping[str, Float[Tensor, "T T"]], part: str) -> dict[int, float]:
    """Block -> mean over the pairs of tasks."""
    return {
        int(name.split()[1]): float(between(values).nanmean()) for name, values in layers.items() if name.endswith(part)
    }


def _bars(axes, bars: dict[str, tuple[dict[int, float], object]]) -> None:
    """Bars side by side at every block; a block that has fewer of them leaves no gap."""
    blocks = sorted(set().union(*(values for values, _ in bars.values())))
    width = WIDTH / len(bars)
    for label in bars:
        values, color = bars[label]
        places = []
        for block in values:
            here = [name for name in bars if block in bars[name][0]]
            places.append(block + width * (here.index(label) - (len(here) - 1) / 2))
        axes.bar(places, list(values.values()), width, color=color, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("block")
    axes.set_xticks(blocks if len(blocks) <= 16 else blocks[:: math.ceil(len(blocks) / 16)])
    axes.legend(frameon=False, fontsize=8)
    clean(axes)


def pairs_figure(conflict: Conflict, beside: Conflict | None = None) -> Figure:
    """Task by task the mean cosine over the FFNs of all blocks: blue agrees, red conflicts.

    Args:
        conflict: of the model; with a map of its own for within single experts, where it has MoE layers.
        beside: of its dense twin.
    """
    maps = {} if beside is None else {"dense model": beside.pair_means().numpy()}
    maps["ffn of all blocks" if beside is None else "MoE model"] = conflict.pair_means().numpy()
    if conflict.experts:
        within = torch.stack(list(conflict.within_experts().values()))  # [layers, T, T]
        maps["within single experts"] = within.nanmean(0).numpy()
    figure = heatmaps(maps, conflict.tasks, "", "", vmax=1, signed=True)
    for axes, values in zip(figure.axes, maps.values(), strict=False):
        axes.images[0].set_cmap("RdBu")  # red is conflict
        style = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(conflict.tasks)), conflict.tasks, fontsize=8, **style)
        for (i, j), value in np.ndenumerate(values):
            if i != j and not math.isnan(value):
                color = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    return figure
