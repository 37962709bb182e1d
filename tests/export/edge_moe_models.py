"""Models of the accelerator's sizes, in which every weight counts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import moecore
from apps.vision.models.m3vit import m3vit_backbone, m3vit_moe
from apps.vision.models.m3vit_weights import to_published
from export.edge_moe import Backbone

TASKS = ("semseg", "depth")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = (128, 256)


def make_model(gate: str = "multi") -> nn.Module:
    """Norms, biases and gates far from where they start, so that each of them counts."""
    torch.manual_seed(0)
    model = m3vit_backbone(m3vit_moe(gate, len(TASKS), 16, 2), SIZE, embed_dim=192, num_heads=3).eval()
    for name, value in model.named_parameters():
        if name.endswith(("bias", "cls_token", "pos_embed")):
            nn.init.normal_(value, std=0.2)
        elif "norm" in name:
            nn.init.uniform_(value, 0.5, 1.5)
        elif "score" in name:
            nn.init.normal_(value, std=0.3)
    return model


def of(model: nn.Module, **changes: object) -> Backbone:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def outputs(images: Tensor, task: int) -> Tensor:
        with moecore.routing_context(task=task):
            return model.forward_features((images / 255 - mean) / std)

    return dataclasses.replace(Backbone(to_published(model), {}, MEAN, STD, TASKS, outputs), **changes)
