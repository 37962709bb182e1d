"""Augmentation of training batches, drawn from a generator of the batch's own."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from apps.vision.models.vimoe import ImageSpec
from apps.vision.settings import DataConfig


def shift_and_flip(
    images: UInt8[Tensor, "B C H W"], padding: int, flip: bool, generator: torch.Generator
) -> UInt8[Tensor, "B C H W"]:
    """Random crops of the reflected-padded images, half of them mirrored: whole batch at once."""
    batch, _, height, width = images.shape
    rows = torch.arange(height).expand(batch, height)
    columns = torch.arange(width).expand(batch, width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    if padding:
        padding = min(padding, height - 1, width - 1)
        images = F.pad(images, (padding,) * 4, mode="reflect")
        rows = rows + torch.randint(0, 2 * padding + 1, (batch, 1), generator=generator)
        columns = columns + torch.randint(0, 2 * padding + 1, (batch, 1), generator=generator)
    sample = torch.arange(batch)[:, None, None]
    return images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, C, H, W]


def per_image(config: DataConfig, image_size: int, resize: bool) -> v2.Transform | None:
    """Transforms that torchvision applies image by image; None if there are none. They draw from torch's own RNG."""
    steps: list[v2.Transform] = []
    if resize:
        steps.append(v2.RandomResizedCrop(image_size, scale=config.crop_scale, antialias=True))
    if resize and config.flip is not False:
        steps.append(v2.RandomHorizontalFlip())
    if config.rand_augment:
        steps.append(v2.RandAugment(config.rand_augment, config.rand_augment_magnitude))
    if config.random_erasing:
        steps.append(v2.RandomErasing(config.random_erasing))
    return v2.Compose(steps) if steps else None


def for_evaluation(spec: ImageSpec) -> v2.Transform:
    """An image as the model is tested on it and predicts from it.

    Whole, resized to the size if need be; or, as for photographs, the centre of one whose shorter side is 8/7 of it.
    """
    size = spec.image_size
    if spec.whole:
        return v2.Resize([size, size], antialias=True)
    return v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)])


def mixing(config: DataConfig, num_classes: int) -> v2.Transform | None:
    """Mixup, cutmix, or one of both per batch; turns labels into distributions."""
    choices: list[v2.Transform] = []
    if config.mixup:
        choices.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        choices.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices) if choices else None
