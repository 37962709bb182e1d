"""Figures that show images: samples per expert, token maps, mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
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
    """One row of images per expert: those with the largest share of their tokens there, of several classes."""
    counts = evaluation.expert_counts[layer].double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # [N, E]
    experts = min(share.shape[1], MOST_EXPERTS)
    figure = Figure(figsize=(10, 10 / PER_EXPERT * experts), layout="constrained")
    grid = figure.subplots(experts, PER_EXPERT, squeeze=False)
    maps = evaluation.maps[layer] if shows_patches(model, evaluation, layer) else None
    for expert, row in enumerate(grid):
        for axes in row:
            axes.set_axis_off()
        best = _most_typical(share[:, expert], evaluation.labels)
        for axes, index, image in zip(row, best, images.plain(best)[0] if best else (), strict=False):
            show_image(axes, image if maps is None else _dimmed(image, maps[index] == expert, model))
        style = {"transform": row[0].transAxes, "va": "center"}
        row[0].text(
            -0.12, 0.5, str(expert), ha="right", fontsize=11, fontweight="bold", color=expert_color(expert), **style
        )
        if not best:
            row[0].text(0.0, 0.5, "no tokens", fontsize=9, **style)
    return figure


def _most_typical(share: Float[Tensor, " N"], labels: Int[Tensor, " N"]) -> list[int]:
    """Images with the largest share of tokens at an expert; at most four of one class, while there are others."""
    chosen, left = [], []
    per_class: Counter[int] = Counter()
    for index in share.argsort(descending=True, stable=True).tolist():
        if share[index] <= 0 or len(chosen) == PER_EXPERT:
            break
        label = int(labels[index])
        per_class[label] += 1
        (chosen if per_class[label] <= 4 else left).append(index)
    return chosen + left[: PER_EXPERT - len(chosen)]


def shows_patches(model: ViMoE, evaluation: Evaluation, layer: str) -> bool:
    """Whether the layer routes patch by patch, rather than segments or whole images."""
    maps = evaluation.maps[layer]
    return maps.dim() == 2 and maps.shape[1] >= model.backbone.patch_embed.num_patches


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
    routed = [layer for layer in layers if shows_patches(model, evaluation, layer)]
    chosen = _one_per_class(evaluation.labels, count)
    figure = Figure(figsize=(10, 1.3 * (1 + len(routed))), layout="constrained")
    grid = figure.subplots(1 + len(routed), len(chosen), squeeze=False)
    for axes, image in zip(grid[0], images.plain(chosen)[0], strict=True):
        show_image(axes, image)
    for row, layer in zip(grid[1:], routed, strict=True):
        for axes, index in zip(row, chosen, strict=True):
            experts = _as_patches(evaluation.maps[layer][index].long(), model)
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
    rest = sorted(set(range(len(labels))) - set(chosen))
    return chosen + rest[: count - len(chosen)]
