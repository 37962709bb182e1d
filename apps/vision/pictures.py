"""Figures that show images: samples per expert, token maps, mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from apps.figures import expert_color
from apps.vision.data import Images
from apps.vision.evaluation import Evaluation
from apps.vision.models.vimoe import ViMoE

PER_EXPERT = 10
"""Images shown for each expert."""
MOST_EXPERTS = 16
"""Experts shown for each layer."""


def show_image(axes, image: Float[Tensor, "C H W"]) -> None:
    """Draw an image without axes."""
    pixels = image.permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def image_grid(images: Images, indices: Sequence[int], captions: Sequence[str], columns: int = 8) -> Figure:
    """Images with captions below."""
    rows = -(-len(indices) // columns)
    figure = Figure(figsize=(10, 1.65 * rows), layout="constrained")
    grid = list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flat)
    for axes, image, caption in zip(grid, images.plain(list(indices))[0], captions, strict=False):
        show_image(axes, image)
        axes.set_title(caption, fontsize=7, y=-0.02, va="top")
    for axes in grid[len(indices) :]:
        axes.set_axis_off()
    return figure


def samples_per_expert(model: ViMoE, images: Images, evaluation: Evaluation, layer: str) -> Figure:
    """One row of images per expert: those with the largest share of tokens there, of different classes if possible."""
    counts = evaluation.expert_counts[layer].double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # [N, E]
    experts = min(share.shape[1], MOST_EXPERTS)
    side = 10 / PER_EXPERT
    figure = Figure(figsize=(10, side * experts), layout="constrained")
    grid = figure.subplots(experts, PER_EXPERT, squeeze=False)
    maps = evaluation.first.get(layer)
    shown = len(maps) if maps is not None and maps.dim() == 2 else len(share)
    for expert in range(experts):
        # Token maps are kept for the first images only; where they are used, samples come from those.
        best = share[:shown, expert].argsort(descending=True, stable=True)[:PER_EXPERT].tolist()
        best = [i for i in best if share[i, expert] > 0]
        pictures = images.plain(best)[0] if best else []
        for column, axes in enumerate(grid[expert]):
            axes.set_axis_off()
            if column < len(best):
                image = pictures[column]
                if maps is not None and maps.dim() == 2:
                    image = _dimmed(image, maps[best[column]] == expert, model)
                show_image(axes, image)
        grid[expert][0].text(
            -0.12,
            0.5,
            str(expert),
            transform=grid[expert][0].transAxes,
            ha="right",
            va="center",
            fontsize=11,
            fontweight="bold",
            color=expert_color(expert),
        )
        if not best:
            grid[expert][0].text(0.0, 0.4, "no tokens", transform=grid[expert][0].transAxes, fontsize=9)
    return figure


def _dimmed(image: Float[Tensor, "C H W"], keep: Tensor, model: ViMoE) -> Float[Tensor, "C H W"]:
    """The image with all patches but those in `keep` (one flag per token) faded."""
    patches = _as_patches(keep.float(), model)
    mask = torch.nn.functional.interpolate(patches[None, None], size=image.shape[1:], mode="nearest")[0]
    return image * (0.25 + 0.75 * mask)


def _as_patches(per_token: Tensor, model: ViMoE) -> Float[Tensor, "H W"]:
    """Values per token on the patch grid; class and register tokens, which come first, are left out."""
    rows, columns = model.backbone.patch_embed.grid_size
    return per_token[-rows * columns :].reshape(rows, columns)


def token_maps(
    model: ViMoE, images: Images, evaluation: Evaluation, layers: Mapping[str, str], count: int = 8
) -> Figure:
    """A row of images, and below it one row per layer that shows each patch's expert by colour."""
    routed = [layer for layer in layers if evaluation.first[layer].dim() == 2]
    chosen = _one_per_class(evaluation.labels[: len(evaluation.first[routed[0]])], count)
    figure = Figure(figsize=(10, 1.3 * (1 + len(routed))), layout="constrained")
    grid = figure.subplots(1 + len(routed), len(chosen), squeeze=False)
    for axes, image in zip(grid[0], images.plain(chosen)[0], strict=True):
        show_image(axes, image)
    for row, layer in zip(grid[1:], routed, strict=True):
        for axes, index in zip(row, chosen, strict=True):
            experts = _as_patches(evaluation.first[layer][index].float(), model).long()
            colors = np.array([(0.9, 0.9, 0.9), *(expert_color(e) for e in range(int(experts.max()) + 1))])
            axes.imshow(colors[experts.numpy() + 1])
            axes.set_axis_off()
        row[0].set_title(layers[layer], fontsize=9, loc="left")
    return figure


def _one_per_class(labels: Tensor, count: int) -> list[int]:
    """Indices of the first image of each of the first classes, then whatever comes."""
    first: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        first.setdefault(label, index)
    chosen = [first[label] for label in sorted(first)][:count]
    rest = [i for i in range(len(labels)) if i not in set(chosen)]
    return chosen + rest[: count - len(chosen)]
