"""Pictures of what tasks predict: colours of classes, depth and normals, maps of experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from apps.figures import expert_color
from apps.vision.models.m3vit import M3ViT
from apps.vision.multitask.evaluation import Evaluation
from apps.vision.multitask.tasks import UNKNOWN, TaskSpec
from apps.vision.pictures import show_image

BLANK = 0.92
"""Grey of what is unknown."""


def class_color(number: int) -> tuple[float, float, float]:
    """One colour per class, the same in every picture: the palette of experts, then hues further round the circle."""
    if number < 20:
        return expert_color(number)
    return tuple(colormaps["hsv"](0.618 * number % 1.0)[:3])


def picture(
    task: TaskSpec, value: Float[Tensor, "*C H W"], low: float | None = None, high: float | None = None
) -> Float[np.ndarray, "H W 3"]:
    """A label, or a decoded prediction, of one image in colours.

    Args:
        task: of maps, not of classes of whole images.
        value: [H, W], or [3, H, W] for normals.
        low: depth of the lightest colour; None: the smallest known one.
        high: depth of the darkest colour; None: the largest one.
    """
    if task.name == "normals":
        known = value.abs().sum(0) > 0
        colors = (F.normalize(value, dim=0).permute(1, 2, 0).numpy() + 1) / 2
        return np.where(known.numpy()[..., None], colors, BLANK)
    values = value.numpy()
    if task.classes:
        palette = np.array([class_color(number) for number in range(len(task.classes))] + [(BLANK,) * 3])
        return palette[np.where(values == UNKNOWN, len(task.classes), values)]
    if task.name == "depth":
        known = values > 0
        low = float(values[known].min(initial=np.inf)) if low is None else low
        high = float(values.max(initial=0)) if high is None else high
        share = np.clip((values - low) / max(high - low, 1e-6), 0, 1) if known.any() else np.zeros_like(values)
        return np.where(known[..., None], colormaps["viridis_r"](share)[..., :3], BLANK)
    known = values != UNKNOWN
    return np.where(known[..., None], np.repeat(1 - values[..., None], 3, -1), BLANK)


def predictions_beside_truth(model: M3ViT, evaluation: Evaluation) -> Figure:
    """For every image a row of labels and a row of predictions, a column per task; classes of images as titles."""
    maps = [task for task in model.spec.tasks if task.kind.dense]
    count = len(evaluation.shown)
    shape = model.spec.height / model.spec.width
    columns = 1 + len(maps)
    figure = Figure(figsize=(10, 2 * count * 10 / columns * shape + 0.3), layout="constrained")
    grid = figure.subplots(2 * count, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, title in zip(grid[0], ["", *(task.kind.title for task in maps)], strict=True):
        axes.set_title(title, fontsize=9)
    for i in range(count):
        show_image(grid[2 * i][0], evaluation.shown[i])
        grid[2 * i + 1][0].text(0.0, 0.98, _classes_of(model, evaluation, i), fontsize=8, va="top", wrap=True)
        for column, task in enumerate(maps, 1):
            truth, found = evaluation.labels[task.name][i], evaluation.predictions[task.name][i]
            low, high = _range(truth) if task.name == "depth" else (None, None)
            grid[2 * i][column].imshow(picture(task, truth, low, high))
            grid[2 * i + 1][column].imshow(picture(task, found, low, high))
    return figure


def _range(depth: Float[Tensor, "H W"]) -> tuple[float | None, float | None]:
    """Of what is known, so that label and prediction share their colours."""
    known = depth[depth > 0]
    return (float(known.min()), float(known.max())) if len(known) else (None, None)


def _classes_of(model: M3ViT, evaluation: Evaluation, index: int) -> str:
    """What the image was classified as."""
    lines = ["above: truth", "here: prediction"]
    for task in model.spec.tasks:
        if not task.kind.dense:
            truth, found = (int(values[task.name][index]) for values in (evaluation.labels, evaluation.predictions))
            lines += ["", f"true: {task.classes[truth] if truth != UNKNOWN else 'unknown'}"]
            lines += [f"found: {task.classes[found]}"]
    return "\n".join(lines)


def token_maps(model: M3ViT, evaluation: Evaluation, layer: str, tasks: Sequence[str], count: int = 6) -> Figure:
    """Images in a row, and below them a row per task with each patch's main expert of a layer by colour."""
    rows, columns = model.backbone.patch_embed.grid_size
    count = min(count, len(evaluation.shown))
    shape = model.spec.height / model.spec.width
    figure = Figure(figsize=(10, (1 + len(tasks)) * (10 / count * shape + 0.22)), layout="constrained")
    grid = figure.subplots(1 + len(tasks), count, squeeze=False)
    for axes, image in zip(grid[0], evaluation.shown, strict=False):
        show_image(axes, image)
    for line, task in zip(grid[1:], tasks, strict=True):
        for axes, tokens in zip(line, evaluation.maps[task][layer], strict=False):
            experts = tokens[-rows * columns :].long().reshape(rows, columns)  # class tokens come first
            colors = np.array([expert_color(e) for e in range(int(experts.max()) + 1)])
            axes.imshow(colors[experts.numpy()])
            axes.set_axis_off()
        line[0].set_title(task, fontsize=9, loc="left")
    return figure
