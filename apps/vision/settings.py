"""Settings of the vision app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from apps.settings import OptimConfig, RunConfig, TrainerConfig
from moecore.config import MoEConfig
from moecore.errors import require


@dataclass
class ModelConfig:
    """A vision transformer and the MoE layers in it."""

    backbone: str = "vit_micro"
    """vit_micro, vit_mini, vit_midi (ours, for small images), or any timm ViT, e.g. deit_small_patch16_224."""
    pretrained: str | None = None
    """Weights to start from: `timm` downloads the backbone's, or a file (.safetensors, .pth) of a plain timm ViT."""
    patch_size: int | None = None
    """Side of a patch in pixels; null: as the backbone, or to suit the image size for ours."""
    stem: Literal["auto", "conv", "patch"] = "auto"
    """How our backbones make tokens: a few 3x3 convolutions (patch size 2, 4, 8, ...), or one patch projection; auto:
    convolutions where the patch size allows."""
    embed_dim: int | None = None
    """Width; null: as the backbone."""
    depth: int | None = None
    """Blocks; null: as the backbone."""
    num_heads: int | None = None
    """Attention heads; null: as the backbone."""
    mlp_ratio: float | None = None
    """FFN width over embed_dim; null: as the backbone."""
    drop_rate: float = 0.0
    """Dropout before the classifier."""
    drop_path_rate: float = 0.0
    """Stochastic depth."""
    moe_layers: str = "last-2"
    """Blocks that carry MoE: all, none, last-N, first-N, every-N, or numbers such as 3,5."""
    moe_init: Literal["upcycle", "random"] = "upcycle"
    """Expert weights start as copies of the block's FFN, or random."""
    experts_schedule: Literal["constant", "ascending", "descending", "pyramid", "wave"] = "constant"
    """How the number of experts varies with depth, up to moe.num_experts."""
    share_router: bool = False
    """One router for all MoE layers."""
    moe: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=8, top_k=2))
    """The MoE layers."""


@dataclass
class DataConfig:
    """Images and what is done to them."""

    dataset: Literal["digits", "cifar10", "cifar100", "folder"] = "digits"
    """digits comes with scikit-learn; cifar10 and cifar100 are downloaded, unless `root` has them; folder is yours."""
    root: str | None = None
    """Folder or archive (.tar, .tar.gz, .zip) of images: [train/ val/ test/]<class>/<image>. For CIFAR also where to
    download to (default: data/)."""
    image_size: int | None = None
    """Side in pixels; null: that of the images if small and equal, else 224."""
    val_fraction: float = 0.1
    """Share of the training images kept for validation where the data has no val/ of its own."""
    test_fraction: float = 0.2
    """Share kept for testing where the data has no test/ of its own."""
    batch_size: int = 64
    """Images per training step."""
    num_workers: int | None = None
    """Loader processes; null: none for images held in memory, else one per free core, at most 8."""
    cache: Literal["auto", "none"] = "auto"
    """Hold decoded images in memory if they are small and fit 2 GiB, or never."""
    on_error: Literal["raise", "skip"] = "raise"
    """An unreadable image stops the run, or is left out and counted."""
    flip: bool | None = None
    """Random horizontal flips; null: yes, except for digits."""
    crop_padding: int | None = None
    """Random shifts by so many pixels, for images used at their own size; null: an eighth of the side."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Range of areas of random resized crops, for images that are resized."""
    rand_augment: int = 0
    """RandAugment operations per image; 0: none."""
    rand_augment_magnitude: int = 9
    """RandAugment strength, 0 to 30."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle."""
    mixup: float = 0.2
    """Beta parameter of mixup; 0: none."""
    cutmix: float = 0.0
    """Beta parameter of cutmix; 0: none. With both, each batch takes one of them."""

    def __post_init__(self) -> None:
        require(self.dataset != "folder" or self.root is not None, "root", self.root, "give the folder of images")
        unused = self.dataset == "digits" and self.root is not None
        require(not unused, "root", self.root, "dataset=digits has its own images; to read these set dataset=folder")
        size = self.image_size
        require(size is None or size >= 4, "image_size", size, "must be at least 4")
        for name in ("val_fraction", "test_fraction"):
            share = getattr(self, name)
            require(0 < share < 0.9, name, share, "must lie between 0 and 0.9")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        require(self.num_workers is None or self.num_workers >= 0, "num_workers", self.num_workers, "at least 0")
        require(0 <= self.random_erasing <= 1, "random_erasing", self.random_erasing, "is a probability")
        for name in ("mixup", "cutmix", "rand_augment", "rand_augment_magnitude"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")


@dataclass
class VisionConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Training loop."""
    run: RunConfig = field(default_factory=RunConfig)
    """Run folder and repeatability."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "must lie in [0, 1)")
