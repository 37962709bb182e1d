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


def compare_onnx(model: nn.Module, path: Path, batches: Iterable[Tensor], axis: int = -1) -> Comparison:
    """Run the file in onnxruntime and the model in PyTorch on the same inputs.

    Args:
        model: on the CPU, in eval mode; gives a tensor, or a tuple of as many as the file has outputs.
        path: the ONNX file.
        batches: real inputs.
        axis: of every output, over which the largest value decides; outputs of length 1 there decide nothing.
    """
    session = open_session(path)
    name = session.get_inputs()[0].name
    outputs = len(session.get_outputs())
    errors, scales = np.zeros(outputs), np.full(outputs, 1e-12)
    agree, decisions, count = 0, 0, 0
    times: dict[str, list[float]] = {"onnx": [], "torch": []}
    for batch in batches:
        started = time.process_time()
        ours = session.run(None, {name: batch.numpy()})
        times["onnx"].append(time.process_time() - started)
        started = time.process_time()
        with torch.no_grad():
            expected = model(batch)
        times["torch"].append(time.process_time() - started)
        expected = [each.numpy() for each in ((expected,) if isinstance(expected, Tensor) else expected)]
        # of numpy, whose maximum lets NaN win
        errors = np.maximum(errors, [np.abs(a - b).max() for a, b in zip(ours, expected, strict=True)])
        scales = np.maximum(scales, [np.abs(each).max() for each in expected])
        for a, b in zip(ours, expected, strict=True):
            if b.shape[axis] > 1:
                same = a.argmax(axis) == b.argmax(axis)
                agree, decisions = agree + int(same.sum()), decisions + same.size
        count += len(batch)
    return Comparison(
        count,
        float(errors.max()),
        float((errors / scales).max()),
        agree / decisions if decisions else 1.0,
        1e3 * float(np.median(times["onnx"])),
        1e3 * float(np.median(times["torch"])),
        path.stat().st_size,
    )
