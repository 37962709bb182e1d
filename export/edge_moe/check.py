"""What is measured before a folder is kept: floats against the model, fixed point against floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from export.edge_moe.arithmetic import FixedPoint, Floats
from export.edge_moe.fixed import PIXEL, Fixed
from export.edge_moe.layout import GOLDEN, Tensors
from export.edge_moe.schedule import Queues, Trace, run
from export.errors import ExportError
from export.verify import TOLERANCE

MSE_LIMIT = 0.1
"""Of the last activation, in the published testbench."""
NEAR_TIE = 1e-6
"""Probabilities so close that the rounding of floats decides which expert is chosen."""
BATCH = 8

ASSUMED = (
    "pos_embed and patch_embed_bias are held in ap_fixed<16,5>",
    "sums of products, mean, variance, root and quotients are wide enough to lose nothing before they are assigned",
    "softmax is that of the formula; the accelerator's single-pass form may differ in the last digits",
    "the table of ReLU minus GELU has the value at the lower end of each step, up to 8",
    "of equal probabilities the expert of the lower number is chosen",
    "stacked .npy files are float32; all their names but moe_w_gate_per_task are ours",
    "the first task is the one whose golden activation the testbench compares, unless another was asked for",
)
"""What nothing published says; the simulation and the names of files rest on it."""

Outputs = Callable[[Tensor, int], Tensor]
"""(images uint8 [B, 3, H, W], number of the task) -> the model's last tokens [B, N, D]."""


def pixels_of(images: Tensor) -> np.ndarray:
    """Bytes -> what the kernel sees, bytes / 256, float32."""
    return (images.numpy() * PIXEL.step).astype(np.float32)


@dataclass(frozen=True)
class Calibration:
    """How the tensors, run as floats, compare with the model."""

    ranges: dict[str, tuple[float, float]]
    """Of the activations."""
    runs: int
    """Runs compared, one for each image and task."""
    near_ties: int
    """Runs left out, as the rounding of floats decides an expert."""
    max_relative_error: float
    """Largest difference over the largest output."""


def calibrate(tensors: Tensors, images: Tensor, tasks: int, outputs: Outputs, scale: float) -> Calibration:
    """Run the schedule in floats on all images and tasks, note the ranges, and compare the end with the model's.

    Args:
        tensors: of the accelerator.
        images: uint8 `[B, 3, H, W]`.
        tasks: how many.
        outputs: of the model.
        scale: by which the tensors' output is to differ from the model's.
    """
    numbers, error, largest, compared, ties = Floats(tensors), 0.0, 1e-12, 0, 0
    for task, batch in _batches(images, tasks):
        trace = run(numbers, pixels_of(batch), task)
        with torch.no_grad():
            expected = outputs(batch, task).detach().cpu().numpy() * scale
        clear = trace.gap > NEAR_TIE  # [B]
        differences = np.abs(trace.activations[GOLDEN] - expected)[clear]
        error = float(np.maximum(error, differences.max(initial=0)))  # of numpy, whose maximum lets nan win
        largest = float(np.maximum(largest, np.abs(expected).max()))
        compared, ties = compared + int(clear.sum()), ties + int((~clear).sum())
    return Calibration(numbers.ranges, compared, ties, error / largest)


def require_agreement(calibration: Calibration) -> None:
    """Refuse tensors that do not give the model's outputs.

    Raises:
        ExportError: if they differ by more than the tolerance of all exports, or nothing could be compared.
    """
    runs, error = calibration.runs, calibration.max_relative_error
    if not runs:
        raise ExportError(
            f"images={calibration.near_ties}: each has a token between two experts; give more calibration images"
        )
    if not error <= TOLERANCE:
        raise ExportError(
            f"{GOLDEN}: differs from the model's output by {error:.2g} of its range, more than {TOLERANCE}; "
            "no file was kept"
        )


def _batches(images: Tensor, tasks: int) -> Iterator[tuple[int, Tensor]]:
    for task in range(tasks):
        for batch in images.split(BATCH):
            yield task, batch


@dataclass(frozen=True)
class Golden:
    """One image of one task: what the accelerator is to give, and what simulated fixed point gives."""

    trace: Trace
    """In floats."""
    mse: dict[str, float]
    """Activation -> mean squared difference of fixed point from floats."""
    routing_agreement: float
    """Share of (token, expert) pairs that fixed point chooses too, over all layers."""


def golden(tensors: Tensors, formats: Mapping[str, Fixed], image: Tensor, tasks: tuple[str, ...]) -> dict[str, Golden]:
    """Golden activations of an image `[1, 3, H, W]` for every task, compared with simulated fixed point.

    Raises:
        ExportError: if the simulated accelerator wraps around or misses the limit of the published testbench.
    """
    pixels, floats, fixed = pixels_of(image), Floats(tensors), FixedPoint(tensors, formats)
    found = {}
    for number, task in enumerate(tasks):
        trace, simulated = run(floats, pixels, number), run(fixed, pixels, number)
        pairs = zip(trace.activations.items(), simulated.activations.values(), strict=True)
        mse = {name: float(np.square(ours - theirs).mean()) for (name, ours), theirs in pairs}
        found[task] = Golden(trace, mse, _agreement(trace.queues, simulated.queues))
        _require_fixed_point(task, mse, fixed.wrapped)
    return found


def _agreement(ours: dict[int, Queues], theirs: dict[int, Queues]) -> float:
    shares = [len(np.intersect1d(_pairs(ours[i]), _pairs(theirs[i]))) / len(ours[i].token) for i in ours]
    return float(np.mean(shares))


def _pairs(queues: Queues) -> np.ndarray:
    """A number for each (token, expert) pair."""
    experts = len(queues.offset) - 1
    return queues.token * experts + np.repeat(np.arange(experts), np.diff(queues.offset))


def _require_fixed_point(task: str, mse: dict[str, float], wrapped: dict[str, int]) -> None:
    if wrapped:
        name, count = next(iter(wrapped.items()))
        raise ExportError(f"{name}: {count} values of task {task} wrap around in simulated fixed point; scale it down")
    if not mse[GOLDEN] <= MSE_LIMIT:
        first = next((name for name, value in mse.items() if not value <= MSE_LIMIT), GOLDEN)
        raise ExportError(
            f"{GOLDEN}: mean squared error {mse[GOLDEN]:.3g} of task {task} in simulated fixed point, above the "
            f"testbench's limit of {MSE_LIMIT} from {first} on; train with more weight decay, or export as fpga"
        )
