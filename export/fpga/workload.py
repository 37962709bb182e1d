"""What an accelerator has to compute: a model as a list of stages with plain dimensions, in the order they run.

A workload comes from dimensions (`vit`) or from the manifest of an FPGA bundle (`from_manifest`); the resource and
latency models read nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from export.errors import ExportError

Kernel = Literal["linear", "attention"]
"""The unit a stage runs on: the array that has weights, or the one that multiplies activations with each other."""

PASSES = {"norm": 2, "softmax": 3}
"""Times each element is visited, for operations that need its row's statistics first; 1 for all others."""


@dataclass(frozen=True)
class Linear:
    """Rows times a constant matrix, with bias: `[rows, inputs] @ [inputs, outputs]`."""

    name: str
    rows: int
    inputs: int
    outputs: int

    op: ClassVar[str] = "linear"
    kernel: ClassVar[Kernel] = "linear"

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inputs * self.outputs

    @property
    def weights(self) -> int:
        """Numbers to load from external memory."""
        return (self.inputs + 1) * self.outputs

    @property
    def reads(self) -> int:
        """Activations it reads."""
        return self.rows * self.inputs

    @property
    def writes(self) -> int:
        """Activations it writes."""
        return self.rows * self.outputs


@dataclass(frozen=True)
class Conv:
    """A convolution, run as one linear layer a group over its output positions.

    `height` and `width` are of the output; `channels` and `outputs` count all groups.
    """

    name: str
    height: int
    width: int
    channels: int
    outputs: int
    kernel_height: int
    kernel_width: int
    groups: int = 1
    stride: int = 1

    op: ClassVar[str] = "conv2d"
    kernel: ClassVar[Kernel] = "linear"
    macs, weights, writes = Linear.macs, Linear.weights, Linear.writes  # of the linear layer it runs as

    @property
    def rows(self) -> int:
        """Output positions."""
        return self.height * self.width

    @property
    def inputs(self) -> int:
        """Length of the dot product of one output."""
        return self.channels // self.groups * self.kernel_height * self.kernel_width

    @property
    def reads(self) -> int:
        """Activations it reads: each pixel once, through line buffers."""
        return self.rows * self.stride**2 * self.channels

    @property
    def line_buffer(self) -> int:
        """Activations of the input rows under the window."""
        return self.kernel_height * (self.width * self.stride + self.kernel_width) * self.channels


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each active expert's weights are loaded once, then its queue of tokens is computed.

    Load is taken as even: the most experts that `tokens * top_k` slots can reach are active. `gated` experts have a
    third matrix (GLU).
    """

    name: str
    tokens: int
    top_k: int
    num_experts: int
    inputs: int
    hidden: int
    outputs: int
    gated: bool = False

    op: ClassVar[str] = "experts"
    kernel: ClassVar[Kernel] = "linear"

    @property
    def pairs(self) -> int:
        """Slots to compute: tokens times experts for each."""
        return self.tokens * self.top_k

    @property
    def active(self) -> int:
        """Experts with a token."""
        return min(self.num_experts, self.pairs)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each matrix of one expert."""
        up = (self.inputs, self.hidden)
        return (up, *([up] if self.gated else []), (self.hidden, self.outputs))

    @property
    def expert_weights(self) -> int:
        """Numbers of one expert."""
        return sum((inputs + 1) * outputs for inputs, outputs in self.matrices)

    @property
    def macs(self) -> int:
        """Multiply-adds of the active experts."""
        return self.pairs * sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def weights(self) -> int:
        """Numbers to load from external memory."""
        return self.active * self.expert_weights

    @property
    def reads(self) -> int:
        """Activations it reads: a token once for each of its experts."""
        return self.pairs * self.inputs

    @property
    def writes(self) -> int:
        """Activations it writes: an output is read back and added to for each further expert."""
        return (2 * self.pairs - self.tokens) * self.outputs


@dataclass(frozen=True)
class Matmul:
    """Activations times activations: `[batch, rows, inner] @ [batch, inner, columns]`."""

    name: str
    batch: int
    rows: int
    inner: int
    columns: int

    op: ClassVar[str] = "matmul"
    kernel: ClassVar[Kernel] = "attention"
    weights: ClassVar[int] = 0

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.batch * self.rows * self.inner * self.columns

    @property
    def right(self) -> int:
        """Activations of the operand that every row needs, of one batch entry."""
        return self.inner * self.columns

    @property
    def reads(self) -> int:
        """Activations it reads."""
        return self.batch * self.inner * (self.rows + self.columns)

    @property
    def writes(self) -> int:
        """Activations it writes."""
        return self.batch * self.rows * self.columns


@dataclass(frozen=True)
class Attention:
    """Scores, softmax and values in one stream: the matrix of scores never leaves the unit."""

    name: str
    tokens: int
    heads: int
    width: int

    op: ClassVar[str] = "attention"
    kernel: ClassVar[Kernel] = "attention"
    weights: ClassVar[int] = 0

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return 2 * self.tokens**2 * self.width

    @property
    def right(self) -> int:
        """Activations that every query needs, of one head: its keys, or its values."""
        return self.tokens * self.width // self.heads

    @property
    def reads(self) -> int:
        """Activations it reads: queries, keys and values."""
        return 3 * self.tokens * self.width

    @property
    def writes(self) -> int:
        """Activations it writes."""
        return self.tokens * self.width


@dataclass(frozen=True)
class Elementwise:
    """Anything without multiply-add arrays: norms, nonlinearities, sums, softmax, top-k, copies.

    `elements` are those of the output, each visited `passes` times.
    """

    name: str
    op: str
    elements: int
    passes: int = 1

    macs: ClassVar[int] = 0
    weights: ClassVar[int] = 0

    @property
    def kernel(self) -> Kernel:
        """Softmax sits with the attention array; all else behind the outputs of the linear one."""
        return "attention" if self.op == "softmax" else "linear"

    @property
    def reads(self) -> int:
        """Activations it reads."""
        return self.elements

    @property
    def writes(self) -> int:
        """Activations it writes."""
        return self.elements


Stage = Linear | Conv | Experts | Matmul | Attention | Elementwise


@dataclass(frozen=True)
class Workload:
    """One inference of a model: its stages, in order."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of one inference, of active experts alone."""
        return sum(stage.macs for stage in self.stages)

    @cached_property
    def shapes(self) -> dict[Stage, list[int]]:
        """Stages without their names, and where each occurs: a model repeats its blocks, a search prices them once."""
        found: dict[Stage, list[int]] = {}
        for i, stage in enumerate(self.stages):
            found.setdefault(replace(stage, name=""), []).append(i)
        return found

    def of(self, *kinds: type) -> list[Any]:
        """The shapes of some kinds."""
        return [stage for stage in self.shapes if isinstance(stage, kinds)]


def vit(
    name: str,
    *,
    tokens: int,
    width: int,
    heads: int,
    depth: int,
    hidden: int,
    patch_inputs: int = 768,
    moe_layers: Collection[int] = (),
    num_experts: int = 0,
    top_k: int = 0,
    expert_hidden: int = 0,
) -> Workload:
    """A pre-norm vision transformer, some of whose feed-forward layers are mixtures of experts.

    GELU, residual sums and the weighting of experts ride on the stage before; norms and choosing are stages.

    Args:
        name: for messages and tables.
        tokens: N, with the class token.
        width: D.
        heads: of attention.
        depth: number of blocks.
        hidden: F of the dense feed-forward layers.
        patch_inputs: numbers in a patch.
        moe_layers: blocks (from 0) with `num_experts` experts of `expert_hidden` each, `top_k` for a token.
    """
    stages: list[Stage] = [Linear("patch_embed", tokens - 1, patch_inputs, width)]
    for i in range(depth):
        block = f"blocks.{i}"
        stages += [
            Elementwise(f"{block}.norm1", "norm", tokens * width, PASSES["norm"]),
            Linear(f"{block}.qkv", tokens, width, 3 * width),
            Attention(f"{block}.attention", tokens, heads, width),
            Linear(f"{block}.proj", tokens, width, width),
            Elementwise(f"{block}.norm2", "norm", tokens * width, PASSES["norm"]),
        ]
        if i in moe_layers:
            stages += [
                Linear(f"{block}.gate", tokens, width, num_experts),
                Elementwise(f"{block}.top_k", "topk", tokens * num_experts),
                Experts(f"{block}.experts", tokens, top_k, num_experts, width, expert_hidden, width),
            ]
        else:
            stages += [Linear(f"{block}.fc1", tokens, width, hidden), Linear(f"{block}.fc2", tokens, hidden, width)]
    return Workload(name, tuple(stages))


def read_manifest(path: Path) -> dict[str, Any]:
    """A bundle's `manifest.json`.

    Raises:
        ExportError: for a file that is none.
    """
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: no manifest of a bundle ({error}); give DIR/manifest.json") from error
    if not isinstance(manifest, dict) or not manifest.get("layers"):
        raise ExportError(f"{path}: has no layers; give the manifest.json of an FPGA bundle")
    return manifest


def from_manifest(manifest: Mapping[str, Any], name: str = "model") -> Workload:
    """The workload of an FPGA bundle.

    Args:
        manifest: as `read_manifest` gives it.
        name: for messages and tables.

    Raises:
        ExportError: for a layer whose dimensions are missing.
    """
    stages = []
    for layer in manifest["layers"]:
        try:
            stages.append(_stage(layer))
        except KeyError as error:
            raise ExportError(f"layer {layer.get('name')!r} of the manifest has no {error}; export it anew") from error
    return Workload(name, tuple(stages))


def _stage(layer: Mapping[str, Any]) -> Stage:
    op, name, dims = layer["op"], layer.get("module") or layer["name"], layer["dims"]
    if op not in LAYERS:
        return Elementwise(name, op, math.prod(dims[size] for size in SIZES.get(op, ("elements",))), PASSES.get(op, 1))
    kind, sizes = LAYERS[op]
    stage = kind(name, *(dims[size] for size in sizes))
    return replace(stage, stride=layer["parameters"]["stride"][0]) if kind is Conv else stage


LAYERS: dict[str, tuple[type, tuple[str, ...]]] = {
    "linear": (Linear, ("rows", "in", "out")),
    "matmul": (Matmul, ("batch", "rows", "in", "out")),
    "conv2d": (Conv, ("height", "width", "channels", "outputs", "kernel_height", "kernel_width", "groups")),
    "experts": (Experts, ("tokens", "top_k", "experts", "in", "hidden", "out", "gated")),
}
"""A manifest's layers with multiply-adds: their stage, and its fields in order. All others are elementwise."""
SIZES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("norm", "softmax", "topk"), ("rows", "inner")),
    **dict.fromkeys(("reduce", "cumulate", "scatter_elements"), ("outer", "inner", "columns")),
    **dict.fromkeys(("gather", "gather_elements"), ("outer", "count", "columns")),
    "affine": ("outer", "channels", "inner"),
    "resize": ("channels", "out_height", "out_width"),
}
"""Of elementwise layers, the dimensions whose product is the elements visited; of all others, `elements`."""
