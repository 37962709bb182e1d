"""Random changes of training batches that keep images and their labels in step with each other and with geometry.

Whole batches at once, every image with parameters of its own, all drawn from one generator.

A picture enlarged by s looks, to a camera of unchanged focal length, as if every point (X, Y, Z) had moved to
(X, Y, Z / s): X / Z, and with it the place in the picture, grows by s about the principal point. So depth is divided by
s; and as normals follow the inverse transpose of what moves the points, here diag(1, 1, s), they become (nx, ny, s nz),
normalised. Cutting out a part moves the principal point, which neither depth nor normals depend on. Mirroring negates X
and so nx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from apps.vision.multitask.tasks import TASKS
from apps.vision.settings import DataConfig

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a grey of the same brightness (ITU-R BT.601)."""


@dataclass(frozen=True)
class Views:
    """How each image of a batch is seen: enlarged, a part of its own size cut out, and that part mirrored or not."""

    zoom: Float[Tensor, " B"]
    top: Float[Tensor, " B"]
    """Of the part, in pixels of the enlarged image."""
    left: Float[Tensor, " B"]
    mirrored: Bool[Tensor, " B"]

    def rows(self, height: int) -> Float[Tensor, "B H"]:
        """Where the centre of every row lies in the original, in pixels from its upper border."""
        return (torch.arange(height) + 0.5 + self.top[:, None]) / self.zoom[:, None]

    def columns(self, width: int) -> Float[Tensor, "B W"]:
        """Where the centre of every column lies in the original, in pixels from its left border."""
        columns = torch.arange(width).expand(len(self.left), width)
        columns = torch.where(self.mirrored[:, None], width - 1 - columns, columns)
        return (columns + 0.5 + self.left[:, None]) / self.zoom[:, None]


def draw_views(
    batch: int, size: tuple[int, int], zoom: tuple[float, float], flip: bool, generator: torch.Generator
) -> Views:
    """Views at random.

    Args:
        batch: images.
        size: height and width in pixels.
        zoom: range of the enlargements, uniform; at least 1.
        flip: mirror half of the images.
        generator: to draw from.
    """
    draws = torch.rand(4, batch, generator=generator)
    factor = zoom[0] + (zoom[1] - zoom[0]) * draws[0]
    top, left = (draws[i] * (factor - 1) * side for i, side in ((1, size[0]), (2, size[1])))
    return Views(factor, top, left, (draws[3] < 0.5) & flip)


def view_images(images: Float[Tensor, "B C H W"], views: Views) -> Float[Tensor, "B C H W"]:
    """The images as seen, interpolated bilinearly."""
    batch, _, height, width = images.shape
    y = (2 * views.rows(height) / height - 1)[:, :, None].expand(batch, height, width)
    x = (2 * views.columns(width) / width - 1)[:, None, :].expand(batch, height, width)
    return F.grid_sample(images, torch.stack([x, y], dim=-1), padding_mode="border", align_corners=False)


def view_labels(labels: Mapping[str, Tensor], views: Views) -> dict[str, Tensor]:
    """The labels as seen: the nearest pixel's, depth and normals changed as geometry wants it.

    Enlarged by 1 or more, no pixel between two that are seen is passed over, so that edges one pixel wide stay whole.
    Labels of whole images stay as they are.
    """
    seen = {name: _nearest(label, views) if TASKS[name].dense else label for name, label in labels.items()}
    if "depth" in seen:
        seen["depth"] = seen["depth"] / views.zoom[:, None, None]
    if "normals" in seen:
        ones = torch.ones_like(views.zoom)
        factors = torch.stack([torch.where(views.mirrored, -ones, ones), ones, views.zoom], dim=1)  # [B, 3]
        seen["normals"] = F.normalize(seen["normals"] * factors[:, :, None, None], dim=1)
    return seen


def _nearest(label: Shaped[Tensor, "B *C H W"], views: Views) -> Shaped[Tensor, "B *C H W"]:
    """Labels of the pixels in which the seen pixels' centres lie."""
    height, width = label.shape[-2:]
    rows, columns = _pixel(views.rows(height), height), _pixel(views.columns(width), width)
    image = torch.arange(len(label))[:, None, None]
    if label.ndim == 3:
        return label[image, rows[:, :, None], columns[:, None, :]]
    return label[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]


def _pixel(place: Float[Tensor, "B N"], side: int) -> Int[Tensor, "B N"]:
    return place.long().clamp(max=side - 1)


def jitter(images: Float[Tensor, "B 3 H W"], share: float, generator: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """Change brightness, contrast and saturation of RGB images in [0, 1] by factors in [1 - share, 1 + share]."""
    factors = 1 + share * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    images = (images * factors[0]).clamp(0, 1)
    grey = _grey(images)
    mean = grey.mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * factors[1]).clamp(0, 1)
    grey = _grey(images)
    return (grey + (images - grey) * factors[2]).clamp(0, 1)


def _grey(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def augment(
    images: Float[Tensor, "B 3 H W"], labels: Mapping[str, Tensor], config: DataConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "B 3 H W"], dict[str, Tensor]]:
    """Flip, zoom and jitter as the settings say; images in [0, 1], labels as in `apps.vision.multitask.tasks`."""
    size = tuple(images.shape[2:])
    views = draw_views(len(images), size, config.zoom, config.flip is not False, generator)
    return jitter(view_images(images, views), config.jitter, generator), view_labels(labels, views)
