"""Powers of two moved between weights, so that ranges fit the accelerator's types and the model means the same.

Moved is only what has to be, and never so far that the other side leaves its range:

- channels of a norm's weight and bias, and columns of the linear maps that read it;
- rows of the queries and of the keys, whose product is all that counts;
- rows of the values, and columns of the projection that reads their mixture;
- the residual stream as a whole, if what writes to it is still too large: every norm that reads it takes the factor
  out again. The output of the backbone is then smaller by the same factor.

The first three change no digit. The last is exact but for the 1e-6 that norms add to the variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from export.edge_moe.fixed import Fixed
from export.edge_moe.layout import LAYERS, MOE_LAYERS, D, Tensors, gate_name

Part = tuple[np.ndarray, Fixed]
"""A view of a tensor whose last dimension is the one that exponents are for, and the tensor's type."""
STREAM = ("attn_proj_weight", "attn_proj_bias", "fc2_weight", "fc2_bias", "h4toh_weight", "h4toh_bias")
"""What each layer adds to the residual stream with."""


@dataclass(frozen=True)
class Rescaled:
    """Tensors that mean the same."""

    tensors: Tensors
    moved: dict[str, int]
    """Pair -> how many of its channels were changed."""
    output_exponent: int
    """The backbone's output is 2 to this power times what it was."""


def rescaled(tensors: Tensors, formats: Mapping[str, Fixed], num_tasks: int) -> Rescaled:
    """Tensors that mean the same, within their types as far as moves allow."""
    changed = {name: value.copy() for name, value in tensors.items()}
    moved = {}

    def part(name: str, view: Callable[[np.ndarray], np.ndarray] = lambda value: value) -> Part:
        return view(changed[name]), formats[name]

    for layer in range(LAYERS):
        for title, first, second in _pairs(layer, num_tasks, part):
            count = _balance(first, second)
            moved |= {title: count} if count else {}
    return Rescaled(changed, moved, -_shrink_stream(changed, formats))


def _pairs(layer: int, num_tasks: int, part: Callable[..., Part]) -> list[tuple[str, list[Part], list[Part]]]:
    """Pairs of a layer whose channels may trade factors: title, the one side, the other side.

    Rows come before columns, as both change the weight of queries, keys and values.
    """
    at = f"l{layer}_"

    def rows(start: int) -> list[Part]:
        span = slice(start, start + D)
        return [part(f"{at}qkv_weight", lambda value: value[span].T), part(f"{at}qkv_bias", lambda value: value[span])]

    def norm(number: int) -> list[Part]:
        return [part(f"{at}norm{number}_{name}") for name in ("weight", "bias")]

    gates = [gate_name(layer, task) for task in range(num_tasks)]
    readers = [f"{at}htoh4_weight", *gates] if layer in MOE_LAYERS else [f"{at}fc1_weight"]
    return [
        (f"{at}query, {at}key", rows(0), rows(D)),
        (f"{at}value, {at}attn_proj", rows(2 * D), [part(f"{at}attn_proj_weight")]),
        (f"{at}norm1, {at}qkv", norm(1), [part(f"{at}qkv_weight")]),
        (f"{at}norm2, {', '.join(readers)}", norm(2), [part(name) for name in readers]),
    ]


def _excess(parts: list[Part]) -> np.ndarray:
    """Per channel, by how many powers of two the parts are too large; negative where there is room."""
    largest = [fixed.excess(np.abs(view).reshape(-1, view.shape[-1]).max(0)) for view, fixed in parts]
    return np.maximum.reduce(largest)


def _balance(first: list[Part], second: list[Part]) -> int:
    """Move factors between two sides where one is too large and the other has room; returns how many channels."""
    down, room = _excess(first), -_excess(second)
    exponent = np.where(down <= room, np.clip(0, down, room), 0)  # [channels] where it cannot fit it stays
    for view, _ in first:
        view *= np.exp2(-exponent).astype(np.float32)
    for view, _ in second:
        view *= np.exp2(exponent).astype(np.float32)
    return int(np.count_nonzero(exponent))


def _shrink_stream(tensors: Tensors, formats: Mapping[str, Fixed]) -> int:
    """Scale all that is added up in the residual stream so that it fits; returns the exponent taken out."""
    names = ["patch_embed_weight", "patch_embed_bias", "pos_embed"]
    names += [f"l{layer}_{name}" for layer in range(LAYERS) for name in STREAM if f"l{layer}_{name}" in tensors]
    exponent = max(0, *(int(formats[name].excess(np.abs(tensors[name]).max())) for name in names))
    for name in names if exponent else ():
        tensors[name] *= np.float32(2.0**-exponent)
    return exponent
