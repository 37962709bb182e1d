"""Nothing is called exported before its outputs were compared with PyTorch's on real inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TOLERANCE = 1e-4
"""Largest error allowed, relative to the largest output."""


@dataclass(frozen=True)
class Comparison:
    """How an exported classifier or regressor compares with the PyTorch model."""

    inputs: int
    max_error: float
    """Largest absolute difference."""
    max_relative_error: float
    """The same over the largest absolute output."""
    decision_agreement: float
    """Share of equal argmaxes over the last dimension."""
    milliseconds: float
    """Median CPU time of the exported model per batch, one thread."""
    torch_milliseconds: float
    """The same for PyTorch eager."""
    file_bytes: int

    @property
    def passed(self) -> bool:
        """Whether the error is within tolerance."""
        return self.max_relative_error <= TOLERANCE

    def scalars(self) -> dict[str, float]:
        """Figures by flat name."""
        return {
            "inputs": float(self.inputs),
            "max_error": self.max_error,
            "max_relative_error": self.max_relative_error,
            "decision_agreement": self.decision_agreement,
            "onnx_milliseconds_per_batch": self.milliseconds,
            "torch_milliseconds_per_batch": self.torch_milliseconds,
            "file_bytes": float(self.file_bytes),
        }


def open_session(path: str | Path) -> InferenceSession:
    """A file in onnxruntime, on the CPU and one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare_onnx(model: nn.Module, path: Path, batches: Iterable[Tensor]) -> Comparison:
    """Run the file in onnxruntime and the model in PyTorch on the same inputs.

    Args:
        model: on the CPU, in eval mode.
        path: the ONNX file.
        batches: real inputs.
    """
    session = open_session(path)
    name = session.get_inputs()[0].name
    errors, scales, agree, decisions, count = [], [], 0, 0, 0
    times: dict[str, list[float]] = {"onnx": [], "torch": []}
    for batch in batches:
        started = time.process_time()
        ours = session.run(None, {name: batch.numpy()})[0]
        times["onnx"].append(time.process_time() - started)
        started = time.process_time()
        with torch.no_grad():
            expected = model(batch).numpy()
        times["torch"].append(time.process_time() - started)
        errors.append(float(np.abs(ours - expected).max()))
        scales.append(float(np.abs(expected).max()))
        same = ours.argmax(-1) == expected.argmax(-1)
        agree, decisions = agree + int(same.sum()), decisions + same.size
        count += len(batch)
    worst = float(np.max(errors))  # of numpy, which lets NaN win
    return Comparison(
        count,
        worst,
        worst / max(*scales, 1e-12),
        agree / decisions,
        1e3 * float(np.median(times["onnx"])),
        1e3 * float(np.median(times["torch"])),
        path.stat().st_size,
    )
