"""A folder with all that an FPGA flow needs: C++, weights, golden values of every layer, testbench, manifest."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from export.errors import ExportError
from export.fpga.emit import FUNCTION, TEMPLATES, file_codes, sources
from export.fpga.manifest import checksum, describe
from export.fpga.memory import STORES, Blob, blobs
from export.fpga.program import Layer, Program, Store
from export.fpga.simulate import encode, simulate
from moecore.files import atomic_folder

SECONDS = 900
"""A testbench that takes longer than this hangs."""


def write_bundle(
    program: Program,
    golden: Sequence[Mapping[str, np.ndarray]],
    folder: Path,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write a bundle, whole or not at all; one that stands there is replaced.

    Args:
        program: compiled.
        golden: inputs whose every intermediate value is written, for each task.
        folder: to make.
        metadata: plain data for the manifest.

    Returns:
        Figures: layers, multiply-adds, bytes of weights, overflows on the golden inputs.
    """
    with atomic_folder(folder) as made:
        return _write(program, golden, made, dict(metadata or {}))


def _write(
    program: Program, golden: Sequence[Mapping[str, np.ndarray]], folder: Path, metadata: dict[str, Any]
) -> dict[str, float]:
    memory = blobs(program)
    for name, text in sources(program, memory).items():
        _put(folder / name, text.encode())
    _write_weights(program, memory, folder / "weights")
    overflows = _Golden(program, folder / "golden").write(golden)
    manifest = {"metadata": metadata, **describe(program, memory), "golden_overflows": overflows}
    figures = {
        "layers": float(len(program.layers)),
        "multiply_adds": float(program.macs),
        "weight_bytes": float(sum(len(blob.bytes()) for blob in memory.values())),
        "golden_overflows": float(sum(overflows.values())),
    }
    for name, text in _guides(program, manifest).items():
        _put(folder / name, text.encode())
    data = sorted(path for part in ("weights", "golden") for path in (folder / part).rglob("*") if path.is_file())
    sums = (f"{checksum(path.read_bytes())}  {path.relative_to(folder)}\n" for path in data)
    _put(folder / "SHA256SUMS", "".join(sums).encode())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {str(path.relative_to(folder)): checksum(path.read_bytes()) for path in files}
    _put(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return figures


def _put(path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def _write_weights(program: Program, memory: dict[Store, Blob], folder: Path) -> None:
    for store in STORES:
        _put(folder / f"{store}.bin", memory[store].bytes())
    tables = [constant.codes.reshape(-1) for constant in program.constants.values() if constant.store == "tables"]
    whole = np.concatenate(tables) if tables else np.zeros(0, np.int64)
    _put(folder / "tables.bin", whole.astype("<i8").tobytes())


class _Golden:
    """Golden values as files, and the index that the testbench reads."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.lines: list[str] = []
        self.numbers = {layer.outputs[0]: number for number, layer in enumerate(program.layers)}
        self.overflows: dict[str, int] = {}

    def write(self, golden: Sequence[Mapping[str, np.ndarray]]) -> dict[str, int]:
        """All runs; returns how many results did not fit, by tensor."""
        for task, name in enumerate(self.program.tasks):
            for number, inputs in enumerate(golden):
                self._run(inputs, task, f"run_{number}" + (f"_{name}" if name else ""))
        _put(self.folder / "index.txt", "\n".join([*self.lines, ""]).encode())
        return self.overflows

    def _run(self, inputs: Mapping[str, np.ndarray], task: int, run: str) -> None:
        self.lines.append(f"case {task} {run}")
        for number, name in enumerate(self.program.inputs):
            codes, _ = encode(self.program, name, inputs)
            self._add("input", number, 0, 0, codes, f"{run}/input_{number}.bin", "input", name)

        def watch(layer: Layer, results: list[np.ndarray], lost: int) -> None:
            number = self.numbers[layer.outputs[0]]
            for part, (codes, name) in enumerate(zip(results, layer.outputs, strict=True)):
                file = f"{run}/layer_{number:04d}_{part}.bin"
                self._add("layer", number, part, lost if part == 0 else 0, codes, file, layer.op.kind, name)

        found = simulate(self.program, inputs, task, watch)
        for name, count in found.overflows.items():
            self.overflows[name] = self.overflows.get(name, 0) + count
        for number, (name, tensor) in enumerate(self.program.outputs.items()):
            codes = self.program.format(tensor).encode(found.outputs[name])
            self._add("output", number, 0, 0, codes, f"{run}/output_{number}.bin", "output", name)

    def _add(
        self, kind: str, number: int, part: int, lost: int, codes: np.ndarray, file: str, op: str, name: str
    ) -> None:
        _put(self.folder / file, file_codes(codes))
        shown = " ".join(name.split())
        self.lines.append(f"{kind} {number} {part} {codes.size} {lost} golden/{file} {op} {shown}")


def _guides(program: Program, manifest: dict[str, Any]) -> dict[str, str]:
    """README and synthesis script."""
    settings = program.settings
    values = {
        "function": FUNCTION,
        "layers": len(program.layers),
        "macs": f"{program.macs:,}",
        "weight_width": settings.weight_width,
        "activation_width": settings.activation_width,
        "overflow": settings.overflow,
        "inputs": _port_lines(manifest["inputs"]),
        "outputs": _port_lines(manifest["outputs"]),
        "tasks": "\n".join(f"- `{number}`: {name}" for number, name in enumerate(program.tasks) if name) or "One.",
    }
    return {
        name: Template((TEMPLATES / name).read_text()).substitute(values) for name in ("README.md", "vitis_hls.tcl")
    }


def _port_lines(ports: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"- `{port['name']}`: {port['shape']}, {port['width']} bits, {port['integer']} of them before the binary point"
        for port in ports
    )


def run_bundle(folder: Path) -> str:
    """Build the testbench with the host's C++ compiler and run it on the golden values.

    Args:
        folder: of the bundle.

    Returns:
        What it printed.

    Raises:
        ExportError: if it does not build, or a value differs; with the line that says so.
    """
    if shutil.which("make") is None:
        raise ExportError(
            "fpga: no make found; install make and a C++14 compiler (g++), or build the testbench elsewhere"
        )
    try:
        done = subprocess.run(
            ["make", "--no-print-directory", "-C", str(folder), "run"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{folder}: the testbench did not end within {SECONDS} seconds") from error
    finally:
        (folder / "testbench").unlink(missing_ok=True)  # the bundle holds sources
    if done.returncode:
        lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        failing = next((line for line in lines if "FAILED" in line or "error:" in line), lines[-1] if lines else "")
        raise ExportError(f"{folder}: the testbench failed: {failing.strip()}")
    return done.stdout
