"""ViMoE: a vision transformer whose FFNs are Mixtures of Experts (arXiv 2410.15732)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

import moecore
from apps.vision.models.backbones import make_backbone
from apps.vision.settings import ModelConfig


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
        depth = len(moecore.find_ffns(self.backbone))
        count = len(moecore.place(config.moe_layers, depth))
        moe = config.moe
        self.moe_layers: list[str] = []
        if count:
            self.moe_layers = moecore.replace_ffn(
                self.backbone,
                config.moe_layers,
                moe,
                init=config.moe_init,
                experts=moecore.schedule(config.experts_schedule, count, max(moe.top_k, 1), moe.num_experts),
                share_router=config.share_router,
            )

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
