"""ViMoE: a vision transformer whose FFNs are Mixtures of Experts (arXiv 2410.15732)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.vision.models.backbones import make_backbone, put_moe_layers
from apps.vision.settings import ModelConfig
from moecore.errors import require


@dataclass(frozen=True)
class ImageSpec:
    """What a classifier must know of its images; kept with its weights."""

    channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    whole: bool = True
    """Trained on whole images, resized to the size if need be, rather than on random crops of larger ones."""

    @classmethod
    def from_dict(cls, values: dict) -> ImageSpec:
        """From plain data, as `dataclasses.asdict` gives it."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class ViMoE(nn.Module):
    """Images with pixels in [0, 1] -> class scores. Normalises its input itself, so that an export does too.

    Args:
        config: backbone, placement and MoE layers.
        images: channels, size, classes, mean and deviation of the data.
    """

    def __init__(self, config: ModelConfig, images: ImageSpec) -> None:
        super().__init__()
        self.config, self.images = config, images
        self.register_buffer("mean", torch.tensor(images.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(images.std).view(-1, 1, 1))
        self.backbone = make_backbone(config, images.channels, images.image_size, len(images.classes))
        no_tasks = config.moe.score not in ("per_task", "task_conditioned")
        remedy = "needs the task of every image, and a classifier has but one"
        require(no_tasks, "model.moe.score", config.moe.score, remedy)
        self.moe_layers = put_moe_layers(self.backbone, config, config.moe)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """[B, C, H, W] in [0, 1] -> [B, classes]."""
        return self.backbone((images - self.mean) / self.std)

    def example_input(self, batch: int = 1) -> Float[Tensor, "B C H W"]:
        """Images of the right shape, for counting and benchmarks."""
        size = self.images.image_size
        return torch.rand(batch, self.images.channels, size, size, device=self.mean.device)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The plain ViT of equal active multiply-adds: with `moe.hidden` null, simply no MoE layers."""
    return dataclasses.replace(config, moe_layers="none")
