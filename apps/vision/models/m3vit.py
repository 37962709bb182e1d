"""M³ViT's backbone: a vision transformer for several tasks, whose odd blocks are MoE layers gated by task.

Fan et al., "M³ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning", arXiv 2210.14793. Here is
the encoder alone: decoders read the tokens of its last block, or of several (`block_outputs`). The task reaches the
gates through `moecore.routing_context(task=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import moecore
from apps.errors import UserError
from moecore.config import MoEConfig
from moecore.errors import ConfigError, choice, require
from moecore.scores_conditioned import TaskConditionedScore

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


def to_published(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights under the names and in the layouts of the published code.

    Dense parts go by timm's names. An MoE layer has `mlp.gate.{task}.w_gate`, `[D, E]`, or `mlp.gate.w_gate`, `[D, E]`
    or `[D + G, E]` with a task embedding; `mlp.experts.htoh4` and `.h4toh`, `[E, F, D]` and `[E, D, F]` with biases.
    The task embedding is `gate_task_represent`.

    Raises:
        ConfigError: if the model holds a weight that has no published name.
    """
    return {name: view.clone(memory_format=torch.contiguous_format) for name, view in _published_views(model).items()}


@torch.no_grad()
def load_published(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into the model; see `to_published` for their names.

    Raises:
        UserError: for a weight that is missing, unexpected or of another shape; the model is then as it was.
        ConfigError: if the model holds a weight that has no published name.
    """
    views = _published_views(model)
    for problem, names in (
        ("is missing", [name for name in views if name not in state]),
        ("is no weight of this model", [name for name in state if name not in views]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"published weights: {names[0]} {problem}{more}")
    for name, view in views.items():
        if state[name].shape != view.shape:
            theirs, ours = tuple(state[name].shape), tuple(view.shape)
            raise UserError(f"published weights: {name} has shape {theirs}, where this model takes {ours}")
    for name, view in views.items():
        view.copy_(state[name])


_EXPERTS = {
    "experts.up": "experts.htoh4.weight",
    "experts.up_bias": "experts.htoh4.bias",
    "experts.down": "experts.h4toh.weight",
    "experts.down_bias": "experts.h4toh.bias",
}
"""Weights of a layer's experts, by our names, and the published ones; the layouts are the same."""
_GATE, _EMBEDDING = "router.score.weight", "router.score.embed."


def _published_views(model: nn.Module) -> dict[str, Tensor]:
    """Published name -> view of the model's own weight in the published layout: to copy from, and to copy into."""
    layers = [name for name, module in model.named_modules() if isinstance(module, moecore.MoE)]
    views: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        part = name if layer is None else name.removeprefix(f"{layer}.")
        if layer is None:
            views[name] = weight
        elif part in _EXPERTS:
            views[f"{layer}.{_EXPERTS[part]}"] = weight
        elif part == _GATE and weight.dim() == 3:
            views |= {f"{layer}.gate.{task}.w_gate": gate.t() for task, gate in enumerate(weight)}  # [D, E] each
        elif part == _GATE:
            views[f"{layer}.gate.w_gate"] = weight.t()  # [D, E]
        elif part.startswith(_EMBEDDING):  # one for all layers, which each of them lists
            views[f"gate_task_represent.{part.removeprefix(_EMBEDDING)}"] = weight
        else:
            raise ConfigError("model", name, "has no published name; build the layers with m3vit_moe")
    return views
