"""What an accelerator's folder means: the backbone written anew in float64, reading nothing but its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

D, TOKENS, EXPERTS, HEADS, EPS = 192, 129, 16, 3, 1e-6
LAYER = {
    "norm1_weight": (192,),
    "norm1_bias": (192,),
    "qkv_weight": (576, 192),
    "qkv_bias": (576,),
    "attn_proj_weight": (192, 192),
    "attn_proj_bias": (192,),
    "norm2_weight": (192,),
    "norm2_bias": (192,),
}
DENSE = {"fc1_weight": (768, 192), "fc1_bias": (768,), "fc2_weight": (192, 768), "fc2_bias": (192,)}
MOE = {
    "htoh4_weight": (16, 384, 192),
    "htoh4_bias": (16, 384),
    "h4toh_weight": (16, 192, 384),
    "h4toh_bias": (16, 192),
}


def shapes(tasks: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that the kernels read, the image and the golden activation, by the name of its file."""
    found = {
        "patch_embed_weight": (192, 3, 16, 16),
        "patch_embed_bias": (192,),
        "pos_embed": (129, 192),
        "image": (3, 128, 256),
        "l11_x_post_moe": (129, 192),
    }
    for layer in range(12):
        found |= {f"l{layer}_{name}": shape for name, shape in (LAYER | (MOE if layer % 2 else DENSE)).items()}
        if layer % 2:
            found |= {f"l{layer}_w_gate_T_task{task}": (16, 192) for task in range(tasks)}
    return found


def read(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """A file as float64; its size must be that of the shape."""
    return torch.from_numpy(np.fromfile(folder / f"{name}.float32.bin", "<f4").reshape(shape)).double()


def run(folder: Path, task: int) -> dict[str, Tensor]:
    """The residual stream behind each layer, and each layer's combine weights, for the folder's image."""
    w = {name: read(folder, name, shape) for name, shape in shapes(task + 1).items()}
    patches = F.conv2d(w["image"][None], w["patch_embed_weight"], w["patch_embed_bias"], stride=16)  # [1, D, 8, 16]
    x = torch.cat([torch.zeros(1, D), patches[0].flatten(1).T]) + w["pos_embed"]  # [N, D]
    found = {}
    for i in range(12):
        z = F.layer_norm(x, (D,), w[f"l{i}_norm1_weight"], w[f"l{i}_norm1_bias"], EPS)
        q, k, v = (z @ w[f"l{i}_qkv_weight"].T + w[f"l{i}_qkv_bias"]).chunk(3, 1)  # [N, D] each
        heads = [part.unflatten(1, (HEADS, 64)).transpose(0, 1)[None] for part in (q, k, v)]  # [1, heads, N, 64]
        mixed = F.scaled_dot_product_attention(*heads, scale=0.125)[0].transpose(0, 1).flatten(1)
        x = x + mixed @ w[f"l{i}_attn_proj_weight"].T + w[f"l{i}_attn_proj_bias"]
        z = F.layer_norm(x, (D,), w[f"l{i}_norm2_weight"], w[f"l{i}_norm2_bias"], EPS)
        if i % 2:
            found[f"l{i}_combine"] = combine = combine_weights(z, w[f"l{i}_w_gate_T_task{task}"])
            hidden = F.gelu(torch.einsum("td,efd->tef", z, w[f"l{i}_htoh4_weight"]) + w[f"l{i}_htoh4_bias"])
            given = torch.einsum("tef,edf->ted", hidden, w[f"l{i}_h4toh_weight"]) + w[f"l{i}_h4toh_bias"]
            x = x + torch.einsum("te,ted->td", combine, given)
        else:
            hidden = F.gelu(z @ w[f"l{i}_fc1_weight"].T + w[f"l{i}_fc1_bias"])
            x = x + hidden @ w[f"l{i}_fc2_weight"].T + w[f"l{i}_fc2_bias"]
        found[f"l{i}"] = x
    return found


def combine_weights(z: Tensor, gate: Tensor) -> Tensor:
    """[T, D] -> [T, E]: softmax over all experts, of which the two largest are left as they are."""
    probs = (z @ gate.T).softmax(1)
    return torch.where(probs >= probs.topk(2).values[:, 1:], probs, 0)
