"""Export of M³ViT for its published FPGA accelerator, Edge-MoE."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

import moecore
from apps.errors import UserError
from apps.vision.arguments import Export
from apps.vision.models.m3vit import M3ViT
from apps.vision.models.m3vit_weights import to_published
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.deploy import calibration_images
from apps.vision.multitask.loading import Trained
from export.edge_moe import ACCELERATOR, Backbone, Outputs, moe_settings, require_settings
from export.edge_moe import export_edge_moe as write_edge_moe
from export.errors import ExportError
from moecore.activations import resolve_activation
from moecore.errors import ConfigError


def export_edge_moe(
    trained: Trained, data: MultiTaskData, path: Path, args: Export, rescale: bool = False
) -> dict[str, float]:
    """Write the accelerator's folder from the backbone, compared with PyTorch on training images.

    Args:
        trained: a run of all tasks.
        data: gives the calibration images, the first of which becomes the golden one.
        path: of the folder; written whole or not at all.
        args: `task` is the one whose golden activation the accelerator's testbench compares, `calibration` the number
            of images.
        rescale: move powers of two between weights where one is too large for its type.

    Returns:
        Figures of the comparison, of simulated fixed point, and of the headroom of its types.

    Raises:
        UserError: if the model is no M³ViT of the accelerator's sizes, or has values outside its types; a folder from
            before then stays as it is.
    """
    if trained.model.slice is not None:
        raise UserError(f"ckpt_path={trained.path}: holds {trained.model.slice.task} alone; give the run of all tasks")
    if args.task is not None:
        trained.model.refuse_unknown(args.task)
    model = copy.deepcopy(trained.model).cpu().eval()
    _refuse_other_blocks(model)
    try:
        settings = backbone_settings(model)
        require_settings(settings)  # before its weights are asked for names, and images made
        weights = to_published(model.backbone)
        backbone = Backbone(weights, settings, model.spec.mean, model.spec.std, model.spec.names, _outputs_of(model))
        return write_edge_moe(backbone, _calibration_bytes(data, args.calibration), path, args.task, rescale)
    except (ExportError, ConfigError) as error:
        raise UserError(f"export: {error}") from error


def _refuse_other_blocks(model: M3ViT) -> None:
    last = len(model.backbone.blocks) - 1
    if tuple(model.decoder.blocks) != (last,):
        read = ", ".join(map(str, model.decoder.blocks))
        raise UserError(
            f"model.m3vit.decoder={model.config.m3vit.decoder}: reads blocks {read}, where the accelerator gives out "
            f"block {last} alone; train with decoder light, or export as onnx"
        )


def backbone_settings(model: M3ViT) -> dict[str, Any]:
    """What the accelerator has compiled in, as this model has it: names of `export.edge_moe.ACCELERATOR`."""
    vit, spec = model.backbone, model.spec
    embed = vit.patch_embed
    moe_layers = {number: block.mlp for number, block in enumerate(vit.blocks) if isinstance(block.mlp, moecore.MoE)}
    return {
        "image_size": (spec.channels, spec.height, spec.width),
        "patch_size": embed.patch_size[0] if type(embed) is PatchEmbed else type(embed).__name__,
        "tokens": embed.num_patches + vit.num_prefix_tokens,
        "class_token": vit.cls_token is not None,
        "width": vit.embed_dim,
        "layers": len(vit.blocks),
        "moe_layers": tuple(moe_layers),
        "final_norm": not isinstance(vit.norm, nn.Identity),
    } | _differing([_block_settings(block) for block in vit.blocks] + [*map(moe_settings, moe_layers.values())])


def _block_settings(block: nn.Module) -> dict[str, Any]:
    """Of attention, norms and, where a block has one, its FFN."""
    attention, norm = block.attn, block.norm1
    found = {
        "heads": attention.num_heads,
        "attention_scale": attention.scale,
        "qkv_bias": attention.qkv.bias is not None,
        "norm_eps": norm.eps if type(norm).__name__.startswith("LayerNorm") else type(norm).__name__,
    }
    if isinstance(block.mlp, moecore.MoE):
        return found
    if type(block.mlp) is not Mlp:
        return found | {"activation": type(block.mlp).__name__}
    activation = resolve_activation(block.mlp.act)[0] or type(block.mlp.act).__name__
    return found | {"dense_hidden": block.mlp.fc1.out_features, "activation": activation}


def _differing(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings of all layers in one: where one differs from what the accelerator takes, its value."""
    found: dict[str, Any] = {}
    for layer in layers:
        found |= {name: value for name, value in layer.items() if name not in found or value != ACCELERATOR[name]}
    return found


def _outputs_of(model: M3ViT) -> Outputs:
    """Bytes of images and the number of a task -> the backbone's last tokens."""

    def outputs(images: UInt8[Tensor, "B 3 H W"], task: int) -> Float[Tensor, "B N D"]:
        with moecore.routing_context(task=task):
            return model.backbone.forward_features((images / 255 - model.mean) / model.std)

    return outputs


def _calibration_bytes(data: MultiTaskData, count: int) -> UInt8[Tensor, "B 3 H W"]:
    """Calibration images as the bytes that they were read as."""
    return torch.cat([(images * 255).round().to(torch.uint8) for images in calibration_images(data, count)])
