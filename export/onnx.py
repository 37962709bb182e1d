"""ONNX: every MoE layer in its dense form (all experts, static shapes), dynamic batch, checked and annotated."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moecore
from moecore.files import atomic_path

OPSET = 20
"""Has Gelu natively; onnxruntime from 1.17 on runs it."""
IR_VERSION = 10


class ExportError(Exception):
    """A model that cannot take the form asked for; one line that says why and what can."""


def export_onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: Path,
    input_name: str | Sequence[str] = "input",
    output_name: str | Sequence[str] = "output",
    metadata: Mapping[str, Any] | None = None,
    dynamic_shapes: tuple[dict[int, Any], ...] | None = None,
) -> Path:
    """Write a model as one ONNX file.

    Args:
        model: put into eval mode; its MoE layers are traced in the dense form.
        example: an input with at least two samples, or one tensor for each of several inputs.
        path: of the file; written whole or not at all.
        input_name: name of the input, or of each.
        output_name: name of the output, or of each.
        metadata: plain data kept in the file (`custom_metadata_map` in onnxruntime), values other than strings as
            JSON.
        dynamic_shapes: of each input the dimensions that may vary, as `torch.export` takes them; None: the first of
            every input, the batch.

    Raises:
        ExportError: for a model that sees the whole batch at once even in eval mode, or has no ONNX form.
    """
    import onnx

    _refuse_batch_routing(model)
    model.eval()
    inputs = (example,) if isinstance(example, Tensor) else example
    shapes = dynamic_shapes or tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    proto = _trace(model, inputs, _names(input_name), _names(output_name), shapes).model_proto
    proto.ir_version = IR_VERSION
    for key, value in (metadata or {}).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(proto, full_check=True)
    with atomic_path(path) as temporary:
        onnx.save_model(proto, temporary)
    return path


def _names(name: str | Sequence[str]) -> list[str]:
    return [name] if isinstance(name, str) else list(name)


def _trace(
    model: nn.Module, inputs: tuple[Tensor, ...], input_names: list[str], output_names: list[str], shapes: tuple
) -> torch.onnx.ONNXProgram:
    # A context, for routers that hand on state: the exporter passes by the hook that opens one in eager mode.
    context = contextlib.nullcontext() if moecore.current_context() else moecore.routing_context()
    with warnings.catch_warnings(), context:
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            return torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise ExportError(f"this model has no ONNX form ({str(cause).strip().splitlines()[0]})") from error


def _refuse_batch_routing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, moecore.MoE) and getattr(module.router.select, "eval_sees_batch", False):
            raise ExportError(
                f"{name}: routes by the whole batch (expert choice with eval_sees_batch); "
                "set eval_sees_batch to false for the per-token form"
            )
