"""A program as plain data and files, and back: the manifest says all that a simulator needs beside the numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from export.fpga.formats import Fixed
from export.fpga.memory import STORES, Blob, plan_buffers
from export.fpga.ops import OPS
from export.fpga.ops.experts import Experts
from export.fpga.program import Constant, FixedSettings, Layer, Program, Store, Tensor, View

VERSION = 1
"""Of the manifest's layout."""
RULES = {
    "codes": "two's complement; value = code * 2^-(width - integer)",
    "rounding": "half up: add half of the last bit kept, then shift right arithmetically",
    "ties": "of equal scores the one with the lower index is chosen",
    "division": "floor(a / b + 1/2)",
}
SCHEDULE = (
    "all tokens are gated, then queued by expert in their order; experts without tokens are skipped; the weights of "
    "each other expert are loaded once, into one of two buffers, while the one before works; outputs are weighted and "
    "summed per token"
)


def describe(program: Program, memory: dict[Store, Blob]) -> dict[str, Any]:
    """The manifest, without the files' checksums."""
    places = {
        constant.name: memory[constant.store].offsets.get(constant.name, 0) if constant.store in STORES else None
        for constant in program.constants.values()
    }
    return {
        "version": VERSION,
        "settings": dataclasses.asdict(program.settings),
        "rules": RULES | {"overflow": f"{program.settings.overflow}, counted for each layer"},
        "tasks": list(program.tasks),
        "inputs": [_port(program, name, tensor) for name, tensor in program.inputs.items()],
        "outputs": [_port(program, name, tensor) for name, tensor in program.outputs.items()],
        "layers": [_layer(program, number, layer) for number, layer in enumerate(program.layers)],
        "tensors": {name: _tensor(tensor) for name, tensor in program.tensors.items()},
        "views": {name: dataclasses.asdict(view) for name, view in program.views.items()},
        "constants": {
            constant.name: {
                "store": constant.store,
                "offset": places[constant.name],
                "size": constant.size,
                "variants": constant.variants,
                "width": constant.format.width,
                "integer": constant.format.integer,
            }
            for constant in program.constants.values()
        },
        "memory": {
            **{store: {"width": blob.width, "bytes": len(blob.bytes())} for store, blob in memory.items()},
            "buffer_bits": plan_buffers(program).bits,
        },
    }


def _port(program: Program, name: str, tensor: str) -> dict[str, Any]:
    form = program.format(tensor)
    return {
        "name": name,
        "tensor": tensor,
        "shape": list(program.shapes[name]),
        "width": form.width,
        "integer": form.integer,
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "width": tensor.format.width,
        "integer": tensor.format.integer,
        "low": tensor.low,
        "high": tensor.high,
    }


def _layer(program: Program, number: int, layer: Layer) -> dict[str, Any]:
    held = [
        program.constants[base] for base in {program.resolve(name)[0] for name in layer.inputs} & {*program.constants}
    ]
    weights = [constant for constant in held if constant.store == "weights"]
    described = {
        "number": number,
        "op": layer.op.kind,
        "name": layer.name,
        "module": layer.origin,
        "inputs": list(layer.inputs),
        "outputs": list(layer.outputs),
        "dims": layer.op.dims,
        "macs": layer.op.macs,
        "weight_bytes": sum(constant.size * constant.format.width for constant in weights) // 8,
        "parameters": layer.op.parameters(),
    }
    return described | ({"schedule": SCHEDULE} if isinstance(layer.op, Experts) else {})


def load(folder: Path) -> Program:
    """The program of a bundle.

    Raises:
        ExportError: if a file is missing, changed, or of another version.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder}: no readable manifest.json ({error}); write the bundle anew") from error
    if manifest.get("version") != VERSION:
        raise ExportError(
            f"{folder}: manifest of version {manifest.get('version')}, not {VERSION}; write the bundle anew"
        )
    program = Program(FixedSettings(**manifest["settings"]), tuple(manifest["tasks"]))
    program.views = {name: View(**view) for name, view in manifest["views"].items()}
    for name, held in manifest["tensors"].items():
        form = Fixed(held["width"], held["integer"])
        program.tensors[name] = Tensor(name, tuple(held["shape"]), form, held["low"], held["high"])
    for layer in manifest["layers"]:
        op = OPS[layer["op"]].load(layer["parameters"])
        program.layers.append(
            Layer(layer["name"], op, tuple(layer["inputs"]), tuple(layer["outputs"]), layer["module"])
        )
    program.inputs = {port["name"]: port["tensor"] for port in manifest["inputs"]}
    program.outputs = {port["name"]: port["tensor"] for port in manifest["outputs"]}
    program.shapes = {port["name"]: tuple(port["shape"]) for port in (*manifest["inputs"], *manifest["outputs"])}
    program.constants = _constants(folder, manifest)
    return program


def _constants(folder: Path, manifest: dict[str, Any]) -> dict[str, Constant]:
    memory = manifest["memory"]
    codes = {"tables": _numbers(folder, manifest, "weights/tables.bin", np.dtype("<i8"))}
    for store in STORES:
        codes[store] = _numbers(folder, manifest, f"weights/{store}.bin", Blob(memory[store]["width"]).dtype)
    found, start = {}, 0
    for name, held in manifest["constants"].items():
        count = held["size"] * held["variants"]
        offset = held["offset"]
        if offset is None:  # tables follow each other
            offset, start = start, start + count
        values = codes[held["store"]][offset : offset + count].reshape(held["variants"], -1)
        found[name] = Constant(name, values, Fixed(held["width"], held["integer"]), held["store"])
    return found


def _numbers(folder: Path, manifest: dict[str, Any], name: str, dtype: np.dtype) -> np.ndarray:
    try:
        raw = (folder / name).read_bytes()
    except OSError as error:
        raise ExportError(f"{folder / name}: {error.strerror}; write the bundle anew") from error
    if checksum(raw) != manifest["files"][name]:
        raise ExportError(f"{folder / name}: not the file that manifest.json describes; write the bundle anew")
    return np.frombuffer(raw, dtype).astype(np.int64)


def checksum(raw: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(raw).hexdigest()
