"""Settings of the vision app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from apps.settings import OptimConfig, RunConfig, TrainerConfig
from apps.vision.multitask.settings import M3ViTConfig, ScenesConfig, TasksConfig
from moecore.config import MoEConfig
from moecore.errors import require

Dataset = Literal["digits", "cifar10", "cifar100", "folder", "scenes", "maps", "nyud", "pascal_context", "cityscapes"]


@dataclass
class ModelConfig:
    """A vision transformer and the MoE layers in it."""

    name: Literal["vimoe", "m3vit"] = "vimoe"
    """vimoe classifies images; m3vit solves several tasks at once on images that have maps for labels."""
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
    m3vit: M3ViTConfig = field(default_factory=M3ViTConfig)
    """What is M³ViT's alone."""


@dataclass
class DataConfig:
    """Images and what is done to them."""

    dataset: Dataset = "digits"
    """digits comes with scikit-learn; cifar10 and cifar100 are downloaded, unless `root` has them; folder is yours. For
    model.name=m3vit: scenes are generated; maps are your own images with a folder of labels per task; nyud,
    pascal_context and cityscapes are read from `root`."""
    root: str | None = None
    """Folder or archive (.tar, .tar.gz, .zip) of images: [train/ val/ test/]<class>/<image>. For CIFAR also where to
    download to (default: data/). For several tasks the folder of images and of a folder of labels per task."""
    image_size: int | None = None
    """Side in pixels; null: that of the images if small and equal, else 224. With several tasks the height."""
    image_width: int | None = None
    """Width in pixels with several tasks; null: as the data set has it."""
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
    zoom: tuple[float, float] = (1.0, 1.5)
    """With several tasks: range of random enlargements, of which an equally large part is cut out."""
    jitter: float = 0.2
    """With several tasks: largest random change of brightness, contrast and saturation, as a share."""
    balance_tasks: bool = False
    """With several tasks: draw training images so that every task's labels are seen equally often."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """Of the generated scenes."""

    @property
    def several_tasks(self) -> bool:
        """Whether the data set has maps for labels, of several tasks."""
        return self.dataset in ("scenes", "maps", "nyud", "pascal_context", "cityscapes")

    def __post_init__(self) -> None:
        if self.dataset in ("folder", "maps", "nyud", "pascal_context", "cityscapes"):
            require(self.root is not None, "root", self.root, "give the folder of images")
        unused = self.dataset in ("digits", "scenes") and self.root is not None
        reader = "folder" if self.dataset == "digits" else "maps"
        remedy = f"dataset={self.dataset} has its own images; to read these set dataset={reader}"
        require(not unused, "root", self.root, remedy)
        for name in ("image_size", "image_width"):
            size = getattr(self, name)
            require(size is None or size >= 4, name, size, "must be at least 4")
        low, high = self.zoom
        require(1 <= low <= high, "zoom", self.zoom, "is a range that starts at 1 or above")
        require(0 <= self.jitter < 1, "jitter", self.jitter, "must lie in [0, 1)")
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
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of M³ViT."""
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
        name, several = self.model.name, self.data.several_tasks
        remedy = "needs data.dataset scenes, maps, nyud, pascal_context or cityscapes"
        require(name == "vimoe" or several, "model.name", name, remedy)
        require(name == "m3vit" or not several, "data.dataset", self.data.dataset, "needs model.name=m3vit")


def idle(config: VisionConfig) -> dict[str, str]:
    """Prefixes of settings that do nothing beside the others, with what would change that."""
    unused = {"model.moe.": "give --model.moe_layers"} if config.model.moe_layers == "none" else {}
    if config.model.name == "m3vit":
        of_classes = ("label_smoothing", "data.crop_", "data.rand_augment", "data.random_erasing")
        return unused | dict.fromkeys((*of_classes, "data.mixup", "data.cutmix"), "give --model.name vimoe")
    of_tasks = ("tasks.", "model.m3vit.", "data.scenes.", "data.image_width", "data.zoom", "data.jitter")
    return unused | dict.fromkeys((*of_tasks, "data.balance_tasks"), "give --model.name m3vit")
