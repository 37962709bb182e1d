"""The accelerator's schedule, in any arithmetic: all tokens are gated, then each expert works through its queue.

A task is switched by reading other gates. From the description of Edge-MoE (arXiv 2305.18691).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from export.edge_moe.arithmetic import Arithmetic
from export.edge_moe.layout import LAYERS, MOE_LAYERS, D, E, gate_name
from export.edge_moe.settings import ACCELERATOR

HEADS, SCALE, EPS = (ACCELERATOR[name] for name in ("heads", "attention_scale", "norm_eps"))


@dataclass(frozen=True)
class Queues:
    """The tokens of each expert with their scores, one queue behind the other."""

    token: np.ndarray
    """[P], ascending within an expert."""
    score: np.ndarray
    """[P]."""
    offset: np.ndarray
    """[E + 1]: expert e has the entries from offset[e] up to offset[e + 1]."""

    @property
    def order(self) -> list[int]:
        """Experts that have tokens, in the order in which their weights are loaded."""
        return np.flatnonzero(np.diff(self.offset)).tolist()

    def of(self, expert: int) -> slice:
        """Entries of an expert."""
        return slice(self.offset[expert], self.offset[expert + 1])


@dataclass
class Trace:
    """What a run of the schedule leaves."""

    gap: np.ndarray
    """[B] smallest difference of a last chosen and a first unchosen probability, over layers and tokens."""
    activations: dict[str, np.ndarray] = field(default_factory=dict)
    """The residual stream `[B, N, D]` behind the patch embedding and each half of each layer."""
    queues: dict[int, Queues] = field(default_factory=dict)
    """Of each MoE layer; tokens are numbered through the batch."""


def run(numbers: Arithmetic, pixels: np.ndarray, task: int) -> Trace:
    """Run the whole backbone.

    Args:
        numbers: tensors and how activations are kept.
        pixels: `[B, 3, H, W]`, bytes / 256.
        task: number of the gates.
    """
    trace = Trace(gap=np.full(len(pixels), np.inf))
    x = trace.activations["x_post_patch_embed"] = _embedded(numbers, pixels)
    for i in range(LAYERS):
        x = trace.activations[f"l{i}_x_post_attn"] = _attention(numbers, x, i)
        z = _norm(numbers, x, f"l{i}_norm2")
        name = f"l{i}_x_post_{'moe' if i in MOE_LAYERS else 'mlp'}"
        change = _experts(numbers, z, i, task, trace) if i in MOE_LAYERS else _dense(numbers, z, i)
        x = trace.activations[name] = numbers.activation(name, x + change)
    return trace


def _embedded(numbers: Arithmetic, pixels: np.ndarray) -> np.ndarray:
    """Pixels -> tokens `[B, N, D]`; row 0 of the positions is the class token with its own."""
    weight, positions = numbers.weight("patch_embed_weight"), numbers.weight("pos_embed")
    batch, channels, height, width = pixels.shape
    side = weight.shape[-1]
    patches = pixels.reshape(batch, channels, height // side, side, width // side, side)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)  # [B, N - 1, C P P]
    embedded = patches @ weight.reshape(D, -1).T + numbers.weight("patch_embed_bias")
    embedded = numbers.activation("patch_embed", embedded)
    first = np.broadcast_to(positions[0], (batch, 1, D))
    return numbers.activation("x_post_patch_embed", np.concatenate([first, embedded + positions[1:]], 1))  # [B, N, D]


def _linear(numbers: Arithmetic, x: np.ndarray, name: str) -> np.ndarray:
    result = x @ numbers.weight(f"{name}_weight").T + numbers.weight(f"{name}_bias")
    return numbers.activation(name, result)


def _norm(numbers: Arithmetic, x: np.ndarray, name: str) -> np.ndarray:
    """Layer norm; mean, variance and root are not rounded, only the result is."""
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPS)
    return numbers.activation(name, normed * numbers.weight(f"{name}_weight") + numbers.weight(f"{name}_bias"))


def _softmax(numbers: Arithmetic, scores: np.ndarray, name: str) -> np.ndarray:
    powers = numbers.activation(f"{name}_exp", np.exp(scores - scores.max(-1, keepdims=True)))
    return numbers.activation(name, powers / powers.sum(-1, keepdims=True))


def _attention(numbers: Arithmetic, x: np.ndarray, layer: int) -> np.ndarray:
    batch, tokens, width = x.shape
    qkv = _linear(numbers, _norm(numbers, x, f"l{layer}_norm1"), f"l{layer}_qkv")  # [B, N, 3 D]
    q, k, v = qkv.reshape(batch, tokens, 3, HEADS, width // HEADS).transpose(2, 0, 3, 1, 4)  # [B, heads, N, D / heads]
    scores = numbers.activation(f"l{layer}_attn_scores", q @ k.swapaxes(-1, -2) * SCALE)
    mixed = _softmax(numbers, scores, f"l{layer}_attn_softmax") @ v
    mixed = numbers.activation(f"l{layer}_attn", mixed.swapaxes(1, 2).reshape(x.shape))
    return numbers.activation(f"l{layer}_x_post_attn", x + _linear(numbers, mixed, f"l{layer}_attn_proj"))


def _dense(numbers: Arithmetic, z: np.ndarray, layer: int) -> np.ndarray:
    hidden = numbers.gelu(_linear(numbers, z, f"l{layer}_fc1"))
    return _linear(numbers, hidden, f"l{layer}_fc2")


def _experts(numbers: Arithmetic, z: np.ndarray, layer: int, task: int, trace: Trace) -> np.ndarray:
    """Gate all tokens, then load each expert that has any once, and add up what it gives."""
    rows = z.reshape(-1, D)  # [T, D]
    scores = numbers.activation(f"l{layer}_gate", rows @ numbers.weight(gate_name(layer, task)).T)
    probs = _softmax(numbers, scores, f"l{layer}_gate_softmax")  # [T, E]
    queues, gap = queue_tokens(probs)
    trace.queues[layer] = queues
    trace.gap = np.minimum(trace.gap, gap.reshape(len(z), -1).min(1))
    up, up_bias, down, down_bias = (
        numbers.weight(f"l{layer}_{name}") for name in ("htoh4_weight", "htoh4_bias", "h4toh_weight", "h4toh_bias")
    )
    total = np.zeros_like(rows)
    for expert in queues.order:
        entries = queues.of(expert)
        token = queues.token[entries]
        hidden = numbers.activation(f"l{layer}_htoh4", rows[token] @ up[expert].T + up_bias[expert])
        given = numbers.activation(f"l{layer}_h4toh", numbers.gelu(hidden) @ down[expert].T + down_bias[expert])
        total[token] += numbers.activation(f"l{layer}_h4toh_scored", given * queues.score[entries, None])
    return numbers.activation(f"l{layer}_moe", total).reshape(z.shape)


def queue_tokens(probs: np.ndarray) -> tuple[Queues, np.ndarray]:
    """Queue each token, in order, with its best experts; of equal probabilities the lower number wins.

    Args:
        probs: `[T, E]`.

    Returns:
        The queues, and `[T]` by how much the last chosen is ahead of the first not chosen.
    """
    k = ACCELERATOR["top_k"]
    best = np.argsort(-probs, axis=-1, kind="stable")[:, : k + 1]
    ahead = np.take_along_axis(probs, best[:, k - 1 :], 1)  # [T, 2]
    chosen = best[:, :k]
    expert, score = chosen.reshape(-1), np.take_along_axis(probs, chosen, 1).reshape(-1)
    place = np.argsort(expert, kind="stable")  # tokens stay ascending within an expert
    offset = np.concatenate([[0], np.cumsum(np.bincount(expert, minlength=E))])
    return Queues(place // k, score[place], offset), ahead[:, 0] - ahead[:, 1]
