"""The folder for the accelerator: raw tensors, stacked tensors, golden activations, a report in JSON and a README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from export.edge_moe.check import Golden, pixels_of
from export.edge_moe.layout import GOLDEN, Tensors, stacked
from export.edge_moe.schedule import Trace
from moecore.files import atomic_folder

REPORT = "edge_moe.json"
README = """# {title}

For the published accelerator of M³ViT (Edge-MoE, arXiv 2305.18691): its files, and what they were checked for.

| files | what |
|---|---|
| `*.float32.bin` | tensors, raw float32 in C order, little-endian; shapes, types and ranges in `{report}` |
| `image.float32.bin` | the golden image, 3 x 128 x 256, bytes / 256; no mean or std, they are in the patch embedding |
| `{golden}.float32.bin` | 129 x 192, what the testbench compares: task {first}, mean squared error at most {limit} |
| `onboard/*.npy` | the same tensors stacked over layers; the first index of `moe_w_gate_per_task` is the task |
| `golden/task*/l*_x_post_*` | the residual stream behind each half of each layer |
| `golden/task*/l*_queue_*` | tokens and scores of each expert, one behind the other; `offset` says where each begins |
| `{report}` | constants, types, ranges, headroom in bits, queues, simulated fixed point, what was assumed |

Tasks, by the number in the names: {tasks}.{scaled}

Compared with the PyTorch model over {runs} runs: largest error {error:.1e} of the output's range. In simulated fixed
point, mean squared error of `{golden}`:

| task | mean squared error | (token, expert) pairs that agree |
|---|---|---|
{rows}

Not in the accelerator, and not here: the decoders of the tasks. They read the patch tokens, rows 1 to 128, on the host.

Assumed, as nothing published says it:

{assumed}
"""


@dataclass(frozen=True)
class Contents:
    """What a folder holds."""

    tensors: Tensors
    image: Tensor
    """uint8 `[3, H, W]`."""
    goldens: Mapping[str, Golden]
    first: str
    """The task that the testbench looks at."""
    report: Mapping[str, Any]


def write_folder(path: Path, contents: Contents) -> tuple[int, int]:
    """Write all files, as a whole or not at all.

    Returns:
        Number of files and their size in bytes.
    """
    with atomic_folder(path) as folder:
        for name, value in contents.tensors.items():
            _write(folder, name, value)
        _write(folder, "image", pixels_of(contents.image))
        _write(folder, GOLDEN, contents.goldens[contents.first].trace.activations[GOLDEN][0])
        (folder / "onboard").mkdir()
        for name, value in stacked(contents.tensors, len(contents.goldens)).items():
            np.save(folder / "onboard" / f"{name}.npy", value)
        for number, golden in enumerate(contents.goldens.values()):
            _write_trace(folder / "golden" / f"task{number}", golden.trace)
        _write_report(folder, contents)
        (folder / "README.md").write_text(_readme(path.name, contents.report), encoding="utf-8")
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return len(sizes), sum(sizes)


def _write(folder: Path, name: str, value: np.ndarray) -> None:
    """Raw and little-endian, behind a name that tells the type: float32 or int32."""
    dtype = np.dtype("<i4" if np.issubdtype(value.dtype, np.integer) else "<f4")
    np.ascontiguousarray(value, dtype).tofile(folder / f"{name}.{dtype.name}.bin")


def _write_trace(folder: Path, trace: Trace) -> None:
    folder.mkdir(parents=True)
    for name, value in trace.activations.items():
        _write(folder, name, value[0])
    for layer, queues in trace.queues.items():
        for part in ("token", "score", "offset"):
            _write(folder, f"l{layer}_queue_{part}", getattr(queues, part))


def _write_report(folder: Path, contents: Contents) -> None:
    """The report, each tensor with its file, its shape and its place among the stacked ones."""
    report, tensors = dict(contents.report), contents.tensors
    places = {name: {"file": f"{name}.float32.bin", "shape": list(tensors[name].shape)} for name in tensors}
    report["tensors"] = {name: places[name] | dict(given) for name, given in contents.report["tensors"].items()}
    (folder / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _readme(title: str, report: Mapping[str, Any]) -> str:
    rows = [
        f"| {task} | {each['mse'][GOLDEN]:.2e} | {100 * each['routing_agreement']:.1f}% |"
        for task, each in report["fixed_point"].items()
    ]
    scale = report["output_scale"]
    scaled = f" Outputs are {scale:g} times the model's; divide by it before the decoders." * (scale != 1)
    return README.format(
        title=title,
        report=REPORT,
        golden=GOLDEN,
        first=report["golden_task"],
        limit=report["fixed_point"][report["golden_task"]]["mse_limit"],
        tasks=", ".join(f"{number} {task}" for number, task in enumerate(report["tasks"])),
        scaled=scaled,
        runs=report["comparison"]["runs"],
        error=report["comparison"]["max_relative_error"],
        rows="\n".join(rows),
        assumed="\n".join(f"- {line}" for line in report["assumed"]),
    )
