"""From a PyTorch model to an ONNX graph in which every mixture of experts is one opaque node."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import moecore
from export.errors import ExportError
from export.lowering.node import LAYER, run_opaque
from moecore.errors import ConfigError
from moecore.executors import traced_with

if TYPE_CHECKING:
    import onnx

OPSET = 20
"""Has Gelu natively; onnxruntime from 1.17 on runs it."""
_OUTPUT = "moecore_output_"
IR_VERSION = 10
"""What onnxruntime from 1.18 on reads; onnx itself writes newer ones than any onnxruntime takes."""


def trace(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...] | None = None,
) -> onnx.ModelProto:
    """The graph of a model in eval mode.

    Modules that offer `for_export()` are swapped for what it returns while the model is traced.

    Args:
        model: put into eval mode.
        example: an input, or one for each of several inputs; sizes that vary must be at least 2 in it.
        input_names: a name for each input.
        output_names: a name for each output.
        dynamic_shapes: of each input the dimensions that may vary, as `torch.export` takes them; None: all are fixed.

    Returns:
        The graph, with nodes `moecore::Experts` (see `export.lowering`), each node annotated with its module.

    Raises:
        ExportError: if a module has no exported form.
    """
    model.eval()
    inputs = (example,) if isinstance(example, Tensor) else example
    # A context, for routers that hand on state: the exporter passes by the hook that opens one in eager mode.
    context = contextlib.nullcontext() if moecore.current_context() else moecore.routing_context()
    with _static_form(model), context, traced_with(run_opaque), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=[f"{_OUTPUT}{i}" for i in range(len(output_names))],
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise ExportError(f"this model has no ONNX form ({str(cause).strip().splitlines()[0]})") from error
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    _name_outputs(proto, output_names)
    _annotate(proto)
    return proto


@contextlib.contextmanager
def _static_form(model: nn.Module) -> Iterator[None]:
    """Modules that offer `for_export()` swapped for what it returns."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, module in list(model.named_modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "for_export"):
                    setattr(module, name, _exported(f"{path}.{name}".lstrip("."), child).train(child.training))
                    swapped.append((module, name, child))
        yield
    finally:
        for module, name, child in swapped:
            setattr(module, name, child)


def _exported(path: str, module: nn.Module) -> nn.Module:
    try:
        return module.for_export()
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error


def _name_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Outputs by their names, and inner values that had such a name by another; the exporter lets the two collide."""
    renamed = {name: f"inner_{name}" for name in names} | {f"{_OUTPUT}{i}": name for i, name in enumerate(names)}
    graph = proto.graph
    taken = {one.name for one in graph.input}
    if collide := taken.intersection(names):
        raise ExportError(f"output_names: {', '.join(sorted(collide))} is an input; give another name")
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [renamed.get(name, name) for name in field]
    for one in (*graph.output, *graph.initializer, *graph.value_info):
        one.name = renamed.get(one.name, one.name)


def _annotate(proto: onnx.ModelProto) -> None:
    """The module of every node in place of what the exporter notes, which quotes source files."""
    for node in proto.graph.node:
        scopes = next((one.value for one in node.metadata_props if one.key.endswith("name_scopes")), "[]")
        layers = ast.literal_eval(scopes)[:-1]  # the last is the operator
        del node.metadata_props[:]
        node.doc_string = ""
        if layers and layers[-1]:
            node.metadata_props.add(key=LAYER, value=layers[-1])
    for one in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del one.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
