"""Rules for what only brings elements to other places."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from export.fpga.formats import INDEX
from export.fpga.graph import Node
from export.fpga.lower.builder import Builder, Limit
from export.fpga.ops.base import broadcast_strides, strides_of
from export.fpga.ops.moves import Concat, Gather, GatherElements, Resize, ScatterElements

WEIGHT_BITS = 15
"""Bits behind the binary point of interpolation weights."""


def lower_transpose(build: Builder, node: Node) -> None:
    """Any order of dimensions."""
    rank = len(build.shape(node.inputs[0]))
    build.transposed(node.inputs[0], node.get("perm", list(range(rank))[::-1]), node.outputs[0])


def lower_expand(build: Builder, node: Node) -> None:
    """Repetition along dimensions of size 1."""
    source, _ = build.operand(node.inputs[0])
    shape = build.shape(node.outputs[0])
    build.move(source, node.outputs[0], shape, broadcast_strides(build.shape(node.inputs[0]), shape))


def lower_tile(build: Builder, node: Node) -> None:
    """Repetition of whole blocks."""
    shape = build.shape(node.inputs[0])
    repeats = build.static(node.inputs[1]).tolist()
    source, _ = build.operand(node.inputs[0])
    sizes = [size for pair in zip(repeats, shape, strict=True) for size in pair]
    strides = [stride for own in strides_of(shape) for stride in (0, own)]
    build.move(source, node.outputs[0], sizes, strides)


def lower_slice(build: Builder, node: Node) -> None:
    """Starts and steps; ends follow from the shapes."""
    x, starts, _, *rest = node.inputs
    shape, after = build.shape(x), build.shape(node.outputs[0])
    begin = build.static(starts).tolist()
    axes = build.static(rest[0]).tolist() if rest and rest[0] else list(range(len(begin)))
    steps = build.static(rest[1]).tolist() if len(rest) > 1 and rest[1] else [1] * len(begin)
    source, _ = build.operand(x)
    strides, offset = strides_of(shape), 0
    own = list(strides)
    for axis, start, step in zip(axes, begin, steps, strict=True):
        axis %= len(shape)
        start = start + shape[axis] if start < 0 else start
        offset += own[axis] * min(max(start, 0), shape[axis] - 1 if step < 0 else shape[axis])
        strides[axis] = own[axis] * step
    build.move(source, node.outputs[0], after, strides, offset)


def lower_split(build: Builder, node: Node) -> None:
    """Consecutive parts."""
    shape = build.shape(node.inputs[0])
    axis = node.get("axis", 0) % len(shape)
    source, _ = build.operand(node.inputs[0])
    strides, start = strides_of(shape), 0
    for name in node.outputs:
        part = build.shape(name)
        build.move(source, name, part, strides, start * strides[axis])
        start += part[axis]


def lower_depth_to_space(build: Builder, node: Node) -> None:
    """Channels into blocks of pixels."""
    batch, channels, height, width = build.shape(node.inputs[0])
    block = node.get("blocksize")
    rest = channels // block**2
    if node.get("mode", "DCR") == "CRD":
        shape, order = (batch, rest, block, block, height, width), (0, 1, 4, 2, 5, 3)
    else:
        shape, order = (batch, block, block, rest, height, width), (0, 3, 4, 1, 5, 2)
    _regroup(build, node, shape, order)


def lower_space_to_depth(build: Builder, node: Node) -> None:
    """Blocks of pixels into channels."""
    batch, channels, height, width = build.shape(node.inputs[0])
    block = node.get("blocksize")
    shape = (batch, channels, height // block, block, width // block, block)
    _regroup(build, node, shape, (0, 3, 5, 1, 2, 4))


def _regroup(build: Builder, node: Node, shape: Sequence[int], order: Sequence[int]) -> None:
    source, _ = build.operand(node.inputs[0])
    strides = strides_of(shape)
    build.move(source, node.outputs[0], [shape[a] for a in order], [strides[a] for a in order])


def lower_concat(build: Builder, node: Node) -> None:
    """Side by side, in one format; that of the parts if they share one."""
    output = node.outputs[0]
    shape = build.shape(output)
    concat(build, node.inputs, node.get("axis", 0) % len(shape), output, shape)


def concat(build: Builder, names: Sequence[str], axis: int, output: str, shape: Sequence[int]) -> None:
    """A layer over tensors of the graph."""
    names = [name for name in names if math.prod(build.shape(name))]
    moving = {build.operand(name)[1] for name in names if not build.graph.is_constant(name)}
    wanted = build.result(output)
    limit = Limit.outside(wanted, build.observed(output).infinity)
    parts = [build.operand(name, wanted.fraction, limit=limit) for name in names]
    forms = {form for _, form in parts}
    result = (
        forms.pop() if len(forms) == 1 and moving else build.result(output, max(form.fraction for _, form in parts))
    )
    lengths = tuple(math.prod(build.shape(name)[axis:]) for name in names)
    shifts = tuple(build.shifted(form, result).shift for _, form in parts)
    op = Concat(math.prod(shape[:axis]), lengths, shifts, result.width, build.settings.wrap)
    build.layer(op, [codes for codes, _ in parts], output, result)


def lower_pad(build: Builder, node: Node) -> None:
    """Constants before and behind, along one dimension."""
    x, pads, value, *rest = (*node.inputs, "")[:4]
    shape, output = build.shape(x), node.outputs[0]
    axes = build.static(rest[0]).tolist() if rest and rest[0] else list(range(len(shape)))
    amounts = build.static(pads).tolist()
    before, behind = amounts[: len(axes)], amounts[len(axes) :]
    padded = [i for i in range(len(axes)) if before[i] or behind[i]]
    if node.get("mode", "constant") != "constant" or len(padded) != 1 or min(amounts) < 0:
        raise build.refuse("other than by constants along one dimension")
    fill = float(build.static(value).item()) if value else 0.0
    axis = axes[padded[0]] % len(shape)
    names = []
    for side, amount in (("before", before[padded[0]]), ("behind", behind[padded[0]])):
        block = [*shape]
        block[axis] = amount
        build.graph.constants[f"{output}.{side}"] = np.full((1, *block), fill, np.float32)
        names.append(f"{output}.{side}")
    concat(build, [names[0], x, names[1]], axis, output, build.shape(output))


def lower_gather(build: Builder, node: Node) -> None:
    """Blocks by number; numbers that are known and evenly spaced need no look-up."""
    x, index = node.inputs
    output, shape = node.outputs[0], build.shape(x)
    axis = node.get("axis", 0) % len(shape)
    source, form = build.operand(x, store="weights")
    if build.graph.is_constant(index):
        known = build.static(index).reshape(-1) % shape[axis]
        steps = np.unique(np.diff(known))
        if len(steps) <= 1:
            step = int(steps[0]) if len(steps) else 1
            strides = strides_of(shape)
            sizes = [*shape[:axis], len(known), *shape[axis + 1 :]]
            moves = [*strides[:axis], strides[axis] * step, *strides[axis + 1 :]]
            build.move(source, output, sizes, moves, int(known[0]) * strides[axis])
            return
    numbers, _ = build.operand(index)
    sizes = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), math.prod(build.shape(index)))
    build.layer(Gather(*sizes), [source, numbers], output, form)


def lower_gather_nd(build: Builder, node: Node) -> None:
    """Blocks by number of the first dimension."""
    x, index = node.inputs
    if node.get("batch_dims", 0) or build.shape(index)[-1] != 1:
        raise build.refuse(f"of {build.shape(x)} by {build.shape(index)}")
    lower_gather(build, Node("Gather", node.name, (x, index), node.outputs, {"axis": 0}, node.origin))


def lower_gather_elements(build: Builder, node: Node) -> None:
    """Single elements by number."""
    x, index = node.inputs
    sizes = _elements(build, node, x, index)
    source, form = build.operand(x)
    build.layer(GatherElements(*sizes), [source, build.operand(index)[0]], node.outputs[0], form)


def lower_scatter_elements(build: Builder, node: Node) -> None:
    """Single elements replaced or added to."""
    x, index, updates = node.inputs
    _scatter(build, node, x, build.operand(index)[0], updates, _elements(build, node, x, index))


def _scatter(build: Builder, node: Node, x: str, numbers: str, updates: str, sizes: tuple[int, int, int, int]) -> None:
    output, how = node.outputs[0], node.get("reduction", "none")
    if how not in ("none", "add"):
        raise build.refuse(f"with reduction {how}")
    wanted = build.result(output)
    limit = Limit.outside(wanted, build.observed(output).infinity)
    parts = [build.operand(name, wanted.fraction, limit=limit) for name in (x, updates)]
    result = build.result(output, max(form.fraction for _, form in parts))
    shifts = [build.shifted(form, result).shift for _, form in parts]
    op = ScatterElements(*sizes, how == "add", *shifts, result.width, build.settings.wrap)
    build.layer(op, [parts[0][0], numbers, parts[1][0]], output, result)


def lower_scatter_nd(build: Builder, node: Node) -> None:
    """Blocks replaced or added to, by number of the first dimension: the same as all of their elements."""
    x, index, updates = node.inputs
    shape = build.shape(x)
    if build.shape(index)[-1] != 1:
        raise build.refuse(f"of {shape} by {build.shape(index)}")
    count = math.prod(build.shape(index))
    every = f"{node.outputs[0]}.index"
    numbers, _ = build.operand(index)
    repeated = build.move(numbers, every, (count, math.prod(shape[1:])), (1, 0))
    _scatter(build, node, x, repeated, updates, (1, shape[0], math.prod(shape[1:]), count))


def _elements(build: Builder, node: Node, x: str, index: str) -> tuple[int, int, int, int]:
    """Outer, inner, columns, count."""
    shape, places = build.shape(x), build.shape(index)
    axis = node.get("axis", 0) % len(shape)
    if any(places[a] != shape[a] for a in range(len(shape)) if a != axis):
        raise build.refuse(f"of {shape} by {places}")
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), places[axis]


def lower_resize(build: Builder, node: Node) -> None:
    """Nearest and linear, of the last two dimensions."""
    x, output = node.inputs[0], node.outputs[0]
    shape, after = build.shape(x), build.shape(output)
    mode = node.get("mode", "nearest")
    plain = mode in ("nearest", "linear") and not node.get("antialias", 0) and len(shape) == 4
    if not plain or shape[:2] != after[:2] or node.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise build.refuse(f"({mode}) of {shape} to {after}")
    scales = build.static(node.inputs[2]).tolist() if len(node.inputs) > 2 and node.inputs[2] else None
    scales = scales if scales else [b / a for a, b in zip(shape, after, strict=True)]
    source, form = build.operand(x)
    tables = []
    for axis, name in ((2, "rows"), (3, "columns")):
        places = _places(node, shape[axis], after[axis], scales[axis])
        tables.append(build.codes(f"resize.{name}", places[None], INDEX, "tables"))
    rule = build.rule(form.fraction + 2 * WEIGHT_BITS, form)
    bits = build.accumulator(form.width + 2 * WEIGHT_BITS + 1, rule)
    op = Resize(shape[0] * shape[1], *shape[2:], *after[2:], WEIGHT_BITS, bits, rule)
    build.layer(op, [source, *tables], output, form)


def _places(node: Node, size: int, after: int, scale: float) -> np.ndarray:
    """For each of `after` places of a result: the first, the second, and the second's weight, `[3, after]`."""
    place = np.arange(after, dtype=np.float64)
    how = node.get("coordinate_transformation_mode", "half_pixel")
    if how == "align_corners":
        place = place * (size - 1) / max(after - 1, 1)
    elif how == "asymmetric":
        place = place / scale
    elif how == "pytorch_half_pixel" and after == 1:
        place = place * 0
    else:
        place = (place + 0.5) / scale - 0.5
    if node.get("mode", "nearest") == "nearest":
        rounding = {
            "floor": np.floor,
            "ceil": np.ceil,
            "round_prefer_floor": lambda x: np.ceil(x - 0.5),
            "round_prefer_ceil": lambda x: np.floor(x + 0.5),
        }[node.get("nearest_mode", "round_prefer_floor")]
        first = np.clip(rounding(place), 0, size - 1).astype(np.int64)
        return np.stack([first, first, np.zeros_like(first)])
    place = np.clip(place, 0, size - 1)
    first = np.minimum(np.floor(place).astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    weight = np.floor(np.ldexp(place - first, WEIGHT_BITS) + 0.5).astype(np.int64)
    return np.stack([first, second, weight])


RULES = {
    "Transpose": lower_transpose,
    "Expand": lower_expand,
    "Tile": lower_tile,
    "Slice": lower_slice,
    "Split": lower_split,
    "DepthToSpace": lower_depth_to_space,
    "SpaceToDepth": lower_space_to_depth,
    "Concat": lower_concat,
    "Pad": lower_pad,
    "Gather": lower_gather,
    "GatherND": lower_gather_nd,
    "ScatterND": lower_scatter_nd,
    "GatherElements": lower_gather_elements,
    "ScatterElements": lower_scatter_elements,
    "Resize": lower_resize,
}
