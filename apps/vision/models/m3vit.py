"""M³ViT: a vision transformer for several tasks, whose MoE layers are gated by task.

Fan et al., "M³ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning", arXiv 2210.14793. The task
reaches the gates through `moecore.routing_context(task=...)`, which `M3ViT` opens itself. `m3vit_backbone` is the
published encoder alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import moecore
from apps.errors import UserError
from apps.vision.models.backbones import make_backbone, put_moe_layers, read_state
from apps.vision.models.decoders import make_decoder
from apps.vision.models.m3vit_weights import backbone_part, load_published
from apps.vision.multitask.tasks import SceneSpec
from apps.vision.settings import ModelConfig
from moecore.config import MoEConfig
from moecore.errors import choice, require
from moecore.scores_conditioned import PerTaskScore, TaskConditionedScore

Gate = Literal["multi", "task_conditioned", "shared"]


def m3vit_moe(
    gate: Gate = "multi",
    num_tasks: int = 2,
    num_experts: int = 16,
    top_k: int = 4,
    task_width: int = 16,
    noise_std: float = 0.0,
) -> MoEConfig:
    """The MoE layers of M³ViT: softmax over all experts, the best `top_k` keep their raw probabilities.

    Experts are as wide as makes the active multiply-adds those of the FFN replaced, which gives the published widths:
    D with the 4 of 16 experts of the paper's command line, 2 D with the 2 of 16 of its settings files and of the FPGA
    designs (Edge-MoE, UbiMoE).

    Args:
        gate: "multi" (one gate per task over experts that all tasks share), "task_conditioned" (one gate that sees an
            embedding of the task behind the token) or "shared" (one gate that does not know the task).
        num_tasks: how many tasks the gates tell apart; "shared" has no use for it.
        num_experts: E.
        top_k: K.
        task_width: G of the task embedding; for "task_conditioned".
        noise_std: Gaussian noise of width `noise_std / E` on the scores in training. 0, as published, leaves the load
            loss without a gradient: it is then a count.
    """
    choice("gate", gate, get_args(Gate))
    tasks = {"num_tasks": num_tasks}
    score, options = {
        "multi": ("per_task", tasks),
        "task_conditioned": ("task_conditioned", {**tasks, "task_width": task_width}),
        "shared": ("noisy", {}),
    }[gate]
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        activation="gelu",
        bias=True,
        score=score,
        score_options={**options, "noise_std": noise_std},
        weight="softmax",
        weight_options={"renormalize": False},
        aux_loss={"importance_cv2": 0.01, "load_cv2": 0.01},
    )


def m3vit_backbone(
    moe: MoEConfig,
    img_size: int | tuple[int, int] = (480, 640),
    patch_size: int = 16,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 12,
) -> VisionTransformer:
    """Images `[B, 3, H, W]` -> tokens `[B, N, D]`, the class token first; no norm at the end, each decoder has its own.

    Blocks 1, 3, 5, ... carry MoE. The defaults are the small model on NYUD-v2; the base model has `embed_dim=768`. The
    published small model has 12 heads where DeiT's has 6: weights of either load into the other and mean another
    attention.

    Args:
        moe: the MoE layers; `m3vit_moe` gives the published ones.
        img_size: height and width in pixels, or the side of a square.
        patch_size: side of a patch in pixels.
        embed_dim: D.
        depth: blocks.
        num_heads: attention heads.

    Raises:
        ConfigError: for sizes that do not fit.

    Example:
        >>> import moecore, torch
        >>> model = m3vit_backbone(m3vit_moe(num_tasks=3), (32, 64), embed_dim=24, depth=2, num_heads=3)
        >>> with moecore.routing_context(task=2):  # or a tensor [B], a task for every image
        ...     model(torch.rand(1, 3, 32, 64)).shape
        torch.Size([1, 9, 24])
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    require(patch_size >= 1, "patch_size", patch_size, "must be at least 1")
    fits = len(size) == 2 and all(side >= patch_size and side % patch_size == 0 for side in size)
    require(fits, "img_size", img_size, f"height and width must be multiples of patch_size={patch_size}")
    require(num_heads >= 1 and embed_dim % num_heads == 0, "num_heads", num_heads, f"must divide embed_dim={embed_dim}")
    require(depth >= 2, "depth", depth, "must be at least 2: every second block carries MoE")
    vit = VisionTransformer(size, patch_size, 3, 0, "", embed_dim, depth, num_heads, final_norm=False)
    moecore.replace_ffn(vit, "every-2", moe, init="random")
    _share_task_embedding(vit)
    return vit


def _share_task_embedding(model: nn.Module) -> None:
    """One task embedding for all layers, as published."""
    scores = [layer.router.score for layer in model.modules() if isinstance(layer, moecore.MoE)]
    scores = [score for score in scores if isinstance(score, TaskConditionedScore)]
    for score in scores:
        score.embed = scores[0].embed
        score.embed.norm.eps = 1e-6  # that of every norm of the backbone, where torch has 1e-5


def block_outputs(model: VisionTransformer, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B N D"]]:
    """Tokens after every block, the class token first; the last entry is what `model(images)` returns."""
    outputs = model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    return [torch.cat([prefix, patches], 1) for patches, prefix in outputs]


@dataclass(frozen=True)
class Slice:
    """What a model for one task holds of the one for all tasks."""

    task: str
    experts: dict[str, list[int]]
    """Per MoE layer, the experts kept by their numbers in the whole model."""
    shares: dict[str, list[float]]
    """Per MoE layer, the share of each expert in the combine weights of all calibration tokens; {} without any."""
    tokens: int = 0
    """Calibration tokens per layer."""


class M3ViT(nn.Module):
    """Images with pixels in [0, 1] -> a prediction for every task. Normalises its input itself.

    Where a gate knows the task, the backbone runs once for each task; what comes before the first such gate is computed
    once for all of them (`m3vit.share_prefix`). Other backbones, dense ones too, run once for all tasks.

    Args:
        config: backbone, MoE layers and decoder.
        spec: size of the images, and the tasks in the order of their gates.
        backbone: None: one from the settings.
        decoder: None: one from the settings.
    """

    def __init__(
        self,
        config: ModelConfig,
        spec: SceneSpec,
        backbone: VisionTransformer | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))
        self.backbone = vit = _task_backbone(config, spec) if backbone is None else backbone
        grid = tuple(vit.patch_embed.grid_size)
        self.decoder = decoder or make_decoder(config.m3vit, spec, vit.embed_dim, len(vit.blocks), grid)
        self.slice: Slice | None = None
        """What a model for one task holds of the whole one."""

    @property
    def task_aware(self) -> bool:
        """Whether a gate knows the task, so that each task has a backbone pass of its own."""
        return self.first_task_aware_block() is not None

    def first_task_aware_block(self) -> int | None:
        """Number of the first block whose gate knows the task."""
        for number, block in enumerate(self.backbone.blocks):
            score = block.mlp.router.score if isinstance(block.mlp, moecore.MoE) else None
            if isinstance(score, (PerTaskScore, TaskConditionedScore)):
                return number
        return None

    def forward(
        self, images: Float[Tensor, "B C H W"], tasks: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "B ..."]]:
        """Predictions of the tasks asked for, of all by default: [B, channels, H, W], classification [B, classes].

        Raises:
            UserError: for a task that the model does not have.
        """
        tasks = self.spec.names if tasks is None else tuple(tasks)
        for task in tasks:
            self.refuse_unknown(task)
        if not self.task_aware:
            return self.decoder.forward_all(self._own(*self._shared(images)), tasks)
        return {task: self.decoder(features, task) for task, features in self._by_task(images, tasks)}

    def refuse_unknown(self, task: str) -> None:
        """Raise a one-line error for a task that the model does not have."""
        if task not in self.spec.names:
            raise UserError(f"task={task}: this model has {', '.join(self.spec.names)}")

    def _by_task(self, images: Tensor, tasks: Sequence[str]) -> Iterable[tuple[str, list[Float[Tensor, "B N D"]]]]:
        """Each task with the patch tokens of the blocks that its decoder reads."""
        common = self._shared(images) if self.config.m3vit.share_prefix else None
        for task in tasks:
            with moecore.routing_context(task=self.spec.names.index(task)):
                yield task, self._own(*(common or self._shared(images)))

    def features(self, images: Float[Tensor, "B C H W"], task: str) -> list[Float[Tensor, "B N D"]]:
        """What the decoder of a task reads: patch tokens of some blocks."""
        with moecore.routing_context(task=self.spec.names.index(task)):
            return self._own(*self._shared(images))

    def _shared(self, images: Tensor) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """All that does not depend on the task: up to the FFN of the first block whose gate knows it.

        Returns:
            Tokens, the same normalised for that FFN (None if no gate knows the task), and outputs of the blocks passed.
        """
        vit = self.backbone
        x = vit.patch_embed((images - self.mean) / self.std)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))  # [B, prefix + N, D]
        first = self.first_task_aware_block()
        passed = {}
        for number, block in enumerate(vit.blocks[:first]):
            x = passed[number] = block(x)
        if first is None:
            return x, None, passed
        block = vit.blocks[first]
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        return x, block.norm2(x), passed

    def _own(self, x: Tensor, normed: Tensor | None, passed: dict[int, Tensor]) -> list[Float[Tensor, "B N D"]]:
        """What is left of the backbone, for the task of the context; patch tokens of the blocks the decoder reads."""
        vit, outputs = self.backbone, dict(passed)
        if normed is not None:
            first = len(passed)
            block = vit.blocks[first]
            x = outputs[first] = x + block.drop_path2(block.ls2(block.mlp(normed)))
            for number in range(first + 1, len(vit.blocks)):
                x = outputs[number] = vit.blocks[number](x)
        return [outputs[number][:, vit.num_prefix_tokens :] for number in self.decoder.blocks]

    def for_task(
        self,
        task: str,
        batches: Iterable[Float[Tensor, "B C H W"]] | None = None,
        margin: float = 0.0,
        min_share: float = 0.0,
    ) -> M3ViT:
        """A smaller model for one task: its gates, its head, and only the experts that its gates choose.

        Args:
            task: to keep.
            batches: calibration images, on which is seen which experts the gates choose; None: all experts stay.
            margin: also keep experts whose probability came so close to that of a chosen one, on some token.
            min_share: leave out experts with a smaller share of the combine weights of all tokens than this.

        Returns:
            A model of its own, with `slice` telling what it holds. Outputs are those of the whole model on images
            whose tokens choose no expert left out; `apps.vision.models.task_slice.leaving` counts those that do.

        Raises:
            UserError: for a task that the model does not have.
        """
        from apps.vision.models.task_slice import choose_experts, slice_model

        return slice_model(self, choose_experts(self, task, batches, margin, min_share))

    def example_input(self, batch: int = 1) -> Float[Tensor, "B C H W"]:
        """Images of the right shape, for counting and benchmarks."""
        spec = self.spec
        return torch.rand(batch, spec.channels, spec.height, spec.width, device=self.mean.device)


def _task_backbone(config: ModelConfig, spec: SceneSpec) -> VisionTransformer:
    """The ViT with its MoE layers, and no norm at the end: each decoder has its own."""
    published = _published_state(config.pretrained)
    plain = config if published is None else dataclasses.replace(config, pretrained=None)
    vit = make_backbone(plain, spec.channels, (spec.height, spec.width), num_classes=0)
    fits = isinstance(vit, VisionTransformer) and all(isinstance(block, Block) for block in vit.blocks)
    require(fits, "model.backbone", config.backbone, "M³ViT takes plain vision transformers: vit_*, deit_*")
    vit.norm = vit.fc_norm = nn.Identity()
    put_moe_layers(vit, config, _moe_of_tasks(config.moe, len(spec.tasks)))
    _share_task_embedding(vit)
    if published is not None:
        load_published(vit, published)
    return vit


def _moe_of_tasks(moe: MoEConfig, num_tasks: int) -> MoEConfig:
    """The MoE layers with as many gates or task embeddings as there are tasks."""
    if moe.score not in ("per_task", "task_conditioned"):
        return moe
    given = moe.score_options.get("num_tasks", num_tasks)
    require(
        given == num_tasks, "model.moe.score_options.num_tasks", given, f"there are {num_tasks} tasks; leave it out"
    )
    return dataclasses.replace(moe, score_options={**moe.score_options, "num_tasks": num_tasks})


def _published_state(pretrained: str | None) -> dict[str, Tensor] | None:
    """The backbone's weights from a file in the published layout; None for anything else."""
    if pretrained in (None, "timm") or not Path(pretrained).is_file():
        return None
    return backbone_part(read_state(Path(pretrained)))
