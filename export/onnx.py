"""ONNX files: traced, mixtures of experts lowered to a form that skips what is not chosen, checked and annotated."""

from __future__ import annotations

import glob
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.compare import ROUTING
from export.errors import ExportError
from export.lowering import lower
from export.lowering.node import read_experts
from export.trace import trace
from moecore.files import atomic_path

if TYPE_CHECKING:
    import onnx

__all__ = ["ExportError", "export_onnx", "save", "trace"]

LARGEST = 2_000_000_000
"""Bytes that one ONNX file holds, a little less than the 2 GiB of a protocol buffer; weights beyond go beside it."""


def export_onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: Path,
    input_name: str | Sequence[str] = "input",
    output_name: str | Sequence[str] = "output",
    metadata: Mapping[str, Any] | None = None,
    dynamic_shapes: tuple[Any, ...] | None = None,
    experts: str = "sparse",
) -> Path:
    """Write a model as one ONNX file.

    Args:
        model: put into eval mode.
        example: an input with at least two samples, or one tensor for each of several inputs.
        path: of the file; written whole or not at all.
        input_name: name of the input, or of each.
        output_name: name of the output, or of each.
        metadata: plain data kept in the file (`custom_metadata_map` in onnxruntime), values other than strings as
            JSON.
        dynamic_shapes: of each input the dimensions that may vary, as `torch.export` takes them; None: the first of
            every input, the batch.
        experts: form of the mixtures, a name of `export.lowering.LOWERINGS`; or "auto", the one that runs the example
            fastest here.

    Raises:
        ExportError: for a model that sees the whole batch at once even in eval mode, or has no ONNX form.
    """
    inputs = (example,) if isinstance(example, Tensor) else example
    shapes = dynamic_shapes or varying(inputs)
    proto = trace(model, inputs, _names(input_name), _names(output_name), shapes)
    if experts == "auto":
        from export.auto import fastest

        experts = fastest(proto, [each.numpy() for each in inputs])
    return save(lower(proto, experts), path, {**(metadata or {}), **routing(proto), "experts": experts})


def varying(inputs: Sequence[Tensor]) -> tuple[dict[int, Any], ...]:
    """The batch, first dimension of every input, may be any."""
    return tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)


def routing(proto: onnx.ModelProto) -> dict[str, Any]:
    """What the metadata says of the mixtures of a traced graph: see `export.compare.ROUTING`."""
    layers = [
        {"layer": one.layer, "expert": one.expert, "weight": one.weight, "num_experts": one.num_experts}
        for one in read_experts(proto)
    ]
    return {ROUTING: layers} if layers else {}


def save(proto: onnx.ModelProto, path: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Check a graph, annotate it and write it, whole or not at all.

    Args:
        proto: without opaque nodes.
        path: of the file; weights of over 2 GB go into a second file beside it, `<name>.<mark>.data`.
        metadata: plain data, values other than strings as JSON; added to what is there.
    """
    import onnx

    known = {entry.key: entry for entry in proto.metadata_props}
    for key, value in (metadata or {}).items():
        entry = known.get(key) or proto.metadata_props.add(key=key)
        entry.value = value if isinstance(value, str) else json.dumps(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    large = sum(len(one.raw_data) for one in proto.graph.initializer) > LARGEST
    if not large:
        onnx.checker.check_model(proto, full_check=True)
    with atomic_path(path) as temporary:
        if large:
            beside = f"{path.name}.{uuid.uuid4().hex[:8]}.data"  # never that of the file before
            onnx.save_model(proto, temporary, save_as_external_data=True, location=beside)
            onnx.checker.check_model(str(temporary), full_check=True)
        else:
            onnx.save_model(proto, temporary)
    return path


def place(made: Path, path: Path) -> None:
    """Give a finished file, and the weights beside it, the place of another.

    Args:
        made: in a folder of its own on the same file system, by the name that it shall have.
        path: where it goes; weights of the file that was there are deleted.
    """
    stale = set(path.parent.glob(f"{glob.escape(path.name)}.*.data"))
    for weights in made.parent.glob(f"{glob.escape(made.name)}.*.data"):
        os.replace(weights, path.with_name(weights.name))
    os.replace(made, path)
    for weights in stale:
        weights.unlink()


def file_bytes(path: Path) -> int:
    """Size of a file with the weights beside it."""
    beside = path.parent.glob(f"{glob.escape(path.name)}.*.data")
    return sum(one.stat().st_size for one in (path, *beside))


def _names(name: str | Sequence[str]) -> list[str]:
    return [name] if isinstance(name, str) else list(name)
