"""A program run in NumPy int64: the same bits as its C++, a whole image in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from export.errors import ExportError
from export.fpga.program import Layer, Program

Watch = Callable[[Layer, list[np.ndarray], int], None]
"""Called after each layer with the codes of its outputs, flat, and how many results did not fit."""


@dataclass
class Simulation:
    """What one run gave."""

    outputs: dict[str, np.ndarray]
    """Values, float64, by the names of the model."""
    overflows: dict[str, int]
    """How many results did not fit, by tensor; those without any are left out."""


def simulate(
    program: Program, inputs: Mapping[str, np.ndarray], task: int = 0, watch: Watch | None = None
) -> Simulation:
    """Run a program.

    Args:
        program: compiled or loaded.
        inputs: values by the names of the model.
        task: number of the task whose constants apply.
        watch: see `Watch`.

    Raises:
        ExportError: for an input that is missing, of another shape, or not finite.
    """
    overflows: dict[str, int] = {}
    codes: dict[str, np.ndarray] = {}
    for name, tensor in program.inputs.items():
        codes[tensor], overflows[tensor] = encode(program, name, inputs)

    def read(name: str) -> np.ndarray:
        base, offset = program.resolve(name)
        if base in codes:
            held = codes[base]
        else:
            variants = program.constants[base].codes
            held = variants[task if len(variants) > 1 else 0]
        return held[offset : offset + program.size(name)]

    unread = program.last_uses()
    for number, layer in enumerate(program.layers):
        results, lost = layer.op.run(*map(read, layer.inputs))
        results = [np.ascontiguousarray(result).reshape(-1) for result in results]
        codes |= dict(zip(layer.outputs, results, strict=True))
        overflows[layer.outputs[0]] = lost
        if watch is not None:
            watch(layer, results, lost)
        for name in unread.get(number, ()):
            del codes[name]
    outputs = {
        name: program.format(tensor).decode(read(tensor)).reshape(program.shapes[name])
        for name, tensor in program.outputs.items()
    }
    return Simulation(outputs, {name: count for name, count in overflows.items() if count})


def encode(program: Program, name: str, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """Codes of an input, flat, and how many of its values lie outside its format.

    Raises:
        ExportError: for one that is missing, of another shape, or not finite.
    """
    if name not in inputs:
        raise ExportError(f"inputs: no {name!r}; give {', '.join(program.inputs)}")
    values = np.asarray(inputs[name])
    if values.shape != program.shapes[name]:
        raise ExportError(f"{name}: has shape {list(values.shape)}, not {list(program.shapes[name])}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ExportError(f"{name}: holds missing or infinite values; fixed point has none, fill them")
    form = program.tensors[program.inputs[name]].format
    return form.encode(values).reshape(-1), form.overflows(values)
